"""One server a name: who gets the run directory, who is refused, and what is left of it."""

import fcntl
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from sparseflow_daemon.claim import Claim

from sparseflow.errors import DiskError, NotPermitted, ServerError
from sparseflow.protocol.run_directory import RunDirectory

DEADLINE_S = 20.0
SHORT_S = 5.0  # far above the patience of a claim

pytestmark = pytest.mark.usefixtures("runtime", "no_descriptor_left")


@contextmanager
def running(program: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """Python in a process of its own, which has said its first line; it is killed at the end."""
    path = os.pathsep.join(sys.path)
    child = subprocess.Popen(
        [sys.executable, "-c", program, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
    )
    with child:
        try:
            assert child.stdout is not None
            child.first_line = child.stdout.readline().strip()  # type: ignore[attr-defined]
            yield child
        finally:
            child.kill()


HOLDER = """
import sys
from sparseflow.protocol.run_directory import RunDirectory
from sparseflow_daemon.claim import Claim
claim = Claim(RunDirectory.of(sys.argv[1]))
print("claimed", flush=True)
sys.stdin.readline()
claim.release()
print("released", flush=True)
"""


def refusal(name: str) -> str:
    """What a second server of that name is told, soon."""
    begin = time.monotonic()
    with pytest.raises(ServerError) as caught:
        Claim(RunDirectory.of(name))
    assert time.monotonic() - begin < SHORT_S
    return str(caught.value)


# --- one a name


def test_claim_makes_a_private_folder_with_a_lock_that_names_us(runtime: Path) -> None:
    directory = RunDirectory.of("one")
    claim = Claim(directory)
    assert directory.is_alive()
    assert directory.owner() == os.getpid()
    assert runtime.stat().st_mode & 0o777 == directory.path.stat().st_mode & 0o777 == 0o700
    assert [entry.name for entry in directory.path.iterdir()] == ["lock"]
    claim.release()


def test_runtime_directory_is_made_where_there_is_none(monkeypatch: pytest.MonkeyPatch, runtime: Path) -> None:
    monkeypatch.setenv("SPARSEFLOW_RUNTIME_DIR", str(runtime / "a" / "b"))
    claim = Claim(RunDirectory.of("one"))
    assert (runtime / "a" / "b").stat().st_mode & 0o777 == 0o700
    claim.release()


@pytest.mark.parametrize("folder", ["/proc/nope", "file/below"])
def test_runtime_directory_that_cannot_be_made_is_said_with_a_remedy(
    monkeypatch: pytest.MonkeyPatch, runtime: Path, folder: str
) -> None:
    (runtime / "file").touch()
    monkeypatch.setenv("SPARSEFLOW_RUNTIME_DIR", str(runtime / folder))
    with pytest.raises(DiskError, match=rf"{folder}: cannot be made \(.*; set SPARSEFLOW_RUNTIME_DIR to a folder of"):
        Claim(RunDirectory.of("one"))


def test_file_where_a_server_s_folder_would_be_is_named(runtime: Path) -> None:
    (runtime / "one").touch(mode=0o600)
    with pytest.raises(NotPermitted, match=f"{runtime / 'one'}: must be a folder"):
        Claim(RunDirectory.of("one"))


def test_second_claim_of_a_name_is_refused_and_told_whose_it_is() -> None:
    claim = Claim(RunDirectory.of("one"))
    said = refusal("one")
    assert f"server 'one' is already running (pid {os.getpid()}); choose another --name" in said
    assert RunDirectory.of("one").is_alive(), "the refused one took nothing away"
    claim.release()


def test_claim_of_another_process_is_refused_naming_its_pid() -> None:
    with running(HOLDER, "one") as child:
        assert f"pid {child.pid}" in refusal("one")
        other = Claim(RunDirectory.of("two"))
        other.release()


def test_refused_claim_leaves_the_sockets_of_the_living_alone() -> None:
    directory = RunDirectory.of("one")
    claim = Claim(directory)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.bind(str(directory.attach_socket))
        directory.ctl_socket.touch()
        refusal("one")
        assert directory.attach_socket.exists()
        assert directory.ctl_socket.exists()
    claim.release()


def test_holder_of_an_unreadable_pid_is_refused_all_the_same() -> None:
    directory = RunDirectory.of("one")
    claim = Claim(directory)
    directory.lock.write_text("")
    assert "already running (another process)" in refusal("one")
    claim.release()


# --- after the end


def test_release_removes_everything_and_may_be_called_twice(runtime: Path) -> None:
    directory = RunDirectory.of("one")
    claim = Claim(directory)
    for path in (directory.attach_socket, directory.ctl_socket):
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
            sock.bind(str(path))
    claim.release()
    claim.release()
    assert list(runtime.iterdir()) == []
    assert not directory.is_alive()


def test_second_release_takes_nothing_from_the_next_owner() -> None:
    directory = RunDirectory.of("one")
    earlier = Claim(directory)
    earlier.release()
    claim = Claim(directory)
    earlier.release()
    assert directory.is_alive()
    assert directory.owner() == os.getpid()
    claim.release()


def test_release_leaves_files_of_others_where_they_are() -> None:
    directory = RunDirectory.of("one")
    claim = Claim(directory)
    (directory.path / "notes").touch()
    claim.release()
    assert [entry.name for entry in directory.path.iterdir()] == ["notes"]


def test_name_is_free_again_after_a_release() -> None:
    with running(HOLDER, "one") as child:
        refusal("one")
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write("\n")
        child.stdin.flush()
        assert child.stdout.readline() == "released\n"
        Claim(RunDirectory.of("one")).release()


def test_what_a_killed_server_left_is_removed_and_its_name_claimed() -> None:
    directory = RunDirectory.of("one")
    with running(HOLDER, "one") as child:
        for path in (directory.attach_socket, directory.ctl_socket):
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
                sock.bind(str(path))
        child.send_signal(signal.SIGKILL)
        child.wait(DEADLINE_S)
        assert directory.owner() == child.pid
    claim = Claim(directory)
    assert [entry.name for entry in directory.path.iterdir()] == ["lock"]
    assert directory.owner() == os.getpid()
    claim.release()


def test_longer_pid_of_a_dead_server_leaves_no_digits_behind() -> None:
    directory = RunDirectory.of("one")
    directory.path.mkdir(mode=0o700)
    directory.lock.write_text("4194303999")
    claim = Claim(directory)
    assert directory.lock.read_text() == str(os.getpid())
    claim.release()


# --- whose folder


@pytest.mark.parametrize("which", ["runtime", "server"])
def test_folder_that_others_may_enter_is_not_claimed(runtime: Path, which: str) -> None:
    directory = RunDirectory.of("one")
    directory.path.mkdir(mode=0o700)
    open_to_others = runtime if which == "runtime" else directory.path
    open_to_others.chmod(0o755)
    with pytest.raises(NotPermitted, match=rf"{open_to_others}: must be .* mode 0700"):
        Claim(directory)


def test_lock_that_is_a_link_is_not_followed(runtime: Path) -> None:
    directory = RunDirectory.of("one")
    directory.path.mkdir(mode=0o700)
    (runtime / "precious").write_text("content")
    directory.lock.symlink_to(runtime / "precious")
    with pytest.raises(OSError, match="symbolic link"):
        Claim(directory)
    assert (runtime / "precious").read_text() == "content"


# --- those who ask, and those who race

PROBER = """
import sys
from sparseflow.protocol.run_directory import RunDirectory
directory = RunDirectory.of(sys.argv[1])
print("asking", flush=True)
while True:
    directory.is_alive()
"""


def test_client_that_asks_all_the_time_makes_no_claim_fail() -> None:
    """Whoever asks holds the lock for an instant, which is no server."""
    directory = RunDirectory.of("one")
    with running(PROBER, "one") as child:
        for _ in range(150):
            claim = Claim(directory)
            assert directory.is_alive()
            claim.release()
        assert child.poll() is None


def test_claim_of_a_dead_server_s_folder_is_made_while_a_client_asks() -> None:
    """The lock file is there all the time, so each question takes it."""
    directory = RunDirectory.of("one")
    directory.path.mkdir(mode=0o700)
    directory.lock.touch()
    with running(PROBER, "one"), running(PROBER, "one"):
        for _ in range(50):
            claim = Claim(directory)
            os.close(claim._fd)  # as when it is killed: the lock file stays
            claim._fd = -1


def test_folder_that_vanishes_while_it_is_made_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another server ends between the system's answer that it is there and our look at it."""
    directory = RunDirectory.of("one")
    directory.path.mkdir(mode=0o700)
    make = os.mkdir
    vanished: list[object] = []

    def mkdir(path: object, *arguments: object, **options: object) -> None:
        try:
            make(path, *arguments, **options)  # type: ignore[arg-type]
        except FileExistsError:
            if path == directory.path and not vanished:
                vanished.append(path)
                directory.path.rmdir()
            raise

    monkeypatch.setattr(os, "mkdir", mkdir)
    claim = Claim(directory)
    assert vanished
    assert directory.is_alive()
    claim.release()


def test_lock_file_that_was_removed_before_it_was_locked_is_no_claim(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another server ended meanwhile; whoever comes next would make and lock a new file beside ours."""
    directory = RunDirectory.of("one")
    lock = fcntl.flock
    removed: list[object] = []

    def flock(fd: int, operation: int) -> None:
        if not removed:
            removed.append(directory.lock)
            directory.lock.unlink()
        lock(fd, operation)

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", flock)
        claim = Claim(directory)
    assert removed
    assert directory.is_alive()
    assert "already running" in refusal("one")
    claim.release()


RACER = """
import os, sys, time
from pathlib import Path
from sparseflow.errors import ServerError
from sparseflow.protocol.run_directory import RunDirectory
from sparseflow_daemon import claim
claim._PATIENCE_S = claim._PAUSE_S = 0.0  # all the faster
directory, flag, begin_s = RunDirectory.of("one"), Path(sys.argv[1]), float(sys.argv[2])
print("ready", flush=True)
n_won = n_refused = 0
time.sleep(max(0.0, begin_s - time.time()))
while time.time() < begin_s + 1.5 or n_won < 2:
    try:
        mine = claim.Claim(directory)
    except ServerError:
        n_refused += 1
        continue
    os.close(os.open(flag, os.O_CREAT | os.O_EXCL))  # fails if another has it too
    assert directory.owner() == os.getpid() and directory.is_alive()
    directory.attach_socket.touch()
    flag.unlink()
    n_won += 1
    mine.release()
print(n_won, n_refused, flush=True)
"""


def test_of_many_that_claim_and_release_only_one_has_it_at_a_time_and_none_breaks(
    runtime: Path, tmp_path: Path
) -> None:
    """Each is either the server or told that there is one, whatever vanishes under it."""
    begin_s = time.time() + 2.0
    children = [
        subprocess.Popen(
            [sys.executable, "-c", RACER, str(tmp_path / "flag"), str(begin_s)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        )
        for _ in range(6)
    ]
    try:
        results = [(*child.communicate(timeout=DEADLINE_S), child.returncode) for child in children]
    finally:
        for child in children:
            child.kill()
    assert [error for _, error, _ in results if error] == []
    assert [code for *_, code in results] == [0] * 6
    won = [int(said.splitlines()[-1].split()[0]) for said, *_ in results]
    assert sum(won) > 6
    assert list(runtime.iterdir()) == []


def test_of_many_that_claim_at_once_exactly_one_gets_it(runtime: Path) -> None:
    program = HOLDER.replace("claim = Claim", "sys.stdin.readline()\nclaim = Claim")
    program = program.replace('print("claimed"', 'print("claimed", flush=True)\nprint("claimed"')
    program = program.replace("from sparseflow.protocol", 'print("ready", flush=True)\nfrom sparseflow.protocol')
    children = [
        subprocess.Popen(
            [sys.executable, "-c", program, "one"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        )
        for _ in range(6)
    ]
    try:
        for child in children:
            assert child.stdout is not None
            assert child.stdout.readline() == "ready\n"
        for child in children:
            assert child.stdin is not None
            child.stdin.write("\n")
            child.stdin.flush()
        losers = []
        deadline = time.monotonic() + DEADLINE_S
        while len(losers) < 5 and time.monotonic() < deadline:
            losers = [child for child in children if child.poll() is not None]
            time.sleep(0.02)
        (winner,) = (child for child in children if child.poll() is None)
        assert RunDirectory.of("one").owner() == winner.pid
        for child in losers:
            assert child.stderr is not None
            assert f"already running (pid {winner.pid})" in child.stderr.read()
        _, error = winner.communicate("\n", timeout=DEADLINE_S)
        assert error == ""
    finally:
        for child in children:
            child.kill()
            child.communicate(timeout=DEADLINE_S)
    assert list(runtime.iterdir()) == []
