"""Arguments that several commands share. Defaults are read from where they are written: the strategy."""

import argparse
import math
from collections.abc import Callable

from sparseflow.core.config import OffloadStrategy
from sparseflow.engine.engine import EVICTIONS
from sparseflow.engine.reading import IO_MODES
from sparseflow.store.profile import DTYPE_NBYTES


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


def add_dtype(parser: argparse.ArgumentParser) -> None:
    """--dtype"""
    parser.add_argument(
        "--dtype", help=f"store the weights as {', '.join(DTYPE_NBYTES)}; else as the checkpoint has them"
    )


def add_model(parser: argparse.ArgumentParser) -> None:
    """How a model is opened."""
    default = OffloadStrategy()
    add_dtype(parser)
    parser.add_argument(
        "--memory",
        default="auto",
        help="the most that weights, arena and buffers may take, such as 6GiB; auto: nine tenths of what is free. "
        "What does not fit stays on disk and is read as it is needed",
    )
    parser.add_argument(
        "--io", default="auto", help=f"how it is read: {', '.join(IO_MODES)}; auto: direct where that is possible"
    )
    parser.add_argument(
        "--fidelity",
        default="exact",
        help="exact, certified, dense, calibrated, or calibrated:RECALL such as calibrated:0.98",
    )
    parser.add_argument(
        "--cpu-cache-ratio",
        type=float,
        default=default.cpu_cache_ratio,
        help="at most this share of all bundles is kept in host memory",
    )
    parser.add_argument(
        "--aggressive-offload", action="store_true", help="keep one layer's share in memory, for all layers in turn"
    )
    parser.add_argument(
        "--eviction", choices=tuple(EVICTIONS), default=default.eviction, help="which bundle goes when a new one comes"
    )
    parser.add_argument(
        "--activation-threshold",
        type=float,
        default=default.activation_threshold,
        help="scales the margin of the bound; 1.0 keeps the fidelity's promise",
    )
    parser.add_argument("--threads", type=number(int, 1), help="compute threads; else torch's own choice")


def add_device(parser: argparse.ArgumentParser) -> None:
    """Where a model computes, and what of it may lie there."""
    parser.add_argument("--device", default="cpu", help="cpu, cuda, or cuda:N")
    parser.add_argument(
        "--device-memory",
        default="auto",
        help="the most that a GPU may be filled with by this process, such as 8GiB; auto: nine tenths of what is free",
    )
    parser.add_argument(
        "--gpu-cache-ratio",
        type=float,
        default=OffloadStrategy().gpu_cache_ratio,
        help="at most this share of all bundles has a slot on the GPU",
    )
    parser.add_argument(
        "--device-hints",
        action="store_true",
        help="bring bundles to the GPU while the layer before computes, as foreseen there",
    )
    parser.add_argument(
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
