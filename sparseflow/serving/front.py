"""What the routes know: the pool, the model's name and abilities, keys, and the weight server's health."""

import time
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from sparseflow.errors import SparseFlowError
from sparseflow.protocol.inquiry import ask_status
from sparseflow.serving.api_error import ApiError
from sparseflow.serving.messages import Job
from sparseflow.serving.metrics import Metrics
from sparseflow.serving.pool import Pool
from sparseflow.serving.worker_process import described

_ASK_S = 2.0


@dataclass
class Front:
    """An open pool, as it is shown over HTTP."""

    pool: Pool
    server: str
    """The weight server's name."""
    name: str
    """What clients call the model."""
    api_keys: frozenset[str] = frozenset()
    """Empty: anybody may ask."""
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.metrics = Metrics(self.pool, partial(ask_status, self.server, _ASK_S), self.server)

    @property
    def fidelity(self) -> str:
        """Of the workers."""
        return self.pool.ready.fidelity

    def model_card(self) -> dict[str, Any]:
        """The model as `/v1/models` lists it."""
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "sparseflow",
            "max_model_len": self.pool.ready.n_positions,
            "fidelity": self.fidelity,
        }

    def require_model(self, name: str | None) -> None:
        """
        Raises:
            ApiError: another model than the one that is served.
        """
        if name not in (None, self.name):
            raise ApiError(404, "model_not_found", f"model {name!r} is not served here; ask for {self.name!r}", "model")

    def fitting(self, jobs: list[Job]) -> list[Job]:
        """The jobs.

        Raises:
            ApiError: a prompt is so long that it need not be tokenized to know that it does not fit.
        """
        ready = self.pool.ready
        for job in jobs:
            size, most, what = len(described(job)), ready.n_positions, "tokens"
            if not isinstance(job.prompt, list):
                most, what = ready.n_positions * ready.longest_token, "characters"
            if size > most:
                text = f"a prompt of {size} {what}, the model has {ready.n_positions} positions; shorten the prompt"
                raise ApiError(400, "context_length_exceeded", text, "messages" if job.messages else "prompt")
        return jobs

    def require_chat_template(self) -> None:
        """
        Raises:
            ApiError: the tokenizer came without one.
        """
        if not self.pool.ready.has_chat_template:
            raise ApiError(
                400,
                "no_chat_template",
                f"{self.name!r} has no chat template, so there is no telling how it was trained to chat; "
                "use /v1/completions, or put chat_template.jinja into the checkpoint folder and convert again",
                "messages",
            )

    def health(self) -> dict[str, Any]:
        """`status` is `ok` where texts can be made, else `unavailable`."""
        pool = self.pool
        try:
            weights = str(ask_status(self.server, _ASK_S)["state"])
        except SparseFlowError as error:
            weights = type(error).__name__
        is_well = pool.n_alive > 0 and weights in ("ready", "degraded")
        return {
            "status": "ok" if is_well else "unavailable",
            "model": self.name,
            "workers": {"alive": pool.n_alive, "busy": pool.n_busy, "wanted": pool.n_workers},
            "requests": pool.n_requests,
            "weight_server": {"name": self.server, "state": weights},
        }
