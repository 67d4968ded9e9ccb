"""What people collect from a server: metrics over HTTP and for files, log lines as JSON, and pages in a terminal."""

import fcntl
import json
import os
import pty
import select
import signal
import socket
import struct
import subprocess
import sys
import termios
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import psutil
import pytest
from processes import Host, ServerProcess, until
from prometheus_client.parser import text_string_to_metric_families
from served_shards import ServedShards

from sparseflow.cli.main import main
from sparseflow.client.weight_client import WeightClient
from sparseflow.protocol.run_directory import RunDirectory

IDS = np.arange(5, dtype=np.uint32)
EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_NOT_RUNNING, EXIT_NO_ANSWER = 0, 1, 2, 3, 4
Serve = Callable[..., ServerProcess]
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def shards(tmp_path: Path) -> ServedShards:
    return ServedShards(tmp_path / "store")


@pytest.fixture
def serve(host: Host, shards: ServedShards) -> Serve:
    """Start a server of a small arena; it is ready. Options as on its command line."""
    return lambda **options: host.serve(shards.folder, cpu_cache_ratio=shards.ratio(80), max_sessions=3, **options)


def samples(text: str) -> dict[str, float]:
    """Values by name and all labels but the server."""
    return {
        " ".join(
            [sample.name, *(value for key, value in sorted(sample.labels.items()) if key != "server")]
        ): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def scrape(server: ServerProcess) -> dict[str, float]:
    with urllib.request.urlopen(server.status()["metrics"], timeout=20) as response:
        return samples(response.read().decode())


# --- over HTTP


def test_hit_rate_of_a_model_that_is_all_in_memory_is_no_figure(host: Host, shards: ServedShards) -> None:
    """Reading it at the start was no client's miss."""
    status = host.serve(shards.folder).status()
    assert status["models"][0]["is_resident"]
    assert (status["hit_rate"], status["hits"], status["misses"]) == (None, 0, 0)
    assert status["disk"]["bytes"] > 0


def test_metrics_of_a_server_follow_what_its_clients_do(serve: Serve) -> None:
    server = serve(metrics_port=0)
    before = scrape(server)
    assert before["sparseflow_up"] == before["sparseflow_state ready"] == 1
    assert before["sparseflow_sessions"] == before["sparseflow_bundle_misses_total"] == 0
    with WeightClient("s") as client:
        for _ in range(2):
            with client.fetch(0, IDS) as fetch:
                fetch.wait(10)
        found = scrape(server)
        assert found["sparseflow_sessions"] == found["sparseflow_model_sessions self-describing"] == 1
        assert found["sparseflow_bundle_misses_total"] == found["sparseflow_bundle_hits_total"] == len(IDS)
        assert found[f"sparseflow_session_bundle_hits_total self-describing {os.getpid()}"] == len(IDS)
        assert found["sparseflow_disk_read_bytes_total"] > 0
    until(lambda: scrape(server)["sparseflow_sessions"] == 0)
    assert scrape(server)["sparseflow_model_sessions self-describing"] == 0


def test_tokens_of_sessions_that_are_over_stay_counted(serve: Serve) -> None:
    server = serve(metrics_port=0)
    for n, n_tokens in enumerate((5, 7), 1):
        with WeightClient("s") as client:
            client.note_tokens(n_tokens)
            assert scrape(server)["sparseflow_tokens_total"] == (5 if n == 1 else 12)
    until(lambda: server.status()["sessions"] == [])
    assert server.status()["tokens"] == 12


def test_endpoint_is_in_the_status_and_its_thread_is_watched(serve: Serve) -> None:
    server = serve(metrics_port=0)
    status = server.status()
    assert f"metrics at {status['metrics']}" in server.log()
    assert [thread["alive"] for thread in status["threads"] if thread["name"] == "metrics"] == [True]


def test_without_the_option_there_is_neither_port_nor_thread(serve: Serve) -> None:
    status = serve().status()
    assert status["metrics"] is None
    assert "metrics" not in [thread["name"] for thread in status["threads"]]


def test_scrapes_leave_nothing_in_the_server(serve: Serve) -> None:
    server = serve(metrics_port=0)
    scrape(server)
    before = server.settled_count()
    for _ in range(50):
        scrape(server)
    assert server.settled_count() == before


def test_port_in_use_is_one_error_before_anything_is_claimed(host: Host, shards: ServedShards) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        server = host.begin(shards.folder, metrics_port=taken.getsockname()[1])
        assert server.wait() == EXIT_FAILED
    (line,) = server.log().splitlines()
    assert "in use" in line
    assert "choose another" in line
    assert not RunDirectory.of("s").path.exists()


@pytest.mark.parametrize("port", [-1, 65536])
def test_port_that_is_none_is_wrong_usage(host: Host, shards: ServedShards, port: int) -> None:
    server = host.begin(shards.folder, metrics_port=port)
    assert server.wait() == EXIT_USAGE
    assert f"--metrics-port: {port} is out of range: give a number between 0 and 65535" in server.log()


def test_host_without_a_port_is_said_to_have_no_effect(serve: Serve) -> None:
    assert "--metrics-host 0.0.0.0 has no effect without --metrics-port" in serve(metrics_host="0.0.0.0").log()


def test_server_ends_as_it_should_while_it_is_scraped_and_its_port_is_free(serve: Serve) -> None:
    """By many at once, one of whom says nothing."""
    server = serve(metrics_port=0)
    url = server.status()["metrics"]
    port = urlsplit(url).port
    is_over = threading.Event()

    def scrape_on() -> int:
        n = 0
        while not is_over.is_set():
            with suppress(OSError), urllib.request.urlopen(url, timeout=20) as response:
                n += b"sparseflow_up" in response.read()
        return n

    with ThreadPoolExecutor(4) as pool:
        scrapers = [pool.submit(scrape_on) for _ in range(4)]
        try:
            time.sleep(0.5)
            with socket.create_connection(("127.0.0.1", port or 0)) as silent:
                silent.sendall(b"GET /")
                begin = time.monotonic()
                assert server.end() == EXIT_OK
                assert time.monotonic() - begin < 5
        finally:
            is_over.set()
        assert sum(scraper.result(30) for scraper in scrapers) > 0
    assert "Traceback" not in server.log()
    with socket.create_server(("127.0.0.1", port or 0)):
        pass


def test_stopped_loop_is_a_server_that_is_down_and_it_comes_back(host: Host, shards: ServedShards) -> None:
    """The loop stands still in a handler; the thread of the metrics says so in time."""
    program = ["-c", STANDING_STILL]
    server = host.serve(shards.folder, program=program, metrics_port=0)
    url = server.status()["metrics"]
    server.signal(signal.SIGUSR2)
    begin = time.monotonic()
    with urllib.request.urlopen(url, timeout=20) as response:
        assert samples(response.read().decode()) == {"sparseflow_up": 0}
    assert time.monotonic() - begin < 4
    until(lambda: scrape(server)["sparseflow_up"] == 1)


STANDING_STILL = """
import signal, sys, time
from sparseflow_daemon.__main__ import main

signal.signal(signal.SIGUSR2, lambda *_: time.sleep(4))
sys.exit(main())
"""


# --- what is logged


def test_log_as_json_has_an_object_a_line_and_says_whose_session_it_is(serve: Serve) -> None:
    server = serve(log_format="json")
    with WeightClient("s"):
        pass
    until(lambda: "is over" in server.log())
    lines = [json.loads(line) for line in server.log().splitlines()]
    (opened,) = [line for line in lines if line["message"].startswith("session of pid") and " on " in line["message"]]
    assert (opened["pid"], opened["model"], opened["level"]) == (os.getpid(), "self-describing", "INFO")
    (begun,) = [line for line in lines if line["message"].startswith("server s, pid")]
    assert (begun["server"], begun["pid"]) == ("s", server.pid)


def test_log_as_json_is_that_of_the_processes_on_a_gpu_too(stub: Path, serve: Serve) -> None:
    """Which here complains that the GPU is not there."""
    server = serve(log_format="json", share_dense_gpu=7)
    until(lambda: '"sparseflow_daemon.gpu.child"' in server.log() and server.log().endswith("\n"))
    lines = [json.loads(line) for line in server.log().splitlines()]
    (begun,) = [
        line for line in lines if line["message"].startswith("GPU child of pid") and "--device" in line["message"]
    ]
    assert begun["pid"] > 0
    assert [line["level"] for line in lines if line["logger"] == "sparseflow_daemon.gpu.child"] == ["ERROR"]
    server.wait_for("degraded")
    assert server.end() == EXIT_OK


def test_log_as_text_is_as_it_was(serve: Serve) -> None:
    server = serve()
    with WeightClient("s"):
        pass
    line = f" INFO sparseflow_daemon.server: session of pid {os.getpid()} on self-describing\n"
    until(lambda: line in server.log())


def failed_with(host: Host, *flags: str) -> list[str]:
    """Lines of a server without a store."""
    program = "import sys; from sparseflow_daemon.__main__ import main; sys.exit(main(sys.argv[1:] + %r))" % [*flags]
    server = host.begin(Path("nowhere/at/all"), program=["-c", program], memory="lots")
    assert server.wait() == EXIT_USAGE
    return server.log().splitlines()


def test_error_is_one_line_and_its_traceback_is_shown_only_under_debug(host: Host) -> None:
    (line,) = failed_with(host)
    assert line.startswith("sparseflow-daemon: error: memory 'lots'")
    debugged = failed_with(host, "--debug")
    assert debugged[0].startswith("Traceback")
    assert debugged[-1] == line


def test_error_is_an_object_where_the_log_is_json(host: Host) -> None:
    (line,) = failed_with(host, "--log-format", "json")
    assert json.loads(line)["message"].startswith("memory 'lots'")
    (line,) = failed_with(host, "--log-format", "json", "--debug")
    assert "BadRequest" in json.loads(line)["exc_info"]


def test_detached_server_says_where_its_metrics_are(host: Host, shards: ServedShards) -> None:
    command = [sys.executable, "-m", "sparseflow_daemon", str(shards.folder), "--name", "d", "--metrics-port", "0"]
    finished = subprocess.run([*command, "--detach"], capture_output=True, text=True, timeout=60, check=True)
    url = finished.stdout.rpartition("; metrics ")[2].strip()
    try:
        with urllib.request.urlopen(url, timeout=20) as response:
            assert samples(response.read().decode())["sparseflow_up"] == 1
    finally:
        pid = int(finished.stdout.partition("pid ")[2].partition(",")[0])
        os.kill(pid, signal.SIGTERM)
        with suppress(psutil.NoSuchProcess):
            until(lambda: psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(url, timeout=20)


# --- for files


def test_metrics_for_a_file_are_those_of_the_server(serve: Serve, capsys: Capture) -> None:
    serve()
    assert main(["status", "--prometheus"]) == EXIT_OK
    found = samples(capsys.readouterr().out)
    assert found["sparseflow_up"] == found["sparseflow_state ready"] == found["sparseflow_thread_up loop"] == 1


def test_metrics_for_a_file_say_that_a_server_is_down_and_the_exit_code_too(host: Host, capsys: Capture) -> None:
    assert main(["status", "--prometheus", "--server", "gone"]) == EXIT_NOT_RUNNING
    printed = capsys.readouterr()
    assert printed.out.splitlines()[-1] == 'sparseflow_up{server="gone"} 0.0'
    assert "no server 'gone' runs here" in printed.err


def test_metrics_for_a_file_say_that_a_server_does_not_answer(serve: Serve, capsys: Capture) -> None:
    server = serve()
    server.signal(signal.SIGSTOP)
    assert main(["status", "--prometheus", "--server", "s", "--timeout", "0.2"]) == EXIT_NO_ANSWER
    server.signal(signal.SIGCONT)
    assert samples(capsys.readouterr().out) == {"sparseflow_up": 0}


def test_degraded_server_is_no_failure_of_whoever_collects(host: Host, shards: ServedShards, capsys: Capture) -> None:
    (shards.folder / "config.json").unlink()
    server = host.begin(shards.folder)
    server.wait_for("degraded")
    assert main(["status", "--prometheus"]) == EXIT_OK
    found = samples(capsys.readouterr().out)
    assert found["sparseflow_state degraded"] == found["sparseflow_degraded_reasons"] == 1
    assert found["sparseflow_model_state self-describing failed"] == 1
    assert server.end() == EXIT_OK


@pytest.mark.parametrize("other", [["--watch", "1"], ["--json"]])
def test_metrics_for_a_file_are_printed_once_and_alone(host: Host, other: list[str], capsys: Capture) -> None:
    assert main(["status", "--prometheus", *other]) == EXIT_USAGE
    assert "leave --json and --watch out" in capsys.readouterr().err


# --- in a terminal


class Terminal:
    """`sparseflow status` in a terminal of its own."""

    def __init__(self, *words: str, columns: int = 80, rows: int = 24) -> None:
        self._ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", rows, columns, 0, 0))
        command = [sys.executable, "-m", "sparseflow", "status", *words]
        # Not what readline sets where only children see it.
        environment = {name: value for name, value in os.environ.items() if name not in ("LINES", "COLUMNS")}
        self.process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
        os.close(theirs)
        self.shown = ""

    def read_until(self, found: Callable[[str], Any], timeout_s: float = 60) -> None:
        deadline = time.monotonic() + timeout_s
        while not found(self.shown):
            assert time.monotonic() < deadline, self.shown
            if select.select([self._ours], [], [], 0.1)[0]:
                try:
                    self.shown += os.read(self._ours, 1 << 16).decode()
                except OSError:  # it has ended
                    assert found(self.shown), self.shown

    def end(self) -> int:
        """All it has shown is read; its exit code."""
        deadline = time.monotonic() + 60
        with suppress(OSError):
            while select.select([self._ours], [], [], 10)[0] and time.monotonic() < deadline:
                self.shown += os.read(self._ours, 1 << 16).decode()
        return self.process.wait(20)

    def close(self) -> None:
        self.process.kill()
        self.process.wait(20)
        os.close(self._ours)


@pytest.fixture
def terminal() -> Iterator[Callable[..., Terminal]]:
    made: list[Terminal] = []

    def start(*words: str, **size: int) -> Terminal:
        made.append(Terminal(*words, **size))
        return made[-1]

    yield start
    for each in made:
        each.close()


HOME, ENTER, LEAVE = "\x1b[H", "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"


def plain(page: str) -> list[str]:
    return page.replace("\x1b[K", "").replace("\x1b[J", "").splitlines()


@pytest.mark.parametrize("columns", [80, 100, 120])
def test_watched_pages_fit_the_terminal_and_nothing_is_erased_before_it_is_overwritten(
    serve: Serve, terminal: Callable[..., Terminal], columns: int
) -> None:
    serve()
    with WeightClient("s"):
        watching = terminal("--watch", "0.1", "--count", "4", columns=columns)
        assert watching.end() == EXIT_OK
    before, *pages = watching.shown.partition(LEAVE)[0].split(HOME)
    assert before == ENTER
    assert len(pages) == 4
    for page in pages:
        assert page.endswith("\x1b[J")
        assert page.count("\x1b[J") == 1
        lines = plain(page)
        assert max(map(len, lines)) <= columns
        assert lines[0].startswith("server s: ready")
        assert len(lines) <= 24
    assert "now        n/a tokens/s" in pages[0]
    assert "now        0.0 tokens/s, 0.0 MB/s from disk" in pages[1]
    last = plain(watching.shown.partition(LEAVE)[2])
    assert last[0].startswith("server s: ready"), "the last page stays"


def test_page_that_is_higher_than_the_terminal_says_how_much_is_not_shown(
    serve: Serve, terminal: Callable[..., Terminal]
) -> None:
    serve()
    watching = terminal("--watch", "0.1", "--count", "1", rows=5)
    assert watching.end() == EXIT_OK
    lines = plain(watching.shown.partition(LEAVE)[0].split(HOME)[1])
    assert len(lines) == 5
    assert lines[-1].strip().endswith("more lines; make the window higher")


def test_ctrl_c_ends_watching_and_gives_the_terminal_back(serve: Serve, terminal: Callable[..., Terminal]) -> None:
    serve()
    watching = terminal("--watch", "0.1")
    watching.read_until(lambda shown: shown.count(HOME) > 2)
    watching.process.send_signal(signal.SIGINT)
    assert watching.end() == EXIT_OK
    assert LEAVE in watching.shown
    assert "Traceback" not in watching.shown


def test_watch_waits_for_a_server_that_is_restarted(serve: Serve, terminal: Callable[..., Terminal]) -> None:
    server = serve()
    watching = terminal("--watch", "0.1")
    watching.read_until(lambda shown: "server s: ready" in shown)
    assert server.end() == EXIT_OK
    watching.read_until(lambda shown: "server s: no server; waiting" in shown)
    serve()
    watching.read_until(lambda shown: "server s: ready" in shown.rpartition("waiting")[2])
    watching.process.send_signal(signal.SIGINT)
    assert watching.end() == EXIT_OK
