"""A status as a server gives it, with a value of its own at every place."""

import copy
from typing import Any

_MODEL = {
    "name": "opt",
    "store": "/srv/opt",
    "state": "ready",
    "error": None,
    "fingerprint": {"weights": "0940f8db98816588", "predictors": "77"},
    "dtype": "float16",
    "layers": 3,
    "is_resident": False,
    "nbytes": {"arena": 5000, "dense": 700},
    "n_sessions": 1,
    "n_slots": 50,
    "n_resident": 40,
    "fetch_limit": 5,
    "hit_rate_by_layer": [0.5, None, 0.75],
}
_SESSION = {
    "pid": 4242,
    "model": "opt",
    "since": 1.5e9,
    "state": "open",
    "leases": 2,
    "leased_slots": 9,
    "waiting": 1,
    "tokens": 31,
    "tokens_per_s": 3.25,
    "hits": 60,
    "misses": 20,
    "hit_rate": 0.75,
    "recall": 0.98,
    "recall_error": 0.01,
    "recall_samples": 64,
    "bytes_from_disk": 8192,
    "last_error": None,
    "transport": "arena",
}
_STATUS = {
    "status_version": 1,
    "name": "s",
    "state": "ready",
    "reasons": [],
    "epoch": 0xABC,
    "pid": 77,
    "version": "1.2.3",
    "protocol": 4,
    "uptime_s": 100.5,
    "models": [_MODEL],
    "arena": {"total": 5000, "used": 4000, "leased": 900, "filling": 100},
    "disk": {
        "reads": 11,
        "bytes": 16384,
        "bundles_per_read": 2.5,
        "latency_p50_s": 0.002,
        "latency_p99_s": 0.05,
        "io": {"opt": "direct"},
        "random_bytes_per_s": {"opt": 7e7},
        "reasons": [],
        "faults": {},
    },
    "prefetch": {"hinted": 13, "useful": 6, "late": 4, "wasted": 3},
    "tokens": 131,
    "hits": 600,
    "misses": 200,
    "hit_rate": 0.875,
    "evictions": 17,
    "memory": {
        "shared": 5700,
        "private": 2048,
        "shared_resident": 5600,
        "page_cache": 512,
        "pinned": None,
        "device": None,
    },
    "max_sessions": 8,
    "sessions": [_SESSION],
    "gpu_children": [],
    "shared_dense": None,
    "metrics": None,
    "threads": [
        {"name": "loop", "alive": True, "last_tick_age_s": 0.25, "errors": 0},
        {"name": "opt/read-0", "alive": True, "last_tick_age_s": None, "errors": 0},
    ],
}
GPU_CHILD = {
    "uuid": "GPU-0",
    "name": "A GPU",
    "state": "ready",
    "pid": 78,
    "slabs": 1,
    "starts": 2,
    "pushes": 5,
    "bytes_pushed": 4096,
    "errors": 1,
    "last_error": "it fell asleep",
}
SHARED_DENSE = {
    "device": 0,
    "uuid": "GPU-0",
    "pid": 79,
    "models": {"opt": {"state": "ready", "nbytes": 700, "borrowers": 2}},
    "last_error": None,
}


def made_status(**changed: Any) -> dict[str, Any]:
    """Of one model with one session. changed: fields that are other."""
    return copy.deepcopy(_STATUS) | changed


def made_session(**changed: Any) -> dict[str, Any]:
    """One of its sessions."""
    return copy.deepcopy(_SESSION) | changed


def made_model(**changed: Any) -> dict[str, Any]:
    """One of its models."""
    return copy.deepcopy(_MODEL) | changed
