"""A model that has a chat template, and an API server of it that tests share."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from api_server import CHAT_TEMPLATE, ApiServer


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
