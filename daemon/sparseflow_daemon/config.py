"""What a server is started with. Each default is written here and nowhere else."""

from dataclasses import dataclass
from pathlib import Path

from sparseflow.engine.engine import DEFAULT_EVICTION, EVICTIONS
from sparseflow.engine.memory_plan import require_memory
from sparseflow.engine.reading import require_io
from sparseflow.errors import BadRequest
from sparseflow.utils.logs import LOG_FORMATS

LAST_PORT = 65535


@dataclass(frozen=True)
class ServerConfig:
    """Settings of one server."""

    stores: tuple[Path, ...]
    """Stores to serve, each under the name of its model."""
    name: str = "default"
    """What clients ask for."""
    memory: str | int = "auto"
    """The most that weights, arenas and buffers may take together, a size or `auto`: nine tenths of what is free."""
    cpu_cache_ratio: float = 1.0
    """At most this share of a model's bundles is kept in memory."""
    io: str = "auto"
    """How bundles are read: `direct`, `buffered`, `map` or `auto`."""
    eviction: str = DEFAULT_EVICTION
    """Which bundle goes first: the least often used of late (`lfu`), the least recently used (`lru`), or `fifo`."""
    max_sessions: int = 8
    """Inference processes at once, for each model. Each can always lease its share of the arena."""
    drain_timeout_s: float = 5.0
    """How long ending waits for leases to come back."""
    gpu_timeout_s: float = 10.0
    """How long the server's child on a GPU may take for anything; then it is ended. To start, three times that."""

    share_dense_gpu: int | None = None
    """The number of a GPU on which dense weights and predictors are kept once, for all inference processes there."""

    metrics_port: int | None = None
    """Where metrics are served over HTTP; 0: on any port that is free. None: nowhere."""
    metrics_host: str = "127.0.0.1"
    """The address of that port."""
    log_format: str = "text"
    """What the log's lines are: `text` for people, `json` for what collects logs."""

    def __post_init__(self) -> None:
        if not self.stores:
            raise BadRequest("no store to serve; name at least one")
        require_memory(self.memory)
        require_io(self.io)
        if not 0 < self.cpu_cache_ratio <= 1:
            raise BadRequest(f"cpu_cache_ratio={self.cpu_cache_ratio}: give a share of all bundles above 0, at most 1")
        if self.eviction not in EVICTIONS:
            raise BadRequest(f"eviction={self.eviction!r}: one of {', '.join(EVICTIONS)}")
        if self.max_sessions < 1:
            raise BadRequest(f"max_sessions={self.max_sessions}: give a number above 0")
        if not self.drain_timeout_s >= 0:
            raise BadRequest(f"drain_timeout_s={self.drain_timeout_s}: give seconds, 0 or more")
        if not self.gpu_timeout_s > 0:
            raise BadRequest(f"gpu_timeout_s={self.gpu_timeout_s}: give seconds, more than 0")
        if self.share_dense_gpu is not None and self.share_dense_gpu < 0:
            raise BadRequest(f"share_dense_gpu={self.share_dense_gpu}: give a GPU's number, 0 or more")
        if self.metrics_port is not None and not 0 <= self.metrics_port <= LAST_PORT:
            raise BadRequest(f"metrics_port={self.metrics_port}: give a port up to {LAST_PORT}, or 0 for any free one")
        if self.log_format not in LOG_FORMATS:
            raise BadRequest(f"log_format={self.log_format!r}: one of {', '.join(LOG_FORMATS)}")
