"""Which neurons of a layer must be computed for some tokens.

    exact       the default: a neuron is skipped only if it is inactive but for a stated, negligible probability
    certified   a neuron is skipped only if it is certainly inactive
    oracle      the truly active ones, found by computing all (for tests)

The first two read codes of fc1 instead of its weights (`kernels.bounds`); nothing is trained. `exact` rests on rounding
that is independent of the input: someone who has read the store can make inputs that break it, never `certified`.
"""

from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sparseflow.core.weight_source import FETCH_TIMEOUT_S, WeightSource
from sparseflow.errors import BadRequest
from sparseflow.kernels.bounds import CodedRows, Margin, candidates, upper_bounds

# Probability that one token misses any active neuron in any layer under `exact`.
EXACT_FAILURE_PROBABILITY = 1e-6

_WIDENED_AT_ONCE = 1024  # neurons whose weights an audit holds in float64

FIDELITIES = ("exact", "certified", "dense", "oracle")


class NeuronPredictor(Protocol):
    """Chooses neurons at the MLP's own input."""

    fidelity: str
    """As in the result fields: `exact`, `certified`, `oracle`, or `threshold:VALUE`."""

    def select(self, layer: int, x: Tensor) -> NDArray[np.uint32]:
        """Neurons to compute for all of these tokens together, ascending. x: (n_tokens, hidden) float32, contiguous."""
        ...

    def bounds(self, layer: int, x: Tensor) -> Tensor:
        """How near each neuron is to being chosen, token by token: it is where this is not <= 0.

        x: as above. Returns (n_tokens, ffn_dim) float32. Slower than `select`, which is the union over the tokens.
        """
        ...


class BoundPredictor:
    """All neurons whose upper bound, from 8-bit codes, is not at most 0."""

    def __init__(self, source: WeightSource, margin: Margin, activation_threshold: float = 1.0) -> None:
        """
        Args:
            margin: `Margin.EXACT` or `Margin.CERTIFIED`.
            activation_threshold: scales the margin; any value but 1.0 gives up the fidelity's promise.
        """
        profile = source.profile
        self._margin = margin
        self._threshold = activation_threshold
        self._failure_probability = EXACT_FAILURE_PROBABILITY / (profile.num_layers * profile.ffn_dimension)
        self._layers = coded_rows(source)
        name = "exact" if margin is Margin.EXACT else "certified"
        self.fidelity = name if activation_threshold == 1 else f"threshold:{activation_threshold:g}"

    def select(self, layer: int, x: Tensor) -> NDArray[np.uint32]:
        """As `NeuronPredictor.select`."""
        return candidates(self._layers[layer], x, self._margin, self._failure_probability, self._threshold)

    def bounds(self, layer: int, x: Tensor) -> Tensor:
        """As `NeuronPredictor.bounds`."""
        return upper_bounds(self._layers[layer], x, self._margin, self._failure_probability, self._threshold)


class OraclePredictor:
    """The truly active neurons, computed from all weights in float64. Slow: it is the twin, not a way to run."""

    fidelity = "oracle"

    def __init__(self, source: WeightSource) -> None:
        self._source = source
        self._biases = fc1_biases(source)

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


def pre_activations(source: WeightSource, layer: int, x: Tensor, fc1_bias: Tensor) -> Tensor:
    """W1 x + b1 of all neurons: (n_tokens, ffn_dim) float64. x: (n_tokens, hidden)."""
    found = []
    n_at_once = min(source.fetch_limit, _WIDENED_AT_ONCE)
    for start in range(0, source.profile.ffn_dimension, n_at_once):
        ids = np.arange(start, min(start + n_at_once, source.profile.ffn_dimension), dtype=np.uint32)
        with source.fetch(layer, ids) as fetch:
            bundles = fetch.wait(FETCH_TIMEOUT_S)
            rows = bundles.base[torch.from_numpy(bundles.slots.astype(np.int64)), 0].double()
        bias = fc1_bias[start : start + len(ids)].double()
        found.append(x.double() @ rows.T + bias)
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
            tensors[f"{layer}.codes"],
            tensors[f"{layer}.scales"],
            bias,
            tensors[f"{layer}.norms"],
            tensors[f"{layer}.error_norms"],
        )
        for layer, bias in enumerate(fc1_biases(source))
    ]


def make_predictor(source: WeightSource, fidelity: str, activation_threshold: float) -> NeuronPredictor | None:
    """The predictor of a fidelity; None for `dense`, which needs none.

    Raises:
        BadRequest: no such fidelity.
    """
    require_fidelity(fidelity)
    match fidelity:
        case "exact":
            return BoundPredictor(source, Margin.EXACT, activation_threshold)
        case "certified":
            return BoundPredictor(source, Margin.CERTIFIED, activation_threshold)
        case "oracle":
            return OraclePredictor(source)
    return None


def require_fidelity(fidelity: str) -> None:
    """
    Raises:
        BadRequest: no such fidelity.
    """
    if fidelity not in FIDELITIES:
        raise BadRequest(f"fidelity {fidelity!r}: this version knows {', '.join(FIDELITIES)}")
