"""A host for each test, with a runtime directory of its own, and what is served there: fixtures for conftest files."""

import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from dense_reference import DenseIds, greedy_ids
from processes import RUNTIME_DIR, Host, ServerProcess
from raw_peers import RawLine, RawSession

from sparseflow.protocol.messages import Detach, Detached

sys.path.append(str(Path(__file__).parents[1] / "engine"))  # shards


_FAILED = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """Whether a test has failed, and beside its failure what its servers have logged."""
    report = yield
    if call.when == "call":
        item.stash[_FAILED] = call.excinfo is not None
        host = item.funcargs.get("host") if isinstance(item, pytest.Function) else None
        if call.excinfo is not None and isinstance(host, Host):
            report.sections += [(f"log of server {server.pid}", server.log()) for server in host.servers]
    return report


@pytest.fixture
def host(
    fork_server: None, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Host]:
    """Servers and clients of one test. Nothing may be left of them, and servers that still run must be well."""
    runtime_dir = Path(tempfile.mkdtemp(prefix="sf-"))  # mode 0700, and short enough for sockets
    monkeypatch.setenv(RUNTIME_DIR, str(runtime_dir))
    logs = tmp_path / "logs"
    logs.mkdir()
    host = Host(runtime_dir, logs)
    try:
        yield host
        if not request.node.stash.get(_FAILED, True):  # else it has said what there is to say
            host.close()
    finally:
        for client in host.clients:
            client.let_go()
        for server in host.servers:
            server.kill()
        shutil.rmtree(runtime_dir)


@pytest.fixture(scope="session")
def demo_store(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model in float32. To be read only."""
    from sparseflow.core.checkpoint import Checkpoint
    from sparseflow.core.converter import convert

    destination = tmp_path_factory.mktemp("demo-store") / "store"
    return convert(Checkpoint(demo_model), destination, dtype="float32", quiet=True)


@pytest.fixture(scope="session")
def dense_ids(demo_model: Path) -> DenseIds:
    """(prompt, n_tokens) -> prompt and greedy continuation by transformers' dense model of the demo checkpoint."""
    import torch
    from transformers import OPTForCausalLM

    dense = OPTForCausalLM.from_pretrained(demo_model, dtype=torch.float32).eval()
    return lambda prompt, n_tokens: greedy_ids(dense, prompt, n_tokens)


@pytest.fixture
def session(server: ServerProcess) -> Iterator[RawSession]:
    """With a server of the test's own; it says goodbye."""
    with RawSession() as session:
        yield session
        session.send(Detach())
        assert session.receive() == Detached(session.welcome.epoch)


@pytest.fixture
def line(session: RawSession) -> Iterator[RawLine]:
    """Of that session."""
    with RawLine(session) as line:
        yield line
