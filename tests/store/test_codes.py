"""8-bit codes of fc1: what the exact and certified bounds rest on."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from sparseflow.store.codes import CODE_LIMIT, GROUP, Codes, code_layer, code_rows, code_specs, group_count

HIDDEN_SIZES = (1, 63, GROUP - 1, GROUP, GROUP + 1, 3 * GROUP + 8)

Draw = Callable[[np.random.Generator, int, int], NDArray[np.float64]]


def normal(rng: np.random.Generator, n: int, hidden: int) -> NDArray[np.float64]:
    return rng.standard_normal((n, hidden))


def scaled(scale: float) -> Draw:
    """Random float32 weights of one magnitude."""
    return lambda rng, n, hidden: (normal(rng, n, hidden) * scale).astype(np.float32).astype(np.float64)


def many_magnitudes(rng: np.random.Generator, n: int, hidden: int) -> NDArray[np.float64]:
    return normal(rng, n, hidden) * 10.0 ** rng.integers(-9, 5, (n, hidden))


def one_peak(rng: np.random.Generator, n: int, hidden: int) -> NDArray[np.float64]:
    """Every weight of a group is its largest: all ratios are as near to the limit as they get."""
    return rng.choice([-1.0, 1.0], (n, hidden)) * np.exp(rng.standard_normal((n, 1)))


def half_floats(rng: np.random.Generator, n: int, hidden: int) -> NDArray[np.float64]:
    """Any finite float16, its denormals included."""
    bits = rng.integers(0, 1 << 16, (n, hidden)).astype(np.uint16)
    return np.nan_to_num(bits.view(np.float16), posinf=65504, neginf=-65504).astype(np.float64)


def half_denormals(rng: np.random.Generator, n: int, hidden: int) -> NDArray[np.float64]:
    return rng.integers(0, 1 << 10, (n, hidden)).astype(np.uint16).view(np.float16).astype(np.float64)


WEIGHTS: dict[str, Draw] = {
    "normal": normal,
    "one peak": one_peak,
    "many magnitudes": many_magnitudes,
    "any float16": half_floats,
    "float16 denormals": half_denormals,
    "1e30": scaled(1e30),
    "1e37": scaled(1e37),
    "1e-30": scaled(1e-30),
    "float32 denormals": scaled(1e-40),
    "smallest float32": scaled(2e-45),
    "zeros": lambda rng, n, hidden: np.zeros((n, hidden)),
}
all_weights = pytest.mark.parametrize("draw", WEIGHTS.values(), ids=WEIGHTS)
all_sizes = pytest.mark.parametrize("hidden", HIDDEN_SIZES)


def decoded(codes: Codes) -> NDArray[np.float64]:
    """(n, n_groups * GROUP): the rows that the codes stand for."""
    return codes.codes.astype(np.float64) * steps_of(codes)


def steps_of(codes: Codes) -> NDArray[np.float64]:
    """(n, n_groups * GROUP): each weight's step."""
    return np.repeat(codes.scales.astype(np.float64), GROUP, axis=1)


def padded(weight: NDArray[np.float64]) -> NDArray[np.float64]:
    hidden = weight.shape[1]
    return np.pad(weight, ((0, 0), (0, group_count(hidden) * GROUP - hidden)))


def norms(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.sqrt((rows.astype(np.longdouble) ** 2).sum(axis=1))


# --- one row at a time


@all_sizes
def test_tensors_are_those_of_the_file_specs(rng: np.random.Generator, hidden: int) -> None:
    numpy_dtype = {"I8": np.int8, "F32": np.float32}
    codes = code_rows(normal(rng, 9, hidden), rng)
    for spec, array in zip(code_specs(9, hidden), codes, strict=True):
        assert array.shape == spec.shape, spec.name
        assert array.dtype == numpy_dtype[spec.dtype], spec.name
    assert [spec.name for spec in code_specs(9, hidden)] == list(Codes._fields)


@pytest.mark.parametrize(
    ("hidden", "expected"), [(1, 1), (GROUP - 1, 1), (GROUP, 1), (GROUP + 1, 2), (2 * GROUP, 2), (3 * GROUP + 8, 4)]
)
def test_groups_cover_the_row(hidden: int, expected: int) -> None:
    assert group_count(hidden) == expected


@all_weights
@all_sizes
def test_no_code_is_clipped(rng: np.random.Generator, draw: Draw, hidden: int) -> None:
    weight = draw(rng, 40, hidden)
    codes = code_rows(weight, rng)
    assert codes.codes.min() >= -CODE_LIMIT
    # The largest weight fits in the steps that there are, so no rounding had to be cut.
    assert (np.abs(padded(weight)) <= CODE_LIMIT * steps_of(codes)).all()


@all_weights
@all_sizes
def test_reconstruction_is_less_than_a_step_away(rng: np.random.Generator, draw: Draw, hidden: int) -> None:
    weight = padded(draw(rng, 40, hidden))
    codes = code_rows(weight[:, :hidden], rng)
    error, step = np.abs(weight - decoded(codes)), steps_of(codes)
    assert ((error < step) | (weight == 0)).all()
    assert (error[weight == 0] == 0).all()


def test_step_is_hardly_larger_than_it_must_be(rng: np.random.Generator) -> None:
    weight = normal(rng, 50, GROUP)
    needed = np.abs(weight).max(axis=1) / CODE_LIMIT
    scales = code_rows(weight, rng).scales[:, 0]
    assert (scales >= needed).all()
    assert (scales <= needed * (1 + 2.0**-21)).all()


@all_weights
@all_sizes
def test_norms_are_upper_bounds(rng: np.random.Generator, draw: Draw, hidden: int) -> None:
    weight = draw(rng, 40, hidden)
    codes = code_rows(weight, rng)
    assert (codes.norms >= norms(decoded(codes))).all()


@all_weights
@all_sizes
def test_error_norms_are_upper_bounds(rng: np.random.Generator, draw: Draw, hidden: int) -> None:
    weight = draw(rng, 40, hidden)
    codes = code_rows(weight, rng)
    assert (codes.error_norms >= norms(padded(weight) - decoded(codes))).all()


def test_norms_are_close_to_the_true_ones(rng: np.random.Generator) -> None:
    weight = normal(rng, 40, 3 * GROUP + 8)
    codes = code_rows(weight, rng)
    np.testing.assert_allclose(codes.norms, norms(decoded(codes)).astype(np.float64), rtol=2e-6)
    np.testing.assert_allclose(codes.error_norms, norms(padded(weight) - decoded(codes)).astype(np.float64), rtol=2e-6)


def test_weights_up_to_the_largest_float32_are_coded_without_overflow(rng: np.random.Generator) -> None:
    largest = np.float64(np.finfo(np.float32).max)
    weight = largest * rng.uniform(-1, 1, (20, 200))
    codes = code_rows(weight, rng)
    assert (np.abs(padded(weight) - decoded(codes)) < steps_of(codes)).all()
    assert (codes.norms >= norms(decoded(codes))).all()


def test_zero_rows_and_zero_groups_have_zero_codes_and_steps(rng: np.random.Generator) -> None:
    weight = normal(rng, 4, 3 * GROUP)
    weight[1] = 0
    weight[2, GROUP : 2 * GROUP] = 0
    codes = code_rows(weight, rng)
    assert not codes.codes[1].any()
    assert not codes.scales[1].any()
    assert codes.norms[1] == codes.error_norms[1] == 0
    assert not codes.codes[2, GROUP : 2 * GROUP].any()
    assert codes.scales[2].astype(bool).tolist() == [True, False, True]


@pytest.mark.parametrize("hidden", [1, GROUP - 1, GROUP + 1, 3 * GROUP + 8])
def test_codes_beyond_hidden_are_zero(rng: np.random.Generator, hidden: int) -> None:
    assert not code_rows(normal(rng, 30, hidden), rng).codes[:, hidden:].any()


# --- rounding


def test_rounding_has_mean_zero(rng: np.random.Generator) -> None:
    """Each error lies in (-step, step) with a variance of step**2 / 4 or less: the mean of n is within 6 deviations."""
    n_draws = 4000
    row = normal(rng, 1, GROUP)
    codes = code_rows(np.repeat(row, n_draws, axis=0), rng)
    mean_error = (decoded(codes) - row).mean(axis=0)
    assert (np.abs(mean_error) < 6 * 0.5 * codes.scales[0, 0] / np.sqrt(n_draws)).all()


def test_rounding_is_stochastic_with_the_probability_of_the_fraction(rng: np.random.Generator) -> None:
    n_draws = 4000
    row = np.zeros((1, GROUP))
    row[0, 0] = CODE_LIMIT  # so that a step is 1, and a hair
    row[0, 1:] = fractions = np.linspace(0.1, 0.9, GROUP - 1)
    codes = code_rows(np.repeat(row, n_draws, axis=0), rng).codes[:, 1:]
    assert set(np.unique(codes)) == {0, 1}
    deviation = np.sqrt(fractions * (1 - fractions) / n_draws)
    assert (np.abs(codes.mean(axis=0) - fractions) < 6 * deviation).all()


def test_errors_of_two_weights_are_not_correlated(rng: np.random.Generator) -> None:
    n_draws = 4000
    errors = code_rows(np.full((n_draws, GROUP), 0.5) + np.eye(GROUP)[0] * 99, rng).codes[:, 1:].astype(np.float64)
    correlation = np.corrcoef(errors.T) - np.eye(GROUP - 1)
    assert np.abs(correlation).max() < 6 / np.sqrt(n_draws)


# --- a layer


def coded_layer(weight: NDArray[np.generic], layer: int, **seed: int) -> Codes:
    return Codes(*(np.concatenate(parts) for parts in zip(*code_layer(weight, layer, **seed), strict=True)))


@pytest.mark.parametrize("n_rows", [1, 511, 512, 513, 1100])
def test_layer_is_coded_row_by_row_in_order(rng: np.random.Generator, n_rows: int) -> None:
    weight = normal(rng, n_rows, GROUP + 1)
    codes = coded_layer(weight, 3)
    assert len(codes.codes) == n_rows
    assert (np.abs(padded(weight) - decoded(codes)) < steps_of(codes) + (padded(weight) == 0)).all()


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_layer_of_any_float_type_is_coded_from_its_exact_values(
    rng: np.random.Generator, dtype: type[np.floating]
) -> None:
    weight = normal(rng, 20, 64).astype(dtype)
    codes = coded_layer(weight, 0)
    exact = coded_layer(weight.astype(np.float64), 0)
    assert all(np.array_equal(one, other) for one, other in zip(codes, exact, strict=True))


def test_layer_is_coded_the_same_every_time(rng: np.random.Generator) -> None:
    weight = normal(rng, 600, 64)
    first = coded_layer(weight, 5)
    coded_layer(weight, 6)  # coding another layer in between changes nothing
    again = coded_layer(weight, 5)
    assert all(np.array_equal(one, other) for one, other in zip(first, again, strict=True))


two_streams = pytest.mark.parametrize(
    ("one", "other"),
    [((0, 1), (1, 1)), ((1, 2), (2, 1)), ((7, 1), (7, 2))],
    ids=["two layers", "layer and seed swapped", "two seeds"],
)


@two_streams
def test_layers_and_seeds_have_independent_streams(one: tuple[int, int], other: tuple[int, int]) -> None:
    """Weights half way between two steps are rounded by coin flips: two streams agree on half of them."""
    weight = np.full((500, GROUP), 0.5)
    weight[:, 0] = CODE_LIMIT  # so that a step is 1, and a hair
    flips = [coded_layer(weight, layer, seed=seed).codes[:, 1:] for layer, seed in (one, other)]
    assert abs((flips[0] == flips[1]).mean() - 0.5) < 6 * 0.5 / np.sqrt(flips[0].size)


def test_blocks_of_a_layer_do_not_repeat_each_other(rng: np.random.Generator) -> None:
    weight = np.repeat(normal(rng, 1, GROUP), 1024, axis=0)
    codes = coded_layer(weight, 0).codes
    assert not np.array_equal(codes[:512], codes[512:])


def test_global_generators_are_left_alone(rng: np.random.Generator) -> None:
    weight = normal(rng, 600, GROUP + 1)
    torch.rand(1), np.random.random(1)  # into states that no seed gives
    torch_before, numpy_before = torch.get_rng_state(), np.random.get_state()
    coded_layer(weight, 0)
    assert torch.equal(torch.get_rng_state(), torch_before)
    numpy_after = np.random.get_state()
    assert all(np.array_equal(one, other) for one, other in zip(numpy_before, numpy_after, strict=True))
