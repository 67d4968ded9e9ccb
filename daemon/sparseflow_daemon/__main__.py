"""`sparseflow-daemon STORE [STORE ...] --name NAME --memory 6GiB`: a weight server, until it is told to end."""

import argparse
import json
import logging
import os
import resource
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from sparseflow.engine.engine import EVICTIONS
from sparseflow.engine.reading import IO_MODES
from sparseflow.errors import BadRequest, SparseFlowError
from sparseflow.protocol.run_directory import RunDirectory
from sparseflow.store.manifest import MANIFEST_NAME
from sparseflow_daemon.claim import Claim
from sparseflow_daemon.config import ServerConfig
from sparseflow_daemon.launch import launch, log_path
from sparseflow_daemon.lifecycle import Lifecycle
from sparseflow_daemon.served_model import open_models
from sparseflow_daemon.server import Server

EXIT_OK, EXIT_FAILED, EXIT_USAGE = 0, 1, 2
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
    parser.add_argument("--detach", action="store_true", help="leave it running, and return once it is ready")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until told to end. Returns 0 ok, 1 failed, 2 wrong usage."""
    arguments = build_parser().parse_args(argv)
    try:
        _start_logging()
        if arguments.detach:
            own = [word for word in (sys.argv[1:] if argv is None else argv) if word != "--detach"]
            status = launch(own, arguments.name)
            models = ", ".join(model["name"] for model in status["models"])
            print(f"server {arguments.name} is ready: pid {status['pid']}, {models}; log {log_path(arguments.name)}")
            return EXIT_OK
        return _serve(arguments)
    except SparseFlowError as error:
        print(f"sparseflow-daemon: error: {error}", file=sys.stderr)
        return EXIT_USAGE if isinstance(error, BadRequest) else EXIT_FAILED


def _take_all_descriptors() -> None:
    """As many as this user may have: a session takes some, and one more for each of its threads that fetch."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with suppress(ValueError, OSError):  # a sandbox
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _serve(arguments: argparse.Namespace) -> int:
    _take_all_descriptors()
    directory = RunDirectory.of(arguments.name)  # a wrong name is told before a checkpoint is converted
    config = ServerConfig(
        stores=tuple(_store(name) for name in arguments.stores),
        name=arguments.name,
        memory=arguments.memory,
        cpu_cache_ratio=arguments.cpu_cache_ratio,
        io=arguments.io,
        eviction=arguments.eviction,
        max_sessions=arguments.max_sessions,
        drain_timeout_s=arguments.drain_timeout,
        gpu_timeout_s=arguments.gpu_timeout,
        share_dense_gpu=arguments.share_dense_gpu,
    )
    claim = Claim(directory)
    try:
        server = Server(config, claim.directory, open_models(config))
        try:
            Lifecycle(server, claim)
            _log.info("server %s, pid %d, epoch %x", config.name, os.getpid(), server.epoch)
            server.run()
        finally:
            server.close()
    finally:
        claim.release()
    return EXIT_OK


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


def _start_logging() -> None:
    level = os.environ.get("SPARSEFLOW_LOG", "INFO").upper()
    if level not in logging.getLevelNamesMapping():
        raise BadRequest(f"SPARSEFLOW_LOG={level}: give one of DEBUG, INFO, WARNING, ERROR")
    logging.basicConfig(level=level, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s")


if __name__ == "__main__":
    sys.exit(main())
