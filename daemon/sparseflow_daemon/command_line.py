"""The words that `sparseflow-daemon` takes. Defaults are those of `ServerConfig`."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import sparseflow
from sparseflow.engine.engine import EVICTIONS
from sparseflow.engine.reading import IO_MODES
from sparseflow.utils.logs import LOG_FORMATS
from sparseflow.utils.parsing import Parser, number
from sparseflow.utils.sizes import SIZE_FORMS
from sparseflow_daemon.config import LAST_PORT, ServerConfig

PROGRAM = "sparseflow-daemon"
SHELLS = ("bash", "zsh", "tcsh")
_DESCRIPTION = """\
A weight server: it keeps the weights of models in memory for all inference processes of this user, until it is told to
end.
"""
_EPILOG = """\
examples:
  sparseflow-daemon STORE --name demo --memory 6GiB
  sparseflow-daemon facebook/opt-1.3b --name demo --detach
  sparseflow generate --server demo --prompt "In the beginning"

Exit codes: 0 ended as told, 1 failed, 2 wrong usage, 130 stopped by Ctrl-C or ended at once, 143 told to end before it
served.
"""


def build_parser() -> argparse.ArgumentParser:
    """Options have to be written out: who starts a server leaves some to it."""
    default = ServerConfig(stores=(Path(),))
    parser = Parser(prog=PROGRAM, description=_DESCRIPTION, epilog=_EPILOG, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {sparseflow.__version__}", help="print it")
    parser.add_argument(
        "--completion",
        action=_PrintCompletion,
        choices=SHELLS,
        metavar="SHELL",
        help=f"print a script by which a shell completes these words: {', '.join(SHELLS)}",
    )
    parser.add_argument("stores", nargs="+", metavar="STORE", help="a store, a transformers checkpoint, or a hub id")
    parser.add_argument("--name", metavar="NAME", default=default.name, help="what clients ask for")
    _add_memory(parser, default)
    _add_sessions(parser, default)
    _add_watching(parser, default)
    group = parser.add_argument_group("the process")
    group.add_argument(
        "--end-with-parent",
        type=number(int, 1),
        metavar="PID",
        help="end, as by TERM, when this process, which started it, has ended",
    )
    group.add_argument("--detach", action="store_true", help="leave it running, and return once it is ready")
    return parser


class _PrintCompletion(argparse.Action):
    """Prints, and ends the process, as `--help` does."""

    def __call__(self, parser: argparse.ArgumentParser, *found: Any) -> None:
        """found: namespace, shell, option."""
        import shtab

        for action in parser._actions:
            if action.dest == "stores":
                action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
        print(shtab.complete(parser, found[1]))
        parser.exit()


def _add_memory(parser: argparse.ArgumentParser, default: ServerConfig) -> None:
    group = parser.add_argument_group("memory")
    group.add_argument(
        "--memory",
        metavar="SIZE",
        default=default.memory,
        help=f"the most that all weights, arenas and buffers may take: {SIZE_FORMS}; auto: nine tenths of what is free",
    )
    group.add_argument(
        "--cpu-cache-ratio",
        type=float,
        metavar="SHARE",
        default=default.cpu_cache_ratio,
        help="at most this share of all neurons is kept in memory",
    )
    group.add_argument(
        "--io",
        choices=IO_MODES,
        metavar="WAY",
        default=default.io,
        help=f"how the others are read: {', '.join(IO_MODES)}; auto: direct where that is possible",
    )
    group.add_argument(
        "--eviction", choices=tuple(EVICTIONS), default=default.eviction, help="which neuron goes when a new one comes"
    )


def _add_sessions(parser: argparse.ArgumentParser, default: ServerConfig) -> None:
    group = parser.add_argument_group("clients and GPUs")
    group.add_argument(
        "--max-sessions",
        type=number(int, 1),
        metavar="N",
        default=default.max_sessions,
        help="inference processes at once, for each model",
    )
    group.add_argument(
        "--drain-timeout",
        type=number(float, 0),
        metavar="SECONDS",
        default=default.drain_timeout_s,
        help="that ending waits for leases",
    )
    group.add_argument(
        "--gpu-timeout",
        type=float,
        metavar="SECONDS",
        default=default.gpu_timeout_s,
        help="that the server's child on a GPU may take for anything until it is ended",
    )
    group.add_argument(
        "--share-dense-gpu",
        type=number(int, 0),
        metavar="DEVICE",
        default=default.share_dense_gpu,
        help="keep dense weights and predictors once on this GPU, for all inference processes there",
    )


def _add_watching(parser: argparse.ArgumentParser, default: ServerConfig) -> None:
    group = parser.add_argument_group("metrics and log")
    group.add_argument(
        "--metrics-port",
        type=number(int, 0, LAST_PORT),
        metavar="PORT",
        default=default.metrics_port,
        help="serve Prometheus metrics at http://HOST:PORT/metrics; 0: on any port that is free, which the log names",
    )
    group.add_argument(
        "--metrics-host",
        metavar="HOST",
        default=default.metrics_host,
        help="the address of that port; whoever reaches it can read how the server is",
    )
    group.add_argument(
        "--log-format",
        choices=LOG_FORMATS,
        default=default.log_format,
        help="lines for people, or one JSON object each",
    )
    group.add_argument("--debug", action="store_true", help="show the traceback of an error")


def config_of(arguments: argparse.Namespace) -> ServerConfig:
    """Of stores as they were named, which need not be stores yet.

    Raises:
        BadRequest: a setting that cannot be served.
    """
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


def words_of(arguments: argparse.Namespace, stores: Sequence[Path]) -> list[str]:
    """The words for the same server, of these stores and in the foreground."""
    words = [str(store) for store in stores]
    for action in build_parser()._actions:
        if not action.option_strings or action.dest == "detach" or not hasattr(arguments, action.dest):
            continue
        value, option = getattr(arguments, action.dest), action.option_strings[0]
        if value != action.default:
            words.append(option if action.nargs == 0 else f"{option}={value}")
    return words
