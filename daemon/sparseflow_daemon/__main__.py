"""`sparseflow-daemon STORE [STORE ...] --name NAME --memory 6GiB`: a weight server, until it is told to end."""

import argparse
import json
import logging
import os
import resource
import signal
import subprocess
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from sparseflow.errors import BadRequest, SparseFlowError, UnsupportedModel
from sparseflow.protocol.inquiry import ask_status
from sparseflow.protocol.run_directory import RunDirectory
from sparseflow.store.manifest import MANIFEST_NAME
from sparseflow.utils.logs import start_logging
from sparseflow.utils.parsing import one_line
from sparseflow_daemon.claim import Claim
from sparseflow_daemon.command_line import PROGRAM, build_parser, config_of, words_of
from sparseflow_daemon.config import ServerConfig
from sparseflow_daemon.launch import launch, log_path
from sparseflow_daemon.lifecycle import Lifecycle, end_with_parent
from sparseflow_daemon.served_model import open_models
from sparseflow_daemon.server import Server

if TYPE_CHECKING:
    from sparseflow_daemon.metrics_endpoint import MetricsEndpoint

EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED, EXIT_TERMINATED = 0, 1, 2, 130, 143
_METRICS_DEADLINE_S = 2.0  # under what scrapers give, so that they are told that the server does not answer
_log = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until told to end. Returns 0 ok, 1 failed, 2 wrong usage, 130 stopped by Ctrl-C."""
    arguments = build_parser().parse_args(argv)
    signal.signal(signal.SIGTERM, _end)
    try:
        start_logging("INFO", arguments.log_format)
        return _detach(arguments) if arguments.detach else _serve(arguments)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except Exception as error:
        _complain(error, arguments)
        is_usage = isinstance(error, BadRequest) and not isinstance(error, UnsupportedModel)
        return EXIT_USAGE if is_usage else EXIT_FAILED


def _end(number: int, frame: FrameType | None) -> NoReturn:
    """Until there is a server to drain, TERM ends this process as an error does: with what it has started."""
    raise SystemExit(EXIT_TERMINATED)


def _complain(error: Exception, arguments: argparse.Namespace) -> None:
    """One line, as everything in the log is; with --debug, where it comes from."""
    text = str(error)
    if not isinstance(error, SparseFlowError):
        remedy = "report it, with the traceback" if arguments.debug else "--debug shows the traceback; report it"
        text = f"unexpected: {type(error).__name__}: {one_line(error)} ({remedy})"
    if arguments.log_format != "text":
        _log.error("%s", text, exc_info=error if arguments.debug else None)
        return
    if arguments.debug:
        traceback.print_exception(error)
    print(f"{PROGRAM}: error: {text}", file=sys.stderr)


def _detach(arguments: argparse.Namespace) -> int:
    """Make what is no store yet, where people see it, and start a server that only has to load."""
    config = config_of(arguments)
    RunDirectory.of(config.name)
    with _metrics(config):  # a name, a setting or a port that is wrong is told before a store is made
        stores = [_store(name) for name in arguments.stores]
    status = launch(words_of(arguments, stores), config.name)
    models = ", ".join(model["name"] for model in status["models"])
    metrics = f"; metrics {status['metrics']}" if status["metrics"] else ""
    print(f"server {config.name} is ready: pid {status['pid']}, {models}; log {log_path(config.name)}{metrics}")
    return EXIT_OK


def _serve(arguments: argparse.Namespace) -> int:
    if arguments.end_with_parent is not None:
        end_with_parent(arguments.end_with_parent)
    _take_all_descriptors()
    directory = RunDirectory.of(arguments.name)
    config = config_of(arguments)
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


def _take_all_descriptors() -> None:
    """As many as this user may have: a session takes some, and one more for each of its threads that fetch."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with suppress(ValueError, OSError):  # a sandbox
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


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

    Where that fails it has said why, and this process ends with its exit code. It ends when this process is told to.
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
