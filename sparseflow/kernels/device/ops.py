"""What a layer step does with device slots, as kernels for a GPU, and the same in plain PyTorch on any device."""

import itertools
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from sparseflow.kernels.device.placement import N_CANDIDATES, N_PLACED, PlacedStep, Placement


@dataclass(frozen=True, slots=True)
class ReachableBundles:
    """Bundles in host memory. bundles: (n, 2, hidden). address: where the device sees the first of them.

    A copy may not reach over the edges of what was page-locked in one piece, which a kernel may: those lie before the
    bundles `first_edge`, `first_edge + n_between_edges` and so on. 0: there are none.
    """

    bundles: Tensor
    address: int
    first_edge: int = 0
    n_between_edges: int = 0

    def pieces(self, first: int, n: int) -> list[tuple[int, int]]:
        """Ranges from `first` to `first + n`, cut at edges."""
        cuts = [first, first + n]
        if self.n_between_edges:
            skipped = max(0, -(-(first + 1 - self.first_edge) // self.n_between_edges))
            edge = self.first_edge + skipped * self.n_between_edges
            cuts[1:1] = range(edge, first + n, self.n_between_edges)
        return list(itertools.pairwise(cuts))

    @property
    def stride_nbytes(self) -> int:
        """From one bundle to the next."""
        return self.bundles.stride(0) * self.bundles.element_size()


@dataclass(frozen=True, slots=True)
class LayerMemory:
    """One layer on the device. slab: (n_slots, 2, hidden). Biases float32. n_active: (1,) int64, of pairs so far."""

    placement: Placement
    slab: Tensor
    fc1_bias: Tensor
    fc2_bias: Tensor
    n_active: Tensor


class DeviceOps(Protocol):
    """Steps of one layer, in this order."""

    def place(self, layer: LayerMemory, mask: Tensor, step: PlacedStep, first: int, end: int) -> None:
        """As `Placement.place`."""
        ...

    def hint(self, layer: LayerMemory, mask: Tensor, step: PlacedStep) -> None:
        """As `Placement.hint`."""
        ...

    def gather(self, host: ReachableBundles, rows: Tensor, places: Tensor, counts: Tensor, slab: Tensor) -> None:
        """Copy bundle `rows[k]` of the host to `slab[places[k]]`, for as many k as `counts[N_PLACED]` says.

        rows, places, counts: int32 on the device.
        """
        ...

    def compute(
        self,
        layer: LayerMemory,
        host: ReachableBundles,
        rows: Tensor,
        step: PlacedStep,
        x: Tensor,
        y: Tensor,
        residual: Tensor | None,
    ) -> None:
        """Fill y with W2 relu(W1 x + b1) + b2 + residual. x: (n_tokens, hidden) float32. y: the same, its own dtype."""
        ...


class TritonOps:
    """On a GPU, without waiting for it."""

    def __init__(self, n_tokens: int, n_neurons: int, hidden: int, device: torch.device) -> None:
        """For steps of up to `n_tokens` tokens."""
        from sparseflow.kernels.device.sparse_mlp import MLPScratch

        self._scratch = MLPScratch(n_tokens, n_neurons, hidden, device)

    def place(self, layer: LayerMemory, mask: Tensor, step: PlacedStep, first: int = 0, end: int = 2**31 - 1) -> None:
        """As `DeviceOps.place`."""
        layer.placement.place(mask, step, first, end)

    def hint(self, layer: LayerMemory, mask: Tensor, step: PlacedStep) -> None:
        """As `DeviceOps.hint`."""
        layer.placement.hint(mask, step)

    def gather(self, host: ReachableBundles, rows: Tensor, places: Tensor, counts: Tensor, slab: Tensor) -> None:
        """As `DeviceOps.gather`."""
        from sparseflow.kernels.device.gather import gather

        gather(host.address, host.stride_nbytes, rows, places, counts, slab)

    def compute(
        self, layer: LayerMemory, host: ReachableBundles, rows: Tensor, step: PlacedStep, x: Tensor, y: Tensor,
        residual: Tensor | None,
    ) -> None:  # fmt: skip
        """As `DeviceOps.compute`."""
        from sparseflow.kernels.device.sparse_mlp import sparse_mlp

        sparse_mlp(
            layer.slab, host.address, host.stride_nbytes, rows, step, layer.fc1_bias, layer.fc2_bias, x, self._scratch,
            layer.n_active, y, residual,
        )  # fmt: skip


class PlainOps:
    """In PyTorch, on any device: the twin, and what keeps device slots on a CPU."""

    def place(self, layer: LayerMemory, mask: Tensor, step: PlacedStep, first: int = 0, end: int = 2**31 - 1) -> None:
        """As `DeviceOps.place`."""
        layer.placement.place_ref(mask, step, first, end)

    def hint(self, layer: LayerMemory, mask: Tensor, step: PlacedStep) -> None:
        """As `DeviceOps.hint`."""
        layer.placement.hint_ref(mask, step)

    def gather(self, host: ReachableBundles, rows: Tensor, places: Tensor, counts: Tensor, slab: Tensor) -> None:
        """As `DeviceOps.gather`."""
        n = int(counts[N_PLACED])
        chosen = host.bundles[rows[:n].long().to(host.bundles.device)]
        slab[places[:n].long()] = chosen.to(slab.device)

    def compute(
        self, layer: LayerMemory, host: ReachableBundles, rows: Tensor, step: PlacedStep, x: Tensor, y: Tensor,
        residual: Tensor | None,
    ) -> None:  # fmt: skip
        """As `DeviceOps.compute`."""
        n = int(step.counts[N_CANDIDATES])
        slots, ids = step.slots[:n].long(), step.ids[:n].long()
        bundles = layer.slab[slots.clamp_min(0)].float()
        if (direct := slots < 0).any():
            direct_rows = rows[-1 - slots[direct]].long()
            bundles[direct] = host.bundles[direct_rows.to(host.bundles.device)].to(bundles)
        h = torch.relu_(torch.addmm(layer.fc1_bias[ids], x, bundles[:, 0].T))
        layer.n_active.add_(torch.count_nonzero(h))
        total = torch.addmm(layer.fc2_bias, h, bundles[:, 1])
        y.copy_(total if residual is None else total + residual.float())
