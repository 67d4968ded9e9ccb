"""A server's status as Prometheus metrics: `sparseflow_` names, base units, `_total` on what only grows.

What a status has no value for is absent, never 0. What is summed since the server began is a counter, of which whoever
reads it takes the rate (`rate(sparseflow_tokens_total[1m])`).
"""

import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from sparseflow.errors import NoAnswer, SparseFlowError

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

STATES = ("loading", "ready", "degraded", "draining")
MODEL_STATES = ("loading", "ready", "failed")
GPU_CHILD_STATES = ("starting", "ready", "ending", "gone")

_log = logging.getLogger(__name__)

# (name, what it says, where in the status)
_GAUGES = (
    ("uptime_seconds", "Time since the server was started.", "uptime_s"),
    ("memory_shared_bytes", "Shared memory that holds weights, arena and codes.", "memory shared"),
    ("memory_private_bytes", "Memory that is the server's alone.", "memory private"),
    ("memory_shared_resident_bytes", "Shared memory that the server has touched.", "memory shared_resident"),
    ("memory_page_cache_bytes", "What of the stores' files is in the page cache.", "memory page_cache"),
    ("memory_pinned_bytes", "Page-locked memory.", "memory pinned"),
    ("memory_device_bytes", "Memory on GPUs.", "memory device"),
    ("arena_size_bytes", "Room for bundles in the arenas of all models.", "arena total"),
    ("arena_used_bytes", "What of the arenas holds bundles.", "arena used"),
    ("arena_leased_bytes", "What of the arenas sessions are reading.", "arena leased"),
    ("arena_filling_bytes", "What of the arenas is being read from disk.", "arena filling"),
    ("hit_ratio", "Share of the bundles asked for that were in memory, since the start.", "hit_rate"),
    ("disk_bundles_per_read", "Bundles that a read brings on average.", "disk bundles_per_read"),
    ("disk_latency_p50_seconds", "Time that reading a layer's bundles took lately, median.", "disk latency_p50_s"),
    ("disk_latency_p99_seconds", "Time that reading a layer's bundles took lately, 99 %.", "disk latency_p99_s"),
    ("sessions_limit", "Sessions of each model that there can be: each has a share of its arena.", "max_sessions"),
)
_COUNTERS = (
    ("tokens_total", "Tokens decoded by all sessions, those that are over included.", "tokens"),
    ("bundle_hits_total", "Bundles that were in memory, or on their way, when asked for.", "hits"),
    ("bundle_misses_total", "Bundles that had to be read when asked for.", "misses"),
    ("evictions_total", "Bundles that had to go for others.", "evictions"),
    ("prefetch_bundles_total", "Bundles read because of a hint.", "prefetch hinted"),
    ("prefetch_useful_bundles_total", "Hinted bundles asked for when they had come.", "prefetch useful"),
    ("prefetch_late_bundles_total", "Hinted bundles asked for on their way.", "prefetch late"),
    ("prefetch_wasted_bundles_total", "Hinted bundles evicted before anybody asked.", "prefetch wasted"),
    ("disk_reads_total", "Reads from disk.", "disk reads"),
    ("disk_read_bytes_total", "Bytes read from disk.", "disk bytes"),
)
# The same of a session; several of one process and model are summed.
_SESSION_GAUGES = (
    ("session_leases", "Requests of a session whose bundles it may be reading.", "leases"),
    ("session_leased_slots", "Slots of the arena under a session's leases.", "leased_slots"),
    ("session_waiting_requests", "Requests of a session that wait for its leases to come back.", "waiting"),
)
_SESSION_COUNTERS = (
    ("session_tokens_total", "Tokens that a session has decoded, as it says.", "tokens"),
    ("session_bundle_hits_total", "Bundles that were in memory when a session asked.", "hits"),
    ("session_bundle_misses_total", "Bundles that had to be read when a session asked.", "misses"),
    ("session_disk_read_bytes_total", "Bytes read from disk for a session.", "bytes_from_disk"),
    ("session_recall_samples_total", "Neurons behind a session's estimate of its recall.", "recall_samples"),
)
# The same where a process has one session of a model: there is no sum of these.
_SINGLE_SESSION_GAUGES = (
    ("session_start_time_seconds", "When a session was opened, in Unix time.", "since"),
    ("session_recall_ratio", "Share of the active neurons that a session computes, as it estimates.", "recall"),
    ("session_recall_error_ratio", "Standard error of that share.", "recall_error"),
)
_GPU_GAUGES = (("gpu_slabs", "Slabs of sessions that bundles are pushed to on a GPU.", "slabs"),)
_GPU_COUNTERS = (
    ("gpu_pushes_total", "Requests whose bundles were pushed to a GPU.", "pushes"),
    ("gpu_pushed_bytes_total", "Bytes pushed to a GPU.", "bytes_pushed"),
    ("gpu_errors_total", "Failures of the server's processes on a GPU.", "errors"),
    ("gpu_child_starts_total", "Processes that the server has started for a GPU.", "starts"),
)

_Value = TypeVar("_Value")
_ByLabels = dict[tuple[str, ...], _Value]
_Rows = Iterable[tuple[tuple[str, ...], float | None]]


class StatusCollector:
    """Asks a server each time a registry is read; what cannot be had is `sparseflow_up 0`, never an error."""

    def __init__(self, ask: Callable[[], dict[str, Any]], server: str) -> None:
        """
        Args:
            ask: gives a status, or raises; it has a deadline of its own.
            server: the server's name, for when it does not answer.
        """
        self._ask, self._server = ask, server

    def collect(self) -> "Iterator[Metric]":
        """What a registry calls."""
        try:
            families = [_up(self._server, True), *status_families(self._ask())]
        except SparseFlowError as error:
            _log.debug("metrics of server %s: %s", self._server, error)
            families = [_up(self._server, False)]
        except Exception:  # a registry would fail as a whole, with what others have put there
            _log.exception("metrics of server %s", self._server)
            families = [_up(self._server, False)]
        return iter(families)


def status_registry(ask: Callable[[], dict[str, Any]], server: str) -> "CollectorRegistry":
    """A registry with a `StatusCollector`, and nothing else."""
    from prometheus_client import CollectorRegistry

    registry = CollectorRegistry()
    registry.register(StatusCollector(ask, server))
    return registry


def status_text(server: str, content: dict[str, Any] | None) -> str:
    """A status in Prometheus' text format. content: None where the server does not answer."""
    from prometheus_client import generate_latest

    def told() -> dict[str, Any]:
        if content is None:
            raise NoAnswer(f"server {server!r} does not answer")
        return content

    return generate_latest(status_registry(told, server)).decode()


def status_families(content: dict[str, Any]) -> "Iterator[Metric]":
    """What a status says, as families with at least one sample each.

    Args:
        content: as `ask_status` returns it.
    """
    families = _Families(content["name"])
    for group in (_server, _models, _sessions, _threads, _gpus):
        yield from (family for family in group(families, content) if family.samples)


class _Families:
    """Makes families whose first label is the server."""

    def __init__(self, server: str) -> None:
        self._server = server

    def gauge(self, name: str, text: str, rows: _Rows, *labels: str) -> "GaugeMetricFamily":
        """rows: values of the labels, and the value."""
        from prometheus_client.core import GaugeMetricFamily

        family = GaugeMetricFamily(f"sparseflow_{name}", text, labels=("server", *labels))
        for values, value in self._known(rows):
            family.add_metric(values, value)
        return family

    def counter(self, name: str, text: str, rows: _Rows, *labels: str) -> "CounterMetricFamily":
        """The same of what only grows."""
        from prometheus_client.core import CounterMetricFamily

        family = CounterMetricFamily(f"sparseflow_{name}", text, labels=("server", *labels))
        for values, value in self._known(rows):
            family.add_metric(values, value)
        return family

    def states(
        self, name: str, text: str, known: tuple[str, ...], found: _ByLabels[str], *labels: str
    ) -> "GaugeMetricFamily":
        """1 for the state that each is in, 0 for the others. found: the states by the values of the labels."""
        rows = [
            ((*values, state), float(state == current))
            for values, current in found.items()
            for state in dict.fromkeys((*known, current))
        ]
        return self.gauge(name, text, rows, *labels, "state")

    def _known(self, rows: _Rows) -> Iterator[tuple[list[str], float]]:
        for values, value in rows:
            if value is not None:
                yield [self._server, *values], value


def _up(server: str, is_up: bool) -> "Metric":
    text = "Whether the weight server answers: 1, or 0 and nothing else is known of it."
    return _Families(server).gauge("up", text, [((), float(is_up))])


def _at(content: dict[str, Any], path: str) -> Any:
    """What lies there; None where nothing does."""
    found: Any = content
    for key in path.split():
        found = None if found is None else found.get(key)
    return found


def _server(families: _Families, content: dict[str, Any]) -> "Iterator[Metric]":
    yield families.gauge("build_info", "The version that runs.", [((content["version"],), 1)], "version")
    yield families.states("state", "Whether the server is in that state.", STATES, {(): content["state"]})
    text = "How many reasons there are to call the server degraded."
    yield families.gauge("degraded_reasons", text, [((), len(content["reasons"]))])
    yield families.gauge("sessions", "Sessions that are open.", [((), len(content["sessions"]))])
    for name, text, path in _GAUGES:
        yield families.gauge(name, text, [((), _at(content, path))])
    for name, text, path in _COUNTERS:
        yield families.counter(name, text, [((), _at(content, path))])
    speeds = content["disk"]["random_bytes_per_s"].items()
    text = "Speed of the disk in pieces of a bundle's size, as measured at the start."
    yield families.gauge(
        "disk_random_read_bytes_per_second", text, [((name,), speed) for name, speed in speeds], "model"
    )
    faults = content["disk"]["faults"].items()
    text = "Reads that went wrong on purpose, for tests."
    yield families.counter("injected_faults_total", text, [((point,), n) for point, n in faults], "point")


def _models(families: _Families, content: dict[str, Any]) -> "Iterator[Metric]":
    models: _ByLabels[dict[str, Any]] = {(model["name"],): model for model in content["models"]}
    states = {key: model["state"] for key, model in models.items()}
    yield families.states("model_state", "Whether a model is in that state.", MODEL_STATES, states, "model")
    infos = [((*key, model["dtype"], model["fingerprint"]["weights"]), 1.0) for key, model in models.items()]
    yield families.gauge("model_info", "What is served.", infos, "model", "dtype", "weights")
    regions = [((*key, region), nbytes) for key, model in models.items() for region, nbytes in model["nbytes"].items()]
    yield families.gauge("model_memory_bytes", "A model's shared memory.", regions, "model", "region")
    sessions = [(key, model.get("n_sessions")) for key, model in models.items()]
    yield families.gauge("model_sessions", "Sessions of a model that are open.", sessions, "model")
    slots = [(key, model["n_slots"]) for key, model in models.items()]
    yield families.gauge("model_slots", "Bundles that a model's arena has room for.", slots, "model")
    residents = [(key, model["n_resident"]) for key, model in models.items()]
    yield families.gauge("model_resident_bundles", "Bundles of a model in memory.", residents, "model")
    rates = [
        ((*key, str(layer)), rate)
        for key, model in models.items()
        for layer, rate in enumerate(model["hit_rate_by_layer"] or ())
    ]
    text = "Share of a layer's bundles asked for that were in memory, since the start."
    yield families.gauge("layer_hit_ratio", text, rates, "model", "layer")


def _sessions(families: _Families, content: dict[str, Any]) -> "Iterator[Metric]":
    by_process: _ByLabels[list[dict[str, Any]]] = defaultdict(list)
    for session in content["sessions"]:
        by_process[str(session["pid"]), session["model"]].append(session)
    labels = "pid", "model"
    for name, text, key in _SESSION_GAUGES:
        yield families.gauge(name, text, _sums(by_process, key), *labels)
    for name, text, key in _SESSION_COUNTERS:
        yield families.counter(name, text, _sums(by_process, key), *labels)
    for name, text, key in _SINGLE_SESSION_GAUGES:
        rows = [(values, found[0].get(key)) for values, found in by_process.items() if len(found) == 1]
        yield families.gauge(name, text, rows, *labels)
    quarantined = [
        (values, sum(session["state"] == "quarantined" for session in found)) for values, found in by_process.items()
    ]
    text = "Sessions whose connection broke while their process lives: they get nothing new."
    yield families.gauge("session_quarantined", text, quarantined, *labels)


def _sums(by_process: _ByLabels[list[dict[str, Any]]], key: str) -> _Rows:
    for values, found in by_process.items():
        known = [session[key] for session in found if session.get(key) is not None]
        yield values, sum(known) if known else None


def _threads(families: _Families, content: dict[str, Any]) -> "Iterator[Metric]":
    threads = content["threads"]
    rows = [((thread["name"],), float(thread["alive"])) for thread in threads]
    yield families.gauge("thread_up", "Whether a thread of the server is well: 1, or 0.", rows, "thread")
    ages = [((thread["name"],), thread["last_tick_age_s"]) for thread in threads]
    yield families.gauge("thread_last_turn_age_seconds", "Time since a thread came round.", ages, "thread")
    text = "Errors that nobody foresaw; each ended no more than what was being done."
    yield families.counter("unforeseen_errors_total", text, [((), sum(thread["errors"] for thread in threads))])


def _gpus(families: _Families, content: dict[str, Any]) -> "Iterator[Metric]":
    children: _ByLabels[dict[str, Any]] = {(child["uuid"],): child for child in content["gpu_children"]}
    states = {key: child["state"] for key, child in children.items()}
    yield families.states("gpu_child_state", "State of the server's process on a GPU.", GPU_CHILD_STATES, states, "gpu")
    for name, text, key in _GPU_GAUGES:
        yield families.gauge(name, text, [(values, child[key]) for values, child in children.items()], "gpu")
    for name, text, key in _GPU_COUNTERS:
        yield families.counter(name, text, [(values, child[key]) for values, child in children.items()], "gpu")
    lent = (content["shared_dense"] or {"models": {}})["models"]
    text = "Dense weights and predictors kept on a GPU for all."
    yield families.gauge("gpu_lent_bytes", text, [((name,), of["nbytes"]) for name, of in lent.items()], "model")
    text = "Sessions that use what is kept on a GPU for all."
    yield families.gauge("gpu_borrowers", text, [((name,), of["borrowers"]) for name, of in lent.items()], "model")
