"""The sparse MLP against its float64 twin, over dtypes, sizes, layouts and threads."""

import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from sparseflow.kernels.sparse_mlp import SparseMLPOutput, sparse_mlp, sparse_mlp_ref

# Largest error, as a share of what the absolute values of all terms add up to. Weights of every dtype are widened
# exactly and added in float32, whose unit is 6e-8.
TOLERANCE = {torch.float16: 1e-6, torch.bfloat16: 1e-6, torch.float32: 1e-6}
HIDDEN_SIZES = (1, 7, 64, 100, 257)
DEADLINE_S = 60

all_dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
all_sizes = pytest.mark.parametrize("hidden", HIDDEN_SIZES)


@dataclass
class Layer:
    """Arguments of one call."""

    bundles: Tensor
    slots: NDArray[np.uint32]
    ids: NDArray[np.uint32]
    fc1_bias: Tensor
    fc2_bias: Tensor
    x: Tensor

    def run(self) -> SparseMLPOutput:
        return sparse_mlp(self.bundles, self.slots, self.ids, self.fc1_bias, self.fc2_bias, self.x)

    def run_ref(self) -> SparseMLPOutput:
        return sparse_mlp_ref(self.bundles, self.slots, self.ids, self.fc1_bias, self.fc2_bias, self.x)

    def chosen(self) -> tuple[Tensor, Tensor, Tensor]:
        """fc1 rows and fc2 columns of the chosen neurons, (n, hidden), and their fc1 biases, (n,); float64."""
        rows = self.bundles[torch.from_numpy(self.slots.astype(np.int64))].double()
        return rows[:, 0], rows[:, 1], self.fc1_bias[torch.from_numpy(self.ids.astype(np.int64))].double()


def random_layer(
    rng: np.random.Generator,
    dtype: torch.dtype,
    hidden: int,
    n_chosen: int,
    *,
    n_tokens: int = 1,
    spare_elements: int = 0,
) -> Layer:
    """Twice as many neurons as are chosen and three slots more, in random order, `spare_elements` between bundles."""
    ffn_dim = 2 * n_chosen + 1
    n_slots = ffn_dim + 3
    rows = torch.from_numpy(rng.standard_normal((n_slots, 2 * hidden + spare_elements))).to(dtype)
    return Layer(
        bundles=rows[:, : 2 * hidden].unflatten(1, (2, hidden)),
        slots=rng.permutation(n_slots)[:n_chosen].astype(np.uint32),
        ids=np.sort(rng.permutation(ffn_dim)[:n_chosen]).astype(np.uint32),
        fc1_bias=torch.from_numpy(rng.standard_normal(ffn_dim)).float(),
        fc2_bias=torch.from_numpy(rng.standard_normal(hidden)).float(),
        x=torch.from_numpy(rng.standard_normal((n_tokens, hidden))).float(),
    )


def check(layer: Layer, output: SparseMLPOutput) -> None:
    """Compare with the twin, term by term size: a sum may lose digits, a term may not."""
    w1, w2, b1 = layer.chosen()
    x = layer.x.double()
    size = (x.abs() @ w1.abs().T + b1.abs()) @ w2.abs() + layer.fc2_bias.double().abs()
    error = (output.y.double() - layer.run_ref().y.double()).abs()
    assert output.y.shape == layer.x.shape
    assert output.y.dtype == torch.float32
    assert (error <= TOLERANCE[layer.bundles.dtype] * size).all()
    h = x @ w1.T + b1
    unclear = 1e-5 * (x.abs() @ w1.abs().T + b1.abs())
    assert (h > unclear).sum() <= output.n_active <= (h > -unclear).sum()


@all_dtypes
@all_sizes
@pytest.mark.parametrize("n_chosen", [0, 1, 2, 33, 200])
def test_agrees_with_the_twin(
    rng: np.random.Generator, n_threads: int, dtype: torch.dtype, hidden: int, n_chosen: int
) -> None:
    layer = random_layer(rng, dtype, hidden, n_chosen)
    check(layer, layer.run())


@all_dtypes
@all_sizes
@pytest.mark.parametrize("n_tokens", [2, 5])
def test_agrees_with_the_twin_for_several_tokens(
    rng: np.random.Generator, n_threads: int, dtype: torch.dtype, hidden: int, n_tokens: int
) -> None:
    layer = random_layer(rng, dtype, hidden, 40, n_tokens=n_tokens)
    check(layer, layer.run())


@all_dtypes
@all_sizes
@pytest.mark.parametrize("spare_elements", [1, 64])
def test_bundles_may_lie_apart(
    rng: np.random.Generator, n_threads: int, dtype: torch.dtype, hidden: int, spare_elements: int
) -> None:
    layer = random_layer(rng, dtype, hidden, 20, n_tokens=2, spare_elements=spare_elements)
    assert layer.bundles.stride(0) == 2 * hidden + spare_elements
    check(layer, layer.run())


def test_twin_is_the_textbook_mlp(rng: np.random.Generator) -> None:
    layer = random_layer(rng, torch.float32, 64, 30, n_tokens=3)
    w1, w2, b1 = layer.chosen()
    expected = torch.relu(layer.x.double() @ w1.T + b1) @ w2 + layer.fc2_bias.double()
    torch.testing.assert_close(layer.run_ref().y, expected.float())


def test_no_neurons_leave_the_bias_of_fc2(rng: np.random.Generator, n_threads: int) -> None:
    layer = random_layer(rng, torch.float16, 100, 0, n_tokens=3)
    output = layer.run()
    assert torch.equal(output.y, layer.fc2_bias.expand(3, 100))
    assert output.n_active == 0


def test_fewer_neurons_and_columns_than_threads(rng: np.random.Generator, set_threads: Callable[[int], None]) -> None:
    set_threads(4)
    layer = random_layer(rng, torch.float32, 2, 1, n_tokens=2)
    check(layer, layer.run())


# --- which neurons count


def hand_made(x: float, biases: list[float]) -> Layer:
    """Neurons with fc1 weight 1 and fc2 weight 2, hidden 1, given from last to first slot."""
    n = len(biases)
    return Layer(
        bundles=torch.tensor([1.0, 2.0]).repeat(n, 1).unflatten(1, (2, 1)),
        slots=np.arange(n, dtype=np.uint32)[::-1].copy(),
        ids=np.arange(n, dtype=np.uint32),
        fc1_bias=torch.tensor(biases),
        fc2_bias=torch.zeros(1),
        x=torch.tensor([[x]]),
    )


def test_only_neurons_above_zero_are_active(n_threads: int) -> None:
    """Pre-activations -1, -0.0, 0, the smallest float32 above 0, and 3."""
    output = hand_made(0.0, [-1.0, -0.0, 0.0, 1e-45, 3.0]).run()
    assert output.n_active == 2
    assert output.y.item() == 6.0


def test_active_pairs_of_token_and_neuron_are_counted(n_threads: int) -> None:
    """Pre-activations of 2 tokens: x - 1, x and x + 1 at x = 0 and at x = 1."""
    layer = hand_made(0.0, [-1.0, 0.0, 1.0])
    layer.x = torch.tensor([[0.0], [1.0]])
    output = layer.run()
    assert output.n_active == 1 + 2
    assert output.y.flatten().tolist() == [2.0, 6.0]


def test_bias_is_chosen_by_id_and_weights_by_slot(n_threads: int) -> None:
    """Slots hold fc1 weights 10, 20, 30; ids hold biases 1, 2, 3: id 2 in slot 0, and id 0 in slot 1."""
    layer = Layer(
        bundles=torch.tensor([[[10.0], [1.0]], [[20.0], [100.0]], [[30.0], [10000.0]]]),
        slots=np.array([1, 0], np.uint32),
        ids=np.array([0, 2], np.uint32),
        fc1_bias=torch.tensor([1.0, 2.0, 3.0]),
        fc2_bias=torch.tensor([0.5]),
        x=torch.ones(1, 1),
    )
    assert layer.run().y.item() == (20 + 1) * 100 + (10 + 3) * 1 + 0.5


def test_column_of_an_inactive_neuron_is_not_read(n_threads: int) -> None:
    layer = hand_made(0.0, [-1.0, 1.0])
    layer.bundles[1, 1] = np.nan  # slot 1: the neuron with bias -1
    assert layer.run().y.item() == 2.0


# --- numbers that are none, and extremes


@all_dtypes
def test_nan_in_x_spoils_its_token_and_no_other(rng: np.random.Generator, n_threads: int, dtype: torch.dtype) -> None:
    layer = random_layer(rng, dtype, 100, 30, n_tokens=3)
    layer.x[1, 42] = np.nan
    y = layer.run().y
    assert y[1].isnan().all()
    assert not y[[0, 2]].isnan().any()


@all_dtypes
def test_nan_in_a_weight_of_fc1_spoils_the_output(rng: np.random.Generator, n_threads: int, dtype: torch.dtype) -> None:
    layer = random_layer(rng, dtype, 100, 30)
    layer.bundles[int(layer.slots[11]), 0, 99] = np.nan
    assert layer.run().y.isnan().all()


@all_dtypes
def test_nan_in_an_active_column_spoils_its_dimension(n_threads: int, dtype: torch.dtype) -> None:
    layer = hand_made(0.0, [1.0, 2.0])
    layer.bundles = torch.ones(2, 2, 5, dtype=dtype)
    layer.bundles[0, 1, 3] = np.nan
    layer.x, layer.fc2_bias = torch.zeros(1, 5), torch.zeros(5)
    assert layer.run().y.isnan().tolist() == [[False, False, False, True, False]]


@pytest.mark.parametrize(("x", "expected"), [(np.inf, np.inf), (-np.inf, 0.0)])
def test_infinity_in_x_keeps_its_meaning(n_threads: int, x: float, expected: float) -> None:
    output = hand_made(x, [0.0, 1.0]).run()
    assert output.y.item() == expected
    assert output.n_active == (2 if expected else 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_finite_16_bit_weight_is_read_exactly(n_threads: int, dtype: torch.dtype) -> None:
    """All 65536 patterns, denormals included: fc1 gives 1, so y is the weight itself."""
    weights = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
    weights = weights[weights.isfinite()]
    bundles = torch.zeros(1, 2, len(weights), dtype=dtype)
    bundles[0, 1] = weights
    zero, one = np.zeros(1, np.uint32), torch.ones(1)
    output = sparse_mlp(bundles, zero, zero, one, torch.zeros(len(weights)), torch.zeros(1, len(weights)))
    assert torch.equal(output.y[0], weights.float())


# --- repeatable, and safe to call from several Python threads


@all_dtypes
def test_same_call_gives_the_same_bits(rng: np.random.Generator, n_threads: int, dtype: torch.dtype) -> None:
    layer = random_layer(rng, dtype, 257, 150, n_tokens=3)
    first = layer.run()
    for _ in range(50):
        again = layer.run()
        assert torch.equal(again.y, first.y)
        assert again.n_active == first.n_active


@pytest.fixture
def busy_cores() -> Iterator[None]:
    """Somebody else computes on every core, now and then, until the test ends."""
    is_over = threading.Event()
    content = bytes(256 << 10)

    def compute(pause_s: float) -> None:
        while not is_over.wait(pause_s):
            hashlib.sha256(content)  # without the interpreter's lock

    n_cores = len(os.sched_getaffinity(0))
    threads = [threading.Thread(target=compute, args=[0.0001 * n]) for n in range(1, 2 * n_cores + 1)]
    for thread in threads:
        thread.start()
    yield
    is_over.set()
    for thread in threads:
        thread.join(DEADLINE_S)


@pytest.mark.parametrize("threads", [2, 3, 8])
@pytest.mark.parametrize("n_chosen", [5, 700])
def test_same_call_gives_the_same_bits_whoever_else_keeps_the_cores_busy(
    rng: np.random.Generator, set_threads: Callable[[int], None], busy_cores: None, threads: int, n_chosen: int
) -> None:
    """Which thread computes which part is chance then, and makes no difference."""
    set_threads(threads)
    layer = random_layer(rng, torch.float16, 257, n_chosen, n_tokens=3)
    first = layer.run()
    check(layer, first)
    for _ in range(60):
        again = layer.run()
        assert torch.equal(again.y, first.y)
        assert again.n_active == first.n_active


def test_arguments_are_left_alone(rng: np.random.Generator, n_threads: int) -> None:
    layer = random_layer(rng, torch.float16, 100, 30, n_tokens=3)
    tensors = (layer.bundles, layer.fc1_bias, layer.fc2_bias, layer.x)
    before = [tensor.clone() for tensor in tensors]
    layer.run()
    assert all(torch.equal(one, other) for one, other in zip(tensors, before, strict=True))


def test_two_python_threads_at_once_get_their_own_results(rng: np.random.Generator, n_threads: int) -> None:
    layers = [
        random_layer(rng, torch.float16, 257, 150, n_tokens=3),
        random_layer(rng, torch.float32, 64, 90, n_tokens=2),
    ]

    def run_many(layer: Layer) -> list[SparseMLPOutput]:
        torch.set_num_threads(n_threads)  # torch keeps this for each thread
        return [layer.run() for _ in range(300)]

    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(run_many, layer) for layer in layers]
        results = [future.result(timeout=DEADLINE_S) for future in futures]
    for layer, outputs in zip(layers, results, strict=True):
        check(layer, outputs[0])
        assert all(torch.equal(output.y, outputs[0].y) for output in outputs)
        assert all(output.n_active == outputs[0].n_active for output in outputs)
