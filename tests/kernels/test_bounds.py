"""No neuron that is active is ever skipped; and the kernel finds what its twin finds, with few more."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from sparseflow.kernels import intrinsics
from sparseflow.kernels.bounds import (
    CodedRows,
    Margin,
    Scorer,
    candidates,
    candidates_ref,
    decoded,
    upper_bounds,
    upper_bounds_ref,
)
from sparseflow.store.codes import FINE_STEPS, GROUP, code_rows, draw_dither, group_count

# One neuron and one token; what a token of a 1.3B model gets is 5e-12. A right kernel fails no run of these tests.
FAILURE_PROBABILITY = 1e-12
DEADLINE_S = 60

# neurons, hidden
SIZES = [(1, 1), (1, 200), (2, 63), (3, GROUP - 1), (7, GROUP), (50, GROUP + 1), (129, 200), (300, 1000)]
all_sizes = pytest.mark.parametrize(("n_neurons", "hidden"), SIZES)
both_margins = pytest.mark.parametrize("margin", Margin, ids=lambda margin: margin.name.lower())
all_planes = pytest.mark.parametrize("planes", [1, 2])

Floats = NDArray[np.float64]


def coded(rng: np.random.Generator, weight: Floats, bias: Floats | None = None) -> CodedRows:
    """weight: (n, hidden). bias: (n,), rounded to float32; None: zeros."""
    dither = draw_dither(weight.shape[1], rng)
    codes = {"dither": dither} | code_rows(weight, dither)._asdict()
    tensors = {name: torch.from_numpy(array) for name, array in codes.items()}
    rows = CodedRows(**tensors, bias=torch.zeros(len(weight)))
    return rows if bias is None else with_bias(rows, bias)


def with_bias(rows: CodedRows, bias: Floats) -> CodedRows:
    return rows._replace(bias=torch.from_numpy(bias.astype(np.float32)))


def stood_for(rows: CodedRows, hidden: int, planes: int = 2) -> Floats:
    """(n, hidden): the rows that the codes stand for."""
    return decoded(rows)[planes - 1].numpy()[:, :hidden]


def tokens(x: Floats) -> torch.Tensor:
    return torch.from_numpy(x.astype(np.float32))


def find(
    rows: CodedRows, x: torch.Tensor, margin: Margin, threshold: float = 1.0, planes: int = 2
) -> NDArray[np.uint32]:
    return candidates(rows, x, margin, FAILURE_PROBABILITY, threshold, planes)


def pre_activations(weight: Floats, rows: CodedRows, x: torch.Tensor) -> Floats:
    """(n_tokens, n) float64, from the true weights."""
    with np.errstate(all="ignore"):
        return x.double().numpy() @ weight.T + rows.bias.double().numpy()


def missed(weight: Floats, rows: CodedRows, x: torch.Tensor, found: NDArray[np.uint32]) -> list[int]:
    """Neurons that are active for a token, or not known not to be, and were not found."""
    active = (~(pre_activations(weight, rows, x) <= 0)).any(axis=0)
    return sorted(set(np.flatnonzero(active).tolist()) - set(found.tolist()))


def float_weights(rng: np.random.Generator, n_neurons: int, hidden: int) -> Floats:
    """Random weights that float32 holds."""
    return rng.standard_normal((n_neurons, hidden)).astype(np.float32).astype(np.float64)


def edge_bias(weight: Floats, x: torch.Tensor) -> Floats:
    """Biases that leave each neuron active, by a hair, for its best token alone."""
    products = x.double().numpy() @ weight.T
    bias = (-products.max(axis=0)).astype(np.float32)
    for _ in range(2):
        bias = np.nextafter(bias, np.float32(np.inf))
    return bias.astype(np.float64)


def test_kernel_and_codes_agree_on_the_group() -> None:
    assert intrinsics.GROUP == GROUP


# --- the result's form


@both_margins
@all_sizes
def test_ids_are_uint32_ascending_and_without_repeats(
    rng: np.random.Generator, n_threads: int, margin: Margin, n_neurons: int, hidden: int
) -> None:
    rows = coded(rng, float_weights(rng, n_neurons, hidden))
    found = find(rows, tokens(rng.standard_normal((3, hidden))), margin)
    assert found.dtype == np.uint32
    assert (np.diff(found.astype(np.int64)) > 0).all()
    assert len(found) == 0 or found[-1] < n_neurons


@both_margins
def test_fewer_neurons_than_threads(
    rng: np.random.Generator, set_threads: Callable[[int], None], margin: Margin
) -> None:
    set_threads(4)
    rows = coded(rng, np.array([[1.0], [-1.0]]))
    assert find(rows, torch.ones(1, 1), margin).tolist() == [0]


@both_margins
def test_number_of_threads_changes_nothing(
    rng: np.random.Generator, set_threads: Callable[[int], None], margin: Margin
) -> None:
    weight = float_weights(rng, 300, 200)
    rows = coded(rng, weight, -rng.random(300) * 30)
    x = tokens(rng.standard_normal((3, 200)))
    found = []
    for n in (1, 2, 3):
        set_threads(n)
        found.append(find(rows, x, margin).tolist())
    assert found[0] == found[1] == found[2]


def test_two_python_threads_at_once_get_their_own_results(rng: np.random.Generator, n_threads: int) -> None:
    problems = []
    for n_neurons, hidden, n_tokens in ((300, 200, 3), (500, 65, 2)):
        rows = coded(rng, float_weights(rng, n_neurons, hidden), np.full(n_neurons, -np.sqrt(hidden)))
        problems.append((rows, tokens(rng.standard_normal((n_tokens, hidden)))))
    expected = [find(rows, x, Margin.EXACT).tolist() for rows, x in problems]

    def find_many(rows: CodedRows, x: torch.Tensor) -> list[list[int]]:
        torch.set_num_threads(n_threads)  # torch keeps this for each thread
        return [find(rows, x, Margin.EXACT).tolist() for _ in range(300)]

    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(find_many, *problem) for problem in problems]
        results = [future.result(timeout=DEADLINE_S) for future in futures]
    for ids, found in zip(expected, results, strict=True):
        assert all(one == ids for one in found)


# --- against the twin


@all_planes
@both_margins
@pytest.mark.parametrize("n_tokens", [0, 1, 2, 5])
@all_sizes
def test_all_that_the_twin_finds_and_few_more(
    rng: np.random.Generator, n_threads: int, margin: Margin, planes: int, n_tokens: int, n_neurons: int, hidden: int
) -> None:
    weight = float_weights(rng, n_neurons, hidden)
    rows = coded(rng, weight, -2 * np.sqrt(hidden) * rng.random(n_neurons))
    x = tokens(rng.standard_normal((n_tokens, hidden)))
    found = set(find(rows, x, margin, planes=planes).tolist())
    expected = set(candidates_ref(rows, x, margin, FAILURE_PROBABILITY, planes=planes).tolist())
    assert expected <= found
    assert len(found - expected) <= 2 + n_neurons // 100


@all_planes
@both_margins
@pytest.mark.parametrize("threshold", [-0.5, 0.0, 1.0])
@pytest.mark.parametrize(("n_tokens", "n_neurons", "hidden"), [(0, 5, 9), (1, 300, 1000), (4, 129, GROUP + 1)])
def test_bounds_are_those_of_the_twin(
    rng: np.random.Generator,
    margin: Margin,
    planes: int,
    threshold: float,
    n_tokens: int,
    n_neurons: int,
    hidden: int,
) -> None:
    """But for what x loses in 16-bit steps, which is far less than half a fine step; and where they differ in plane."""
    rows = coded(rng, float_weights(rng, n_neurons, hidden), -np.sqrt(hidden) * rng.random(n_neurons))
    x = tokens(rng.standard_normal((n_tokens, hidden)))
    how = margin, FAILURE_PROBABILITY, threshold, planes
    bounds, twin = upper_bounds(rows, x, *how), upper_bounds_ref(rows, x, *how)
    assert bounds.shape == (n_tokens, n_neurons)
    assert bounds.dtype == torch.float32
    close = 2e-4 * hidden
    is_near_zero = (upper_bounds_ref(rows, x, *how[:3], 1).abs() < close) & (planes == 2)
    torch.testing.assert_close(bounds.double().where(~is_near_zero, twin), twin, atol=close, rtol=0)
    assert np.count_nonzero(is_near_zero) <= 2 + is_near_zero.numel() // 50


@all_planes
@both_margins
@pytest.mark.parametrize("threshold", [-1.0, 0.0, 0.3, 1.0])
def test_candidates_are_where_some_tokens_bound_is_not_at_most_zero(
    rng: np.random.Generator, n_threads: int, margin: Margin, planes: int, threshold: float
) -> None:
    rows = coded(rng, float_weights(rng, 300, 200), rng.standard_normal(300) * 10)
    x = tokens(rng.standard_normal((5, 200)))
    x[3, 7] = np.nan if threshold == 0.3 else 1e25
    x[4] *= 1e-42
    how = margin, FAILURE_PROBABILITY, threshold, planes
    bounds = upper_bounds(rows, x, *how)
    assert candidates(rows, x, *how).tolist() == (~(bounds <= 0)).any(0).nonzero().flatten().tolist()
    for t in range(5):
        alone = x[t : t + 1].contiguous()
        assert candidates(rows, alone, *how).tolist() == (~(bounds[t] <= 0)).nonzero().flatten().tolist()


@both_margins
def test_fine_plane_is_read_only_of_neurons_that_the_coarse_one_leaves_open(
    rng: np.random.Generator, n_threads: int, margin: Margin
) -> None:
    rows = coded(rng, float_weights(rng, 500, 1000), rng.uniform(-400, 0, 500))
    x = tokens(rng.standard_normal((3, 1000)))
    is_open = ~(upper_bounds(rows, x, margin, FAILURE_PROBABILITY, planes=1) <= 0)
    assert Scorer(rows, margin, FAILURE_PROBABILITY).select(x)[1] == int(is_open.any(0).sum())
    assert Scorer(rows, margin, FAILURE_PROBABILITY).bounds(x)[1] == int(is_open.sum())
    assert Scorer(rows, margin, FAILURE_PROBABILITY, planes=1).select(x)[1] == 0
    settled = ~is_open.any(0)
    assert 0 < int(settled.sum()) < 500
    damaged = rows.fine.clone()
    damaged[settled] = torch.randint(-(2**15), 2**15, damaged.shape, dtype=torch.int16)[settled]
    assert find(rows._replace(fine=damaged), x, margin).tolist() == find(rows, x, margin).tolist()


@both_margins
def test_margin_skips_most_neurons_that_are_far_below_zero(rng: np.random.Generator, margin: Margin) -> None:
    hidden = 1000
    weight = float_weights(rng, 2000, hidden)
    rows = coded(rng, weight, np.full(2000, -1.5 * np.sqrt(hidden)))
    x = tokens(rng.standard_normal((1, hidden)))
    n_active = (pre_activations(weight, rows, x) > 0).sum()  # about 7 % of the neurons
    assert n_active < len(find(rows, x, margin)) < 2 * n_active


@pytest.mark.parametrize("threshold", [0.25, 0.5, 2.0])
@both_margins
def test_threshold_scales_the_margin_as_in_the_twin(rng: np.random.Generator, margin: Margin, threshold: float) -> None:
    rows = coded(rng, float_weights(rng, 1000, 200))
    x = tokens(rng.standard_normal((1, 200)))
    found = set(find(rows, x, margin, threshold).tolist())
    expected = set(candidates_ref(rows, x, margin, FAILURE_PROBABILITY, threshold).tolist())
    assert expected <= found
    assert len(found - expected) <= 10


@both_margins
def test_threshold_zero_leaves_the_sign_of_the_score(rng: np.random.Generator, n_threads: int, margin: Margin) -> None:
    hidden = 200
    weight = float_weights(rng, 1000, hidden)
    rows = coded(rng, weight, rng.standard_normal(1000))
    x = tokens(rng.standard_normal((1, hidden)))
    scores = [stood_for(rows, hidden, planes) @ x[0].double().numpy() + rows.bias.double().numpy() for planes in (1, 2)]
    found = np.zeros(1000, bool)
    found[find(rows, x, margin, threshold=0)] = True
    clear = np.abs(scores).min(axis=0) > 1e-3 * np.sqrt(hidden)  # the kernel takes x in 16-bit steps
    assert clear.mean() > 0.9
    assert (found == (np.minimum(*scores) > 0))[clear].all()


def test_smaller_failure_probability_asks_for_more(rng: np.random.Generator) -> None:
    rows = coded(rng, float_weights(rng, 2000, 200))
    x = tokens(rng.standard_normal((1, 200)))
    found = [set(candidates(rows, x, Margin.EXACT, d).tolist()) for d in (0.5, 1e-3, 1e-12)]
    assert found[0] < found[1] < found[2]


# --- against the truth


@both_margins
@pytest.mark.parametrize("n_tokens", [1, 4])
@all_sizes
def test_no_active_neuron_is_missed(
    rng: np.random.Generator, n_threads: int, margin: Margin, n_tokens: int, n_neurons: int, hidden: int
) -> None:
    weight = float_weights(rng, n_neurons, hidden)
    rows = coded(rng, weight, rng.standard_normal(n_neurons))
    x = tokens(rng.standard_normal((n_tokens, hidden)))
    assert missed(weight, rows, x, find(rows, x, margin)) == []


@both_margins
@pytest.mark.parametrize("n_tokens", [1, 3])
@all_sizes
def test_neurons_that_are_active_by_a_hair_are_found(
    rng: np.random.Generator, n_threads: int, margin: Margin, n_tokens: int, n_neurons: int, hidden: int
) -> None:
    """With several tokens each neuron is active for one of them only: the result is the union."""
    weight = float_weights(rng, n_neurons, hidden)
    x = tokens(rng.standard_normal((n_tokens, hidden)))
    rows = coded(rng, weight, edge_bias(weight, x))
    assert find(rows, x, margin).tolist() == list(range(n_neurons))


@both_margins
def test_all_zero_weights_with_a_bias_of_zero_or_less_are_skipped(
    rng: np.random.Generator, n_threads: int, margin: Margin
) -> None:
    bias = np.array([0.0, -0.0, -1e-30, -1.0, -1e30, 1e-30, 1.0])
    rows = coded(rng, np.zeros((7, 200)), bias)
    x = tokens(rng.standard_normal((2, 200)))
    assert find(rows, x, margin).tolist() == [5, 6]


@both_margins
def test_zero_input_leaves_the_sign_of_the_bias(rng: np.random.Generator, margin: Margin) -> None:
    bias = rng.standard_normal(100).astype(np.float32)
    bias[:3] = 0.0
    rows = coded(rng, float_weights(rng, 100, GROUP + 1), bias.astype(np.float64))
    assert find(rows, torch.zeros(2, GROUP + 1), margin).tolist() == np.flatnonzero(bias > 0).tolist()


# --- inputs made to break the certificate


@all_planes
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("hidden", [1, GROUP, GROUP + 1, 1000])
def test_certificate_holds_and_is_tight_where_x_is_a_rows_rounding_error(
    rng: np.random.Generator, n_threads: int, hidden: int, scale: float, planes: int
) -> None:
    """x = e_i makes e_i . x all that its plane's margin allows: active by a hair, and lost with 3 % less margin."""
    weight = float_weights(rng, 30, hidden)
    rows = coded(rng, weight)
    errors = weight - stood_for(rows, hidden, planes)
    for i in range(30):
        x = tokens(scale * errors[i : i + 1])
        for signed in (x, -x):
            edge = with_bias(rows, edge_bias(weight, signed))
            assert i in find(edge, signed, Margin.CERTIFIED, planes=planes)
            assert i in find(edge, signed, Margin.CERTIFIED)
        edge = with_bias(rows, edge_bias(weight, x))
        if hidden > 1:  # there 16-bit steps of x are as large as an error
            assert i not in find(edge, x, Margin.CERTIFIED, threshold=0.97, planes=planes)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("seed", range(8))
def test_certificate_holds_for_any_weights_and_the_inputs_worst_for_them(dtype: torch.dtype, seed: int) -> None:
    """Weights of 16 bits and any size; x along each row's errors of both planes, plus what else may come along."""
    rng = np.random.default_rng(seed)
    hidden = int(rng.integers(1, 3 * GROUP))
    size = 10.0 ** rng.uniform(-6, 3, (20, 1))
    weight = torch.from_numpy(rng.standard_normal((20, hidden)) * size).to(dtype).double().numpy()
    weight[:2] = 0
    weight[2:4] *= np.arange(hidden) == rng.integers(0, hidden)  # one column
    rows = coded(rng, weight)
    worst = np.concatenate([weight - stood_for(rows, hidden, planes) for planes in (1, 2)])
    worst = np.concatenate((worst, -worst)) * 10.0 ** rng.integers(-20, 20, (80, 1))
    worst[::3, rng.integers(0, hidden)] *= 1e3
    for x in tokens(worst).split(1):
        edge = with_bias(rows, edge_bias(weight, x))
        assert missed(weight, edge, x, find(edge, x, Margin.CERTIFIED)) == []


def gaussian(rng: np.random.Generator, n_tokens: int, hidden: int) -> Floats:
    return rng.standard_normal((n_tokens, hidden))


def outliers(rng: np.random.Generator, n_tokens: int, hidden: int) -> Floats:
    x = gaussian(rng, n_tokens, hidden)
    x[:, rng.integers(0, hidden, 3)] *= 1e4
    return x


def one_dimension(rng: np.random.Generator, n_tokens: int, hidden: int) -> Floats:
    x = np.zeros((n_tokens, hidden))
    x[np.arange(n_tokens), rng.integers(0, hidden, n_tokens)] = rng.standard_normal(n_tokens)
    return x


def many_magnitudes(rng: np.random.Generator, n_tokens: int, hidden: int) -> Floats:
    return gaussian(rng, n_tokens, hidden) * 10.0 ** rng.integers(-9, 5, (n_tokens, hidden))


def empty_groups(rng: np.random.Generator, n_tokens: int, hidden: int) -> Floats:
    keep = rng.random((n_tokens, group_count(hidden))) < 0.5
    return gaussian(rng, n_tokens, hidden) * keep.repeat(GROUP, axis=1)[:, :hidden]


def constant(rng: np.random.Generator, n_tokens: int, hidden: int) -> Floats:
    return np.ones((n_tokens, hidden)) * rng.standard_normal((n_tokens, 1))


INPUTS: dict[str, Callable[[np.random.Generator, int, int], Floats]] = {
    "gaussian": gaussian,
    "outliers of 1e4": outliers,
    "one dimension": one_dimension,
    "many magnitudes": many_magnitudes,
    "empty groups": empty_groups,
    "constant": constant,
}


@both_margins
@pytest.mark.parametrize("hidden", [1, GROUP + 1, 1000, 8192])
@pytest.mark.parametrize("draw", INPUTS.values(), ids=INPUTS)
def test_neurons_active_by_a_hair_are_found_for_inputs_of_any_shape(
    rng: np.random.Generator, margin: Margin, draw: Callable[[np.random.Generator, int, int], Floats], hidden: int
) -> None:
    weight = float_weights(rng, 40, hidden)
    x = tokens(draw(rng, 2, hidden))
    rows = coded(rng, weight, edge_bias(weight, x))
    assert find(rows, x, margin).tolist() == list(range(40))


def as_if_exact(rows: CodedRows, planes: int) -> CodedRows:
    """The rows coded in so many planes taken for the true ones: what margin is left is for x's rounding and floats."""
    errors = [rows_of_plane - decoded(rows)[planes - 1] for rows_of_plane in decoded(rows)]
    coarse, fine = (1.0001 * error.norm(dim=1).float() for error in errors)
    return rows._replace(coarse_error_norms=coarse, fine_error_norms=fine)


@all_planes
@pytest.mark.parametrize("outlier", [1.0, 1e2, 1e4])
def test_rows_aligned_with_the_rounding_of_x_are_found(rng: np.random.Generator, outlier: float, planes: int) -> None:
    """The kernel takes x in 16-bit steps; a row that points along what that drops gains all of it. Tight to 30 %."""
    hidden = 4 * GROUP
    x = gaussian(rng, 1, hidden)
    x[:, ::GROUP] = outlier
    x = tokens(x)
    grouped = x.double().numpy().reshape(-1, GROUP)
    step = np.abs(grouped).max(axis=1, keepdims=True) / 32767
    dropped = (grouped - step * np.rint(grouped / step)).reshape(1, hidden)
    rows = as_if_exact(coded(rng, dropped * rng.uniform(0.5, 2, (20, 1))), planes)
    rows = with_bias(rows, edge_bias(stood_for(rows, hidden, planes), x))
    assert find(rows, x, Margin.CERTIFIED, planes=planes).tolist() == list(range(20))
    assert find(rows, x, Margin.CERTIFIED, 0.7, planes).tolist() == []


@all_planes
def test_float_errors_of_long_sums_are_covered(rng: np.random.Generator, planes: int) -> None:
    """x lies on its 16-bit steps, so nothing is dropped: a hair above 0 must outweigh 128 groups' float32 rounding."""
    n_groups = 128
    x = rng.integers(-32767, 32768, (1, n_groups * GROUP)).astype(np.float64)
    x[:, ::GROUP] = 32767  # makes the step 1
    rows = as_if_exact(coded(rng, float_weights(rng, 200, n_groups * GROUP)), planes)
    rows = with_bias(rows, edge_bias(stood_for(rows, n_groups * GROUP, planes), tokens(x)))
    assert find(rows, tokens(x), Margin.CERTIFIED, planes=planes).tolist() == list(range(200))
    assert len(find(rows, tokens(x), Margin.CERTIFIED, 0, planes)) < 200


# --- how often the exact bound fails


def most_failures(n: int, probability: float) -> float:
    """Of n events, a number that is passed with a probability of 1e-9 at most (Bernstein's inequality)."""
    log = np.log(1e9)
    return n * probability + np.sqrt(2 * n * probability * log) + log / 3


def failures(
    rng: np.random.Generator, row: Floats, x: Floats, d: float, threshold: float, planes: int, n_dithers: int
) -> int:
    """Of neurons active by a hair, those that are missed: one row, coded under so many dithers.

    Eight of them at once: the row lies in other groups for each, and is zero elsewhere. row, x: (1, 2 * GROUP).
    """
    weight, wide = np.kron(np.eye(8), row), tokens(np.tile(x, (1, 8)))
    edge = edge_bias(weight, wide)
    found = sum(
        len(candidates(coded(rng, weight, edge), wide, Margin.EXACT, d, threshold, planes))
        for _ in range(n_dithers // 8)
    )
    return n_dithers - found


@all_planes
@pytest.mark.parametrize(("dtype", "d"), [(torch.float16, 0.01), (torch.bfloat16, 0.2)])
@pytest.mark.parametrize("draw", ["gaussian", "outliers of 1e4"])
def test_exact_misses_no_more_often_than_stated(
    rng: np.random.Generator, dtype: torch.dtype, d: float, draw: str, planes: int
) -> None:
    row = torch.from_numpy(rng.standard_normal((1, 2 * GROUP))).to(dtype).double().numpy()
    x = INPUTS[draw](rng, 1, 2 * GROUP)
    assert failures(rng, row, x, d, 1.0, planes, 1600) <= most_failures(1600, d)


@all_planes
def test_half_the_margin_misses_more_often_than_stated(rng: np.random.Generator, planes: int) -> None:
    """So the test above would notice: at half the margin of d = 0.001 a Gaussian misses 2.5 % in each plane."""
    row, x = float_weights(rng, 1, 2 * GROUP), gaussian(rng, 1, 2 * GROUP)
    most = most_failures(3200, 0.001)
    assert failures(rng, row, x, 0.001, 1.0, planes, 3200) <= most
    assert failures(rng, row, x, 0.001, 0.5, planes, 3200) > most


def test_half_of_the_failures_are_for_each_plane(rng: np.random.Generator) -> None:
    rows = coded(rng, float_weights(rng, 50, 200))
    x = tokens(rng.standard_normal((1, 200)))
    for planes, step in ((1, FINE_STEPS), (2, 1)):
        at_zero, at_one = (upper_bounds(rows, x, Margin.EXACT, 0.01, cut, planes)[0] for cut in (0.0, 1.0))
        if planes == 2:  # where all are open
            open_rows = rows._replace(bias=torch.full((50,), 1e4))
            at_zero, at_one = (upper_bounds(open_rows, x, Margin.EXACT, 0.01, cut, 2)[0] for cut in (0.0, 1.0))
        squares = torch.nn.functional.pad(x.double(), (0, 2 * GROUP - 200)).unflatten(1, (2, GROUP)).square().sum(2)
        width = (squares @ rows.scales.double().square().T).sqrt()[0] * step
        expected = np.sqrt(np.log(2 / 0.01) / 6) * width
        torch.testing.assert_close((at_one - at_zero).double(), expected, rtol=0.02, atol=0.01)


# --- magnitudes at the ends of float32

MAGNITUDES = [  # of weights, of x
    (1e30, 1.0),
    (1.0, 1e30),
    (1e30, 1e6),
    (1e30, 3e7),  # sums around float32's largest
    (1e30, 1e15),  # sums above it
    (1e18, 1e18),
    (1e37, 1.0),
    (1e-30, 1e30),
    (1e30, 1e-30),
    (1.0, 1e-10),
    (1.0, 1e-15),
    (1.0, 1e-20),
    (1.0, 1e-25),
    (1.0, 1e-30),
    (1.0, 1e-40),  # denormal
    (1e-15, 1.0),
    (1e-20, 1.0),
    (1e-25, 1.0),
    (1e-30, 1.0),
    (1e-40, 1.0),  # denormal
    (6e-8, 1.0),  # float16's smallest
]


@both_margins
@pytest.mark.parametrize(("weight_scale", "x_scale"), MAGNITUDES)
def test_no_active_neuron_is_missed_at_any_magnitude(
    rng: np.random.Generator, margin: Margin, weight_scale: float, x_scale: float
) -> None:
    weight = (float_weights(rng, 500, 200) * weight_scale).astype(np.float32).astype(np.float64)
    x = tokens(rng.standard_normal((1, 200)) * x_scale)
    rows = coded(rng, weight)
    assert missed(weight, rows, x, find(rows, x, margin)) == []


@both_margins
@pytest.mark.parametrize(("weight_scale", "x_scale"), [pair for pair in MAGNITUDES if pair[0] * pair[1] < 1e37])
def test_neurons_active_by_a_hair_are_found_at_any_magnitude(
    rng: np.random.Generator, margin: Margin, weight_scale: float, x_scale: float
) -> None:
    weight = (float_weights(rng, 500, 200) * weight_scale).astype(np.float32).astype(np.float64)
    x = tokens(rng.standard_normal((1, 200)) * x_scale)
    rows = coded(rng, weight, edge_bias(weight, x))
    assert missed(weight, rows, x, find(rows, x, margin)) == []


@both_margins
@pytest.mark.parametrize("x_scale", [1e-38, 1e-30, 1e-20])
def test_no_active_neuron_is_missed_where_one_token_is_tiny_beside_another(
    rng: np.random.Generator, margin: Margin, x_scale: float
) -> None:
    weight = float_weights(rng, 500, 200)
    x = tokens(rng.standard_normal((2, 200)) * np.array([[1.0], [x_scale]]))
    rows = coded(rng, weight, np.full(500, -1.0))
    assert missed(weight, rows, x, find(rows, x, margin)) == []


@both_margins
@pytest.mark.parametrize("peak", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("position", [0, GROUP, 199])
def test_input_that_is_not_finite_makes_every_neuron_a_candidate(
    rng: np.random.Generator, n_threads: int, margin: Margin, peak: float, position: int
) -> None:
    rows = coded(rng, float_weights(rng, 50, 200), np.full(50, -1e6))
    x = tokens(rng.standard_normal((3, 200)))
    x[1, position] = peak
    assert find(rows, x, margin).tolist() == list(range(50))


@both_margins
@pytest.mark.parametrize("peak", [3e38, -3e38])
def test_no_active_neuron_is_missed_at_the_end_of_float32(
    rng: np.random.Generator, n_threads: int, margin: Margin, peak: float
) -> None:
    weight = float_weights(rng, 50, 200)
    rows = coded(rng, weight, np.full(50, -1e6))
    x = tokens(rng.standard_normal((3, 200)))
    x[1, GROUP] = peak
    assert missed(weight, rows, x, find(rows, x, margin)) == []


@both_margins
def test_nan_in_a_bias_makes_its_neuron_a_candidate(rng: np.random.Generator, margin: Margin) -> None:
    bias = np.full(50, -1e6)
    bias[17] = np.nan
    rows = coded(rng, float_weights(rng, 50, 65), bias)
    assert find(rows, tokens(rng.standard_normal((1, 65))), margin).tolist() == [17]
