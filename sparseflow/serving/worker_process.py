"""The front's side of one worker: its process, its socket, and the job that it has."""

import asyncio
import json
import socket
import sys
from asyncio.subprocess import DEVNULL, Process
from collections import deque
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from sparseflow.errors import ServerError
from sparseflow.serving.api_error import ApiError
from sparseflow.serving.messages import Alive, Cancel, Done, Failed, Job, Message, Ready, pack, unpack, unpacker
from sparseflow.serving.uncancelled import uncancelled

_READ_NBYTES = 1 << 16
_END_S = 10.0  # for a worker that is told to end
_STUCK = "worker_stuck"


class WorkerProcess:
    """A worker that is ready for jobs, one at a time."""

    def __init__(
        self, process: Process, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, silence_s: float
    ) -> None:
        """Use `start`.

        Args:
            silence_s: seconds for a step of the model; a worker that is silent for longer is taken for stuck.
        """
        self._process, self._reader, self._writer, self._silence_s = process, reader, writer, silence_s
        self._ended = asyncio.create_task(process.wait())
        self._messages = unpacker()
        self._pending: deque[Message] = deque()  # received together with one that was asked for
        self._job_id: int | None = None
        self._is_lost = False
        self.ready: Ready
        self.last_prompt: str | list[int] = ""
        """Of its last job: keys and values of it are in its cache."""

    @classmethod
    async def start(
        cls,
        arguments: Mapping[str, Any],
        load_timeout_s: float,
        silence_s: float,
        program: Sequence[str] = ("-m", "sparseflow.serving.worker"),
    ) -> "WorkerProcess":
        """Start one and wait until it has opened the model.

        Args:
            arguments: what `worker` takes.

        Raises:
            ServerError: it ended (it has said why on stderr), or was not ready in time.
        """
        ours, theirs = socket.socketpair()
        with ours, theirs:
            command = [sys.executable, *program, str(theirs.fileno()), json.dumps(arguments)]
            process = await asyncio.create_subprocess_exec(
                *command, stdin=DEVNULL, stdout=sys.stderr, pass_fds=[theirs.fileno()]
            )
            try:
                worker = cls(process, *await asyncio.open_unix_connection(sock=ours.dup()), silence_s)
            except BaseException:
                process.kill()
                await uncancelled(process.wait())
                raise
        try:
            worker.ready = await worker._first_word(load_timeout_s)
        except BaseException:
            worker._kill()  # it has nothing to lose
            await worker.end()
            raise
        return worker

    async def _first_word(self, timeout_s: float) -> Ready:
        try:
            first = await self._next(timeout_s)
        except ApiError as error:
            if error.code == _STUCK:
                raise ServerError(f"a worker was not ready within {timeout_s:g} s; it was ended") from None
            code = await self._process.wait()
            raise ServerError(f"a worker ended with exit code {code} before it was ready; see above") from None
        assert isinstance(first, Ready)
        return first

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        """Whether it can take a job."""
        return not (self._is_lost or self._ended.done())

    @property
    def is_idle(self) -> bool:
        """Whether it has none."""
        return self._job_id is None

    def when_ended(self, call: Callable[[], None]) -> None:
        """Have `call` called once it has ended, by itself or not."""
        self._ended.add_done_callback(lambda _: call())

    async def run(self, job: Job) -> AsyncGenerator[Message]:
        """Its messages about a job, but for Done.

        Raises:
            ApiError: the job failed, or the worker died or is stuck; then it is not alive.
        """
        assert self._job_id is None
        packed = pack(job)
        self._job_id = job.id
        self.last_prompt = described(job)
        self._writer.write(packed)
        while True:
            message = await self._next(self._silence_s)
            match message:
                case Alive():
                    continue
                case Done():
                    self._job_id = None
                    return
                case Failed(status=status, code=code, text=text):
                    self._job_id = None
                    raise ApiError(status, code, text)
            yield message

    async def abandon(self) -> None:
        """Let it end the job that it has, which nobody waits for; where it does not, it is not alive after this."""
        if self._job_id is None or not self.is_alive:
            return
        self._writer.write(pack(Cancel(self._job_id)))
        with suppress(ApiError):
            while not isinstance(await self._next(self._silence_s), Done | Failed):
                pass
            self._job_id = None

    async def end(self) -> None:
        """Close its socket, and kill it where it does not end by that. May be called twice."""
        await uncancelled(self._end())

    async def _end(self) -> None:
        self._writer.close()
        try:
            async with asyncio.timeout(_END_S):
                await self._process.wait()
        except TimeoutError:
            self._kill()
            await self._process.wait()

    async def _next(self, timeout_s: float) -> Message:
        try:
            async with asyncio.timeout(timeout_s):
                while not self._pending:
                    await self._receive()
            return self._pending.popleft()
        except TimeoutError:
            self._is_lost = True
            self._kill()
            raise ApiError(500, _STUCK, f"the worker was silent for {timeout_s:g} s; try again") from None
        except (OSError, EOFError):
            self._is_lost = True
            raise ApiError(500, "worker_died", "the worker that had this request died; try again") from None

    async def _receive(self) -> None:
        received = await self._reader.read(_READ_NBYTES)
        if not received:
            raise EOFError
        self._messages.feed(received)
        self._pending.extend(map(unpack, self._messages))

    def _kill(self) -> None:
        with suppress(ProcessLookupError):
            self._process.kill()


def described(job: Job) -> str | list[int]:
    """The prompt in a form whose beginning can be compared with another's."""
    return json.dumps(job.messages) if job.prompt is None else job.prompt
