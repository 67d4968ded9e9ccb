"""One request's jobs: they wait, run, and are cancelled together."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing

from sparseflow.serving.api_error import ApiError
from sparseflow.serving.messages import Begun, Finished, Job, Message, Piece
from sparseflow.serving.metrics import Metrics
from sparseflow.serving.pool import Pool

_UNREAD_MAX = 64  # messages that wait for a client that reads slowly; then its workers wait too
_log = logging.getLogger(__name__)


class Work:
    """Runs jobs from when it is made until `close`, which whoever makes it has to call."""

    def __init__(self, pool: Pool, jobs: Sequence[Job], metrics: Metrics) -> None:
        """
        Raises:
            ApiError: too many requests wait already.
        """
        self._pool, self._jobs, self._metrics = pool, jobs, metrics
        # So that a request of many prompts leaves the others their turn.
        self._turns = asyncio.Semaphore(pool.n_workers)
        self._told: asyncio.Queue[tuple[int, Message] | ApiError | None] = asyncio.Queue(_UNREAD_MAX)
        self._begin_s = time.perf_counter()
        self._is_closed = False
        pool.enter()
        self._task = asyncio.create_task(self._run())

    async def messages(self) -> AsyncIterator[tuple[int, Message]]:
        """Each message with the number of its job.

        Raises:
            ApiError: one of the jobs failed; the others are cancelled.
        """
        while (told := await self._told.get()) is not None:
            if isinstance(told, ApiError):
                raise told
            yield told

    async def close(self) -> None:
        """Cancel what is not done, and give the place in the queue back. May be called twice."""
        if self._is_closed:
            return
        self._is_closed = True
        if not self._task.done():
            self._metrics.cancelled.inc()
        self._task.cancel()
        self._pool.leave()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        last: ApiError | None = None
        try:
            async with asyncio.TaskGroup() as group:
                for number, job in enumerate(self._jobs):
                    group.create_task(self._run_job(number, job))
        except* ApiError as errors:
            last = _first(errors)
        except* Exception as errors:
            _log.error("a request failed", exc_info=errors)
            last = ApiError(500, "internal", f"{type(_leaf(errors)).__name__}; see the log")
        await self._told.put(last)

    async def _run_job(self, number: int, job: Job) -> None:
        last_s: float | None = None
        async with self._turns, aclosing(self._pool.run(job)) as messages:
            async for message in messages:
                now_s = time.perf_counter()
                match message:
                    case Begun():
                        self._metrics.waited_s.observe(now_s - self._begin_s)
                        self._metrics.prompt_tokens.inc(message.prompt_tokens)
                        self._metrics.cached_tokens.inc(message.cached_tokens)
                    case Piece(is_prompt=False):
                        if last_s is None:
                            self._metrics.first_token_s.observe(now_s - self._begin_s)
                        else:
                            self._metrics.between_s.observe(now_s - last_s)
                        last_s = now_s
                    case Finished():
                        self._metrics.made_tokens.inc(message.completion_tokens)
                await self._told.put((number, message))


def _first(errors: BaseExceptionGroup[ApiError]) -> ApiError:
    error = _leaf(errors)
    assert isinstance(error, ApiError)
    return error


def _leaf(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
