"""What every test gets; checkpoints, stores, processes and a CUDA driver without a GPU that several tests share."""

import gc
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported: no test asks the hub
os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is: tests run side by side; those of threads ask for theirs
if not Path("/dev/nvidiactl").exists():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is: without a GPU its kernels run on the CPU, interpreted

import pytest
import stub_library
from filelock import FileLock
from forked_program import start_servers

import sparseflow

# A suite in the background was told to ignore Ctrl-C; what it starts shall not.
signal.signal(signal.SIGINT, signal.default_int_handler)

MakeFolder = Callable[[str, str], Path]


@pytest.fixture(scope="session", autouse=True)
def imported_for_good() -> Iterator[None]:
    """Whoever collects garbage goes through what tests have made: through all imports it takes a fifth of a second."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def sparseflow_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty place of its own for what a test converts."""
    home = tmp_path_factory.mktemp("sparseflow-home")
    monkeypatch.setenv("SPARSEFLOW_HOME", str(home))
    return home


@pytest.fixture(scope="session")
def fork_server() -> None:
    """Started before any test's variables are set, or it would count as left by that test."""
    start_servers()


@pytest.fixture(scope="session")
def stub_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a libcuda.so.1 that needs no GPU."""
    return stub_library.build(tmp_path_factory.mktemp("stub"))


@pytest.fixture
def stub(stub_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """That library, for processes that are started; they share memory through a folder, empty again at the end."""
    with stub_library.shared_memory(stub_folder, monkeypatch):
        yield stub_folder / "libcuda.so.1"


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """The trained checkpoint that comes with the package."""
    return Path(sparseflow.__file__).parent / "assets" / "demo_model"


@pytest.fixture(scope="session")
def family_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> MakeFolder:
    """(member, dtype) -> its checkpoint, made once. To be read only; copy what you want to change."""
    import opt_family  # torch and transformers, which are nothing to who only starts the tests

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
            settings = CalibrationSettings(tokens=4096, epochs=1, keeps_all=True)
            calibrate(store, [demo_model / "calibration.txt"], settings)
            done.touch()
    return store
