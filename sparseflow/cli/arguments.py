"""Arguments that several commands share. Defaults are read from where they are written: the strategy."""

import argparse
import math
from collections.abc import Callable
from typing import Any

from sparseflow.core.config import OffloadStrategy
from sparseflow.engine.engine import EVICTIONS
from sparseflow.engine.reading import IO_MODES
from sparseflow.errors import BadRequest
from sparseflow.store.profile import DTYPE_NBYTES
from sparseflow.utils.logs import LOG_FORMATS
from sparseflow.utils.sizes import SIZE_FORMS, parse_size

MODEL_HELP = "a store, a transformers checkpoint folder, or a hub id"


def number(convert: Callable[[str], float], least: float, most: float = math.inf) -> Callable[[str], float]:
    """What argparse shall make of a text: a number from `least` to `most`; anything else is wrong usage."""

    def parse(text: str) -> float:
        value = convert(text)
        if not least <= value <= most:
            limits = f"at least {least}" if most == math.inf else f"between {least} and {most}"
            raise argparse.ArgumentTypeError(f"{text} is out of range: give a number {limits}")
        return value

    parse.__name__ = convert.__name__  # argparse names it where the text is no number at all
    return parse


def size(text: str) -> int:
    """What argparse shall make of a size, in bytes."""
    try:
        return parse_size(text)
    except BadRequest as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def model_path(text: str) -> str:
    """A store, a checkpoint folder or a hub id: the shell completes it as a folder."""
    return text


def add_common(parser: argparse.ArgumentParser, *, log_level: str = "WARNING", repeated: bool = False) -> None:
    """What every command takes.

    Args:
        log_level: from which on things are logged, where `$SPARSEFLOW_LOG` does not say.
        repeated: what was given further left stays, if nothing is given here.
    """
    group = parser.add_argument_group("of every command")
    suppressed: dict[str, Any] = {"default": argparse.SUPPRESS} if repeated else {}
    group.add_argument("--json", action="store_true", help="print the result as JSON on stdout", **suppressed)
    group.add_argument("--debug", action="store_true", help="show the traceback of an error", **suppressed)
    group.add_argument(
        "--log-format",
        choices=LOG_FORMATS,
        help="of what is logged on stderr: lines, or one JSON object a line. $SPARSEFLOW_LOG is the least level, "
        f"{log_level} if that is not set",
        **({"default": LOG_FORMATS[0]} | suppressed),
    )


def add_quiet(parser: argparse.ArgumentParser, what: str = "no progress bars") -> None:
    """--quiet"""
    parser.add_argument("--quiet", action="store_true", help=what)


def add_dtype(parser: argparse._ActionsContainer) -> None:
    """--dtype"""
    parser.add_argument(
        "--dtype",
        metavar="DTYPE",
        help=f"store the weights as {', '.join(DTYPE_NBYTES)}; without, as the checkpoint has them",
    )


def add_memory(parser: argparse._ActionsContainer) -> None:
    """--memory"""
    parser.add_argument(
        "--memory",
        default="auto",
        metavar="SIZE",
        help=f"the most that weights, arena and buffers may take: {SIZE_FORMS}; auto: nine tenths of what is free. "
        "What does not fit stays on disk and is read as it is needed",
    )


def add_threads(parser: argparse._ActionsContainer) -> None:
    """--threads"""
    parser.add_argument(
        "--threads", type=number(int, 1), metavar="N", help="that compute; without, as many as torch chooses"
    )


def add_cache_ratio(parser: argparse._ActionsContainer) -> None:
    """--cpu-cache-ratio"""
    parser.add_argument(
        "--cpu-cache-ratio",
        type=float,
        default=OffloadStrategy().cpu_cache_ratio,
        metavar="SHARE",
        help="at most this share of all neurons is kept in host memory",
    )


def add_fidelity(parser: argparse._ActionsContainer) -> None:
    """--fidelity"""
    parser.add_argument(
        "--fidelity",
        default="exact",
        metavar="FIDELITY",
        help="exact, certified, dense, calibrated, or calibrated:RECALL such as calibrated:0.98",
    )


def add_model(parser: argparse.ArgumentParser) -> None:
    """How a model is opened."""
    default = OffloadStrategy()
    group = parser.add_argument_group("fidelity")
    add_dtype(group)
    add_fidelity(group)
    group.add_argument(
        "--activation-threshold",
        type=float,
        default=default.activation_threshold,
        metavar="FACTOR",
        help="scales the margin of the bound; 1 keeps the fidelity's promise",
    )
    add_threads(group)
    group = parser.add_argument_group("memory", "Host memory, and what is read from disk.")
    add_memory(group)
    add_cache_ratio(group)
    group.add_argument(
        "--aggressive-offload", action="store_true", help="keep one layer's share in memory, for all layers in turn"
    )
    group.add_argument(
        "--eviction", choices=tuple(EVICTIONS), default=default.eviction, help="which neuron goes when a new one comes"
    )
    group.add_argument(
        "--io",
        default="auto",
        metavar="WAY",
        help=f"how what is on disk is read: {', '.join(IO_MODES)}; auto: direct where that is possible",
    )


def add_device(parser: argparse.ArgumentParser) -> None:
    """Where a model computes, and what of it may lie there."""
    default = OffloadStrategy()
    group = parser.add_argument_group("device")
    group.add_argument("--device", default="cpu", metavar="DEVICE", help="cpu, cuda, or cuda:N")
    group.add_argument(
        "--device-memory",
        default="auto",
        metavar="SIZE",
        help=f"the most that a GPU may be filled with by this process: {SIZE_FORMS}; auto: nine tenths of what is free",
    )
    group.add_argument(
        "--gpu-cache-ratio",
        type=float,
        default=default.gpu_cache_ratio,
        metavar="SHARE",
        help="at most this share of all neurons has a slot on the GPU",
    )
    group.add_argument(
        "--device-hints",
        action="store_true",
        help="bring neurons to the GPU while the layer before computes, as foreseen there",
    )
    group.add_argument(
        "--borrow-dense",
        action="store_true",
        help="with --server: use dense weights and codes as it keeps them on the GPU (its --share-dense-gpu)",
    )


def strategy_of(arguments: argparse.Namespace) -> OffloadStrategy:
    """The strategy that the arguments of `add_model` describe."""
    default = OffloadStrategy()
    return OffloadStrategy(
        gpu_cache_ratio=getattr(arguments, "gpu_cache_ratio", default.gpu_cache_ratio),
        cpu_cache_ratio=arguments.cpu_cache_ratio,
        aggressive_offload=arguments.aggressive_offload,
        activation_threshold=arguments.activation_threshold,
        eviction=arguments.eviction,
        device_hints=getattr(arguments, "device_hints", default.device_hints),
    )
