"""One token's MLP in one call: what scoring and the sparse MLP give one after the other, to the bit."""

import numpy as np
import pytest
import torch
from torch import Tensor

from sparseflow.kernels.bounds import CodedRows, Margin, Scorer
from sparseflow.kernels.mlp_step import MLPStep, Stepped
from sparseflow.kernels.sparse_mlp import sparse_mlp
from sparseflow.store.codes import code_rows, draw_dither

FAILURE_PROBABILITY = 1e-9


class Layer:
    """Random weights, their codes, and biases that leave few neurons active."""

    def __init__(self, rng: np.random.Generator, ffn_dim: int, hidden: int, dtype: torch.dtype) -> None:
        weights = torch.from_numpy(rng.standard_normal((ffn_dim, 2, hidden), np.float32)).to(dtype)
        rows = weights[:, 0].double().numpy()
        dither = draw_dither(hidden, rng)
        codes = {"dither": dither} | code_rows(rows, dither)._asdict()
        self.bundles = weights
        self.fc1_bias = torch.from_numpy(rng.standard_normal(ffn_dim, np.float32)) - 1.5 * hidden**0.5
        self.fc2_bias = torch.from_numpy(rng.standard_normal(hidden, np.float32))
        tensors = {name: torch.from_numpy(array) for name, array in codes.items()}
        self.codes = CodedRows(**tensors, bias=self.fc1_bias)

    def scorer(self, margin: Margin, planes: int) -> Scorer:
        return Scorer(self.codes, margin, FAILURE_PROBABILITY, planes=planes)

    def in_two_calls(self, scorer: Scorer, x: Tensor) -> Stepped:
        ids, n_fine_rows = scorer.select(x)
        y, n_active = sparse_mlp(self.bundles, ids, ids, self.fc1_bias, self.fc2_bias, x)
        return Stepped(y, ids, n_active, n_fine_rows)


def assert_same(found: Stepped, expected: Stepped) -> None:
    assert torch.equal(found.y, expected.y)
    assert found.ids.tolist() == expected.ids.tolist()
    assert found[2:] == expected[2:]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("margin", Margin, ids=lambda margin: margin.name.lower())
@pytest.mark.parametrize(("ffn_dim", "hidden"), [(1, 1), (37, 129), (700, 256)])
def test_one_call_gives_what_two_give(
    rng: np.random.Generator, n_threads: int, ffn_dim: int, hidden: int, margin: Margin, planes: int, dtype: torch.dtype
) -> None:
    layer = Layer(rng, ffn_dim, hidden, dtype)
    scorer = layer.scorer(margin, planes)
    step = MLPStep(scorer, layer.fc1_bias, layer.fc2_bias)
    for _ in range(3):
        x = torch.from_numpy(rng.standard_normal((1, hidden), np.float32))
        assert_same(step(x, layer.bundles), layer.in_two_calls(scorer, x))


def test_few_neurons_are_chosen_and_they_are_the_active_ones(rng: np.random.Generator) -> None:
    layer = Layer(rng, 2000, 256, torch.float32)
    x = torch.from_numpy(rng.standard_normal((1, 256), np.float32))
    stepped = MLPStep(layer.scorer(Margin.EXACT, 2), layer.fc1_bias, layer.fc2_bias)(x, layer.bundles)
    h = torch.relu(layer.bundles[:, 0].double() @ x[0].double() + layer.fc1_bias.double())
    assert 0 < stepped.n_active == int((h > 0).sum()) <= len(stepped.ids) < 400
    expected = h @ layer.bundles[:, 1].double() + layer.fc2_bias.double()
    torch.testing.assert_close(stepped.y[0].double(), expected, rtol=1e-4, atol=1e-3)


def test_no_neuron_leaves_the_bias_and_what_is_not_a_number_chooses_all(rng: np.random.Generator) -> None:
    layer = Layer(rng, 50, 64, torch.float16)
    layer.fc1_bias.fill_(-1e9)
    step = MLPStep(layer.scorer(Margin.EXACT, 2), layer.fc1_bias, layer.fc2_bias)
    nothing = step(torch.ones(1, 64), layer.bundles)
    assert torch.equal(nothing.y[0], layer.fc2_bias)
    assert nothing.n_active == len(nothing.ids) == 0
    everything = step(torch.full((1, 64), torch.nan), layer.bundles)
    assert everything.ids.tolist() == list(range(50))
    assert everything.y.isnan().all()


def test_more_or_fewer_threads_from_call_to_call(rng: np.random.Generator) -> None:
    layer = Layer(rng, 300, 128, torch.float16)
    scorer = layer.scorer(Margin.CERTIFIED, 2)
    step = MLPStep(scorer, layer.fc1_bias, layer.fc2_bias)
    x = torch.from_numpy(rng.standard_normal((1, 128), np.float32))
    before = torch.get_num_threads()
    try:
        for n_threads in (1, 3, 2, 1):
            torch.set_num_threads(n_threads)
            assert_same(step(x, layer.bundles), layer.in_two_calls(scorer, x))
    finally:
        torch.set_num_threads(before)


def test_bundles_may_be_others_from_call_to_call(rng: np.random.Generator) -> None:
    layer = Layer(rng, 300, 128, torch.float16)
    scorer = layer.scorer(Margin.EXACT, 2)
    step = MLPStep(scorer, layer.fc1_bias, layer.fc2_bias)
    x = torch.from_numpy(rng.standard_normal((1, 128), np.float32))
    first = step(x, layer.bundles)
    apart = torch.zeros(600, 2, 128, dtype=torch.float16)
    apart[::2] = layer.bundles
    assert_same(step(x, apart[::2]), first)
