"""`/metrics` over HTTP: its port, its thread, and clients that are slow, rude or many. Real connections."""

import errno
import gzip
import http.client
import logging
import re
import socket
import socketserver
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from made_status import made_status
from prometheus_client.parser import text_string_to_metric_families
from sparseflow_daemon import metrics_endpoint
from sparseflow_daemon.metrics_endpoint import MetricsEndpoint

from sparseflow.errors import BadRequest, NoAnswer, ServerError

HOST = "127.0.0.1"
DEADLINE_S = 20.0
Make = Callable[..., MetricsEndpoint]


@pytest.fixture
def make(no_descriptor_left: None) -> Iterator[Make]:
    """Endpoints of a server `s` that answers; all are closed at the end, and nothing may be left of them."""
    made: list[MetricsEndpoint] = []

    def endpoint(ask: Callable[[], dict[str, Any]] = made_status, host: str = HOST, port: int = 0) -> MetricsEndpoint:
        made.append(MetricsEndpoint(host, port, "s", ask))
        return made[-1]

    n_threads = threading.active_count()
    yield endpoint
    for each in made:
        each.close()
        each.close()
    assert threading.active_count() == n_threads


def connect(endpoint: MetricsEndpoint) -> socket.socket:
    url = urlsplit(endpoint.url)
    assert url.hostname is not None
    assert url.port is not None
    return socket.create_connection((url.hostname, url.port), DEADLINE_S)


def ask(endpoint: MetricsEndpoint, method: str = "GET", path: str = "/metrics", **headers: str) -> tuple[int, bytes]:
    """Status code and body."""
    url = urlsplit(endpoint.url)
    connection = http.client.HTTPConnection(url.hostname or "", url.port, timeout=DEADLINE_S)
    try:
        connection.request(method, path, headers=headers)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def up(endpoint: MetricsEndpoint) -> float:
    """Whether the weight server answers, as the metrics say."""
    code, body = ask(endpoint)
    assert code == 200
    families = {family.name: family for family in text_string_to_metric_families(body.decode())}
    return families["sparseflow_up"].samples[0].value


# --- what is served


def test_metrics_are_served_in_the_text_format(make: Make) -> None:
    endpoint = make()
    endpoint.begin()
    assert up(endpoint) == 1
    code, body = ask(endpoint)
    assert code == 200
    assert b'sparseflow_tokens_total{server="s"} 131.0\n' in body


def test_metrics_are_compressed_for_whoever_takes_that(make: Make) -> None:
    endpoint = make()
    endpoint.begin()
    assert b"sparseflow_up" in gzip.decompress(ask(endpoint, **{"Accept-Encoding": "gzip"})[1])


def test_server_that_does_not_answer_is_down_and_the_endpoint_goes_on(make: Make) -> None:
    answers: list[Exception | None] = [NoAnswer("nothing"), RuntimeError("a test's own"), None]

    def answer() -> dict[str, Any]:
        if (error := answers.pop(0)) is not None:
            raise error
        return made_status()

    endpoint = make(answer)
    endpoint.begin()
    assert [up(endpoint) for _ in range(3)] == [0, 0, 1]


@pytest.mark.parametrize("method", ["POST", "DELETE", "HEAD"])
def test_other_methods_are_refused_without_asking_the_server(make: Make, method: str) -> None:
    n_asked = 0

    def answer() -> dict[str, Any]:
        nonlocal n_asked
        n_asked += 1
        return made_status()

    endpoint = make(answer)
    endpoint.begin()
    assert ask(endpoint, method)[0] == 405
    assert n_asked == 0


# --- the port


def test_port_0_takes_a_free_one_and_the_log_names_it(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    endpoints = [make() for _ in range(2)]
    with caplog.at_level(logging.INFO):
        for endpoint in endpoints:
            endpoint.begin()
    assert len({endpoint.url for endpoint in endpoints}) == 2
    assert [record.getMessage() for record in caplog.records] == [f"metrics at {each.url}" for each in endpoints]


def test_port_in_use_is_one_error_that_names_it(make: Make) -> None:
    port = urlsplit(make().url).port
    with pytest.raises(ServerError, match=rf"--metrics-port {port} of 127\.0\.0\.1.*in use.*or 0 for any"):
        make(port=port)


@pytest.mark.parametrize("host", ["no.such.host.invalid", "192.0.2.1"])
def test_address_that_is_not_of_this_machine_is_one_error(make: Make, host: str) -> None:
    with pytest.raises(BadRequest, match=rf"--metrics-host {re.escape(host)}: .*give an address of this machine"):
        make(host=host)


def test_address_of_ipv6_is_written_in_brackets(make: Make) -> None:
    if not Path("/proc/net/if_inet6").read_text(encoding="ascii"):  # a machine without it
        with pytest.raises(ServerError, match="::1"):
            make(host="::1")
        return
    endpoint = make(host="::1")
    endpoint.begin()
    assert endpoint.url.startswith("http://[::1]:")
    assert up(endpoint) == 1


def test_who_connects_before_it_begins_is_answered_then(make: Make) -> None:
    endpoint = make()
    with connect(endpoint) as sock:
        sock.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        endpoint.begin()
        assert sock.recv(15) == b"HTTP/1.0 200 OK"


def test_port_and_thread_are_free_after_close(make: Make) -> None:
    endpoint = make()
    endpoint.begin()
    assert up(endpoint) == 1
    assert endpoint.is_alive
    endpoint.close()
    assert not endpoint.is_alive
    with pytest.raises(ConnectionRefusedError):
        connect(endpoint)
    make(port=urlsplit(endpoint.url).port)


# --- clients


def test_client_that_says_nothing_is_cut_after_its_time_and_others_are_served(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics_endpoint, "_CONNECTION_S", 0.2)
    endpoint = make()
    endpoint.begin()
    with connect(endpoint) as silent:
        begin = time.monotonic()
        assert up(endpoint) == 1
        assert time.monotonic() - begin < DEADLINE_S / 2
        assert silent.recv(1) == b""


def test_client_that_drips_is_cut_after_its_time_all_the_same(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_endpoint, "_CONNECTION_S", 0.5)
    endpoint = make()
    endpoint.begin()
    with connect(endpoint) as dripping:
        deadline, is_cut = time.monotonic() + DEADLINE_S, False
        while not is_cut and time.monotonic() < deadline:
            time.sleep(0.05)
            try:
                dripping.sendall(b"G")
            except ConnectionError:
                is_cut = True
        assert is_cut
        assert up(endpoint) == 1


@pytest.mark.parametrize("junk", [b"\r\n\r\n", b"\0" * 100, b"GET " + b"x" * 70000, b"GET / HTTP/9.9\r\n\r\n", b"x"])
def test_junk_is_survived(make: Make, junk: bytes) -> None:
    endpoint = make()
    endpoint.begin()
    with connect(endpoint) as sock, suppress(OSError):  # it may be sent away before all of it is sent
        sock.sendall(junk)
        sock.shutdown(socket.SHUT_WR)
        while sock.recv(4096):
            pass
    assert up(endpoint) == 1


def test_connection_that_cannot_be_taken_is_tried_again_after_a_pause(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where no descriptor is left: the connection stays, and would be tried all the time."""
    take, tries = socketserver.TCPServer.get_request, []

    def take_later(server: socketserver.TCPServer) -> tuple[socket.socket, Any]:
        tries.append(time.monotonic())
        if len(tries) <= 3:
            raise OSError(errno.EMFILE, "Too many open files")
        return take(server)

    monkeypatch.setattr(socketserver.TCPServer, "get_request", take_later)
    endpoint = make()
    endpoint.begin()
    assert up(endpoint) == 1
    assert tries[3] - tries[0] >= 3 * metrics_endpoint._PAUSE_S


def test_close_does_not_wait_for_a_client_that_is_slow(make: Make) -> None:
    endpoint = make()
    endpoint.begin()
    with connect(endpoint) as sock:
        sock.sendall(b"GET /met")
        time.sleep(0.1)  # it is being read by now
        begin = time.monotonic()
        endpoint.close()
        assert time.monotonic() - begin < metrics_endpoint._CONNECTION_S / 2
        assert not endpoint.is_alive


def test_close_cuts_a_client_that_connects_in_the_same_moment(make: Make) -> None:
    """Whichever comes first; a hundred times."""
    for _ in range(100):
        endpoint = make()
        endpoint.begin()
        sock = connect(endpoint)
        closing = threading.Thread(target=endpoint.close)
        closing.start()
        begin = time.monotonic()
        closing.join(DEADLINE_S)
        sock.close()
        assert time.monotonic() - begin < metrics_endpoint._CONNECTION_S / 2
        assert not endpoint.is_alive


def test_a_hundred_scrapes_leave_no_thread_and_no_descriptor(make: Make) -> None:
    endpoint = make()
    endpoint.begin()
    n_threads = threading.active_count()
    for _ in range(100):
        assert up(endpoint) == 1
    assert threading.active_count() == n_threads
