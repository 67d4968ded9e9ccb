"""Options that were given and have no effect, each with its reason: the table, and the warnings."""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass

from sparseflow.cli.opening import add_opening
from sparseflow.cli.placement import Placement
from sparseflow.cli.sampling import add_sampling


@dataclass(frozen=True, slots=True)
class Knob:
    """An option, when it has no effect, and why."""

    option: str
    is_idle: Callable[[argparse.Namespace, Placement], bool]
    why: str

    @property
    def name(self) -> str:
        """Of its value among the arguments."""
        return self.option.removeprefix("--").replace("-", "_")


def _is_greedy(arguments: argparse.Namespace, placement: Placement) -> bool:
    return bool(arguments.temperature == 0)


def _is_resident(arguments: argparse.Namespace, placement: Placement) -> bool:
    return placement.is_resident


def _is_on_cpu(arguments: argparse.Namespace, placement: Placement) -> bool:
    return placement.device is None


def _is_dense(arguments: argparse.Namespace, placement: Placement) -> bool:
    return placement.fidelity == "dense"


def _has_less_room(arguments: argparse.Namespace, placement: Placement) -> bool:
    n_told = round(arguments.cpu_cache_ratio * 1000)
    return not arguments.aggressive_offload and round(placement.neurons_in_memory * 1000) < n_told


_GREEDY = "at temperature 0 the likeliest token is always taken; give --temperature above 0 to sample"
_RESIDENT = "all neurons are in memory and none is read while it runs; --memory or --cpu-cache-ratio would lower that"
_ON_CPU = "neurons are computed in host memory; --device cuda would bring them to a GPU"
_DENSE = "dense computes all neurons; give another --fidelity"

KNOBS = (
    Knob("--top-p", _is_greedy, _GREEDY),
    Knob("--top-k", _is_greedy, _GREEDY),
    Knob("--seed", _is_greedy, _GREEDY),
    Knob("--io", _is_resident, _RESIDENT),
    Knob("--eviction", _is_resident, _RESIDENT),
    Knob("--cpu-cache-ratio", _has_less_room, "--memory holds fewer neurons than that; raise it"),
    Knob("--aggressive-offload", _is_resident, _RESIDENT),
    Knob("--gpu-cache-ratio", _is_on_cpu, _ON_CPU),
    Knob("--device-memory", _is_on_cpu, _ON_CPU),
    Knob("--device-hints", _is_on_cpu, _ON_CPU),
    Knob("--activation-threshold", _is_dense, _DENSE),
    Knob("--audit", _is_dense, _DENSE),
)


def idle_knobs(arguments: argparse.Namespace, placement: Placement) -> list[str]:
    """A line for each option that was given and has no effect on a model that is placed so."""
    defaults = _defaults()
    given = {name: value for name, value in vars(arguments).items() if value != defaults.get(name)}
    return [
        f"{knob.option}{_shown(given[knob.name])} has no effect: {knob.why}"
        for knob in KNOBS
        if knob.name in given and knob.is_idle(arguments, placement)
    ]


def warn_of_idle_knobs(arguments: argparse.Namespace, placement: Placement) -> None:
    """On stderr."""
    for line in idle_knobs(arguments, placement):
        print(f"sparseflow: warning: {line}", file=sys.stderr)


def _shown(value: object) -> str:
    return "" if value is True else f" {value}"


def _defaults() -> dict[str, object]:
    parser = argparse.ArgumentParser()
    add_opening(parser)
    add_sampling(parser, max_new_tokens=1)
    return vars(parser.parse_args([])) | {"audit": 0}
