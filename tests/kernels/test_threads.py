"""Compiled kernels are found again, and made again when what they are made of changes."""

import shutil
from pathlib import Path

from child_process import run_python

import sparseflow
from sparseflow.kernels import threads

USE = """
import sys
sys.path.insert(0, sys.argv[1])
import numpy as np, torch
from sparseflow.kernels import sparse_mlp
assert sparse_mlp.__file__.startswith(sys.argv[1])
ids = np.arange(3, dtype=np.uint32)
print(sparse_mlp.sparse_mlp(torch.ones(3, 2, 4), ids, ids, torch.zeros(3), torch.zeros(4), torch.ones(1, 4)).y.tolist())
"""


def test_a_change_in_the_intrinsics_is_compiled_in(tmp_path: Path) -> None:
    package = tmp_path / "with a blank" / "sparseflow"
    shutil.copytree(Path(sparseflow.__file__).parent, package, ignore=shutil.ignore_patterns("assets", "__pycache__"))
    intrinsics = package / "kernels" / "intrinsics.py"
    assert run_python(USE, package.parent) == "[[12.0, 12.0, 12.0, 12.0]]\n"
    changed = intrinsics.read_text().replace("    return value\n", "    return builder.fadd(value, value)\n")
    intrinsics.write_text(changed)
    assert run_python(USE, package.parent) == "[[48.0, 48.0, 48.0, 48.0]]\n"


def test_the_runtime_is_the_one_torch_has_loaded() -> None:
    runtimes = threads._loaded_openmp_runtimes()
    assert runtimes
    assert all(Path(path).is_file() for path in runtimes)
