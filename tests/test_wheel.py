"""The wheel: what is in it, and that it works where the checkout is not."""

import email
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

import sparseflow

ROOT = Path(__file__).parents[1]
PACKAGES = {"sparseflow": ROOT / "sparseflow", "sparseflow_daemon": ROOT / "daemon" / "sparseflow_daemon"}
DIST_INFO = f"sparseflow-{sparseflow.__version__}.dist-info"


def run(*command: object, timeout_s: float = 240, **variables: str) -> str:
    """What a command prints; in a folder and an environment that say nothing of where Python looks."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    words = [*map(str, command)]
    result = subprocess.run(
        words, cwd="/", env=environment | variables, capture_output=True, text=True, timeout=timeout_s, check=False
    )
    assert result.returncode == 0, f"{words}\n{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the sources, with the setuptools that is here."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("sparseflow", "daemon"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, source)
    (built,) = out.iterdir()
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`bin` of an environment with the wheel in it. What it depends on is ours, by a path file.

    Path files in a folder that a path file names are not read, so nothing there leads to the checkout.
    """
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    python = folder / "bin" / "python"
    (own,) = (folder / "lib").glob("python*/site-packages")
    (own / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel)
    return folder / "bin"


def test_every_module_and_nothing_else_is_in_the_wheel(wheel: Path) -> None:
    expected = {
        f"{package}/{path.relative_to(folder).as_posix()}"
        for package, folder in PACKAGES.items()
        for path in folder.rglob("*.py")
    }
    assets = {f"sparseflow/{path.relative_to(ROOT / 'sparseflow').as_posix()}" for path in demo_files()}
    own = {f"{DIST_INFO}/{name}" for name in ("METADATA", "RECORD", "WHEEL", "entry_points.txt", "top_level.txt")}
    found = set(zipfile.ZipFile(wheel).namelist())
    assert found == expected | assets | own | {"sparseflow/py.typed", f"{DIST_INFO}/licenses/LICENSE"}


def demo_files() -> list[Path]:
    assets = ROOT / "sparseflow" / "assets"
    return [*assets.glob("*.md"), *(path for path in (assets / "demo_model").iterdir() if path.is_file())]


def test_metadata_say_what_it_is(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    metadata = email.message_from_bytes(archive.read(f"{DIST_INFO}/METADATA"))
    assert metadata["Name"] == "sparseflow"
    assert metadata["Version"] == sparseflow.__version__
    assert metadata["License-Expression"] == "MIT"
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert str(metadata.get_payload()).strip().startswith("# SparseFlow")
    assert "Operating System :: POSIX :: Linux" in metadata.get_all("Classifier", [])
    scripts = archive.read(f"{DIST_INFO}/entry_points.txt").decode()
    assert re.findall(r"^([\w-]+) =", scripts, re.MULTILINE) == ["sparseflow", "sparseflow-daemon"]


def test_installed_package_is_found_and_the_checkout_is_not(installed: Path) -> None:
    code = (
        "import sparseflow, sparseflow_daemon, sys; print(sparseflow.__file__, sparseflow_daemon.__file__, *sys.path)"
    )
    home, of_server, *path = run(installed / "python", "-c", code).split()
    assert Path(home).is_relative_to(installed.parent)
    assert Path(of_server).is_relative_to(installed.parent)
    assert not {str(ROOT), str(ROOT / "daemon")} & set(path)


def test_commands_of_the_installed_package_start(installed: Path) -> None:
    assert run(installed / "sparseflow", "version").strip()
    assert "STORE" in run(installed / "sparseflow-daemon", "--help")
    assert "COMMAND" in run(installed / "python", "-m", "sparseflow", "--help")


@pytest.mark.slow
def test_demo_of_the_installed_package_gives_the_text_of_the_dense_model(installed: Path, tmp_path: Path) -> None:
    """Most of its time goes into kernels, which are compiled anew where the package is installed."""
    result = json.loads(run(installed / "sparseflow", "demo", "--json", SPARSEFLOW_HOME=str(tmp_path)))
    assert result["ok"] is True


@pytest.mark.slow
def test_server_of_the_installed_package_serves_its_client(installed: Path, tmp_path: Path) -> None:
    store, home = tmp_path / "store", str(tmp_path / "home")
    (model,) = installed.parent.glob("lib/python*/site-packages/sparseflow/assets/demo_model")
    variables = {"SPARSEFLOW_HOME": home, "SPARSEFLOW_RUNTIME_DIR": str(tmp_path / "run")}
    run(installed / "sparseflow", "convert", model, store, **variables)
    run(installed / "sparseflow-daemon", store, "--name", "wheel", "--detach", **variables)
    pid = (tmp_path / "run" / "wheel" / "lock").read_text(encoding="ascii")
    try:
        text = run(
            *(installed / "sparseflow", "generate", "--server", "wheel", "--prompt", "In the beginning"),
            *("--max-new-tokens", "8"),
            **variables,
        )
        assert text.strip()
    finally:
        run("kill", pid)
