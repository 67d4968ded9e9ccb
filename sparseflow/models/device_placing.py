"""What of a model lies on a device, in the order in which it comes there: codes, dense weights, slots."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparseflow.core.config import SparseFlowConfig
from sparseflow.core.weight_source import LentWeights
from sparseflow.models.token_step import TokenStep
from sparseflow.orchestration.device.choosers import Mover
from sparseflow.orchestration.device.coordinator import DeviceCoordinator, choosers_of
from sparseflow.orchestration.device.layer_stream import LayerStream
from sparseflow.orchestration.device.slots import HINTS_NBYTES, DevicePlan
from sparseflow.orchestration.neuron_predictor import NeuronPredictor

if TYPE_CHECKING:
    from sparseflow.models.opt_sparse import SparseOPTForCausalLM


def has_slots(config: SparseFlowConfig) -> bool:
    """Whether bundles have device slots, or are computed in host memory."""
    return torch.device(config.primary_device).type != "cpu" or config.strategy.device_cache == "copy"


class PlacedModel:
    """The parts of a model on its device, and what has to be closed there."""

    def __init__(self, model: "SparseOPTForCausalLM", predictor: NeuronPredictor | None) -> None:
        """Bring the predictor's weights to the device.

        Raises:
            BadRequest: it does not work on a device.
        """
        config, source = model.sparseflow_config, model.source
        self._model, self._source, self._predictor = model, source, predictor
        self.device = torch.device(config.primary_device)
        self._plan = DevicePlan(source, self.device, config.device_memory)
        self._lent: LentWeights | None = None
        lent = {}
        if config.borrows_dense:
            self._lent = source.borrow_dense(self.device.index or 0)
            there, here = self._lent.predictor_tensors(self.device), source.predictor_tensors()
            lent = {tensor.data_ptr(): there[name] for name, tensor in here.items() if tensor.numel()}
        move = Mover(self.device, lent)
        self._choosers = choosers_of(predictor, move)
        self._plan.take(move.nbytes)
        if predictor is not None and config.strategy.device_hints:
            self._plan.take(HINTS_NBYTES)
        self._stream: LayerStream | None = None
        self._coordinator: DeviceCoordinator | None = None
        self._dense_nbytes = 0

    def dense(self) -> dict[str, Tensor]:
        """The dense weights there, by name; of the last layers' attention, where not all fit, what is streamed to.

        Raises:
            NotEnoughMemory: they do not fit with all layers streamed.
        """
        if self._lent is not None:
            return dict(self._lent.dense(self.device))
        dense, layers = self._source.dense(), self._model.model.decoder.layers
        names = [
            {part: f"model.decoder.layers.{n}.self_attn.{part}" for part, _ in layer.self_attn.named_parameters()}
            for n, layer in enumerate(layers)
        ]
        layer_nbytes = max(sum(dense[name].nbytes for name in of_layer.values()) for of_layer in names)
        others = sum(weight.nbytes for weight in dense.values()) - len(names) * layer_nbytes
        n_streamed = self._plan.n_streamed_layers(layer_nbytes, others)
        streamed: dict[str, Tensor] = {}
        first = len(names) - n_streamed
        if n_streamed:
            weights = [{part: dense[name] for part, name in of_layer.items()} for of_layer in names[first:]]
            self._stream = LayerStream(weights, self.device)
            self._plan.take(self._stream.nbytes)
            for k, of_layer in enumerate(names[first:]):
                layers[first + k].turn = self._stream.turn(k)
                streamed |= {of_layer[part]: tensor for part, tensor in self._stream.tensors(k).items()}
        kept = {name: weight.to(self.device) for name, weight in dense.items() if name not in streamed}
        self._dense_nbytes = sum(weight.nbytes for weight in kept.values())
        self._plan.take(self._dense_nbytes)
        return kept | streamed

    def coordinator(self, fc2_biases: list[Tensor | None]) -> DeviceCoordinator:
        """Slots in what room is left, and what runs the MLPs from them.

        Raises:
            NotEnoughMemory: not even one slot a layer.
        """
        strategy = self._model.sparseflow_config.strategy
        self._coordinator = DeviceCoordinator(
            self._source,
            self._predictor,
            self._choosers,
            fc2_biases,
            [layer.mlp_norm for layer in self._model.model.decoder.layers],
            self.device,
            self._plan.slots(strategy.gpu_cache_ratio),
            0 if self._stream is None else self._stream.n_layers * self._stream.layer_nbytes,
            moves_hints=strategy.device_hints,
        )
        if self._lent is not None:
            self._coordinator.before_pass = self._lent.require
        return self._coordinator

    def token_step(self) -> TokenStep | None:
        """None on a CPU, and for a model with parts that it does not know."""
        if self.device.type == "cpu" or not TokenStep.can_run(self._model) or self._coordinator is None:
            return None
        step = TokenStep(self._model, self._coordinator)
        if self._stream is not None and self._stream.reason:
            step.uses_graph = False  # which cannot hold copies from memory that is not page-locked
        return step

    def report(self) -> dict[str, Any]:
        """What lies on the device, in bytes, and how neurons get there."""
        if self._coordinator is None:
            return {}
        report, step = self._coordinator.report(), self._model.token_step
        report["nbytes"]["dense"] = self._dense_nbytes
        if self._stream is not None:
            report["nbytes"]["buffers"] += self._stream.nbytes
        return report | {
            "uses_graph": step is not None and step.uses_graph,
            "borrows_dense": self._lent is not None,
            "n_streamed_layers": 0 if self._stream is None else self._stream.n_layers,
            "streaming_reason": None if self._stream is None else self._stream.reason or None,
        }

    def close(self) -> None:
        """Let go of the device's memory. May be called twice."""
        if self._coordinator is not None:
            self._coordinator.close()
        if self._stream is not None:
            self._stream.close()
        self._choosers = []
        if self._lent is not None:
            self._lent.close()
