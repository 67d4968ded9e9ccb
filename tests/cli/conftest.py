"""Models that commands are tried on, and lines that are typed at them."""

import io
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "integration"))

from own_host import demo_store, host, pytest_runtest_makereport

__all__ = ["demo_store", "host", "pytest_runtest_makereport"]

MARKED_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture
def checkpoint(family_checkpoint: Callable[..., Path], demo_model: Path, tmp_path: Path) -> Path:
    """A tiny model with a tokenizer, free to be damaged."""
    folder = Path(shutil.copytree(family_checkpoint("base"), tmp_path / "tiny"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(demo_model / name, folder / name)
    return folder


@pytest.fixture(scope="session")
def chat_store(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model in float32, with a chat template that writes answers as they are. To be read only."""
    from sparseflow.core.checkpoint import Checkpoint
    from sparseflow.core.converter import convert

    folder = tmp_path_factory.mktemp("chat")
    checkpoint = Path(shutil.copytree(demo_model, folder / "checkpoint"))
    settings = json.loads((checkpoint / "tokenizer_config.json").read_text())
    (checkpoint / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": MARKED_TEMPLATE}))
    return convert(Checkpoint(checkpoint), folder / "store", dtype="float32", quiet=True)


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Put lines where standard input is."""

    def put(*lines: str) -> None:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(line + "\n" for line in lines)))

    return put
