"""A trace: which neurons each layer step of a decode asked for. What evictions and budgets are judged by.

A trace on disk is a safetensors file: `layers` (n_steps,), `offsets` (n_steps + 1,) and `ids`, and in its metadata the
sizes of the model and the fingerprint of its weights.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from sparseflow.errors import BadRequest, DiskError

_FORMAT = "sparseflow-trace-1"
_SIZES = ("n_layers", "ffn_dim", "bundle_nbytes")


class Step(NamedTuple):
    """One layer step. ids: (n,) uint32, ascending, no repeats."""

    layer: int
    ids: NDArray[np.uint32]


@dataclass(frozen=True, eq=False)
class Trace:
    """Layer steps in the order in which they came, flat: step n asked for `ids[offsets[n]:offsets[n + 1]]`."""

    n_layers: int
    ffn_dim: int
    bundle_nbytes: int
    fingerprint: str
    """Of the weights that the trace was recorded with."""
    layers: NDArray[np.uint32]
    """(n_steps,)"""
    offsets: NDArray[np.uint64]
    """(n_steps + 1,), from 0 to the number of ids."""
    ids: NDArray[np.uint32]

    def __post_init__(self) -> None:
        problem = _problem(self)
        if problem:
            raise BadRequest(f"trace: {problem}; record it again")

    @classmethod
    def from_steps(cls, sizes: tuple[int, int, int], fingerprint: str, steps: Iterable[Step]) -> Self:
        """sizes: `n_layers`, `ffn_dim`, `bundle_nbytes`."""
        steps = list(steps)
        layers = np.array([step.layer for step in steps], np.uint32)
        offsets = np.cumsum([0, *(len(step.ids) for step in steps)]).astype(np.uint64)
        ids = np.concatenate([np.empty(0, np.uint32), *(step.ids for step in steps)], dtype=np.uint32)
        return cls(*sizes, fingerprint, layers, offsets, ids)

    @classmethod
    def load(cls, path: Path) -> Self:
        """
        Raises:
            DiskError: cannot be read. BadRequest: not a trace.
        """
        try:
            with safe_open(path, framework="numpy") as file:
                metadata: Mapping[str, str] = file.metadata() or {}
                if metadata.get("format") != _FORMAT:
                    raise BadRequest(f"{path}: not a trace ({_FORMAT}); make one with `sparseflow trace record`")
                sizes = [int(metadata[name]) for name in _SIZES]
                arrays = [file.get_tensor(name) for name in ("layers", "offsets", "ids")]
            return cls(sizes[0], sizes[1], sizes[2], metadata["fingerprint"], *arrays)
        except OSError as error:
            raise DiskError(f"{path}: cannot be read ({error}); name a trace") from error
        except BadRequest as error:
            raise BadRequest(str(error) if str(path) in str(error) else f"{path}: {error}") from error
        except (SafetensorError, KeyError, ValueError) as error:
            raise BadRequest(f"{path}: not a trace ({error}); make one with `sparseflow trace record`") from error

    def save(self, path: Path) -> None:
        """
        Raises:
            DiskError: cannot be written.
        """
        metadata = {"format": _FORMAT, "fingerprint": self.fingerprint}
        metadata |= {name: str(getattr(self, name)) for name in _SIZES}
        arrays = {"layers": self.layers, "offsets": self.offsets, "ids": self.ids}
        try:
            save_file(arrays, path, metadata)
        except (OSError, SafetensorError) as error:
            raise DiskError(f"{path}: cannot be written ({error}); name another file") from error

    @property
    def n_steps(self) -> int:
        """Layer steps."""
        return len(self.layers)

    @property
    def n_tokens(self) -> int:
        """Tokens, each of which is a step of every layer."""
        return self.n_steps // self.n_layers

    def __iter__(self) -> Iterator[Step]:
        bounds = self.offsets.astype(np.int64)
        for n, layer in enumerate(self.layers.tolist()):
            yield Step(layer, self.ids[bounds[n] : bounds[n + 1]])

    def part(self, start: int, stop: int) -> Self:
        """Some steps of it, as a trace."""
        sizes = (self.n_layers, self.ffn_dim, self.bundle_nbytes)
        bounds = self.offsets[start : stop + 1]
        ids = self.ids[int(bounds[0]) : int(bounds[-1])]
        return type(self)(*sizes, self.fingerprint, self.layers[start:stop], bounds - bounds[0], ids)

    def of_layer(self, layer: int) -> list[NDArray[np.uint32]]:
        """The ids of each step of one layer."""
        bounds = self.offsets.astype(np.int64)
        return [self.ids[bounds[n] : bounds[n + 1]] for n in np.flatnonzero(self.layers == layer)]


def _problem(trace: Trace) -> str | None:
    """What is wrong with a trace, if something is."""
    arrays = {"layers": np.uint32, "offsets": np.uint64, "ids": np.uint32}
    for name, dtype in arrays.items():
        array = getattr(trace, name)
        if array.dtype != dtype or array.ndim != 1:
            return f"{name} are {array.dtype} of {array.ndim} dimensions, not {np.dtype(dtype)} of 1"
    if min(trace.n_layers, trace.ffn_dim, trace.bundle_nbytes) < 1:
        return f"{trace.n_layers} layers of {trace.ffn_dim} neurons of {trace.bundle_nbytes} bytes"
    offsets = trace.offsets.astype(np.int64)
    if (
        len(offsets) != len(trace.layers) + 1
        or offsets[0]
        or offsets[-1] != len(trace.ids)
        or (np.diff(offsets) < 0).any()
    ):
        return f"offsets do not divide {len(trace.ids)} ids among {len(trace.layers)} steps"
    if (trace.layers >= trace.n_layers).any():
        return f"layer {trace.layers.max()} of {trace.n_layers}"
    if (trace.ids >= trace.ffn_dim).any():
        return f"neuron {trace.ids.max()} of {trace.ffn_dim}"
    falls = np.flatnonzero(np.diff(trace.ids.astype(np.int64)) <= 0) + 1
    if not np.isin(falls, offsets).all():
        return "ids of a step do not ascend, or repeat"
    return None
