"""One attached inference process: what it holds, and what is counted of it."""

import os
import socket
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparseflow.engine.counts import FetchCounts
from sparseflow.engine.shared_memory import SharedMemory
from sparseflow.protocol.measured_recall import MeasuredRecall
from sparseflow.protocol.messages import AcquireNeurons
from sparseflow.protocol.session_counters import COUNTERS_NBYTES, SessionCounters
from sparseflow_daemon.served_model import ServedModel

_RATE_WINDOW_S = 10.0


@dataclass(slots=True)
class Lease:
    """A request, from when it came until it is released. line: where its reply goes."""

    line: bytes
    request: AcquireNeurons
    ids: NDArray[np.uint32]
    deadline_s: float
    """When it is refused if it is not begun yet."""
    fetch: int = 0
    """Its number in the engine; 0: not begun, because the session would hold more than its share."""
    is_told: bool = False
    """The client knows its slots, but not yet that all are filled."""


@dataclass(eq=False)
class Session:
    """Lives as long as its connection and its process."""

    token: bytes
    pid: int
    sock: socket.socket
    pidfd: int
    model: ServedModel
    counters_memory: SharedMemory = field(init=False)
    is_quarantined: bool = False
    """Its connection ended without goodbye while its process lives: it gets nothing new, and what it leases stays."""
    leases: dict[int, Lease] = field(default_factory=dict)
    """Begun, by request id."""
    lines: set[bytes] = field(default_factory=set)
    waiting: deque[Lease] = field(default_factory=deque)
    """Not begun."""
    counts: FetchCounts = field(default_factory=FetchCounts)
    last_error: str | None = None
    since_s: float = field(default_factory=time.time)

    def __post_init__(self) -> None:
        self.counters_memory = SharedMemory("counters", COUNTERS_NBYTES, others_may_write=True)
        self._counters = SessionCounters(self.counters_memory.bytes)
        self._samples: deque[tuple[float, int]] = deque([(time.monotonic(), 0)])

    @property
    def log_fields(self) -> dict[str, Any]:
        """What lines of the log that are about it carry beside their text."""
        return {"pid": self.pid, "model": self.model.name}

    @property
    def n_leased(self) -> int:
        """Slots under its leases."""
        return sum(len(lease.ids) for lease in self.leases.values())

    @property
    def tokens(self) -> int:
        """Tokens it has decoded, as it says."""
        return self._counters.tokens

    @property
    def recall(self) -> MeasuredRecall:
        """What it finds of what is active, as it says."""
        return self._counters.recall

    def sample(self) -> None:
        """Note the number of tokens; called about once a second."""
        now = time.monotonic()
        self._samples.append((now, self.tokens))
        while len(self._samples) > 2 and self._samples[1][0] < now - _RATE_WINDOW_S:
            self._samples.popleft()

    @property
    def tokens_per_s(self) -> float:
        """Over the last seconds."""
        begin_s, before = self._samples[0]
        return (self.tokens - before) / max(time.monotonic() - begin_s, 1e-3)

    def close(self) -> None:
        """Close what is open of it. May be called twice."""
        self.sock.close()
        self.counters_memory.close()
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self.pidfd = -1
