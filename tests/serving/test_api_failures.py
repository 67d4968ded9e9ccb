"""Clients that hang up, workers and weight servers that die, a server that is full or told to end: real processes."""

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import openai
import psutil
import pytest
from api_server import DEADLINE_S, ApiServer, until
from prometheus_client.parser import text_string_to_metric_families

LONG = {"prompt": "In the beginning", "max_tokens": 500, "temperature": 0, "ignore_eos": True}


@pytest.fixture
def started(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """(options) -> a server of the demo model, of this test alone."""
    servers: list[ApiServer] = []
    home = tmp_path_factory.mktemp("api")

    def start(*options: object, **how: Any) -> ApiServer:
        servers.append(ApiServer(home, demo_model, *options, **how))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def asked(api: ApiServer, fields: dict[str, Any], **headers: str) -> tuple[HTTPConnection, HTTPResponse]:
    """A request whose answer has begun."""
    where = urlsplit(api.url)
    assert where.hostname
    connection = HTTPConnection(where.hostname, where.port, timeout=DEADLINE_S)
    body = json.dumps(fields)
    connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"} | headers)
    return connection, connection.getresponse()


def begun(api: ApiServer, body_nbytes: int) -> socket.socket:
    """A connection whose request has still to send its body."""
    where = urlsplit(api.url)
    sock = socket.create_connection((where.hostname, where.port), timeout=DEADLINE_S)
    lines = (
        "POST /v1/completions HTTP/1.1",
        "Host: localhost",
        "Content-Type: application/json",
        f"Content-Length: {body_nbytes}",
    )
    sock.sendall("".join(f"{line}\r\n" for line in (*lines, "")).encode())
    return sock


def events(answer: HTTPResponse) -> Iterator[Any]:
    for line in answer:
        if line.startswith(b"data: {"):
            yield json.loads(line[6:])


def text(api: ApiServer, **fields: Any) -> str:
    connection, answer = asked(api, LONG | {"max_tokens": 12} | fields)
    body = json.loads(answer.read())
    connection.close()
    assert answer.status == 200, body
    return str(body["choices"][0]["text"])


def metrics(api: ApiServer) -> dict[str, float]:
    """Samples without labels, and with them as `name{a=b}`."""
    found = {}
    for family in text_string_to_metric_families(api.get("/metrics")):
        for sample in family.samples:
            labels = ",".join(f"{key}={value}" for key, value in sorted(sample.labels.items()))
            found[sample.name + (f"{{{labels}}}" if labels else "")] = sample.value
    return found


def test_client_that_hangs_up_stops_its_generation_or_leaves_the_queue(api: ApiServer) -> None:
    before = metrics(api)["sparseflow_cancelled_requests_total"]
    body = json.dumps(LONG | {"n": 100, "temperature": 1})
    bodies = [json.dumps(json.loads(body) | {"stream": stream}).encode() for stream in (True, False)]
    computed = [asking(api, body) for body in bodies]
    until(lambda: metrics(api)["sparseflow_workers_busy"] == 2)
    queued = [asking(api, body) for body in bodies]
    until(lambda: metrics(api)["sparseflow_requests"] == 4)
    for sockets, n_left in ((queued, 2), (computed, 0)):
        for sock in sockets:
            sock.close()
        until(lambda n_left=n_left: metrics(api)["sparseflow_requests"] == n_left, 20)
    until(lambda: metrics(api)["sparseflow_workers_busy"] == 0, 20)
    after = metrics(api)
    assert after["sparseflow_cancelled_requests_total"] == before + 4
    assert after["sparseflow_worker_restarts_total"] == 0


def asking(api: ApiServer, body: bytes) -> socket.socket:
    """A request that was sent."""
    sock = begun(api, len(body))
    sock.sendall(body)
    return sock


def test_client_that_reads_nothing_makes_nothing_grow_and_keeps_its_place(api: ApiServer) -> None:
    """Its worker waits for it, as far as one minute goes."""
    front = psutil.Process(api.process.pid)
    before = front.memory_info().rss
    many = {"prompt": [5] * 400, "max_tokens": 100, "n": 128, "echo": True, "logprobs": 20, "ignore_eos": True}
    sock = asking(api, json.dumps(many | {"stream": True}).encode())
    until(lambda: metrics(api)["sparseflow_requests"] == 1)
    time.sleep(3)
    assert metrics(api)["sparseflow_requests"] == 1
    assert front.memory_info().rss - before < 64 << 20
    sock.close()
    until(lambda: metrics(api)["sparseflow_requests"] == 0, 20)


def test_what_clients_make_up_makes_no_label(api: ApiServer) -> None:
    where = urlsplit(api.url)
    for method, path in (("FOO", "/v1/models"), ("GET", "/made/up"), ("GET", "/v1/models/made-up")):
        connection = HTTPConnection(where.hostname, where.port, timeout=DEADLINE_S)
        connection.request(method, path)
        assert connection.getresponse().status in (404, 405)
        connection.close()
    assert not [name for name in metrics(api) if "FOO" in name or "made" in name]


def test_metrics_count_what_was_made_and_show_the_weight_server(api: ApiServer) -> None:
    before = metrics(api)
    text(api, max_tokens=7)
    after = metrics(api)
    assert after["sparseflow_generated_tokens_total"] - before.get("sparseflow_generated_tokens_total", 0) == 7
    assert after["sparseflow_workers"] == 2
    assert after[f"sparseflow_up{{server={api.facts['server']}}}"] == 1
    route = "sparseflow_http_requests_total{method=POST,route=/v1/completions,status=200}"
    assert after[route] - before.get(route, 0) == 1


def test_health_says_who_is_there(api: ApiServer) -> None:
    until(lambda: metrics(api)["sparseflow_workers_busy"] == 0)  # which others' requests may have left
    health = json.loads(api.get("/health"))
    assert health["status"] == "ok"
    assert health["workers"] == {"alive": 2, "busy": 0, "wanted": 2}
    assert health["weight_server"]["state"] == "ready"


def test_body_that_is_too_large_is_refused_and_the_next_is_served(api: ApiServer) -> None:
    before = psutil.Process(api.process.pid).memory_info().rss
    with begun(api, 100 << 20) as sock:
        for _ in range(100):
            sock.sendall(b" " * (1 << 20))
        assert b" 413 " in sock.recv(4096).splitlines()[0]
    assert psutil.Process(api.process.pid).memory_info().rss - before < 64 << 20
    assert text(api)


def test_worker_that_is_killed_is_an_error_for_its_request_and_another_one_comes(started: Any) -> None:
    """And a text that is being made when the server is told to end is finished."""
    api = started("--workers", 1, "--drain-timeout", DEADLINE_S)
    whole = text(api)
    connection, answer = asked(api, LONG | {"stream": True, "n": 100, "temperature": 1})
    told = events(answer)
    next(told)
    (pid,) = api.facts["workers"]
    next(process for process in api.processes() if process.pid == pid).send_signal(signal.SIGKILL)
    *_, last = told
    connection.close()
    assert last["error"]["code"] == "worker_died"
    assert text(api) == whole  # waits for the one that takes its place
    assert metrics(api)["sparseflow_worker_restarts_total"] == 1
    connection, answer = asked(api, LONG | {"stream": True, "max_tokens": 300})
    told = events(answer)
    next(told)
    api.processes()
    api.process.send_signal(signal.SIGTERM)
    assert sum(bool(event["choices"][0]["text"]) for event in told) > 250
    connection.close()
    assert api.process.wait(DEADLINE_S) == 0
    api.expect_nothing_left()


def test_weight_server_that_is_killed_is_started_again_and_the_text_goes_on_unchanged(started: Any) -> None:
    """And nothing is left of all of them when the API server is killed."""
    api = started("--workers", 1, "--cpu-cache-ratio", 0.3)
    whole = text(api, max_tokens=200)
    text(api, prompt=[2, *range(5, 30)])  # so that nothing of the first prompt is in the worker's cache
    connection, answer = asked(api, LONG | {"max_tokens": 200, "stream": True})
    told = events(answer)
    begin = next(told)["choices"][0]["text"]
    old = api.weight_server()
    old.send_signal(signal.SIGKILL)
    assert begin + "".join(event["choices"][0]["text"] for event in told) == whole
    connection.close()
    until(lambda: json.loads(api.get("/health"))["status"] == "ok")
    assert api.weight_server().pid != old.pid
    connection, answer = asked(api, LONG | {"stream": True})
    next(events(answer))
    api.processes()
    api.process.kill()
    connection.close()
    api.expect_nothing_left()


def test_request_too_many_is_refused_and_keys_are_asked_for(started: Any, tmp_path: Path) -> None:
    """And a text that is not complete in time, when the server is told to end, ends with an error."""
    keys = tmp_path / "keys"
    keys.write_text("one\n\ntwo\n")
    api = started("--workers", 1, "--queue", 0, "--api-key-file", keys, "--drain-timeout", 0.5)
    for wrong in ("three", "", "on"):
        connection, answer = asked(api, LONG, Authorization=f"Bearer {wrong}")
        assert (answer.status, json.loads(answer.read())["error"]["code"]) == (401, "invalid_api_key")
        connection.close()
    assert json.loads(api.get("/health"))["status"] == "ok"  # for whoever watches it, without a key
    with openai.OpenAI(base_url=api.url, api_key="two", max_retries=0) as client:
        endless = client.completions.create(
            model="demo_model", prompt="In the beginning", max_tokens=500, n=100, stream=True
        )
        next(iter(endless))
        with pytest.raises(openai.RateLimitError, match="--queue") as refused:
            client.completions.create(model="demo_model", prompt="a")
        assert refused.value.code == "queue_full"
        assert refused.value.response.headers["retry-after"] == "1"
        endless.close()
        until(lambda: metrics(api)["sparseflow_requests"] == 0)
        assert client.completions.create(model="demo_model", prompt="a", max_tokens=1).usage
        endless = client.completions.create(
            model="demo_model", prompt="In the beginning", max_tokens=500, n=100, stream=True
        )
        next(iter(endless))
        api.processes()
        api.process.send_signal(signal.SIGINT)
        with pytest.raises(openai.APIError, match="the server is ending"):
            list(endless)
    assert api.process.wait(DEADLINE_S) == 0
    api.expect_nothing_left()
    assert "another one is started" not in api.log()
    assert "Traceback" not in api.log()


def test_server_that_is_told_to_end_while_it_loads_leaves_nothing(started: Any) -> None:
    api = started("--workers", 2, ready=False)
    until(lambda: len(api.processes()) > 1)  # the weight server, or what converts
    assert api.stop(signal.SIGINT) == 0


def refused(home: Path, *options: object) -> tuple[int, str]:
    """Exit code and what it says, of a server that does not begin."""
    command = [sys.executable, "-m", "sparseflow", "serve", *map(str, options)]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S, check=False)
    return finished.returncode, finished.stderr


def test_wrong_settings_are_one_line_before_anything_is_loaded(demo_model: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.write_text("\n")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        cases = [
            ([demo_model, "--port", taken.getsockname()[1]], 2, "Address already in use"),
            ([demo_model, "--host", "192.0.2.1"], 2, "--host 192.0.2.1"),
            ([demo_model, "--api-key-file", tmp_path / "none"], 1, "none: cannot be read"),
            ([demo_model, "--api-key-file", empty], 2, "no key in it"),
            ([], 2, "name either a STORE or a --server"),
            ([demo_model, "--server", "x"], 2, "name either a STORE or a --server"),
            (["--server", "x", "--memory", "1GiB"], 2, "--memory 1GiB: the server decides that"),
            ([demo_model, "--model", "x"], 2, "--model x: goes with --server"),
        ]
        for options, code, said in cases:
            found, text = refused(tmp_path, *options)
            assert found == code, text
            (line,) = text.splitlines()
            assert said in line
