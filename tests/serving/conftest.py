"""A model that has a chat template, and an API server of it that tests share."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from api_server import ApiServer

# A turn is the speaker's name in capitals and what is said, as in the plays that the demo model has read.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() }}\n{{ message['content'] }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT\n{% endif %}"
)


@pytest.fixture(scope="session")
def chat_model(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo checkpoint with a chat template."""
    folder = tmp_path_factory.mktemp("chat") / "chat_model"
    shutil.copytree(demo_model, folder)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def api(chat_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    """Two workers and a weight server; they are shared, so no test may harm them. At the end nothing is left."""
    server = ApiServer(tmp_path_factory.mktemp("api"), chat_model, "--workers", 2)
    try:
        yield server
        assert server.stop() == 0
    finally:
        server.close()
