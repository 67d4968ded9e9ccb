"""`sparseflow-daemon STORE [STORE ...] --name NAME --memory 6GiB`: a weight server, until it is told to end."""

import argparse
import json
import logging
import os
import resource
import subprocess
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from sparseflow.engine.engine import EVICTIONS
from sparseflow.engine.reading import IO_MODES
from sparseflow.errors import BadRequest, SparseFlowError
from sparseflow.protocol.inquiry import ask_status
from sparseflow.protocol.run_directory import RunDirectory
from sparseflow.store.manifest import MANIFEST_NAME
from sparseflow.utils.logs import LOG_FORMATS, start_logging
from sparseflow_daemon.claim import Claim
from sparseflow_daemon.config import ServerConfig
from sparseflow_daemon.launch import launch, log_path
from sparseflow_daemon.lifecycle import Lifecycle, end_with_parent
from sparseflow_daemon.served_model import open_models
from sparseflow_daemon.server import Server

if TYPE_CHECKING:
    from sparseflow_daemon.metrics_endpoint import MetricsEndpoint

EXIT_OK, EXIT_FAILED, EXIT_USAGE = 0, 1, 2
_METRICS_DEADLINE_S = 2.0  # under what scrapers give, so that they are told that the server does not answer
_log = logging.getLogger(__name__)


def build_parser() -> argparse.ArgumentParser:
    """Defaults are those of `ServerConfig`."""
    default = ServerConfig(stores=(Path(),))
    parser = argparse.ArgumentParser(
        prog="sparseflow-daemon", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("stores", nargs="+", metavar="STORE", help="a store, a transformers checkpoint, or a hub id")
    parser.add_argument("--name", default=default.name, help="what clients ask for")
    parser.add_argument(
        "--memory",
        default=default.memory,
        help="the most that all weights, arenas and buffers may take, such as 6GiB; auto: nine tenths of what is free",
    )
    parser.add_argument(
        "--cpu-cache-ratio", type=float, default=default.cpu_cache_ratio, help="at most this share of bundles in memory"
    )
    parser.add_argument("--io", default=default.io, help=f"how bundles are read: {', '.join(IO_MODES)}")
    parser.add_argument("--eviction", default=default.eviction, help=f"of bundles: {', '.join(EVICTIONS)}")
    parser.add_argument(
        "--max-sessions", type=int, default=default.max_sessions, help="inference processes at once, for each model"
    )
    parser.add_argument(
        "--drain-timeout", type=float, default=default.drain_timeout_s, help="seconds that ending waits for leases"
    )
    parser.add_argument(
        "--gpu-timeout",
        type=float,
        default=default.gpu_timeout_s,
        help="seconds that the server's child on a GPU may take for anything until it is ended",
    )
    parser.add_argument(
        "--share-dense-gpu",
        type=int,
        metavar="DEVICE",
        default=default.share_dense_gpu,
        help="keep dense weights and predictors once on this GPU, for all inference processes there",
    )
    parser.add_argument(
        "--metrics-port",
        type=int,
        metavar="PORT",
        default=default.metrics_port,
        help="serve Prometheus metrics at http://HOST:PORT/metrics; 0: on any port that is free, which the log names",
    )
    parser.add_argument(
        "--metrics-host",
        metavar="HOST",
        default=default.metrics_host,
        help="the address of that port; whoever reaches it can read how the server is",
    )
    parser.add_argument(
        "--log-format",
        choices=LOG_FORMATS,
        default=default.log_format,
        help="lines for people, or one JSON object each",
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_argument(
        "--end-with-parent", action="store_true", help="end, as by TERM, when the process that started it has ended"
    )
    parser.add_argument("--detach", action="store_true", help="leave it running, and return once it is ready")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until told to end. Returns 0 ok, 1 failed, 2 wrong usage."""
    arguments = build_parser().parse_args(argv)
    try:
        start_logging("INFO", arguments.log_format)
        if arguments.detach:
            own = [word for word in (sys.argv[1:] if argv is None else argv) if word != "--detach"]
            status = launch(own, arguments.name)
            models = ", ".join(model["name"] for model in status["models"])
            metrics = f"; metrics {status['metrics']}" if status["metrics"] else ""
            log = log_path(arguments.name)
            print(f"server {arguments.name} is ready: pid {status['pid']}, {models}; log {log}{metrics}")
            return EXIT_OK
        return _serve(arguments)
    except SparseFlowError as error:
        _complain(error, arguments)
        return EXIT_USAGE if isinstance(error, BadRequest) else EXIT_FAILED


def _take_all_descriptors() -> None:
    """As many as this user may have: a session takes some, and one more for each of its threads that fetch."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with suppress(ValueError, OSError):  # a sandbox
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _complain(error: SparseFlowError, arguments: argparse.Namespace) -> None:
    """One line, as everything in the log is; with --debug, where it comes from."""
    if arguments.log_format != "text":
        _log.error("%s", error, exc_info=arguments.debug)
        return
    if arguments.debug:
        traceback.print_exception(error)
    print(f"sparseflow-daemon: error: {error}", file=sys.stderr)


def _config(arguments: argparse.Namespace) -> ServerConfig:
    """Of stores as they were named, which need not be stores yet."""
    return ServerConfig(
        stores=tuple(Path(name) for name in arguments.stores),
        name=arguments.name,
        memory=arguments.memory,
        cpu_cache_ratio=arguments.cpu_cache_ratio,
        io=arguments.io,
        eviction=arguments.eviction,
        max_sessions=arguments.max_sessions,
        drain_timeout_s=arguments.drain_timeout,
        gpu_timeout_s=arguments.gpu_timeout,
        share_dense_gpu=arguments.share_dense_gpu,
        metrics_port=arguments.metrics_port,
        metrics_host=arguments.metrics_host,
        log_format=arguments.log_format,
    )


def _serve(arguments: argparse.Namespace) -> int:
    if arguments.end_with_parent:
        end_with_parent()
    _take_all_descriptors()
    directory = RunDirectory.of(arguments.name)
    config = _config(arguments)
    with _metrics(config) as metrics:  # a name, a setting or a port that is wrong is told before a store is made
        config = replace(config, stores=tuple(_store(name) for name in arguments.stores))
        claim = Claim(directory)
        try:
            server = Server(config, claim.directory, open_models(config))
            try:
                Lifecycle(server, claim)
                fields = {"server": config.name, "pid": os.getpid()}
                _log.info("server %s, pid %d, epoch %x", config.name, os.getpid(), server.epoch, extra=fields)
                if metrics is not None:
                    metrics.begin()  # not before: the name was another server's
                    server.metrics = metrics
                server.run()
            finally:
                server.close()
        finally:
            claim.release()
    return EXIT_OK


@contextmanager
def _metrics(config: ServerConfig) -> "Iterator[MetricsEndpoint | None]":
    """A port that is ours and not answered on yet; None where none is asked for."""
    if config.metrics_port is None:
        if config.metrics_host != ServerConfig(stores=config.stores).metrics_host:
            _log.warning("--metrics-host %s has no effect without --metrics-port", config.metrics_host)
        yield None
        return
    from sparseflow_daemon.metrics_endpoint import MetricsEndpoint

    endpoint = MetricsEndpoint(
        config.metrics_host, config.metrics_port, config.name, lambda: ask_status(config.name, _METRICS_DEADLINE_S)
    )
    try:
        yield endpoint
    finally:
        endpoint.close()


def _store(name: str) -> Path:
    """The folder of a store; a checkpoint is converted by another process, because that takes torch.

    Where that fails it has said why, and this process ends with its exit code.
    """
    folder = Path(name).expanduser().absolute()
    if (folder / MANIFEST_NAME).is_file():
        return folder
    command = [sys.executable, "-m", "sparseflow", "convert", name, "--json"]
    finished = subprocess.run(command, stdout=subprocess.PIPE, check=False)
    if finished.returncode:
        sys.exit(finished.returncode)
    return Path(json.loads(finished.stdout)["store"])


if __name__ == "__main__":
    sys.exit(main())
