"""What a server says of itself: from counters, at once, whatever the disk is doing."""

import os
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np

import sparseflow
from sparseflow.engine.counts import FetchCounts
from sparseflow.protocol.messages import PROTOCOL_VERSION
from sparseflow.utils.process_memory import process_memory
from sparseflow_daemon.page_cache import page_cache_nbytes
from sparseflow_daemon.served_model import ServedModel

if TYPE_CHECKING:
    from sparseflow_daemon.server import Server
    from sparseflow_daemon.sessions import Session

STATUS_VERSION = 1


def reasons(server: "Server") -> list[str]:
    """Why the server is degraded; empty where it is not."""
    found = [str(model.error) for model in server.models.values() if model.error is not None]
    for leasing in server.leasings.values():
        if leasing.last_error is not None:
            found.append(f"{leasing.n_errors} requests failed at the disk, the last: {leasing.last_error}")
    if server.lending.last_error is not None:
        found.append(server.lending.last_error)
    if server.n_errors:
        found.append(f"{server.n_errors} unforeseen errors, see the log")
    for thread in threads(server):
        if not thread["alive"]:
            found.append(f"thread {thread['name']} has died; restart the server")
    return found


def content(server: "Server") -> dict[str, Any]:
    """The fields of `sparseflow status --json`. SI units; None for what there is not."""
    memory = process_memory()
    models = list(server.models.values())
    loaded = [model for model in models if model.state == "ready"]
    counts = sum((model.engine.counts() for model in loaded), FetchCounts())
    # A model that is all in memory was asked for once, to fill the arena.
    asked = sum((model.engine.counts() for model in loaded if not model.is_resident), FetchCounts())
    n_sessions = Counter(session.model.name for session in server.sessions.values())
    return {
        "status_version": STATUS_VERSION,
        "name": server.directory.name,
        "state": server.state,
        "reasons": reasons(server),
        "epoch": server.epoch,
        "pid": os.getpid(),
        "version": sparseflow.__version__,
        "protocol": PROTOCOL_VERSION,
        "uptime_s": time.time() - server.began_s,
        "models": [_model(model, n_sessions[model.name]) for model in models],
        "arena": _arena(loaded),
        "disk": _disk(loaded, counts),
        "prefetch": {
            "hinted": counts.hinted,
            "useful": counts.hints_useful,
            "late": counts.hints_late,
            "wasted": counts.hints_wasted,
        },
        "tokens": server.n_past_tokens + sum(session.tokens for session in server.sessions.values()),
        "hits": asked.hits,
        "misses": asked.misses,
        "hit_rate": asked.hit_rate,
        "evictions": counts.evictions,
        "memory": {
            "shared": sum(model.nbytes for model in models),
            "private": memory.private,
            "shared_resident": memory.shared,
            "page_cache": page_cache_nbytes(models),
            "pinned": None,
            "device": None,
        },
        "max_sessions": server.config.max_sessions,
        "sessions": [
            _session(session) | {"transport": server.pushing.transport(session)} for session in server.sessions.values()
        ],
        "gpu_children": server.children.status(),
        "shared_dense": server.lending.status(),
        "metrics": None if server.metrics is None else server.metrics.url,
        "threads": threads(server),
    }


def threads(server: "Server") -> list[dict[str, Any]]:
    """Each thread's health. The loop is well where it answers; the loader's end is no death."""
    age_s = time.monotonic() - server.last_tick_s
    found = [{"name": "loop", "alive": True, "last_tick_age_s": age_s, "errors": server.n_errors}]
    if server.loader.is_alive():
        found.append({"name": "loader", "alive": True, "last_tick_age_s": None, "errors": 0})
    if server.metrics is not None:
        found.append({"name": "metrics", "alive": server.metrics.is_alive, "last_tick_age_s": None, "errors": 0})
    for model in server.models.values():
        if model.state == "ready":
            for n, is_alive in enumerate(model.engine.state().threads_alive):
                found.append(
                    {"name": f"{model.name}/read-{n}", "alive": is_alive, "last_tick_age_s": None, "errors": 0}
                )
    return found


def _model(model: ServedModel, n_sessions: int) -> dict[str, Any]:
    is_ready = model.state == "ready"
    state = model.engine.state() if is_ready else None
    return {
        "name": model.name,
        "store": str(model.store),
        "state": model.state,
        "error": None if model.error is None else str(model.error),
        "fingerprint": {key: model.identity[key] for key in ("weights", "predictors")},
        "dtype": model.profile.dtype,
        "layers": model.profile.num_layers,
        "is_resident": model.is_resident,
        "nbytes": {name: region.nbytes for name, region in model.regions.items()},
        "n_sessions": n_sessions,
        "n_slots": model.n_slots,
        "n_resident": None if state is None else state.n_resident,
        "fetch_limit": model.fetch_limit,
        "hit_rate_by_layer": None if state is None else _rates(state.hits, state.misses),
    }


def _rates(hits: Any, misses: Any) -> list[float | None]:
    return [h / (h + m) if h + m else None for h, m in zip(hits.tolist(), misses.tolist(), strict=True)]


def _arena(loaded: list[ServedModel]) -> dict[str, Any]:
    """Sums over models, in bytes, because their bundles differ in size."""
    sums = {"total": 0, "used": 0, "leased": 0, "filling": 0}
    for model in loaded:
        state, nbytes = model.engine.state(), model.profile.bundle_nbytes
        for name, n in zip(sums, (state.n_slots, state.n_resident, state.n_leased, state.n_loading), strict=True):
            sums[name] += n * nbytes
    return sums


def _disk(loaded: list[ServedModel], counts: FetchCounts) -> dict[str, Any]:
    states = [model.engine.state() for model in loaded]
    latencies = [latency for state in states for latency in state.latencies_s]
    p50, p99 = np.percentile(latencies, (50, 99)).tolist() if latencies else (None, None)
    n_bundles = sum(state.n_bundles_read for state in states)
    return {
        "reads": counts.reads,
        "bytes": counts.bytes_from_disk,
        "bundles_per_read": n_bundles / counts.reads if counts.reads else None,
        "latency_p50_s": p50,
        "latency_p99_s": p99,
        "io": {model.name: model.engine.io for model in loaded},
        "random_bytes_per_s": {
            model.name: model.engine.speed.bytes_per_s(model.profile.bundle_nbytes) for model in loaded
        },
        "reasons": [reason for model in loaded for reason in model.engine.reasons],
        "faults": sum((Counter(model.engine.faults) for model in loaded), Counter()),
    }


def _session(session: "Session") -> dict[str, Any]:
    measured = session.recall
    return {
        "pid": session.pid,
        "model": session.model.name,
        "since": session.since_s,
        "state": "quarantined" if session.is_quarantined else "open",
        "leases": len(session.leases),
        "leased_slots": session.n_leased,
        "waiting": len(session.waiting),
        "tokens": session.tokens,
        "tokens_per_s": session.tokens_per_s,
        "hits": session.counts.hits,
        "misses": session.counts.misses,
        "hit_rate": session.counts.hit_rate,
        "recall": measured.recall,
        "recall_error": measured.recall_error,
        "recall_samples": measured.recall_samples,
        "bytes_from_disk": session.counts.bytes_from_disk,
        "last_error": session.last_error,
    }
