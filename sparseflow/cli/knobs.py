"""Options that were given and have no effect, each with its reason: the tables, and the warnings."""

import argparse
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sparseflow.cli.placement import Placement
from sparseflow.utils.parsing import actions_of

_log = logging.getLogger(__name__)


def _is_greedy(arguments: argparse.Namespace) -> bool:
    return bool(arguments.temperature == 0)


def _is_without(name: str) -> Callable[[argparse.Namespace], bool]:
    """Whether an option of this name is not set."""
    return lambda arguments: not getattr(arguments, name, None)


def _is_with(name: str) -> Callable[[argparse.Namespace], bool]:
    """Whether one is."""
    return lambda arguments: bool(getattr(arguments, name, None))


def _is_cpu(arguments: argparse.Namespace) -> bool:
    return bool(arguments.device == "cpu")


def _always(arguments: argparse.Namespace) -> bool:
    return True


def _is_resident(arguments: argparse.Namespace, placement: Placement) -> bool:
    return placement.is_resident


def _is_on_cpu(arguments: argparse.Namespace, placement: Placement) -> bool:
    return placement.device is None


def _is_dense(arguments: argparse.Namespace, placement: Placement) -> bool:
    return placement.fidelity == "dense"


def _has_less_room(arguments: argparse.Namespace, placement: Placement) -> bool:
    n_told = round(arguments.cpu_cache_ratio * 1000)
    return not arguments.aggressive_offload and round(placement.neurons_in_memory * 1000) < n_told


@dataclass(frozen=True, slots=True)
class _Option:
    """An option, and why it has no effect where it has none."""

    option: str
    why: str

    @property
    def name(self) -> str:
        """Of its value among the arguments."""
        return self.option.removeprefix("--").replace("-", "_")


@dataclass(frozen=True, slots=True)
class Knob(_Option):
    """One of which the arguments alone say so."""

    is_idle: Callable[[argparse.Namespace], bool]


@dataclass(frozen=True, slots=True)
class PlacedKnob(_Option):
    """One of which is known when the model is open."""

    is_idle: Callable[[argparse.Namespace, Placement], bool]


_GREEDY = "at temperature 0 the likeliest token is always taken; give --temperature above 0 to sample"
_RESIDENT = "all neurons are in memory and none is read while it runs; --memory or --cpu-cache-ratio would lower that"
_ON_CPU = "neurons are computed in host memory; --device cuda would bring them to a GPU"
_DENSE = "dense computes all neurons; give another --fidelity"
_QUICK = "--quick decodes few tokens in one round; leave it out"
_CODES_ONLY = "with --codes-only no predictor is trained; leave that out"

_SAMPLING = tuple(Knob(option, _GREEDY, _is_greedy) for option in ("--top-p", "--top-k", "--seed"))

KNOBS: dict[str, tuple[Knob, ...]] = {
    "generate": _SAMPLING,
    "chat": _SAMPLING,
    "serve": tuple(Knob(name, _ON_CPU, _is_cpu) for name in ("--gpu-cache-ratio", "--device-memory", "--device-hints")),
    "demo": (
        Knob("--seed", _GREEDY, _is_greedy),
        Knob("--gpu-cache-ratio", "the demo computes on the CPU; `sparseflow generate` has --device", _always),
    ),
    "info": (
        Knob("--gpu-cache-ratio", "it is said of a model how many neurons that are; name one", _is_without("model")),
    ),
    "trace": (Knob("--seed", "the tokens are those of --text", _is_with("text")),),
    "calibrate": (
        Knob("--epochs", _CODES_ONLY, _is_with("codes_only")),
        Knob("--keep-all", _CODES_ONLY, _is_with("codes_only")),
    ),
    "bench": (
        Knob("--reserve", "it is kept from --limit, which was not given", _is_without("limit")),
        Knob("--tokens", _QUICK, _is_with("quick")),
        Knob("--rounds", _QUICK, _is_with("quick")),
    ),
    "status": (Knob("--count", "it counts what --watch shows, which was not given", _is_without("watch")),),
}
"""By command."""

PLACED_KNOBS = (
    PlacedKnob("--io", _RESIDENT, _is_resident),
    PlacedKnob("--eviction", _RESIDENT, _is_resident),
    PlacedKnob("--cpu-cache-ratio", "--memory holds fewer neurons than that; raise it", _has_less_room),
    PlacedKnob("--aggressive-offload", _RESIDENT, _is_resident),
    PlacedKnob("--gpu-cache-ratio", _ON_CPU, _is_on_cpu),
    PlacedKnob("--device-memory", _ON_CPU, _is_on_cpu),
    PlacedKnob("--device-hints", _ON_CPU, _is_on_cpu),
    PlacedKnob("--activation-threshold", _DENSE, _is_dense),
    PlacedKnob("--audit", _DENSE, _is_dense),
)
"""Of `generate` and `chat`."""


def given_options(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> frozenset[str]:
    """Names of the options that the command line has, be their values the defaults or not. Spoils the parser."""
    for action in actions_of(parser):
        if action.option_strings:
            action.default = argparse.SUPPRESS
    return frozenset(vars(parser.parse_known_args(argv)[0]))


def idle_knobs(arguments: argparse.Namespace, placement: Placement | None = None) -> list[str]:
    """A line for each option that was given and has no effect.

    Args:
        arguments: with `given`, of `given_options`.
        placement: of the open model, for what depends on that; None: for what the arguments alone say.
    """
    if placement is None:
        idle: list[_Option] = [knob for knob in KNOBS.get(arguments.command, ()) if knob.is_idle(arguments)]
    else:
        idle = [knob for knob in PLACED_KNOBS if hasattr(arguments, knob.name) and knob.is_idle(arguments, placement)]
    return [
        f"{knob.option}{_shown(getattr(arguments, knob.name))} has no effect: {knob.why}"
        for knob in idle
        if knob.name in arguments.given
    ]


def warn_of_idle_knobs(arguments: argparse.Namespace, placement: Placement | None = None) -> None:
    """Log them. Arguments: as of `idle_knobs`."""
    for line in idle_knobs(arguments, placement):
        _log.warning(line)


def _shown(value: object) -> str:
    return "" if value is True else f" {value}"
