"""What every test gets, and checkpoints and stores that several tests share."""

import os
from collections.abc import Callable
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported: no test asks the hub
os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is: tests run side by side; those of threads ask for theirs
if not Path("/dev/nvidiactl").exists():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is: without a GPU its kernels run on the CPU, interpreted

import opt_family
import pytest
from filelock import FileLock

import sparseflow

MakeFolder = Callable[[str, str], Path]


@pytest.fixture(autouse=True)
def sparseflow_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty place of its own for what a test converts."""
    home = tmp_path_factory.mktemp("sparseflow-home")
    monkeypatch.setenv("SPARSEFLOW_HOME", str(home))
    return home


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """The trained checkpoint that comes with the package."""
    return Path(sparseflow.__file__).parent / "assets" / "demo_model"


@pytest.fixture(scope="session")
def family_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> MakeFolder:
    """(member, dtype) -> its checkpoint, made once. To be read only; copy what you want to change."""
    made: dict[tuple[str, str], Path] = {}

    def checkpoint(name: str, dtype: str = "float32") -> Path:
        if (name, dtype) not in made:
            folder = tmp_path_factory.mktemp("checkpoint") / name
            opt_family.make(name, folder, opt_family.DTYPES[dtype])
            made[name, dtype] = folder
        return made[name, dtype]

    return checkpoint


@pytest.fixture(scope="session")
def family_store(tmp_path_factory: pytest.TempPathFactory, family_checkpoint: MakeFolder) -> MakeFolder:
    """(member, dtype) -> a store of its checkpoint of that dtype, made once. To be read only, as above."""
    from sparseflow.core.checkpoint import Checkpoint
    from sparseflow.core.converter import convert

    made: dict[tuple[str, str], Path] = {}

    def store(name: str, dtype: str = "float32") -> Path:
        if (name, dtype) not in made:
            destination = tmp_path_factory.mktemp("store") / name
            made[name, dtype] = convert(Checkpoint(family_checkpoint(name, dtype)), destination, quiet=True)
        return made[name, dtype]

    return store


@pytest.fixture(scope="session")
def calibrated_demo_store(tmp_path_factory: pytest.TempPathFactory, demo_model: Path) -> Path:
    """A store of the demo model, calibrated with all predictors kept. To be read only; copy what you want to change."""
    from sparseflow.calibration.calibrate import CalibrationSettings, calibrate
    from sparseflow.core.checkpoint import Checkpoint
    from sparseflow.core.converter import convert

    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # each has a folder in that of the run
        folder = folder.parent
    store, done = folder / "calibrated-demo", folder / "calibrated-demo.done"
    with FileLock(folder / "calibrated-demo.lock", timeout=600):
        if not done.exists():
            convert(Checkpoint(demo_model), store, quiet=True)
            settings = CalibrationSettings(tokens=6144, epochs=1, keeps_all=True)
            calibrate(store, [demo_model / "calibration.txt"], settings)
            done.touch()
    return store
