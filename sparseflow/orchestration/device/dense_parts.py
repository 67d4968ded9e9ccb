"""A layer's MLP, dense, on a device that does not hold it: one part is computed while the next comes."""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sparseflow.core.weight_source import WeightSource
from sparseflow.kernels.device.ops import DeviceOps, LayerMemory, ReachableBundles
from sparseflow.kernels.device.placement import N_PLACED
from sparseflow.orchestration.device.slots import DENSE_PART_NBYTES
from sparseflow.orchestration.device.transport import Brought

Bring = Callable[[int, NDArray[np.uint32]], Brought]


class DenseParts:
    """Two buffers on the device, used in turn, and what goes through them."""

    def __init__(
        self,
        source: WeightSource,
        layers: list[LayerMemory],
        ops: DeviceOps,
        device: torch.device,
        *,
        keeps_first: bool,
    ) -> None:
        """
        Args:
            keeps_first: the slots of a layer hold its first bundles for good: nothing else needs them.
        """
        profile = source.profile
        self._layers, self._ops, self._device = layers, ops, device
        self._keeps_first, self._filled = keeps_first, [False] * len(layers)
        self._dtype = getattr(torch, profile.dtype)
        self._n_neurons = profile.ffn_dimension
        self._n_at_once = max(1, min(self._n_neurons, DENSE_PART_NBYTES // profile.bundle_nbytes, source.fetch_limit))
        shape = (2, self._n_at_once, profile.parts_per_bundle, profile.hidden_dimension)
        self._buffers = torch.empty(shape, dtype=self._dtype, device=device)
        self._bundle_nbytes = profile.bundle_nbytes
        self._places = torch.arange(self._n_at_once, dtype=torch.int32, device=device)
        self._n_active = torch.zeros(1, dtype=torch.int64, device=device)
        self._nbytes_moved = 0
        self._n_moved = 0  # parts, which settles whose turn it is
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)
            self._is_read = [torch.cuda.Event() for _ in range(2)]

    def compute(self, layer: int, x: Tensor, host: ReachableBundles | None, bring: Bring, limit: int) -> Tensor:
        """W2 relu(W1 x + b1) + b2.

        Args:
            x: (n_tokens, hidden) float32.
            host: the layer's bundles where the device reads them by itself; None: they are brought.
            bring: fetches bundles of a layer to where the device reads them, `limit` at most.

        Returns:
            (n_tokens, hidden) float32.
        """
        memory = self._layers[layer]
        n_kept = memory.placement.n_slots if self._keeps_first else 0
        y = memory.fc2_bias.repeat(len(x), 1)
        if n_kept:
            self._fill(layer, n_kept, host, bring, limit)
            self._add(memory, 0, memory.slab[:n_kept], x, y)
        for first in range(n_kept, self._n_neurons, self._n_at_once):
            n = min(self._n_at_once, self._n_neurons - first)
            turn = self._n_moved % 2
            part = self._buffers[turn, :n]
            self._n_moved += 1
            self._move(layer, first, part, host, bring, limit, turn)
            self._add(memory, first, part, x, y)
            if self._device.type == "cuda":
                self._is_read[turn].record()
        return y

    def holds_all(self) -> bool:
        """Whether every neuron of every layer is in a slot by now."""
        return all(self._filled) and all(memory.placement.n_slots == self._n_neurons for memory in self._layers)

    @property
    def nbytes(self) -> int:
        """What the buffers take on the device."""
        return self._buffers.nbytes

    def take_active(self) -> int:
        """Active pairs of token and neuron since this was asked last. Waits for the device."""
        n = int(self._n_active)
        self._n_active.zero_()
        return n

    def take_moved(self) -> int:
        """Bytes moved since this was asked last."""
        n, self._nbytes_moved = self._nbytes_moved, 0
        return n

    def close(self) -> None:
        """Let go of the buffers."""
        self._buffers = self._buffers[:0].clone()
        self._layers = []

    def _add(self, memory: LayerMemory, first: int, bundles: Tensor, x: Tensor, y: Tensor) -> None:
        fc1_bias = memory.fc1_bias[first : first + len(bundles)]
        h = torch.relu_(_product(x.to(self._dtype), bundles[:, 0].T).add_(fc1_bias))
        self._n_active += torch.count_nonzero(h)
        y += _product(h.to(self._dtype), bundles[:, 1])

    def _fill(self, layer: int, n_kept: int, host: ReachableBundles | None, bring: Bring, limit: int) -> None:
        if self._filled[layer]:
            return
        slab = self._layers[layer].slab
        for first in range(0, n_kept, self._n_at_once):
            n = min(self._n_at_once, n_kept - first)
            self._move(layer, first, slab[first : first + n], host, bring, limit, None)
        self._filled[layer] = True

    def _move(
        self,
        layer: int,
        first: int,
        part: Tensor,
        host: ReachableBundles | None,
        bring: Bring,
        limit: int,
        turn: int | None,
    ) -> None:
        """Bundles from `first` on. turn: of the buffer that they go to, once what it held is read."""
        self._nbytes_moved += len(part) * self._bundle_nbytes
        if host is None:
            self._fetch(layer, first, part, bring, limit)
        elif self._device.type == "cpu" or turn is None:
            self._copy(host, first, part)
        else:
            here = torch.cuda.current_stream(self._device)
            self._stream.wait_event(self._is_read[turn])
            with torch.cuda.stream(self._stream):
                self._copy(host, first, part)
            here.wait_stream(self._stream)

    def _copy(self, host: ReachableBundles, first: int, part: Tensor) -> None:
        for begin, end in host.pieces(first, len(part)):
            part[begin - first : end - first].copy_(host.bundles[begin:end], non_blocking=True)

    def _fetch(self, layer: int, first: int, part: Tensor, bring: Bring, limit: int) -> None:
        ids = np.arange(first, first + len(part), dtype=np.uint32)
        counts = torch.zeros(N_PLACED + 1, dtype=torch.int32, device=self._device)
        for begin in range(0, len(ids), limit):
            these = ids[begin : begin + limit]
            counts[N_PLACED] = len(these)
            host, rows, lease = bring(layer, these)
            self._ops.gather(host, rows, self._places[begin : begin + len(these)], counts, part)
            if self._device.type == "cuda":
                torch.cuda.current_stream(self._device).synchronize()
            if lease is not None:
                lease.release()  # the device has read it


def _product(a: Tensor, b: Tensor) -> Tensor:
    """In float32, of two matrices of one dtype."""
    if a.device.type == "cuda" and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()
