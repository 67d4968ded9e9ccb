"""Builds `cuda/stub_driver.c`: a CUDA driver without a GPU, for what must go through libcuda's own calls."""

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent / "cuda" / "stub_driver.c"


def build(folder: Path) -> Path:
    """Skips the test where there is no C compiler."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler (cc) for the stub of CUDA's driver")
    command = [compiler, "-shared", "-fPIC", "-Wall", "-Werror", "-O1", "-o", folder / "libcuda.so.1", SOURCE]
    subprocess.run(command, check=True, timeout=60)
    return folder


@contextmanager
def shared_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Have processes find the stub, and a short place for what they share, which is empty again at the end."""
    with tempfile.TemporaryDirectory(prefix="sf-") as shared:
        monkeypatch.setenv("STUB_FOLDER", shared)
        monkeypatch.setenv("LD_LIBRARY_PATH", str(folder))
        yield
        assert list(Path(shared).iterdir()) == []
