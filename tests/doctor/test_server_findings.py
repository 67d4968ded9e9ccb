"""What is told of weight servers: living, ill, stopped, dead and foreign; and of the folder of their sockets."""

import os
import signal
import time

import pytest
from looking import by_name
from processes import Host, ServerProcess
from served_shards import ServedShards

import sparseflow
from sparseflow.doctor import servers
from sparseflow.doctor.finding import Finding
from sparseflow.protocol.run_directory import RunDirectory


@pytest.fixture
def server(host: Host, shards: ServedShards) -> ServerProcess:
    """One that is ready."""
    return host.serve(shards.folder)


def told(name: str = "s", version: str = sparseflow.__version__) -> Finding:
    """What is told of a server, by a SparseFlow of that version."""
    return by_name(servers.servers(version))[f"server {name}"]


# --- servers


def test_where_no_server_ever_ran_all_is_ok(host: Host) -> None:
    assert servers.servers(sparseflow.__version__).findings == [
        Finding("servers", "ok", "none runs, and none has left anything")
    ]


def test_server_that_is_ready_is_ok(server: ServerProcess) -> None:
    found = told()
    assert found.verdict == "ok"
    told_of = f"ready, pid {server.pid}, version {sparseflow.__version__}, self-describing"
    assert found.text == f"{told_of}, 0 sessions (at most 8 for each model)"


def test_degraded_server_is_a_problem_with_its_reasons(host: Host, shards: ServedShards) -> None:
    with shards.flipped(1, 5):
        server = host.begin(shards.folder)
        (reason,) = server.wait_for("degraded")["reasons"]
    found = told()
    assert found.verdict == "problem"
    assert found.text.startswith("degraded, ")
    assert reason in found.text
    assert "sparseflow status --server s" in found.remedy
    assert server.end() == 0


def test_what_a_killed_server_left_is_a_warning_that_says_how_to_clear_it(server: ServerProcess) -> None:
    server.kill()
    found = told()
    assert found.verdict == "warning"
    assert f"it was pid {server.pid}" in found.text
    assert found.remedy.endswith(f"rm -r {server.directory}")


def test_every_server_is_told_of_the_dead_among_the_living(host: Host, shards: ServedShards) -> None:
    host.serve(shards.folder, name="a")
    host.serve(shards.folder, name="b").kill()
    assert {finding.name: finding.verdict for finding in servers.servers(sparseflow.__version__).findings} == {
        "server a": "ok",
        "server b": "warning",
    }


def test_stopped_server_is_a_problem_within_the_time_for_an_answer(
    server: ServerProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(servers, "_ANSWER_S", 0.3)
    server.signal(signal.SIGSTOP)
    begin = time.monotonic()
    found = told()
    assert time.monotonic() - begin < 5
    assert found.verdict == "problem"
    assert f"kill -CONT {server.pid}" in found.remedy
    server.signal(signal.SIGCONT)


def test_server_of_another_version_is_a_warning_and_of_another_protocol_a_problem(
    server: ServerProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = told(version="9.9")
    assert found.verdict == "warning"
    assert found.text.endswith("this is 9.9")
    monkeypatch.setattr(servers, "PROTOCOL_VERSION", 999)
    found = told()
    assert found.verdict == "problem"
    assert "this version 999" in found.text
    assert f"kill {server.pid}" in found.remedy


def test_server_that_loads_is_a_note(server: ServerProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    status = server.status() | {"state": "loading"}
    monkeypatch.setattr(servers, "ask_status", lambda *_: status)
    assert told().verdict == "note"


def test_server_that_ends_meanwhile_is_a_note(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers, "folder_names", lambda: ["gone"])
    assert (told("gone").verdict, told("gone").text) == ("note", "has just ended")


def test_folder_that_others_can_enter_is_a_problem(server: ServerProcess) -> None:
    server.directory.chmod(0o755)
    found = told()
    assert found.verdict == "problem"
    assert "mode 0755" in found.text
    server.directory.chmod(0o700)


def test_folder_that_is_no_server_s_is_a_note(host: Host) -> None:
    (host.runtime_dir / "not a name").mkdir()
    found = told("not a name")
    assert found.verdict == "note"
    assert str(host.runtime_dir / "not a name") in found.remedy
    (host.runtime_dir / "not a name").rmdir()


# --- the runtime directory


def test_runtime_directory_of_ours_alone_is_ok(host: Host) -> None:
    found = servers.runtime_directory()
    assert found.verdict == "ok"
    assert found.text == f"{host.runtime_dir}, which only user {os.getuid()} can enter"


@pytest.mark.parametrize("mode", [0o755, 0o777, 0o710])
def test_runtime_directory_of_another_mode_is_a_problem(host: Host, mode: int) -> None:
    host.runtime_dir.chmod(mode)
    found = servers.runtime_directory()
    assert found.verdict == "problem"
    assert f"mode {mode:04o}" in found.text
    assert found.remedy.startswith(f"chmod 700 {host.runtime_dir}, or name another")


def test_runtime_directory_of_another_user_is_a_problem(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    found = servers.runtime_directory()
    assert found.verdict == "problem"
    assert "must be a folder of user 12345" in found.text


@pytest.mark.parametrize(("spare", "verdict"), [(64, "ok"), (63, "note"), (1, "note"), (0, "problem")])
def test_path_is_as_long_as_names_of_servers_allow(
    host: Host, monkeypatch: pytest.MonkeyPatch, spare: int, verdict: str
) -> None:
    """spare: letters that are left for a name."""
    left = 107 - spare - len(os.fsencode(host.runtime_dir / "x" / "" / "attach.sock")) - 1
    folder = host.runtime_dir / ("d" * (left + 1)) if left >= 0 else host.runtime_dir
    monkeypatch.setenv("SPARSEFLOW_RUNTIME_DIR", str(folder))
    found = servers.runtime_directory()
    assert found.verdict == verdict
    if verdict == "note":
        assert f"{spare} letters at most" in found.text
        assert RunDirectory.of("a" * spare).path.parent == folder


def test_runtime_directory_that_is_not_there_yet_is_ok_where_it_can_be_made(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = host.runtime_dir / "not" / "yet"
    monkeypatch.setenv("SPARSEFLOW_RUNTIME_DIR", str(folder))
    found = servers.runtime_directory()
    assert (found.verdict, found.text) == ("ok", f"{folder}, which the first server makes")
    monkeypatch.setattr(servers.os, "access", lambda *_: False)
    found = servers.runtime_directory()
    assert (found.verdict, found.text) == (
        "problem",
        f"{folder} cannot be made: {host.runtime_dir} cannot be written to",
    )
    assert not folder.parent.exists()


def test_runtime_directory_below_a_file_is_a_problem(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    file = host.runtime_dir / "file"
    file.touch()
    monkeypatch.setenv("SPARSEFLOW_RUNTIME_DIR", str(file / "below"))
    found = servers.runtime_directory()
    assert found.verdict == "problem"
    assert "Not a directory" in found.text
    file.unlink()
