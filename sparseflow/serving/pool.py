"""The workers: which is free, who waits for one, and another one in the place of one that dies."""

import asyncio
import logging
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from contextlib import aclosing
from typing import Any

from sparseflow.errors import ServerError
from sparseflow.serving.api_error import ApiError
from sparseflow.serving.messages import Job, Message, Ready
from sparseflow.serving.worker_process import WorkerProcess, described

_log = logging.getLogger(__name__)
_RESTART_S_MAX = 30.0
_COMPARED = 1 << 16  # characters, or token ids


class Pool:
    """So many workers, and a queue of bounded length before them."""

    def __init__(
        self, start: Callable[[], Awaitable[WorkerProcess]], n_workers: int, n_waiting_max: int, queue_timeout_s: float
    ) -> None:
        """
        Args:
            start: makes a worker.
            n_waiting_max: requests that may wait beside those that are computed.
            queue_timeout_s: how long a job waits for a worker.
        """
        self._start = start
        self.n_workers = n_workers
        self._n_requests_max = n_workers + n_waiting_max
        self._queue_timeout_s = queue_timeout_s
        self._workers: set[WorkerProcess] = set()
        self._idle: list[WorkerProcess] = []
        self._waiting: deque[asyncio.Future[WorkerProcess]] = deque()
        self._tasks: set[asyncio.Task[None]] = set()
        self.ready: Ready
        """What the first worker said of the model."""
        self.n_requests = 0
        self.n_restarts = 0
        self._is_closed = False

    async def open(self) -> None:
        """Start all workers.

        Raises:
            ServerError: one could not be started; then none is left.
        """
        for _ in range(self.n_workers):
            self._in_background(self._start_one())
        starts = list(self._tasks)
        try:
            await asyncio.gather(*starts)
        except BaseException:
            await self.close()
            raise
        self.ready = self._idle[0].ready

    async def close(self) -> None:
        """End all workers, and what has one or waits for one, by an error `ending`. May be called twice."""
        self._is_closed = True
        for future in self._waiting:
            if not future.done():
                future.set_exception(_ending())
        while self._tasks or self._workers:
            tasks, workers, self._workers, self._idle = list(self._tasks), list(self._workers), set(), []
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, *(worker.end() for worker in workers), return_exceptions=True)

    # --- requests

    def enter(self) -> None:
        """A request comes, to `leave` later.

        Raises:
            ApiError: there are as many as may be.
        """
        if self.n_requests >= self._n_requests_max:
            n_waiting = self._n_requests_max - self.n_workers
            raise ApiError(
                429,
                "queue_full",
                f"{self.n_workers} requests are computed and {n_waiting} wait, which is the most (--queue); try later",
                retry_after_s=1,
            )
        self.n_requests += 1

    def leave(self) -> None:
        """A request is answered, or nobody waits for it any more."""
        self.n_requests -= 1

    async def run(self, job: Job) -> AsyncGenerator[Message]:
        """A job's messages, but for Done, from the next free worker. If it is closed early, the job is cancelled.

        Raises:
            ApiError: no worker was free in time, the job failed, or the worker died.
        """
        worker = await self._take(job)
        try:
            async with aclosing(worker.run(job)) as messages:
                async for message in messages:
                    yield message
        except ApiError as error:
            raise (_ending() if self._is_closed else error) from None
        finally:
            if worker.is_idle and worker.is_alive:
                self._give(worker)
            else:
                self._in_background(self._recover(worker))

    # --- workers

    @property
    def n_alive(self) -> int:
        """Workers that are there now."""
        return sum(worker.is_alive for worker in list(self._workers))

    @property
    def pids(self) -> list[int]:
        """Of the workers."""
        return sorted(worker.pid for worker in self._workers)

    @property
    def n_busy(self) -> int:
        """Workers that have a job."""
        return sum(not worker.is_idle for worker in list(self._workers))

    async def _take(self, job: Job) -> WorkerProcess:
        if self._is_closed:
            raise _ending()
        if self._idle:
            best = max(self._idle, key=lambda worker: _n_common(worker.last_prompt, job))
            self._idle.remove(best)
            return best
        future: asyncio.Future[WorkerProcess] = asyncio.get_running_loop().create_future()
        self._waiting.append(future)
        try:
            async with asyncio.timeout(self._queue_timeout_s):
                return await future
        except BaseException as error:
            if future in self._waiting:
                self._waiting.remove(future)
            elif future.done() and not future.cancelled() and future.exception() is None:
                self._give(future.result())  # it came when it was waited for no more
            if not isinstance(error, TimeoutError):
                raise
            text = f"no worker was free for {self._queue_timeout_s:g} s; try later, or start more with --workers"
            raise ApiError(503, "queue_timeout", text, retry_after_s=1) from None

    async def _start_one(self) -> None:
        worker = await self._start()
        self._workers.add(worker)
        worker.when_ended(lambda: self._on_end(worker))
        self._give(worker)

    def _on_end(self, worker: WorkerProcess) -> None:
        """One that had a job is recovered by whoever runs that."""
        if worker in self._idle:
            self._idle.remove(worker)
            self._in_background(self._recover(worker))

    def _give(self, worker: WorkerProcess) -> None:
        """A worker is free."""
        if not worker.is_alive:
            self._in_background(self._recover(worker))
            return
        while self._waiting:
            future = self._waiting.popleft()
            if not future.done():
                future.set_result(worker)
                return
        self._idle.append(worker)

    async def _recover(self, worker: WorkerProcess) -> None:
        """A worker is free once it has ended the job that nobody waits for; one that died is replaced."""
        await worker.abandon()
        if worker.is_alive:
            self._give(worker)
            return
        self._workers.discard(worker)
        await worker.end()
        if not self._is_closed:
            _log.warning("worker %d died; another one is started", worker.pid)
            await self._replace()

    async def _replace(self) -> None:
        delay_s = 0.0
        while True:
            await asyncio.sleep(delay_s)
            try:
                await self._start_one()
            except (ServerError, OSError) as error:  # the system may have no more processes or descriptors now
                delay_s = min(max(1.0, 2 * delay_s), _RESTART_S_MAX)
                _log.error("no worker in its place: %s; tried again in %g s", error, delay_s)
            else:
                self.n_restarts += 1
                return

    def _in_background(self, work: Coroutine[Any, Any, None]) -> None:
        if self._is_closed:
            work.close()
            return
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _ending() -> ApiError:
    return ApiError(503, "ending", "the server is ending; try again when it is back")


def _n_common(last_prompt: str | list[int], job: Job) -> int:
    """How much of a job's prompt a worker's last one began with: so much need not be computed."""
    prompt = described(job)[:_COMPARED]
    if not isinstance(prompt, type(last_prompt)):
        return 0
    pairs = zip(prompt, last_prompt, strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(prompt), len(last_prompt)))
