"""What a layer's neurons do on text: its MLP's inputs, which neurons fire, and the residual stream before them.

The text goes through the dense model one layer at a time: every window through the first layer, then every window
through the second. What passes between layers lies in files, so memory holds the weights of a layer or two.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sparseflow.orchestration.layer_mlp import LayerMlp
from sparseflow.utils.progress import progress

if TYPE_CHECKING:
    from sparseflow.models.opt_sparse import SparseOPTForCausalLM

_TOKENS_AT_ONCE = 2048


class _Watcher:
    """Stands where the coordinator does: computes one layer dense, in float32, and keeps what it saw."""

    def __init__(self, mlp: LayerMlp) -> None:
        self._mlp = mlp
        self.x = torch.empty(0)
        self.fires = torch.empty(0, dtype=torch.bool)

    def hint(self, layer: int, hidden: Tensor) -> None:
        """Nothing to foresee."""

    def mlp(self, layer: int, x: Tensor, hidden: Tensor, *, decoding: bool) -> Tensor:
        """As `TransferCoordinator.mlp`."""
        self.x = x
        before = self._mlp.pre_activations(x.float())
        self.fires = before > 0
        return self._mlp.output(before.relu_()).to(x.dtype)


@dataclass(frozen=True, slots=True)
class LayerActivity:
    """One layer on all tokens, window after window.

    x: (n_tokens, hidden), the MLP's input, dtype of the store. is_active: (n_tokens, ffn_dim / 8) uint8, packed bits,
    first neuron first. weight: (ffn_dim, hidden) float32, bias: (ffn_dim,) float32: fc1's.
    """

    x: Tensor
    is_active: NDArray[np.uint8]
    weight: Tensor
    bias: Tensor

    def labels(self, rows: Any) -> Tensor:
        """Which neurons are active for the tokens `rows` (a slice, or indices): (n, ffn_dim) bool."""
        bits = np.unpackbits(self.is_active[rows], axis=1, count=len(self.bias))
        return torch.from_numpy(bits).bool()


def embed(model: "SparseOPTForCausalLM", windows: Tensor, path: Path) -> None:
    """Write what enters the first layer to `path`: (n_tokens, hidden), dtype of the store."""
    decoder = model.model.decoder
    kept = decoder.layers, decoder.final_layer_norm, decoder.project_out
    decoder.layers, decoder.final_layer_norm, decoder.project_out = nn.ModuleList(), None, None
    try:
        stream = _create(path, model, windows.numel())
        for start, batch in _batches(windows):
            rows = decoder(batch, use_cache=False).last_hidden_state.flatten(0, 1)
            stream[start : start + len(rows)] = rows
    finally:
        decoder.layers, decoder.final_layer_norm, decoder.project_out = kept


def run_layer(
    model: "SparseOPTForCausalLM", layer: int, window: int, before: Path, after: Path, inputs: Path, *, quiet: bool
) -> LayerActivity:
    """Run all tokens through one layer.

    Args:
        model: opened with fidelity `dense`.
        window: tokens that attend to each other.
        before, after: files of the residual stream before the layer, which is there, and after it, which is written.
        inputs: where to write the MLP's inputs.
    """
    module = model.model.decoder.layers[layer]
    stream = open_stream(before, model)
    n_tokens, hidden = stream.shape
    written, x = _create(after, model, n_tokens), _create(inputs, model, n_tokens)
    mlp = LayerMlp.fetch(model.source, layer, module.fc1.bias, module.fc2.bias)
    is_active = np.empty((n_tokens, -(-len(mlp.fc1_bias) // 8)), np.uint8)
    module.coordinator = watcher = _Watcher(mlp)
    try:
        starts = range(0, n_tokens, _at_once(window))
        for start in progress(starts, f"layer {layer}: run", quiet=quiet, leave=False):
            rows = slice(start, start + _at_once(window))
            output = module(stream[rows].view(-1, window, hidden), attention_mask=None)
            written[rows] = output.flatten(0, 1)
            x[rows] = watcher.x
            is_active[rows] = np.packbits(watcher.fires.numpy(), axis=1)
    finally:
        module.coordinator = model.coordinator
    return LayerActivity(x, is_active, mlp.weights[0], mlp.fc1_bias)


def open_stream(path: Path, model: "SparseOPTForCausalLM") -> Tensor:
    """(n_tokens, hidden) of a file that `embed` or `run_layer` wrote."""
    n_elements = path.stat().st_size // model.dtype.itemsize
    return torch.from_file(str(path), shared=True, size=n_elements, dtype=model.dtype).view(
        -1, model.config.hidden_size
    )


def _create(path: Path, model: "SparseOPTForCausalLM", n_tokens: int) -> Tensor:
    with open(path, "wb") as file:
        file.truncate(n_tokens * model.config.hidden_size * model.dtype.itemsize)
    return open_stream(path, model)


def _at_once(window: int) -> int:
    return max(1, _TOKENS_AT_ONCE // window) * window


def _batches(windows: Tensor) -> Iterator[tuple[int, Tensor]]:
    n = _at_once(windows.shape[1]) // windows.shape[1]
    for first in range(0, len(windows), n):
        yield first * windows.shape[1], windows[first : first + n]
