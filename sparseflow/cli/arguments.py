"""Arguments that several commands share. Defaults are read from where they are written: the strategy."""

import argparse
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sparseflow.core.checkpoint import local_folder
from sparseflow.core.config import OffloadStrategy
from sparseflow.core.fidelity_name import DEFAULT_FIDELITY, require_fidelity
from sparseflow.engine.engine import EVICTIONS
from sparseflow.engine.reading import IO_MODES
from sparseflow.errors import BadRequest
from sparseflow.store.profile import DTYPE_NBYTES
from sparseflow.utils.logs import LOG_FORMATS
from sparseflow.utils.parsing import number
from sparseflow.utils.sizes import SIZE_FORMS, parse_size

MODEL_HELP = "a store, a transformers checkpoint folder, or a hub id"


def model_path(text: str) -> str:
    """A store, a checkpoint folder or a hub id: the shell completes it as a folder."""
    return text


def share(text: str) -> float:
    """What argparse shall make of a share of all neurons."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is no share: give a number above 0 and at most 1")
    return value


def _checked(check: Callable[[str], None]) -> Callable[[str], str]:
    """What argparse shall make of a text: the same, or wrong usage where `check` refuses."""

    def parse(text: str) -> str:
        try:
            check(text)
        except BadRequest as error:
            raise argparse.ArgumentTypeError(str(error)) from error
        return text

    return parse


def _require_size_or_auto(text: str) -> None:
    if text != "auto":
        parse_size(text, "size")


def _require_device_name(text: str) -> None:
    if re.fullmatch(r"cpu|cuda(:\d+)?", text, re.ASCII) is None:
        raise BadRequest(f"{text!r} is no device: give cpu, cuda, or cuda:N for the GPU of that number")


fidelity = _checked(require_fidelity)
size_or_auto = _checked(_require_size_or_auto)
device = _checked(_require_device_name)


def require_model_path(name: str) -> None:
    """
    Raises:
        DiskError: no such folder, and no hub id.
    """
    local_folder(name)


def require_place(path: Path) -> None:
    """
    Raises:
        BadRequest: no file can be made there.
    """
    if not path.parent.is_dir():
        raise BadRequest(f"{path}: its folder does not exist; make it first")
    if path.is_dir():
        raise BadRequest(f"{path}: is a folder; give a file in it")
    if not os.access(path.parent, os.W_OK):
        raise BadRequest(f"{path}: its folder cannot be written; give another one")


def add_named_model(parser: argparse.ArgumentParser, help_text: str) -> None:
    """MODEL, or --model, which means the same."""
    parser.add_argument("model", nargs="?", type=model_path, metavar="MODEL", help=help_text)
    parser.add_argument("--model", dest="model_option", type=model_path, metavar="MODEL", help="the same as MODEL")


def take_named_model(arguments: argparse.Namespace) -> None:
    """Let `model` be what was given in either way.

    Raises:
        BadRequest: given in both. DiskError: no such folder, and no hub id.
    """
    if arguments.model_option is not None:
        if arguments.model is not None:
            raise BadRequest(f"{arguments.model} and --model {arguments.model_option}: give one of them")
        arguments.model = arguments.model_option
    if arguments.model is not None:
        require_model_path(arguments.model)


def add_slots_ratio(parser: argparse.ArgumentParser, help_text: str) -> None:
    """--gpu-cache-ratio, or --cache-ratio, which means the same."""
    parser.add_argument(
        "--gpu-cache-ratio",
        "--cache-ratio",
        dest="gpu_cache_ratio",
        type=share,
        default=OffloadStrategy().gpu_cache_ratio,
        metavar="SHARE",
        help=help_text,
    )


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
        choices=tuple(DTYPE_NBYTES),
        metavar="DTYPE",
        help=f"store the weights as {', '.join(DTYPE_NBYTES)}; without, as the checkpoint has them",
    )


def add_memory(parser: argparse._ActionsContainer) -> None:
    """--memory"""
    parser.add_argument(
        "--memory",
        type=size_or_auto,
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
        type=share,
        default=OffloadStrategy().cpu_cache_ratio,
        metavar="SHARE",
        help="at most this share of all neurons is kept in host memory",
    )


def add_fidelity(parser: argparse._ActionsContainer) -> None:
    """--fidelity"""
    parser.add_argument(
        "--fidelity",
        type=fidelity,
        default=DEFAULT_FIDELITY,
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
        type=number(float, 0),
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
        choices=IO_MODES,
        default="auto",
        metavar="WAY",
        help=f"how what is on disk is read: {', '.join(IO_MODES)}; auto: direct where that is possible",
    )


def add_device(parser: argparse.ArgumentParser) -> None:
    """Where a model computes, and what of it may lie there."""
    default = OffloadStrategy()
    group = parser.add_argument_group("device")
    group.add_argument("--device", type=device, default="cpu", metavar="DEVICE", help="cpu, cuda, or cuda:N")
    group.add_argument(
        "--device-memory",
        type=size_or_auto,
        default="auto",
        metavar="SIZE",
        help=f"the most that a GPU may be filled with by this process: {SIZE_FORMS}; auto: nine tenths of what is free",
    )
    group.add_argument(
        "--gpu-cache-ratio",
        type=share,
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
