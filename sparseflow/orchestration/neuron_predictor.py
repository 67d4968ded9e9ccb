"""Which neurons of a layer must be computed for some tokens.

    exact       the default: a neuron is skipped only if it is inactive but for a stated, negligible probability
    certified   a neuron is skipped only if it is certainly inactive
    oracle      the truly active ones, found by computing all (for tests)

The first two read codes of fc1 instead of its weights (`kernels.bounds`); nothing is trained. `exact` rests on a dither
that is independent of the input: someone who has read the store can make inputs that break it, never `certified`.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sparseflow.core.weight_source import FETCH_TIMEOUT_S, WeightSource
from sparseflow.kernels.bounds import CodedRows, Margin, Scorer
from sparseflow.orchestration.device.choosers import Chooser, ChooserByCodes, Mover
from sparseflow.store.profile import ModelProfile

# Probability that one token misses any active neuron in any layer under `exact`.
EXACT_FAILURE_PROBABILITY = 1e-6

_WIDENED_AT_ONCE = 1024  # neurons whose weights an audit holds in float64


class NeuronPredictor(Protocol):
    """Chooses neurons at the MLP's own input."""

    fidelity: str
    """As in the result fields: `exact`, `certified`, `calibrated:RECALL`, `oracle`, `given`, or `threshold:VALUE`."""

    @property
    def nbytes_read(self) -> int:
        """Bytes of predictor weights read by `select` and `bounds` so far; `bounds` counts each token as if alone."""
        ...

    def scorer(self, layer: int) -> Scorer | None:
        """What `select` asks, where that is codes."""
        ...

    def select(self, layer: int, x: Tensor) -> NDArray[np.uint32]:
        """Neurons to compute for all of these tokens together, ascending. x: (n_tokens, hidden) float32, contiguous."""
        ...

    def bounds(self, layer: int, x: Tensor) -> Tensor:
        """How near each neuron is to being chosen, token by token: it is where this is not <= 0.

        x: as above. Returns (n_tokens, ffn_dim) float32. Slower than `select`, which is the union over the tokens.
        """
        ...


class LayerPredictor(Protocol):
    """Chooses neurons of one layer, as `NeuronPredictor` does of all."""

    nbytes_read: int

    @property
    def scorer(self) -> Scorer | None:
        """As `NeuronPredictor.scorer`."""
        ...

    def select(self, x: Tensor) -> NDArray[np.uint32]:
        """As `NeuronPredictor.select`."""
        ...

    def bounds(self, x: Tensor) -> Tensor:
        """As `NeuronPredictor.bounds`."""
        ...

    def on_device(self, move: Mover) -> Chooser:
        """What chooses the same neurons on a GPU, to which `move` brings its weights."""
        ...


class LayeredPredictor:
    """A predictor for each layer."""

    def __init__(self, layers: Sequence[LayerPredictor], kinds: list[str], fidelity: str) -> None:
        self.layers = layers
        self.kinds = kinds
        """What each layer's is."""
        self.fidelity = fidelity
        self.nbytes_read = 0

    def scorer(self, layer: int) -> Scorer | None:
        """As `NeuronPredictor.scorer`."""
        return self.layers[layer].scorer

    def select(self, layer: int, x: Tensor) -> NDArray[np.uint32]:
        """As `NeuronPredictor.select`."""
        predictor = self.layers[layer]
        before = predictor.nbytes_read
        ids = predictor.select(x)
        self.nbytes_read += predictor.nbytes_read - before
        return ids

    def bounds(self, layer: int, x: Tensor) -> Tensor:
        """As `NeuronPredictor.bounds`."""
        predictor = self.layers[layer]
        before = predictor.nbytes_read
        bounds = predictor.bounds(x)
        self.nbytes_read += predictor.nbytes_read - before
        return bounds


class CodesOfLayer:
    """All neurons whose upper bound, from codes of fc1, is not at most 0."""

    def __init__(
        self, rows: CodedRows, margin: Margin, failure_probability: float, threshold: float = 1.0, planes: int = 2
    ) -> None:
        """
        Args:
            failure_probability: of one neuron and one token, under `Margin.EXACT`.
            threshold: scales the margin; any value but 1.0 gives up the bound's promise.
            planes: of the codes, that may be read.
        """
        self.scorer = Scorer(rows, margin, failure_probability, threshold, planes)
        self.nbytes_read = 0
        self._settings = rows, margin, failure_probability, threshold, planes

    def on_device(self, move: Mover) -> Chooser:
        """As `LayerPredictor.on_device`."""
        return ChooserByCodes(*self._settings, move)

    def select(self, x: Tensor) -> NDArray[np.uint32]:
        """As `NeuronPredictor.select`."""
        ids, n_fine_rows = self.scorer.select(x)
        self.nbytes_read += self.scorer.nbytes_read(1, n_fine_rows)
        return ids

    def bounds(self, x: Tensor) -> Tensor:
        """As `NeuronPredictor.bounds`."""
        bounds, n_fine_rows = self.scorer.bounds(x)
        self.nbytes_read += self.scorer.nbytes_read(len(x), n_fine_rows)
        return torch.from_numpy(bounds)


def bound_predictor(source: WeightSource, margin: Margin, activation_threshold: float = 1.0) -> LayeredPredictor:
    """All neurons whose upper bound is not at most 0.

    Args:
        margin: `Margin.EXACT` or `Margin.CERTIFIED`.
        activation_threshold: scales the margin; any value but 1.0 gives up the fidelity's promise.
    """
    d = failure_probability(source.profile)
    layers = [CodesOfLayer(rows, margin, d, activation_threshold) for rows in coded_rows(source)]
    name = "exact" if margin is Margin.EXACT else "certified"
    fidelity = name if activation_threshold == 1 else f"threshold:{activation_threshold:g}"
    return LayeredPredictor(layers, [name] * len(layers), fidelity)


def failure_probability(profile: ModelProfile) -> float:
    """Of one neuron and one token, so that a token's all together have EXACT_FAILURE_PROBABILITY."""
    return EXACT_FAILURE_PROBABILITY / (profile.num_layers * profile.ffn_dimension)


class OraclePredictor:
    """The truly active neurons, computed from all weights in float64. Slow: it is the twin, not a way to run."""

    fidelity = "oracle"
    nbytes_read = 0

    def __init__(self, source: WeightSource) -> None:
        self._source = source
        self._biases = fc1_biases(source)

    def scorer(self, layer: int) -> None:
        """None."""

    def select(self, layer: int, x: Tensor) -> NDArray[np.uint32]:
        """As `NeuronPredictor.select`."""
        return active_neurons(self._source, layer, x, self._biases[layer])

    def bounds(self, layer: int, x: Tensor) -> Tensor:
        """As `NeuronPredictor.bounds`: the pre-activations."""
        return pre_activations(self._source, layer, x, self._biases[layer]).float()


def active_neurons(source: WeightSource, layer: int, x: Tensor, fc1_bias: Tensor) -> NDArray[np.uint32]:
    """Neurons whose pre-activation, in float64, is above 0 for at least one token."""
    is_active = (pre_activations(source, layer, x, fc1_bias) > 0).any(0)
    return is_active.nonzero().flatten().numpy().astype(np.uint32)


def pre_activations(
    source: WeightSource, layer: int, x: Tensor, fc1_bias: Tensor, ids: NDArray[np.uint32] | None = None
) -> Tensor:
    """W1 x + b1: (n_tokens, n) float64. What has to be read for it is not kept.

    Args:
        x: (n_tokens, hidden).
        ids: (n,), ascending; None: all neurons.
    """
    ids = np.arange(source.profile.ffn_dimension, dtype=np.uint32) if ids is None else ids
    wide = x.double()
    found = [torch.empty(len(x), 0, dtype=torch.float64)]
    n_at_once = min(source.fetch_limit, _WIDENED_AT_ONCE)
    for start in range(0, len(ids), n_at_once):
        part = ids[start : start + n_at_once]
        with source.fetch(layer, part, keep=False) as fetch:
            bundles = fetch.wait(FETCH_TIMEOUT_S)
            rows = bundles.base[torch.from_numpy(bundles.slots.astype(np.int64)), 0].double()
        found.append(wide @ rows.T + fc1_bias[torch.from_numpy(part.astype(np.int64))].double())
    return torch.cat(found, 1)


def fc1_biases(source: WeightSource) -> list[Tensor]:
    """fc1's bias of each layer, (ffn_dim,) float32; zeros where the model has none."""
    dense, profile = source.dense(), source.profile
    names = [f"model.decoder.layers.{layer}.fc1.bias" for layer in range(profile.num_layers)]
    return [dense[name].float() if name in dense else torch.zeros(profile.ffn_dimension) for name in names]


def coded_rows(source: WeightSource) -> list[CodedRows]:
    """Codes of each layer."""
    tensors = source.predictor_tensors()
    return [
        CodedRows(
            **{name: tensors[f"{layer}.{name}"] for name in CodedRows._fields if name != "bias"},
            bias=bias,
        )
        for layer, bias in enumerate(fc1_biases(source))
    ]
