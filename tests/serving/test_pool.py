"""The pool on real processes that compute nothing: who waits, who is told what, and who takes the place of the dead."""

import asyncio
import errno
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import psutil
import pytest

from sparseflow.errors import ServerError
from sparseflow.serving.api_error import ApiError
from sparseflow.serving.messages import Job, Message, Piece
from sparseflow.serving.pool import Pool
from sparseflow.serving.worker_process import WorkerProcess

PROGRAM = [str(Path(__file__).with_name("light_worker.py"))]
DEADLINE_S = 60.0
IDS = count(1)


def run_test(test: Callable[[], Awaitable[None]]) -> None:
    """With a deadline, and nothing left of it."""

    async def limited() -> None:
        async with asyncio.timeout(DEADLINE_S):
            await test()

    me = psutil.Process()
    children, before = me.children(), (me.num_fds(), me.num_threads())
    asyncio.run(limited())
    assert me.children() == children
    deadline = time.monotonic() + 5  # asyncio waits for a process in a thread, which ends a moment after it
    while (after := (me.num_fds(), me.num_threads())) != before and time.monotonic() < deadline:
        time.sleep(0.02)
    assert after == before


@asynccontextmanager
async def opened(
    n_workers: int = 1, n_waiting: int = 9, queue_timeout_s: float = DEADLINE_S, silence_s: float = DEADLINE_S
) -> AsyncIterator[Pool]:
    start = partial(WorkerProcess.start, {}, DEADLINE_S, silence_s, PROGRAM)
    pool = Pool(start, n_workers, n_waiting, queue_timeout_s)
    await pool.open()
    try:
        yield pool
    finally:
        await pool.close()
        await pool.close()  # may be called twice


async def said(pool: Pool, prompt: str) -> str:
    messages: list[Message] = [message async for message in pool.run(Job(next(IDS), prompt=prompt))]
    return " ".join(message.text for message in messages if isinstance(message, Piece))


async def until(holds: Callable[[], Any]) -> None:
    while not holds():
        await asyncio.sleep(0.01)


async def begun(pool: Pool, prompt: str) -> "asyncio.Task[str]":
    """A job that has a worker."""
    n_busy = pool.n_busy
    task = asyncio.create_task(said(pool, prompt))
    await until(lambda: pool.n_busy > n_busy)
    return task


def test_jobs_are_done_and_each_waits_for_a_worker() -> None:
    async def test() -> None:
        async with opened(2) as pool:
            assert pool.ready.model == "scripted"
            found = await asyncio.gather(*(said(pool, f"say a{n} b{n}") for n in range(20)))
            assert found == [f"a{n} b{n}" for n in range(20)]
            assert (pool.n_alive, pool.n_busy) == (2, 0)

    run_test(test)


def test_who_waits_is_served_in_turn() -> None:
    async def test() -> None:
        async with opened(1) as pool:
            order: list[int] = []

            async def note(n: int) -> None:
                await said(pool, "say x")
                order.append(n)

            first = await begun(pool, "wait")
            others = [asyncio.create_task(note(n)) for n in range(5)]
            await asyncio.sleep(0)
            first.cancel()
            await asyncio.gather(*others)
            assert order == [0, 1, 2, 3, 4]

    run_test(test)


def test_one_request_too_many_is_told_so_by_name() -> None:
    async def test() -> None:
        async with opened(1, n_waiting=2) as pool:
            for _ in range(3):
                pool.enter()
            with pytest.raises(ApiError, match="1 requests are computed and 2 wait") as refused:
                pool.enter()
            assert (refused.value.status, refused.value.code) == (429, "queue_full")
            assert refused.value.headers == {"Retry-After": "1"}
            pool.leave()
            pool.enter()

    run_test(test)


def test_wait_for_a_worker_has_an_end() -> None:
    async def test() -> None:
        async with opened(1, queue_timeout_s=0.2) as pool:
            busy = await begun(pool, "wait")
            with pytest.raises(ApiError, match=r"no worker was free for 0.2 s") as refused:
                await said(pool, "say a")
            assert (refused.value.status, refused.value.code) == (503, "queue_timeout")
            busy.cancel()
            await until(lambda: pool.n_busy == 0)
            assert await said(pool, "say a") == "a"

    run_test(test)


def test_cancelled_job_frees_its_worker_and_a_cancelled_wait_costs_none() -> None:
    async def test() -> None:
        async with opened(1) as pool:
            for _ in range(10):
                running = await begun(pool, "wait")
                waiting = asyncio.create_task(said(pool, "say never"))
                await asyncio.sleep(0)
                waiting.cancel()
                running.cancel()
                with suppress(asyncio.CancelledError):
                    await running
                await until(lambda: pool.n_busy == 0)
            assert await said(pool, "say a") == "a"
            assert (pool.n_alive, pool.n_restarts) == (1, 0)

    run_test(test)


def test_wait_that_is_cancelled_as_its_worker_comes_gives_it_on() -> None:
    """In the same round of the loop."""

    async def test() -> None:
        async with opened(1) as pool:
            running = await begun(pool, "wait")
            waiting = asyncio.create_task(said(pool, "say never"))
            await asyncio.sleep(0)
            give = pool._give

            def give_and_cancel(worker: WorkerProcess) -> None:
                give(worker)
                waiting.cancel()

            pool._give = give_and_cancel
            running.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            pool._give = give
            assert await said(pool, "say b") == "b"

    run_test(test)


@pytest.mark.parametrize(
    ("prompt", "status", "code", "text"),
    [("refuse", 400, "bad_request", "not with me"), ("fail", 500, "internal", "ZeroDivisionError")],
)
def test_failed_job_is_told_by_name_and_its_worker_stays(prompt: str, status: int, code: str, text: str) -> None:
    async def test() -> None:
        async with opened(1) as pool:
            pids = pool.pids
            with pytest.raises(ApiError, match=text) as failed:
                await said(pool, prompt)
            assert (failed.value.status, failed.value.code) == (status, code)
            assert await said(pool, "say a") == "a"
            assert pool.pids == pids

    run_test(test)


def test_job_whose_worker_dies_is_told_so_and_another_worker_comes() -> None:
    async def test() -> None:
        async with opened(1) as pool:
            (pid,) = pool.pids
            with pytest.raises(ApiError) as failed:
                await said(pool, "die")
            assert (failed.value.status, failed.value.code) == (500, "worker_died")
            assert await said(pool, "say a") == "a"
            assert pool.n_restarts == 1
            assert pool.pids != [pid]

    run_test(test)


def test_worker_that_is_killed_while_it_is_idle_is_replaced_before_anybody_asks() -> None:
    async def test() -> None:
        async with opened(2) as pool:
            os.kill(pool.pids[0], signal.SIGKILL)
            await until(lambda: pool.n_restarts == 1 and pool.n_alive == 2)
            assert await asyncio.gather(*(said(pool, "say a") for _ in range(4))) == ["a"] * 4

    run_test(test)


def test_worker_that_is_silent_for_too_long_is_replaced() -> None:
    async def test() -> None:
        async with opened(1, silence_s=0.5) as pool:
            with pytest.raises(ApiError, match=r"silent for 0.5 s") as failed:
                await said(pool, "hang")
            assert failed.value.code == "worker_stuck"
            assert await said(pool, "say a") == "a"
            hanging = await begun(pool, "hang")
            hanging.cancel()  # nobody waits, and it does not listen
            assert await said(pool, "say b") == "b"
            assert pool.n_restarts == 2

    run_test(test)


def test_worker_that_cannot_be_replaced_at_once_is_tried_again() -> None:
    async def test() -> None:
        async with opened(1) as pool:
            right, fails = pool._start, iter([True, True])

            async def start() -> WorkerProcess:
                if next(fails, False):
                    return await WorkerProcess.start({"begins": False}, DEADLINE_S, DEADLINE_S, PROGRAM)
                return await right()

            pool._start = start
            os.kill(pool.pids[0], signal.SIGKILL)
            await until(lambda: pool.n_alive == 0)
            assert await said(pool, "say a") == "a"

    run_test(test)


@pytest.mark.parametrize(
    ("arguments", "timeout_s", "text"),
    [({"begins": False}, DEADLINE_S, "exit code 3"), ({"begins": "late"}, 0.5, r"not ready within 0.5 s")],
)
def test_worker_that_does_not_begin_is_one_error(arguments: dict[str, Any], timeout_s: float, text: str) -> None:
    async def test() -> None:
        pool = Pool(partial(WorkerProcess.start, arguments, timeout_s, DEADLINE_S, PROGRAM), 2, 0, DEADLINE_S)
        with pytest.raises(ServerError, match=text):
            await pool.open()

    run_test(test)


def test_system_that_refuses_a_process_is_asked_again() -> None:
    async def test() -> None:
        async with opened(1) as pool:
            right, fails = pool._start, iter([True])

            async def start() -> WorkerProcess:
                if next(fails, False):
                    raise OSError(errno.EMFILE, "Too many open files")
                return await right()

            pool._start = start
            os.kill(pool.pids[0], signal.SIGKILL)
            await until(lambda: pool.n_alive == 0)
            assert await said(pool, "say a") == "a"

    run_test(test)


def test_job_that_cannot_be_sent_leaves_its_worker_free() -> None:
    async def test() -> None:
        async with opened(1) as pool:
            with pytest.raises(UnicodeEncodeError):
                await said(pool, "\ud800")
            assert await said(pool, "say a") == "a"
            assert pool.n_restarts == 0

    run_test(test)


def test_pool_that_is_closed_while_it_opens_leaves_no_worker() -> None:
    async def test() -> None:
        arguments = iter([{}, {"begins": "late"}])

        async def start() -> WorkerProcess:
            return await WorkerProcess.start(next(arguments), DEADLINE_S, DEADLINE_S, PROGRAM)

        pool = Pool(start, 2, 0, DEADLINE_S)
        opening = asyncio.create_task(pool.open())
        await until(lambda: pool.n_alive == 1)
        opening.cancel()
        with pytest.raises(asyncio.CancelledError):
            await opening

    run_test(test)


def test_nothing_is_started_once_the_pool_is_closed() -> None:
    async def test() -> None:
        async with opened(2) as pool:
            started: list[None] = []
            right = pool._start

            async def start() -> WorkerProcess:
                started.append(None)
                return await right()

            pool._start = start
            running = await begun(pool, "wait")
            os.kill(pool.pids[0], signal.SIGKILL)
            await pool.close()
            with pytest.raises(ApiError):
                await running
            n_started = len(started)
            await asyncio.sleep(0.3)
            assert len(started) == n_started
            with pytest.raises(ApiError, match="ending"):
                await said(pool, "say a")

    run_test(test)


def test_job_goes_to_the_worker_that_has_the_beginning_of_its_prompt() -> None:
    async def test() -> None:
        async with opened(3) as pool:
            prompts = [f"say {letter * 30}" for letter in "abc"]
            busy = [await begun(pool, "wait") for _ in range(2)]
            await said(pool, prompts[0])
            for task in busy:
                task.cancel()
            await until(lambda: pool.n_busy == 0)
            (knows,) = [worker for worker in pool._workers if worker.last_prompt == prompts[0]]
            await said(pool, prompts[0] + " and more")
            assert knows.last_prompt == prompts[0] + " and more"

    run_test(test)


def test_pool_that_is_closed_ends_jobs_and_waits() -> None:
    async def test() -> None:
        async with opened(1) as pool:
            running = await begun(pool, "wait")
            waiting = asyncio.create_task(said(pool, "say a"))
            await asyncio.sleep(0)
            await pool.close()
            for task in (running, waiting):
                with pytest.raises(ApiError):
                    await task

    run_test(test)
