"""One request's jobs: they wait, run, and are cancelled together."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing

from sparseflow.serving.api_error import ApiError
from sparseflow.serving.messages import Begun, Finished, Job, Message, Piece
from sparseflow.serving.metrics import Metrics
from sparseflow.serving.pool import Pool


class Work:
    """Runs jobs from when it is made until `close`, which cancels what is not done."""

    def __init__(self, pool: Pool, jobs: Sequence[Job], metrics: Metrics) -> None:
        """
        Raises:
            ApiError: too many requests wait already.
        """
        self._pool, self._jobs, self._metrics = pool, jobs, metrics
        # So that a request of many prompts leaves the others their turn.
        self._turns = asyncio.Semaphore(pool.n_workers)
        self._told: asyncio.Queue[tuple[int, Message] | ApiError | None] = asyncio.Queue()
        self._begin_s = time.perf_counter()
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
        """Cancel what is not done. May be called twice."""
        if not self._task.done():
            self._metrics.cancelled.inc()
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                for number, job in enumerate(self._jobs):
                    group.create_task(self._run_job(number, job))
        except* ApiError as errors:
            self._told.put_nowait(_first(errors))
        finally:
            self._pool.leave()
            self._told.put_nowait(None)

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
                    case Piece():
                        if last_s is None:
                            self._metrics.first_token_s.observe(now_s - self._begin_s)
                        else:
                            self._metrics.between_s.observe(now_s - last_s)
                        last_s = now_s
                    case Finished():
                        self._metrics.made_tokens.inc(message.completion_tokens)
                self._told.put_nowait((number, message))


def _first(errors: BaseExceptionGroup[ApiError]) -> ApiError:
    error: BaseException = errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, ApiError)
    return error
