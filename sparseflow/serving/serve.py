"""An API server from start to end: port, weight server, workers, HTTP; and back in that order."""

import asyncio
import logging
import math
import os
import signal
import socket
from collections.abc import Callable, Generator
from contextlib import AsyncExitStack, contextmanager
from functools import partial
from typing import Any

import uvicorn

from sparseflow.errors import BadRequest
from sparseflow.serving.app import make_app
from sparseflow.serving.config import ServeConfig
from sparseflow.serving.front import Front
from sparseflow.serving.pool import Pool
from sparseflow.serving.weight_server import OwnWeightServer
from sparseflow.serving.worker_process import WorkerProcess

_log = logging.getLogger(__name__)
_ANSWER_S = 5.0  # beside the drain, to tell those whose texts are not complete


def serve(config: ServeConfig, when_ready: Callable[[dict[str, Any]], None]) -> None:
    """Serve until INT or TERM; a second one ends it at once.

    Args:
        when_ready: is told `url`, `model`, `fidelity`, `server`, `workers` (their pids) once requests are answered.

    Raises:
        BadRequest: the port is taken, the address is none of this machine, or there is no key in the key file.
        SparseFlowError: weight server or workers could not be started.
    """
    asyncio.run(_serve(config, when_ready))


async def _serve(config: ServeConfig, when_ready: Callable[[dict[str, Any]], None]) -> None:
    keys = config.api_keys()
    async with AsyncExitStack() as stack:
        sock = stack.enter_context(_bind(config.host, config.port))
        stopping = _Stopping()
        opening = asyncio.create_task(_open(config, keys, stack))
        if not await stopping.unless_stopped(opening):
            return
        front = opening.result()
        url = f"http://{_host_of(sock)}:{sock.getsockname()[1]}/v1"
        facts = {
            "url": url,
            "model": front.name,
            "fidelity": front.fidelity,
            "server": front.server,
            "workers": front.pool.pids,
            "pid": os.getpid(),
        }
        if not keys and not _is_local(config.host):
            _log.warning("whoever reaches %s may use the model: no --api-key-file was given", url)
        settings = uvicorn.Config(
            make_app(front),
            log_config=None,
            access_log=False,
            lifespan="off",
            timeout_graceful_shutdown=math.ceil(config.drain_timeout_s + _ANSWER_S),
        )
        server = _Server(settings, partial(when_ready, facts), front.pool, config.drain_timeout_s)
        stopping.then(server.stop)
        try:
            await server.serve(sockets=[sock])
        except OSError as error:  # somebody else has begun to listen there
            raise _taken(config.host, config.port, error) from error


async def _open(config: ServeConfig, keys: frozenset[str], stack: AsyncExitStack) -> Front:
    """Start the weight server, where it is to be one of our own, and the workers."""
    name = config.server
    if name is None:
        assert config.store is not None
        own = OwnWeightServer(
            f"serve-{os.getpid()}", [config.store, *config.weight_server_options], config.load_timeout_s
        )
        stack.push_async_callback(own.end)
        await own.start()
        name = own.name
    arguments = {"threads": None, **config.worker, "name": name, "log_format": config.log_format}
    start = partial(WorkerProcess.start, arguments, config.load_timeout_s, config.step_timeout_s)
    pool = Pool(start, config.workers, config.queue, config.queue_timeout_s)
    stack.push_async_callback(pool.close)
    await pool.open()
    return Front(pool, name, config.served_model_name or pool.ready.model, keys)


class _Server(uvicorn.Server):
    """uvicorn's, which says when it listens, and leaves signals to us: it would end the process before the workers."""

    def __init__(
        self, config: uvicorn.Config, when_ready: Callable[[], None], pool: Pool, drain_timeout_s: float
    ) -> None:
        super().__init__(config)
        self._when_ready, self._pool, self._drain_timeout_s = when_ready, pool, drain_timeout_s
        self._draining: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._when_ready()

    @contextmanager
    def capture_signals(self) -> Generator[None]:
        yield

    def stop(self) -> None:
        """Take no more requests and end once those there are have been answered; called twice: at once."""
        self.force_exit = self.should_exit
        self.should_exit = True
        self._draining = self._draining or asyncio.create_task(self._drain())

    async def _drain(self) -> None:
        """Texts that are not complete in time end with an error."""
        await asyncio.sleep(self._drain_timeout_s)
        await self._pool.close()


class _Stopping:
    """INT and TERM, from now on."""

    def __init__(self) -> None:
        self._stopped = asyncio.Event()
        self._then: Callable[[], None] | None = None
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._on_signal)

    async def unless_stopped(self, task: "asyncio.Task[Any]") -> bool:
        """Wait for the task; False where a signal came first, and then it is cancelled."""
        stopped = asyncio.create_task(self._stopped.wait())
        await asyncio.wait({task, stopped}, return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        if task.done():
            return True
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return False

    def then(self, call: Callable[[], None]) -> None:
        """What a signal does from now on; at once, if one has come."""
        self._then = call
        if self._stopped.is_set():
            call()

    def _on_signal(self) -> None:
        self._stopped.set()
        if self._then is not None:
            self._then()


def _bind(host: str, port: int) -> socket.socket:
    """Tried before anything is loaded; it listens only once requests can be answered."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except socket.gaierror as error:
        raise BadRequest(
            f"--host {host}: {error.strerror}; give an address of this machine, such as 127.0.0.1"
        ) from error
    family, kind, protocol, _, address = found[0]
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except OSError as error:
        sock.close()
        raise _taken(host, port, error) from error
    sock.set_inheritable(False)
    return sock


def _taken(host: str, port: int, error: OSError) -> BadRequest:
    return BadRequest(f"--host {host} --port {port}: {error.strerror}; give others (--port 0: any)")


def _is_local(host: str) -> bool:
    return host == "localhost" or host.startswith("127.") or host == "::1"


def _host_of(sock: socket.socket) -> str:
    host = str(sock.getsockname()[0])
    return f"[{host}]" if ":" in host else host
