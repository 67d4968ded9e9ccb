"""Where servers are found: names, lengths, whose folder it is, and whether somebody lives there."""

import fcntl
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from sparseflow.errors import BadRequest, NotPermitted
from sparseflow.protocol.run_directory import RunDirectory, folder_names, require_private, runtime_dir, server_names

LONGEST = 107
DEADLINE_S = 20.0


@pytest.fixture(autouse=True)
def runtime(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty runtime directory with a short name."""
    with tempfile.TemporaryDirectory(prefix="sf-") as folder:
        monkeypatch.setenv("SPARSEFLOW_RUNTIME_DIR", folder)
        yield Path(folder)


def lock_of(name: str, content: str = "") -> RunDirectory:
    """A run directory with a lock file that nobody holds."""
    directory = RunDirectory.of(name)
    directory.path.mkdir(mode=0o700)
    directory.lock.write_text(content)
    return directory


# --- where


@pytest.mark.parametrize(
    ("given", "xdg", "expected"),
    [
        ("/run/here", "/run/user/1", "/run/here"),
        ("/run/here", None, "/run/here"),
        ("", "/run/user/1", "/run/user/1/sparseflow"),
        (None, "/run/user/1", "/run/user/1/sparseflow"),
        (None, "", f"{tempfile.gettempdir()}/sparseflow-{os.getuid()}"),
        (None, None, f"{tempfile.gettempdir()}/sparseflow-{os.getuid()}"),
    ],
)
def test_our_variable_goes_before_that_of_xdg_and_that_before_the_temporary_directory(
    monkeypatch: pytest.MonkeyPatch, given: str | None, xdg: str | None, expected: str
) -> None:
    for name, value in (("SPARSEFLOW_RUNTIME_DIR", given), ("XDG_RUNTIME_DIR", xdg)):
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    assert runtime_dir() == Path(expected)
    assert RunDirectory.of("a").attach_socket == Path(expected) / "a" / "attach.sock"


def test_relative_directory_is_made_absolute(monkeypatch: pytest.MonkeyPatch, runtime: Path) -> None:
    """Whoever changes directory later still finds the server."""
    monkeypatch.chdir(runtime)
    monkeypatch.setenv("SPARSEFLOW_RUNTIME_DIR", "below")
    assert runtime_dir() == runtime / "below"


def test_folder_holds_lock_and_sockets(runtime: Path) -> None:
    directory = RunDirectory.of("one")
    assert directory.path == runtime / "one"
    assert [directory.lock, directory.attach_socket, directory.ctl_socket] == [
        runtime / "one" / name for name in ("lock", "attach.sock", "ctl.sock")
    ]
    assert directory.ctl_endpoint == f"ipc://{runtime}/one/ctl.sock"
    assert not directory.path.exists(), "asking makes nothing"


# --- names


@pytest.mark.parametrize("name", ["a", "0", "default", "OPT-6.7b_fp16", "a" * 64, "9..-_"])
def test_name_of_letters_digits_and_a_few_signs_is_taken(name: str) -> None:
    assert RunDirectory.of(name).name == name


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "a/b",
        "/a",
        "../a",
        "-a",
        "_a",
        ".a",
        "a b",
        "a\n",
        "\na",
        "a\0",
        "ü",
        "a" * 65,
        "a:b",
        "a\\b",
        "*",
    ],
)
def test_other_name_is_refused_and_told(name: str) -> None:
    with pytest.raises(BadRequest, match="1 to 64 letters, digits") as caught:
        RunDirectory.of(name)
    assert repr(name) in str(caught.value)


@pytest.mark.parametrize("letter", ["d", "ü"])
def test_path_is_as_long_as_a_socket_takes_and_no_longer(
    monkeypatch: pytest.MonkeyPatch, runtime: Path, letter: str
) -> None:
    """107 bytes, not characters; the kernel agrees."""
    left = LONGEST - len(os.fsencode(runtime / "x" / "attach.sock")) - 1
    folder = runtime / (letter * (left // len(letter.encode())))
    monkeypatch.setenv("SPARSEFLOW_RUNTIME_DIR", str(folder))
    name = "x" * (1 + LONGEST - len(os.fsencode(folder / "x" / "attach.sock")))
    directory = RunDirectory.of(name)
    assert len(os.fsencode(directory.attach_socket)) == LONGEST
    directory.path.mkdir(parents=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.bind(str(directory.attach_socket))
    with pytest.raises(BadRequest, match=r"108 bytes, .* at most 107; set SPARSEFLOW_RUNTIME_DIR"):
        RunDirectory.of(name + "x")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock, pytest.raises(OSError, match="too long"):
        sock.bind(str(directory.attach_socket) + "x")


# --- whose


def test_folder_of_ours_that_nobody_else_enters_is_private(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    require_private(tmp_path)


@pytest.mark.parametrize("mode", [0o777, 0o755, 0o750, 0o705, 0o701, 0o710, 0o720, 0o1777])
def test_folder_that_others_may_enter_is_refused(tmp_path: Path, mode: int) -> None:
    tmp_path.chmod(mode)
    with pytest.raises(
        NotPermitted, match=rf"{tmp_path}: .*mode 0700, .*mode {mode:04o}; chmod 700 {tmp_path}, or name"
    ):
        require_private(tmp_path)


def test_file_and_link_are_refused(tmp_path: Path) -> None:
    """A link to a private folder too: whoever may write beside it could turn it."""
    folder = tmp_path / "folder"
    folder.mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(folder)
    (tmp_path / "file").touch(mode=0o600)
    for name in ("link", "file"):
        with pytest.raises(NotPermitted, match="remove it, or name another"):
            require_private(tmp_path / name)


def test_folder_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tmp_path.chmod(0o700)
    uid = os.getuid()
    monkeypatch.setattr("sparseflow.protocol.run_directory.os.getuid", lambda: uid + 1)
    with pytest.raises(NotPermitted, match=f"of user {uid + 1} .* is of user {uid}"):
        require_private(tmp_path)


# --- who lives there


def test_nobody_lives_where_there_is_no_folder_no_lock_or_no_holder(runtime: Path, no_descriptor_left: None) -> None:
    directory = RunDirectory.of("one")
    assert not directory.is_alive()
    directory.path.mkdir()
    assert not directory.is_alive()
    assert not directory.lock.exists(), "asking makes nothing"
    directory.lock.touch()
    assert not directory.is_alive()


def test_somebody_lives_while_the_lock_is_held(no_descriptor_left: None) -> None:
    directory = lock_of("one")
    fd = os.open(directory.lock, os.O_RDWR)
    fcntl.flock(fd, fcntl.LOCK_EX)
    for _ in range(3):
        assert directory.is_alive()
    fcntl.flock(fd, fcntl.LOCK_UN)
    assert not directory.is_alive()
    fcntl.flock(fd, fcntl.LOCK_EX)
    assert directory.is_alive()
    os.close(fd)
    assert not directory.is_alive()


def test_asking_takes_nothing_from_others_who_ask_and_leaves_nothing_held(no_descriptor_left: None) -> None:
    directory = lock_of("one")
    asking = os.open(directory.lock, os.O_RDONLY)
    fcntl.flock(asking, fcntl.LOCK_SH)
    assert not directory.is_alive(), "another who asks is no server"
    os.close(asking)
    fd = os.open(directory.lock, os.O_RDWR)
    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(fd)


HOLDER = """
import fcntl, os, sys, time
fd = os.open(sys.argv[1], os.O_RDWR)
fcntl.flock(fd, fcntl.LOCK_EX)
os.write(fd, str(os.getpid()).encode())
print("held", flush=True)
time.sleep(60)
"""


def test_lock_dies_with_its_holder_however_that_ends() -> None:
    directory = lock_of("one")
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(directory.lock)], stdout=subprocess.PIPE) as child:
        try:
            assert child.stdout is not None
            assert child.stdout.readline() == b"held\n"
            assert directory.is_alive()
            assert directory.owner() == child.pid
            child.send_signal(signal.SIGKILL)
            child.wait(DEADLINE_S)
            assert not directory.is_alive()
            assert directory.owner() == child.pid, "who it was is still to be read"
        finally:
            child.kill()


@pytest.mark.parametrize(
    ("content", "expected"), [(b"4711", 4711), (b" 4711\n", 4711), (b"", None), (b"pid", None), (b"\xff\xfe", None)]
)
def test_owner_is_the_pid_that_the_lock_names(content: bytes, expected: int | None) -> None:
    directory = lock_of("one")
    directory.lock.write_bytes(content)
    assert directory.owner() == expected


def test_owner_of_a_missing_lock_is_nobody() -> None:
    assert RunDirectory.of("one").owner() is None


def test_servers_are_listed_by_their_folders(monkeypatch: pytest.MonkeyPatch, runtime: Path) -> None:
    for name in ("b", "a", "c"):
        lock_of(name)
    (runtime / "file").touch()
    (runtime / ".junk").mkdir()  # no server's, and no reason to list none
    (runtime / "link").symlink_to(runtime / "a")
    assert server_names() == ["a", "b", "c"]
    assert folder_names() == [".junk", "a", "b", "c"]
    monkeypatch.setenv("SPARSEFLOW_RUNTIME_DIR", str(runtime / "missing"))
    assert server_names() == []
