"""A status as Prometheus metrics: names, values, and what is absent; and a server that does not answer."""

import re
from collections.abc import Callable
from typing import Any

import pytest
from child_process import run_python
from made_status import GPU_CHILD, SHARED_DENSE, made_model, made_session, made_status
from prometheus_client import CollectorRegistry, Gauge, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from sparseflow.errors import NoAnswer, ServerNotRunning
from sparseflow.protocol.metrics import StatusCollector, status_families, status_registry, status_text

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def read(text: str) -> Samples:
    """Values by name and labels, as Prometheus reads them; each may be there once."""
    found: Samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            key = sample.name, tuple(sorted(sample.labels.items()))
            assert key not in found, f"{key} twice"
            found[key] = sample.value
    return found


def value(samples: Samples, name: str, **labels: str) -> float | None:
    """Of one sample of server `s`; None where it is absent."""
    return samples.get((f"sparseflow_{name}", tuple(sorted({"server": "s", **labels}.items()))))


def of(**changed: Any) -> Samples:
    """What is read of a status."""
    return read(status_text("s", made_status(**changed)))


# --- names


def full_status() -> dict[str, Any]:
    """One in which everything has a value."""
    status = made_status(gpu_children=[GPU_CHILD], shared_dense=SHARED_DENSE)
    status["memory"] |= {"pinned": 1, "device": 2}
    status["disk"]["faults"] = {"read-error": 3}
    return status


def test_every_name_has_our_prefix_a_base_unit_and_help() -> None:
    families = [*text_string_to_metric_families(status_text("s", full_status()))]
    assert len(families) > 50
    for family in families:
        assert re.fullmatch(r"sparseflow_[a-z0-9_]+", family.name)
        assert not re.search(r"_(s|ms|kb|mb|kib|mib|gib|percent|rate|share|nbytes|ns)(_total)?$", family.name), (
            family.name
        )
        assert family.documentation.endswith("."), family.name
        assert all(sample.labels["server"] == "s" for sample in family.samples)


def test_counters_end_in_total_and_nothing_else_does() -> None:
    for line in status_text("s", full_status()).splitlines():
        if line.startswith("# TYPE"):
            _, _, name, kind = line.split()
            assert (kind == "counter") == name.endswith("_total"), line


def test_all_that_a_status_counts_is_there() -> None:
    """Each number of the status, but those that name something or follow from others."""
    values = set(read(status_text("s", full_status())).values())
    left_out = {"status_version", "epoch", "pid", "protocol", "layers", "fetch_limit", "tokens_per_s", "hit_rate"}

    def numbers(found: Any, key: str = "") -> list[tuple[str, float]]:
        if isinstance(found, dict):
            return [pair for key, part in found.items() if key not in left_out for pair in numbers(part, key)]
        if isinstance(found, list):
            return [pair for part in found for pair in numbers(part, key)]
        is_number = isinstance(found, int | float) and not isinstance(found, bool)
        return [(key, found)] if is_number else []

    missing = [pair for pair in numbers(full_status()) if pair[1] not in values and pair[0] != "device"]
    assert missing == []


# --- values


@pytest.mark.parametrize(
    ("name", "labels", "expected"),
    [
        ("up", {}, 1),
        ("build_info", {"version": "1.2.3"}, 1),
        ("uptime_seconds", {}, 100.5),
        ("degraded_reasons", {}, 0),
        ("memory_shared_bytes", {}, 5700),
        ("arena_size_bytes", {}, 5000),
        ("arena_leased_bytes", {}, 900),
        ("hit_ratio", {}, 0.875),
        ("bundle_hits_total", {}, 600),
        ("bundle_misses_total", {}, 200),
        ("tokens_total", {}, 131),
        ("evictions_total", {}, 17),
        ("prefetch_wasted_bundles_total", {}, 3),
        ("disk_read_bytes_total", {}, 16384),
        ("disk_latency_p99_seconds", {}, 0.05),
        ("disk_random_read_bytes_per_second", {"model": "opt"}, 7e7),
        ("sessions", {}, 1),
        ("sessions_limit", {}, 8),
        ("model_info", {"model": "opt", "dtype": "float16", "weights": "0940f8db98816588"}, 1),
        ("model_memory_bytes", {"model": "opt", "region": "dense"}, 700),
        ("model_resident_bundles", {"model": "opt"}, 40),
        ("model_sessions", {"model": "opt"}, 1),
        ("layer_hit_ratio", {"model": "opt", "layer": "2"}, 0.75),
        ("session_tokens_total", {"pid": "4242", "model": "opt"}, 31),
        ("session_disk_read_bytes_total", {"pid": "4242", "model": "opt"}, 8192),
        ("session_recall_ratio", {"pid": "4242", "model": "opt"}, 0.98),
        ("session_quarantined", {"pid": "4242", "model": "opt"}, 0),
        ("thread_up", {"thread": "opt/read-0"}, 1),
        ("thread_last_turn_age_seconds", {"thread": "loop"}, 0.25),
        ("unforeseen_errors_total", {}, 0),
    ],
)
def test_value_of_a_status_is_found_under_its_name(name: str, labels: dict[str, str], expected: float) -> None:
    assert value(of(), name, **labels) == expected


def test_gpu_values_are_there_where_a_gpu_is_used() -> None:
    found = of(gpu_children=[GPU_CHILD], shared_dense=SHARED_DENSE)
    assert value(found, "gpu_pushed_bytes_total", gpu="GPU-0") == 4096
    assert value(found, "gpu_child_state", gpu="GPU-0", state="ready") == 1
    assert value(found, "gpu_child_state", gpu="GPU-0", state="gone") == 0
    assert value(found, "gpu_borrowers", model="opt") == 2
    assert not [name for name, _ in of() if "gpu" in name]


@pytest.mark.parametrize("state", ["loading", "ready", "degraded", "draining", "a state of a later version"])
def test_one_state_is_1_and_all_others_are_0(state: str) -> None:
    found = of(state=state)
    states = {dict(labels)["state"]: value for (name, labels), value in found.items() if name == "sparseflow_state"}
    assert states == dict.fromkeys(["loading", "ready", "degraded", "draining"], 0.0) | {state: 1.0}


def test_reasons_are_counted_and_not_told() -> None:
    text = status_text("s", made_status(state="degraded", reasons=["the disk is gone", "a thread has died"]))
    assert value(read(text), "degraded_reasons") == 2
    assert "disk is gone" not in text


def test_what_has_no_value_is_absent_and_never_0() -> None:
    status = made_status(hit_rate=None, models=[made_model(state="loading", n_resident=None, hit_rate_by_layer=None)])
    status["disk"] |= {"latency_p50_s": None, "bundles_per_read": None, "random_bytes_per_s": {}}
    status["sessions"] = [made_session(recall=None, recall_error=None)]
    found = read(status_text("s", status))
    names = {name for name, _ in found}
    for name in (
        *("hit_ratio", "memory_pinned_bytes", "disk_latency_p50_seconds", "disk_bundles_per_read"),
        *("disk_random_read_bytes_per_second", "model_resident_bundles", "layer_hit_ratio", "session_recall_ratio"),
    ):
        assert f"sparseflow_{name}" not in names
    assert value(found, "disk_latency_p99_seconds") == 0.05
    assert value(of(), "layer_hit_ratio", model="opt", layer="1") is None, "a layer of which nothing was asked"


def test_no_family_is_without_a_sample() -> None:
    assert all(family.samples for family in status_families(made_status(sessions=[], models=[], threads=[])))


# --- sessions


def test_sessions_of_one_process_and_model_are_summed() -> None:
    sessions = [
        made_session(),
        made_session(tokens=100, leases=0, state="quarantined"),
        made_session(pid=5, tokens=7),
        made_session(model="other", tokens=9),
    ]
    found = of(sessions=sessions)
    of_both = {"pid": "4242", "model": "opt"}
    assert value(found, "session_tokens_total", **of_both) == 131
    assert value(found, "session_leases", **of_both) == 2
    assert value(found, "session_quarantined", **of_both) == 1
    assert value(found, "session_recall_ratio", **of_both) is None, "a mean would be nobody's"
    assert value(found, "session_recall_ratio", pid="5", model="opt") == 0.98
    assert value(found, "session_tokens_total", pid="5", model="opt") == 7
    assert value(found, "session_tokens_total", pid="4242", model="other") == 9


@pytest.mark.parametrize("name", ['a "quoted" one', "back\\slash", "two\nlines", "größer", "{}=,"])
def test_names_come_through_whatever_is_in_them(name: str) -> None:
    found = of(models=[made_model(name=name)], sessions=[made_session(model=name)])
    assert value(found, "model_slots", model=name) == 50
    assert value(found, "session_tokens_total", pid="4242", model=name) == 31


# --- a server that does not answer


def refuse(error: Exception) -> Callable[[], dict[str, Any]]:
    def ask() -> dict[str, Any]:
        raise error

    return ask


@pytest.mark.parametrize(
    "ask",
    [
        refuse(ServerNotRunning("no server runs here")),
        refuse(NoAnswer("it said nothing")),
        refuse(OSError(24, "Too many open files")),
        refuse(ZeroDivisionError("a bug")),
        lambda: {"name": "s"},
        lambda: made_status(models=[{}]),
    ],
)
def test_server_that_gives_no_status_is_down_and_nothing_more_is_said(ask: Callable[[], dict[str, Any]]) -> None:
    assert read(generate_latest(status_registry(ask, "s")).decode()) == {
        ("sparseflow_up", (("server", "s"),)): 0.0,
    }
    assert read(status_text("s", None)) == {("sparseflow_up", (("server", "s"),)): 0.0}


def test_server_is_asked_each_time_and_may_come_back() -> None:
    answers: list[dict[str, Any] | None] = [made_status(tokens=1), None, made_status(tokens=2)]

    def ask() -> dict[str, Any]:
        answer = answers.pop(0)
        if answer is None:
            raise NoAnswer("it said nothing")
        return answer

    registry = status_registry(ask, "s")
    assert len(answers) == 3, "nobody has read anything"
    seen = [read(generate_latest(registry).decode()) for _ in range(3)]
    assert [value(found, "up") for found in seen] == [1, 0, 1]
    assert [value(found, "tokens_total") for found in seen] == [1, None, 2]


def test_what_others_put_into_a_registry_is_read_though_the_server_is_down() -> None:
    registry = CollectorRegistry()
    Gauge("other", "Somebody else's.", registry=registry).set(5)
    registry.register(StatusCollector(refuse(ServerNotRunning("none")), "s"))
    found = read(generate_latest(registry).decode())
    assert found["other", ()] == 5
    assert value(found, "up") == 0


def test_library_is_loaded_only_where_metrics_are_made() -> None:
    run_python("import sparseflow.protocol.metrics, sys; assert 'prometheus_client' not in sys.modules")
