"""What the front counts, for Prometheus; beside it what the weight server says of itself."""

from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from sparseflow.protocol.metrics import StatusCollector
from sparseflow.serving.pool import Pool

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)


class Metrics:
    """Counters and histograms of one front."""

    def __init__(self, pool: Pool, ask_weight_server: Callable[[], dict[str, Any]], server: str) -> None:
        registry = self.registry = CollectorRegistry()
        self.requests = Counter(
            "sparseflow_http_requests_total",
            "Answers to HTTP requests",
            ["route", "method", "status"],
            registry=registry,
        )
        self.request_s = Histogram(
            "sparseflow_http_request_seconds", "From request to end of its answer", ["route"], registry=registry,
            buckets=_SECONDS,
        )  # fmt: skip
        self.waited_s = Histogram(
            "sparseflow_queue_seconds", "From request to its prompt's start", registry=registry, buckets=_SECONDS
        )
        self.first_token_s = Histogram(
            "sparseflow_time_to_first_token_seconds", "From request to its first text", registry=registry,
            buckets=_SECONDS,
        )  # fmt: skip
        self.between_s = Histogram(
            "sparseflow_inter_token_seconds", "Between two pieces of text", registry=registry, buckets=_TOKEN_SECONDS
        )
        self.prompt_tokens = Counter("sparseflow_prompt_tokens_total", "Tokens of prompts", registry=registry)
        self.cached_tokens = Counter(
            "sparseflow_cached_prompt_tokens_total", "Those of them that were not computed anew", registry=registry
        )
        self.made_tokens = Counter("sparseflow_generated_tokens_total", "Tokens generated", registry=registry)
        self.cancelled = Counter(
            "sparseflow_cancelled_requests_total", "Requests whose client hung up", registry=registry
        )
        registry.register(_PoolCollector(pool))
        registry.register(StatusCollector(ask_weight_server, server))


class _PoolCollector(Collector):
    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    def collect(self) -> Iterator[Metric]:
        pool = self._pool
        yield GaugeMetricFamily("sparseflow_workers", "Workers that are there", value=pool.n_alive)
        yield GaugeMetricFamily("sparseflow_workers_busy", "Workers that compute", value=pool.n_busy)
        yield GaugeMetricFamily("sparseflow_requests", "Requests that are computed or wait", value=pool.n_requests)
        restarts = Metric("sparseflow_worker_restarts", "Workers started in the place of one that died", "counter")
        restarts.add_sample("sparseflow_worker_restarts_total", {}, pool.n_restarts)
        yield restarts

    def describe(self) -> list[Metric]:
        return []
