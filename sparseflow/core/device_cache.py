"""Device slots of one layer: which neuron lies in which slot, and which one goes when a new one comes.

Bookkeeping over ids, vectorised; it moves no bytes. The slot table is the only record: a victim's slot is the new
neuron's slot, and nothing else decides where a bundle is written.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sparseflow.errors import BadRequest

if TYPE_CHECKING:
    from torch import Tensor

_EMPTY = -1


class Placement(NamedTuple):
    """slots: (n,) int64, where each neuron asked for lies now. evicted: (m,) int64, neurons that had to go."""

    slots: NDArray[np.int64]
    evicted: NDArray[np.int64]


class WeightCache:
    """A fixed number of slots; the least recently used neuron goes first, or with `lru=False` the oldest.

    Neurons touched by one call are equally recent; among them the lower slot goes first.
    """

    def __init__(self, capacity: int, device: str = "cuda", *, lru: bool = True) -> None:
        """
        Args:
            capacity: slots.
            device: where the bundles lie; and where tensors that this class returns are.
        """
        if capacity < 1:
            raise BadRequest(f"capacity={capacity}: a device cache needs at least one slot")
        self.capacity = capacity
        self.device = device
        self._lru = lru
        self._clock = 0
        self._neuron_in = np.full(capacity, _EMPTY, np.int64)  # slot -> neuron
        self._stamp = np.zeros(capacity, np.int64)  # slot -> time of last use, or of arrival
        self._slot_of: NDArray[np.int64] = np.full(0, _EMPTY, np.int64)  # neuron -> slot, grown as ids appear

    def __len__(self) -> int:
        return int((self._neuron_in != _EMPTY).sum())

    def slots(self, neurons: NDArray[np.int64]) -> NDArray[np.int64]:
        """(n,) int64: the slot of each neuron, -1 where it has none. Changes nothing."""
        self._grow(neurons)
        return self._slot_of[neurons]

    def touch(self, neurons: NDArray[np.int64]) -> NDArray[np.int64]:
        """The slot of each neuron, -1 where it has none; those that have one were used now."""
        self._clock += 1
        slots = self.slots(neurons)
        if self._lru:
            self._stamp[slots[slots != _EMPTY]] = self._clock
        return slots

    def place(self, neurons: NDArray[np.int64]) -> Placement:
        """Give every neuron a slot, evicting others but none of these. neurons: (n,) int64 without repeats.

        Raises:
            BadRequest: more neurons than slots.
        """
        if len(neurons) > self.capacity:
            raise BadRequest(f"{len(neurons)} neurons for {self.capacity} slots; place them in parts")
        if len(np.unique(neurons)) != len(neurons):
            raise BadRequest(
                f"{len(neurons) - len(np.unique(neurons))} of {len(neurons)} neurons repeated; name each once"
            )
        slots = self.touch(neurons)
        missing = neurons[slots == _EMPTY]
        order = self._stamp.copy()
        order[slots[slots != _EMPTY]] = np.iinfo(np.int64).max
        order[self._neuron_in == _EMPTY] = -1
        chosen = np.argsort(order, kind="stable")[: len(missing)]
        victims = self._neuron_in[chosen]
        evicted = victims[victims != _EMPTY]
        self._slot_of[evicted] = _EMPTY
        self._neuron_in[chosen] = missing
        self._slot_of[missing] = chosen
        self._stamp[chosen] = self._clock
        return Placement(self._slot_of[neurons], evicted)

    def access(self, neuron_idx: int) -> int | None:
        """The slot of a neuron, used now; None where it has none."""
        slot = int(self.touch(np.array([neuron_idx]))[0])
        return None if slot == _EMPTY else slot

    def insert(self, neuron_idx: int) -> tuple[int, int | None]:
        """Give a neuron a slot. Returns it, and the neuron that had to go."""
        placement = self.place(np.array([neuron_idx]))
        return int(placement.slots[0]), int(placement.evicted[0]) if len(placement.evicted) else None

    def bulk_insert(self, neuron_indices: Sequence[int]) -> dict[int, int]:
        """Give neurons slots, all at once. Returns neuron -> slot."""
        neurons = np.unique(np.array(neuron_indices, np.int64))
        return dict(zip(neurons.tolist(), self.place(neurons).slots.tolist(), strict=True))

    def get_cached_indices(self) -> "Tensor":
        """(n,) int32, ascending: neurons that have a slot."""
        import torch

        neurons = np.sort(self._neuron_in[self._neuron_in != _EMPTY])
        return torch.from_numpy(neurons.astype(np.int32)).to(self.device)

    def get_missing_indices(self, requested: "Tensor") -> "Tensor":
        """(n,) int32, in the order given: neurons of `requested` that have no slot."""
        import torch

        neurons = requested.cpu().numpy().astype(np.int64)
        return torch.from_numpy(neurons[self.slots(neurons) == _EMPTY].astype(np.int32)).to(self.device)

    def _grow(self, neurons: NDArray[np.int64]) -> None:
        if not len(neurons):
            return
        if neurons.min() < 0:
            raise BadRequest(f"neuron {neurons.min()}: ids count from 0")
        short = int(neurons.max()) + 1 - len(self._slot_of)
        if short > 0:
            self._slot_of = np.concatenate((self._slot_of, np.full(short, _EMPTY, np.int64)))
