"""What a benchmark runs: cases, by name and options, and which partial offloads are worth a try."""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sparseflow.bench.child import PEERS
from sparseflow.errors import BadRequest

PARTIAL = "partial_offload"  # stands for the best `device_map:layers=N`, which is searched for
_CONVERTED = ("airllm", "ctranslate2", "onnxruntime")  # peers that read a folder of their own


@dataclass(frozen=True)
class Case:
    """One peer and its options, each as `name=value`."""

    peer: str
    options: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> "Case":
        """As in `sparseflow:fidelity=calibrated,io=map`.

        Raises:
            ValueError: no such case.
        """
        peer, _, rest = text.partition(":")
        options = tuple(filter(None, rest.split(",")))
        known = {} if peer == PARTIAL else PEERS.get(peer)
        if known is None:
            raise ValueError(f"{text!r}: give one of {', '.join((*PEERS, PARTIAL))}")
        for option in options:
            name, _, value = option.partition("=")
            if name not in known or not value or value not in (known[name] or (value,)):
                raise ValueError(f"{text!r}: {option!r} is not an option of {peer}; it has {known or 'none'}")
        return cls(peer, options)

    @property
    def label(self) -> str:
        """As it is written on the command line."""
        return self.peer + (":" + ",".join(self.options) if self.options else "")

    @property
    def needs_conversion(self) -> bool:
        """Whether it reads a folder of its own."""
        return self.peer in _CONVERTED


def layer_nbytes(checkpoint: Path) -> list[int]:
    """Bytes of each decoder layer, and last of all that belongs to none, from the headers of its safetensors files."""
    sizes: dict[int, int] = {}
    for path in checkpoint.glob("*.safetensors"):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        for name, place in header.items():
            if name == "__metadata__":
                continue
            match = re.search(r"\blayers\.(\d+)\.", name)
            layer = int(match[1]) if match else -1
            sizes[layer] = sizes.get(layer, 0) + place["data_offsets"][1] - place["data_offsets"][0]
    return [sizes[layer] for layer in sorted(sizes, key=lambda layer: (layer < 0, layer))]


def partial_candidates(given: Sequence[int], sizes: Sequence[int], room_nbytes: int) -> list[Case]:
    """Which partial offloads to try.

    Copied layers, which the kernel cannot take back, around as many as fit beside the rest and one layer on its way;
    mapped ones, which compete for the page cache, as many, and all: that is transformers without accelerate.

    Args:
        given: numbers of layers to try instead.
        sizes: as `layer_nbytes`.

    Raises:
        BadRequest: no number given is possible.
    """
    *layers, rest = sizes
    n_fitting = max(0, min(len(layers), (room_nbytes - rest - max(layers)) // max(layers)))
    copied: Iterable[int] = given or range(n_fitting - 1, n_fitting + 3)
    mapped: Iterable[int] = given or (n_fitting, len(layers))
    tried = [(n, "yes") for n in copied] + [(n, "no") for n in mapped]
    candidates = [_partial(n, way) for n, way in dict.fromkeys(tried) if 0 < n <= len(layers)]
    if not candidates:
        raise BadRequest(
            f"--partial-layers {' '.join(map(str, given))}: the model has {len(layers)} layers; give 1 or more"
        )
    return candidates


def one_layer_more(case: Case, n_layers: int) -> Case | None:
    """The partial offload that keeps another layer on the cpu; None if there is none."""
    layers, way = (option.partition("=")[2] for option in case.options)
    return _partial(int(layers) + 1, way) if int(layers) < n_layers else None


def _partial(n_layers: int, copied: str) -> Case:
    return Case("device_map", (f"layers={n_layers}", f"copied={copied}"))
