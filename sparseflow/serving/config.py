"""What an API server is started with. Each default is written here and nowhere else."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparseflow.errors import BadRequest, DiskError


@dataclass(frozen=True)
class ServeConfig:
    """Settings of one API server."""

    store: str | None = None
    """A store, a checkpoint folder or a hub id, for a weight server of its own. Or `server`."""
    server: str | None = None
    """A weight server that runs already."""
    weight_server_options: tuple[str, ...] = ()
    """Of `sparseflow-daemon`, for a weight server of its own."""
    worker: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of `SparseOPTForCausalLM.from_server`, but for the server's name; and `threads`."""
    workers: int = 1
    """Processes that generate, one text at a time each."""
    host: str = "127.0.0.1"
    """The address to listen at. 0.0.0.0: all that the machine has."""
    port: int = 8000
    """0: any that is free."""
    api_key_file: Path | None = None
    """A key a line; without it anybody who reaches the port may ask."""
    served_model_name: str | None = None
    """What clients call the model; None: its own name."""
    queue: int = 64
    """Requests that may wait; one more is answered 429."""
    queue_timeout_s: float = 300.0
    """How long a request waits for a worker; then it is answered 503."""
    step_timeout_s: float = 300.0
    """How long a worker may take for a token, or 512 tokens of a prompt; then it is replaced."""
    load_timeout_s: float = 1800.0
    """How long the weight server and the workers may take to start; converting a checkpoint counts."""
    drain_timeout_s: float = 10.0
    """How long ending waits for the texts that are being made."""
    log_format: str = "text"
    """`text` or `json`."""

    def __post_init__(self) -> None:
        if (self.store is None) == (self.server is None):
            raise BadRequest("serve: name either a STORE or a --server")
        if self.workers < 1:
            raise BadRequest(f"workers={self.workers}: give a number above 0")
        if self.queue < 0:
            raise BadRequest(f"queue={self.queue}: give a number of requests, 0 or more")
        if not 0 <= self.port < 1 << 16:
            raise BadRequest(f"port={self.port}: give a number from 0 (any) to 65535")
        for name in ("queue_timeout_s", "step_timeout_s", "load_timeout_s"):
            if not 0 < getattr(self, name) < math.inf:
                raise BadRequest(f"{name}={getattr(self, name)}: give seconds, more than 0")
        if not 0 <= self.drain_timeout_s < math.inf:
            raise BadRequest(f"drain_timeout_s={self.drain_timeout_s}: give seconds, 0 or more")

    def api_keys(self) -> frozenset[str]:
        """The keys of the file; empty where there is none.

        Raises:
            DiskError: it cannot be read. BadRequest: there is no key in it.
        """
        if self.api_key_file is None:
            return frozenset()
        try:
            lines = self.api_key_file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DiskError(
                f"{self.api_key_file}: cannot be read ({error}); write one API key a line into it"
            ) from error
        keys = frozenset(line.strip() for line in lines if line.strip())
        if not keys:
            raise BadRequest(f"{self.api_key_file}: no key in it; write one a line")
        return keys
