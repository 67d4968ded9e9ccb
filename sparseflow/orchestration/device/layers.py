"""The layers of a model as they lie on a device: slots and biases of each, and what their steps share."""

from collections.abc import Sequence

import torch
from numpy import int64
from numpy.typing import NDArray
from torch import Tensor

from sparseflow.core.weight_source import WeightSource
from sparseflow.kernels.device.ops import DeviceOps, LayerMemory, PlainOps, TritonOps
from sparseflow.kernels.device.placement import PlacedStep, Placement
from sparseflow.orchestration.device.choosers import TOKENS_AT_ONCE, Chooser
from sparseflow.orchestration.device.tally import DeviceTally
from sparseflow.orchestration.neuron_predictor import fc1_biases


class DeviceLayers:
    """What a sparse step finds and fills there."""

    def __init__(
        self,
        source: WeightSource,
        choosers: Sequence[Chooser],
        fc2_biases: Sequence[Tensor | None],
        slots: NDArray[int64],
        tally: DeviceTally,
        device: torch.device,
    ) -> None:
        """As `DeviceCoordinator` is told. tally: what the device counts to."""
        profile = source.profile
        n_layers, self.n_neurons, hidden = profile.num_layers, profile.ffn_dimension, profile.hidden_dimension
        self.device, self.choosers = device, choosers
        is_cpu = device.type == "cpu"
        self.ops: DeviceOps = PlainOps() if is_cpu else TritonOps(TOKENS_AT_ONCE, self.n_neurons, hidden, device)
        shape = (int(slots.sum()), profile.parts_per_bundle, hidden)
        self.slab = torch.empty(shape, dtype=getattr(torch, profile.dtype), device=device)
        self.fc1_biases = fc1_biases(source)
        """(ffn_dim,) float32 of each layer, in host memory."""
        no_bias = torch.zeros(hidden)
        self.memory = [
            LayerMemory(
                Placement(self.n_neurons, len(slab), device, totals),
                slab,
                fc1.to(device),
                (no_bias if fc2 is None else fc2.float()).to(device),
                n_active,
            )
            for slab, fc1, fc2, (totals, n_active) in zip(
                self.slab.split(slots.tolist()), self.fc1_biases, fc2_biases, tally.of_layers, strict=True
            )
        ]
        self.step = PlacedStep.empty(self.n_neurons, device)
        if not choosers:
            self.step.fill_with_all()
        self.masks = torch.zeros(n_layers, TOKENS_AT_ONCE, self.n_neurons, dtype=torch.int8, device=device)
        """(n_layers, tokens, ffn_dim), candidates of each layer's last sparse step."""
        self.inputs = torch.zeros(n_layers, TOKENS_AT_ONCE, hidden, device=device)
        """(n_layers, tokens, hidden) float32, what that was given."""

    def __len__(self) -> int:
        return len(self.memory)

    def choose(self, layer: int, x: Tensor) -> None:
        """Which neurons a step computes; all, without choosers. x: (n_tokens, hidden) float32."""
        if self.choosers:
            self.choosers[layer].choose(x, self.masks[layer, : len(x)])

    def empty(self) -> None:
        """Forget what lies in slots."""
        for memory in self.memory:
            memory.placement.empty()

    def close(self) -> None:
        """Let go of the device's memory. May be called twice."""
        self.memory, self.choosers, self.fc1_biases = [], [], []
        self.slab, self.masks, self.inputs = (each[:0].clone() for each in (self.slab, self.masks, self.inputs))
