"""Imports run downward only, and what the torch-free server needs loads without torch."""

import ast
import os
from functools import cache
from pathlib import Path

import pytest
import sparseflow_daemon
from child_process import run_python

import sparseflow

PACKAGE = Path(sparseflow.__file__).parent
DAEMON = Path(sparseflow_daemon.__file__).parent

# A part may import itself, its own row and the rows above it. A new part needs a place here.
LAW = [
    {"assets", "errors"},
    {"protocol"},
    {"store", "utils"},
    {"cuda", "engine"},
    {"core"},
    {"client"},
    {"kernels", "orchestration"},
    {"models"},
    {"bench", "calibration", "doctor", "evaluation", "serving"},
    {"cli", "examples", "__main__"},
]
RANKS = {part: rank for rank, row in enumerate(LAW) for part in row}

# The package's own face: its lazy names come from anywhere, so only people's entry points may import from it.
FACE = "__init__"

TORCH_FREE = ("errors", "protocol", "store", "cuda", "engine")

MODULES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))
DAEMON_MODULES = sorted(path.relative_to(DAEMON).as_posix() for path in DAEMON.rglob("*.py"))

# What the server may import of the package, and those parts that know it is one process of several.
OF_THE_DAEMON = {"errors", "protocol", "store", "utils", "cuda", "engine"}
WITH_THE_CLIENT = {"client", "models", "cli", "examples", "__main__", FACE}


def part_of(module: str) -> str:
    """`store/manifest.py` -> `store`, `errors.py` -> `errors`, `__init__.py` -> `__init__`."""
    return module.split("/")[0].removesuffix(".py")


@cache
def imported_names(source: str, module: str) -> list[str]:
    """Every dotted name that a module imports, at its top, in functions or for type checkers; relative ones resolved.

    `from a import b` gives `a.b`, because `b` may be a module.
    """
    folder = ["sparseflow", *module.split("/")[:-1]]
    names: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = folder[: len(folder) + 1 - node.level] if node.level else []
            base += [node.module] if node.module else []
            names += (".".join([*base, alias.name]) for alias in node.names)
    return names


def imported_parts(source: str, module: str) -> set[str]:
    """Parts of our own that a module imports; `__init__` for a public name of the package.

    `import sparseflow`, for its version, is no import of its names.
    """
    parts = set()
    for name in imported_names(source, module):
        if name.split(".")[0] == "sparseflow" and name != "sparseflow":
            part = [*name.split("."), FACE][1]
            is_ours = (PACKAGE / part).is_dir() or (PACKAGE / f"{part}.py").is_file()
            parts.add(part if is_ours else FACE)
    return parts


def violations(source: str, module: str) -> set[str]:
    """Parts that this module imports against the law."""
    part = part_of(module)
    if part == FACE:
        return set()
    if part == "utils":
        return imported_parts(source, module) - {"utils", "errors"}
    top = len(LAW) - 1
    return {other for other in imported_parts(source, module) if (top if other == FACE else RANKS[other]) > RANKS[part]}


def test_every_part_has_its_place() -> None:
    assert {part_of(module) for module in MODULES} - {FACE} <= set(RANKS)


@pytest.mark.parametrize("module", MODULES)
def test_module_imports_downward_only(module: str) -> None:
    assert violations((PACKAGE / module).read_text(encoding="utf-8"), module) == set()


@pytest.mark.parametrize("module", MODULES)
def test_module_knows_nothing_of_the_daemon(module: str) -> None:
    source = (PACKAGE / module).read_text(encoding="utf-8")
    assert not [name for name in imported_names(source, module) if name.split(".")[0] == "sparseflow_daemon"]


@pytest.mark.parametrize(
    ("source", "module", "expected"),
    [
        ("import sparseflow.core.config", "store/codes.py", {"core"}),
        ("from sparseflow.core import config", "store/codes.py", {"core"}),
        ("from sparseflow import core", "store/codes.py", {"core"}),
        ("from ..core.config import ModelProfile", "store/codes.py", {"core"}),
        ("from .. import models", "kernels/bounds.py", {"models"}),
        ("def f():\n    from sparseflow.models.opt_sparse import X", "core/config.py", {"models"}),
        ("from sparseflow import OffloadStrategy", "core/config.py", {FACE}),
        ("from sparseflow.store.codes import GROUP", "utils/tensor_ops.py", {"store"}),
        ("from sparseflow.utils.tensor_ops import GIB", "store/codes.py", set()),
        ("from . import codes", "store/manifest.py", set()),
        ("from sparseflow import OffloadStrategy", "cli/main.py", set()),
        ("import sparseflow", "store/codes.py", set()),
        ("import sparseflow_daemon, torch.nn", "store/codes.py", set()),
    ],
)
def test_the_law_sees_each_way_to_import(source: str, module: str, expected: set[str]) -> None:
    assert violations(source, module) == expected


@pytest.mark.parametrize("module", MODULES)
def test_only_entry_points_and_models_know_the_client(module: str) -> None:
    """What computes sees a weight source, whoever it is."""
    if part_of(module) not in WITH_THE_CLIENT:
        assert "client" not in imported_parts((PACKAGE / module).read_text(encoding="utf-8"), module)


@pytest.mark.parametrize("module", DAEMON_MODULES)
def test_daemon_imports_only_what_needs_no_torch(module: str) -> None:
    names = {
        name for name in imported_names((DAEMON / module).read_text(encoding="utf-8"), module) if name != "sparseflow"
    }
    parts = {name.split(".")[1] for name in names if name.split(".")[0] == "sparseflow"}
    assert parts <= OF_THE_DAEMON
    assert not {"torch", "transformers", "safetensors"} & {name.split(".")[0] for name in names}


def test_torch_free_parts_load_without_torch() -> None:
    names = ["sparseflow"]
    for module in MODULES:
        if part_of(module) in TORCH_FREE:
            names.append("sparseflow." + module.removesuffix(".py").removesuffix("/__init__").replace("/", "."))
    assert {"sparseflow.errors", "sparseflow.cuda.driver", "sparseflow.engine.resident"} <= set(names)
    code = "\n".join([*(f"import {name}" for name in names), "import sys", "assert 'torch' not in sys.modules"])
    run_python(code)


def test_daemon_loads_without_torch_numba_and_transformers() -> None:
    names = ["sparseflow_daemon." + module.removesuffix(".py").replace("/", ".") for module in DAEMON_MODULES]
    assert {"sparseflow_daemon.server", "sparseflow_daemon.gpu.child", "sparseflow_daemon.__main__"} <= set(names)
    heavy = "{'torch', 'numba', 'transformers'}"
    code = "\n".join([*(f"import {name}" for name in names), "import sys", f"assert not {heavy} & set(sys.modules)"])
    run_python(code, PYTHONPATH=os.pathsep.join([str(PACKAGE.parent), str(DAEMON.parent)]))
