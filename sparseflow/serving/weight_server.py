"""The weight server of an API server's own: started with it, started again where it dies, ended with it."""

import asyncio
import logging
import os
import sys
import time
from asyncio.subprocess import DEVNULL, Process
from collections.abc import Sequence
from contextlib import suppress

from sparseflow.errors import ServerError
from sparseflow.protocol.run_directory import RunDirectory
from sparseflow.serving.uncancelled import uncancelled

_log = logging.getLogger(__name__)
_POLL_S = 0.05
_END_S = 15.0
_RESTART_S_MAX = 30.0
_SETTLED_S = 60.0


class OwnWeightServer:
    """A `sparseflow-daemon`. Workers that lose it wait for the one that is started in its place."""

    def __init__(self, name: str, arguments: Sequence[str], load_timeout_s: float) -> None:
        """
        Args:
            arguments: of `sparseflow-daemon`, but for its name.
        """
        self.name = name
        own = ["--name", name, "--end-with-parent", str(os.getpid())]
        self._command = [sys.executable, "-m", "sparseflow_daemon", *arguments, *own]
        self._load_timeout_s = load_timeout_s
        self._process: Process | None = None
        self._keeping: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Returns when it lets clients in; it may still be loading.

        Raises:
            ServerError: it ended (it has said why on stderr), or took too long.
        """
        await self._start_one()
        self._keeping = asyncio.create_task(self._keep())

    async def end(self) -> None:
        """End it. May be called twice."""
        if self._keeping is not None:
            self._keeping.cancel()
            await asyncio.gather(self._keeping, return_exceptions=True)
        await uncancelled(self._end_one())

    async def _start_one(self) -> None:
        process = self._process = await asyncio.create_subprocess_exec(
            *self._command, stdin=DEVNULL, stdout=sys.stderr, start_new_session=True
        )
        directory = RunDirectory.of(self.name)
        try:
            async with asyncio.timeout(self._load_timeout_s):
                while not (directory.is_alive() and directory.owner() == process.pid):
                    if process.returncode is not None:
                        raise ServerError(f"the weight server ended with exit code {process.returncode}; see above")
                    await asyncio.sleep(_POLL_S)
        except TimeoutError:
            await uncancelled(self._end_one())
            raise ServerError(
                f"the weight server was not there within {self._load_timeout_s:g} s; convert the checkpoint before "
                "(sparseflow convert), or raise --load-timeout"
            ) from None
        except BaseException:
            await uncancelled(self._end_one())
            raise

    async def _keep(self) -> None:
        """Start another one where it ends; ever later, while they end soon."""
        delay_s = 0.0
        while True:
            assert self._process is not None
            begin_s = time.monotonic()
            code = await self._process.wait()
            if time.monotonic() - begin_s > _SETTLED_S:
                delay_s = 0.0
            _log.warning("the weight server ended with exit code %d; another one is started in %g s", code, delay_s)
            await asyncio.sleep(delay_s)
            delay_s = min(max(1.0, 2 * delay_s), _RESTART_S_MAX)
            try:
                await self._start_one()
            except (ServerError, OSError) as error:
                _log.error("no weight server in its place: %s", error)

    async def _end_one(self) -> None:
        process = self._process
        if process is None or process.returncode is not None:
            return
        with suppress(ProcessLookupError):
            process.terminate()
        try:
            async with asyncio.timeout(_END_S):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()
