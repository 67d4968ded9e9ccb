"""8-bit codes of fc1 in two planes: what the exact and certified bounds rest on."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from sparseflow.store.codes import (
    DITHER_UNIT,
    FINE_STEPS,
    GROUP,
    ROW_GROUP_WORDS,
    STEP_LIMIT,
    Codes,
    code_layer,
    code_rows,
    code_specs,
    draw_dither,
    group_count,
    layer_dither,
)

Floats = NDArray[np.float64]

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


def coded(rng: np.random.Generator, weight: Floats) -> tuple[Codes, Floats]:
    """The codes, and their dither in float64."""
    dither = draw_dither(weight.shape[1], rng)
    return code_rows(weight, dither), dither.astype(np.float64)


def unpacked(plane: NDArray[np.int16]) -> Floats:
    """(n, n_groups * GROUP), from 0 to 15: word j of a group holds column j lowest, then column j + GROUP / 4, ..."""
    packed = plane.view(np.uint16).reshape(len(plane), -1, ROW_GROUP_WORDS).astype(np.int64)
    nibbles = [packed // 16**place % 16 for place in range(4)]
    return np.concatenate(nibbles, axis=2).reshape(len(plane), -1).astype(np.float64)


def steps_of(codes: Codes) -> Floats:
    """(n, n_groups * GROUP): each weight's fine step."""
    return np.repeat(codes.scales.astype(np.float64), GROUP, axis=1)


def decoded(codes: Codes, dither: Floats, hidden: int) -> tuple[Floats, Floats]:
    """(n, hidden) each: the rows that the coarse codes stand for, and those that both planes do."""
    upper, lower, steps = unpacked(codes.coarse) - 8, unpacked(codes.fine), steps_of(codes)
    coarse = steps * (16 * upper + 8 - dither)
    fine = steps * (16 * upper + lower + 0.5 - dither)
    return coarse[:, :hidden], fine[:, :hidden]


def errors(codes: Codes, dither: Floats, weight: Floats) -> tuple[Floats, Floats]:
    """(n, hidden) each: errors of the two planes, in steps of that plane, where the step is not 0."""
    hidden = weight.shape[1]
    steps = steps_of(codes)[:, :hidden]
    steps = np.where(steps > 0, steps, 1)
    coarse, fine = decoded(codes, dither, hidden)
    return (weight - coarse) / (FINE_STEPS * steps), (weight - fine) / steps


def norms(rows: Floats) -> NDArray[np.longdouble]:
    return np.sqrt((rows.astype(np.longdouble) ** 2).sum(axis=1))


# --- one row at a time


@all_sizes
def test_tensors_are_those_of_the_file_specs(rng: np.random.Generator, hidden: int) -> None:
    numpy_dtype = {"I16": np.int16, "F32": np.float32}
    codes, _ = coded(rng, normal(rng, 9, hidden))
    tensors = {"dither": draw_dither(hidden, rng)} | codes._asdict()
    specs = code_specs(9, hidden)
    assert [spec.name for spec in specs] == list(tensors)
    for spec in specs:
        assert tensors[spec.name].shape == spec.shape, spec.name
        assert tensors[spec.name].dtype == numpy_dtype[spec.dtype], spec.name


@pytest.mark.parametrize(
    ("hidden", "expected"), [(1, 1), (GROUP - 1, 1), (GROUP, 1), (GROUP + 1, 2), (2 * GROUP, 2), (3 * GROUP + 8, 4)]
)
def test_groups_cover_the_row(hidden: int, expected: int) -> None:
    assert group_count(hidden) == expected


def test_words_are_as_drawn() -> None:
    """Weights of whole steps, without dither: q is the weight, its upper half goes to coarse, its lower to fine."""
    weight = np.zeros((1, GROUP))
    weight[0, [0, 1, 32, 64, 65, 97]] = STEP_LIMIT, -1, 17, 5, -STEP_LIMIT, 37  # makes the step 1
    codes = code_rows(weight, np.zeros(GROUP, np.float32))
    assert codes.scales.tolist() == [[1.0]]
    assert codes.coarse.view(np.uint16)[0, :3].tolist() == [0x889F, 0xA087, 0x8888]
    assert codes.fine.view(np.uint16)[0, :3].tolist() == [0x0518, 0x580F, 0x0000]


@all_weights
@all_sizes
def test_no_code_is_clipped_and_no_error_is_beyond_half_a_step(
    rng: np.random.Generator, draw: Draw, hidden: int
) -> None:
    """A code that was clipped would be more than half a step off; the slack is that of the test's own division."""
    weight = draw(rng, 40, hidden)
    codes, dither = coded(rng, weight)
    for error in errors(codes, dither, weight):
        assert (np.abs(error) <= 0.5 * (1 + 2.0**-40)).all()


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("extreme", [-8.0, 8 - DITHER_UNIT])
def test_the_largest_weights_are_not_clipped_at_the_ends_of_the_dither(sign: int, extreme: float) -> None:
    """The largest weight of a row, at every position within float32's grid of the step, under the extreme dithers."""
    weight = sign * np.linspace(1, 2, 1001)[:, None].astype(np.float32).astype(np.float64).repeat(GROUP, axis=1)
    dither = np.full(GROUP, extreme)
    codes = code_rows(weight, dither.astype(np.float32))
    for error in errors(codes, dither, weight):
        assert (np.abs(error) <= 0.5 * (1 + 2.0**-40)).all()


def test_step_is_hardly_larger_than_it_must_be(rng: np.random.Generator) -> None:
    weight = normal(rng, 50, GROUP)
    needed = np.abs(weight).max(axis=1) / STEP_LIMIT
    scales = coded(rng, weight)[0].scales[:, 0]
    assert (scales >= needed).all()
    assert (scales <= needed * (1 + 2.0**-21)).all()


@all_weights
@all_sizes
def test_norms_are_upper_bounds_at_both_planes(rng: np.random.Generator, draw: Draw, hidden: int) -> None:
    weight = draw(rng, 40, hidden)
    codes, dither = coded(rng, weight)
    coarse, fine = decoded(codes, dither, hidden)
    assert (codes.norms >= norms(coarse)).all()
    assert (codes.norms >= norms(fine)).all()
    assert (codes.coarse_error_norms >= norms(weight - coarse)).all()
    assert (codes.fine_error_norms >= norms(weight - fine)).all()


@all_weights
@all_sizes
def test_norms_are_as_long_as_float_errors_need_them(rng: np.random.Generator, draw: Draw, hidden: int) -> None:
    """112 steps a group; kernels bound the rounding of their own sums by that."""
    codes, _ = coded(rng, draw(rng, 40, hidden))
    assert (codes.norms >= 112 * norms(codes.scales.astype(np.float64))).all()


def test_norms_are_close_to_the_true_ones(rng: np.random.Generator) -> None:
    weight = normal(rng, 40, 3 * GROUP + 8)
    codes, dither = coded(rng, weight)
    coarse, fine = decoded(codes, dither, weight.shape[1])
    np.testing.assert_allclose(codes.norms, np.maximum(norms(coarse), norms(fine)).astype(np.float64), rtol=0.01)
    for stored, error in ((codes.coarse_error_norms, weight - coarse), (codes.fine_error_norms, weight - fine)):
        np.testing.assert_allclose(stored, norms(error).astype(np.float64), rtol=2e-6)


def test_weights_up_to_the_largest_float32_are_coded_without_overflow(rng: np.random.Generator) -> None:
    weight = np.float64(np.finfo(np.float32).max) * rng.uniform(-1, 1, (20, 200))
    codes, dither = coded(rng, weight)
    assert np.isfinite(codes.scales).all()
    for error in errors(codes, dither, weight):
        assert (np.abs(error) <= 0.5 * (1 + 2.0**-40)).all()


def test_zero_rows_and_zero_groups_have_zero_steps(rng: np.random.Generator) -> None:
    weight = normal(rng, 4, 3 * GROUP)
    weight[1] = 0
    weight[2, GROUP : 2 * GROUP] = 0
    codes, _ = coded(rng, weight)
    assert not codes.scales[1].any()
    assert codes.norms[1] == codes.coarse_error_norms[1] == codes.fine_error_norms[1] == 0
    assert codes.scales[2].astype(bool).tolist() == [True, False, True]


# --- dither


def smirnov_distance(values: Floats) -> float:
    """How far the distribution of values is from uniform on [-1/2, 1/2]; below 3 / sqrt(n) but once in 3e7 times."""
    ranked = np.sort(values.ravel()) + 0.5
    n = len(ranked)
    return float(max((np.arange(1, n + 1) / n - ranked).max(), (ranked - np.arange(n) / n).max()))


@pytest.mark.parametrize("dtype", [np.float16, "bfloat16", np.float32])
@pytest.mark.parametrize("row", ["normal", "one peak", "on the steps", "half way"])
def test_errors_over_dithers_are_uniform_in_a_step_of_each_plane(
    rng: np.random.Generator, row: str, dtype: type[np.floating] | str
) -> None:
    """For a fixed weight of any kind: the law is over the dither, and knows nothing of w."""
    weight = {
        "normal": normal(rng, 1, GROUP),
        "one peak": one_peak(rng, 1, GROUP),
        "on the steps": rng.integers(-119, 120, (1, GROUP)).astype(np.float64),
        "half way": rng.integers(-119, 119, (1, GROUP)) + 0.5,
    }[row]
    weight[0, 0] = STEP_LIMIT
    weight = torch.from_numpy(weight).to(torch.bfloat16 if dtype == "bfloat16" else torch.float32).double().numpy()
    weight = weight if dtype == "bfloat16" else weight.astype(dtype).astype(np.float64)
    n_draws = 300
    planes = [errors(*coded(rng, weight), weight) for _ in range(n_draws)]
    for plane in range(2):
        found = np.stack([errors[plane][0] for errors in planes])  # (n_draws, GROUP)
        assert smirnov_distance(found) < 3 / np.sqrt(found.size)
        for column in (0, 1, GROUP // 2):
            assert smirnov_distance(found[:, column]) < 3 / np.sqrt(n_draws)


def test_smirnov_distance_tells_other_laws_from_a_uniform_one(rng: np.random.Generator) -> None:
    n = 300
    for other in (rng.uniform(-0.5, 0.5, n) * 0.6, rng.choice([-0.5, 0.5], n), rng.uniform(-0.25, 0.75, n)):
        assert smirnov_distance(other) > 3 / np.sqrt(n)


def test_errors_of_two_columns_are_not_correlated(rng: np.random.Generator) -> None:
    n_draws = 1000
    weight = np.full((1, GROUP), 0.5)
    weight[0, 0] = STEP_LIMIT
    planes = [errors(*coded(rng, weight), weight) for _ in range(n_draws)]
    for plane in range(2):
        found = np.stack([errors[plane][0] for errors in planes])
        correlation = np.corrcoef(found.T) - np.eye(GROUP)
        assert np.abs(correlation).max() < 6 / np.sqrt(n_draws)


@all_sizes
def test_dither_is_even_in_units_that_float32_holds_and_zero_beyond_hidden(
    rng: np.random.Generator, hidden: int
) -> None:
    dither = draw_dither(hidden, rng)
    assert dither.dtype == np.float32
    assert (dither / DITHER_UNIT == np.rint(dither / DITHER_UNIT)).all()
    assert (dither >= -8).all()
    assert (dither < 8).all()
    assert not dither[hidden:].any()
    assert smirnov_distance(draw_dither(5000, rng)[:5000].astype(np.float64) / FINE_STEPS) < 3 / np.sqrt(5000)


# --- a layer


def coded_layer(weight: NDArray[np.generic], layer: int, **seed: int) -> Codes:
    dither = layer_dither(weight.shape[1], layer, **seed)
    return Codes(*(np.concatenate(parts) for parts in zip(*code_layer(weight, dither), strict=True)))


@pytest.mark.parametrize("n_rows", [1, 127, 128, 129, 300])
def test_layer_is_coded_row_by_row_in_order(rng: np.random.Generator, n_rows: int) -> None:
    weight = normal(rng, n_rows, GROUP + 1)
    layer, whole = coded_layer(weight, 3), code_rows(weight, layer_dither(GROUP + 1, 3))
    assert all(np.array_equal(one, other) for one, other in zip(layer, whole, strict=True))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_layer_of_any_float_type_is_coded_from_its_exact_values(
    rng: np.random.Generator, dtype: type[np.floating]
) -> None:
    weight = normal(rng, 20, 64).astype(dtype)
    codes = coded_layer(weight, 0)
    exact = coded_layer(weight.astype(np.float64), 0)
    assert all(np.array_equal(one, other) for one, other in zip(codes, exact, strict=True))


def test_layer_is_coded_the_same_every_time() -> None:
    first = layer_dither(200, 5)
    layer_dither(200, 6)  # another layer in between changes nothing
    assert np.array_equal(first, layer_dither(200, 5))


@pytest.mark.parametrize(
    ("one", "other"),
    [((0, 1), (1, 1)), ((1, 2), (2, 1)), ((7, 1), (7, 2))],
    ids=["two layers", "layer and seed swapped", "two seeds"],
)
def test_layers_and_seeds_have_independent_dithers(one: tuple[int, int], other: tuple[int, int]) -> None:
    n = 5000
    dithers = [layer_dither(n, layer, seed)[:n] for layer, seed in (one, other)]
    assert abs(np.corrcoef(dithers)[0, 1]) < 6 / np.sqrt(n)


def test_global_generators_are_left_alone(rng: np.random.Generator) -> None:
    weight = normal(rng, 600, GROUP + 1)
    torch.rand(1), np.random.random(1)  # into states that no seed gives
    torch_before, numpy_before = torch.get_rng_state(), np.random.get_state()
    coded_layer(weight, 0)
    assert torch.equal(torch.get_rng_state(), torch_before)
    numpy_after = np.random.get_state()
    assert all(np.array_equal(one, other) for one, other in zip(numpy_before, numpy_after, strict=True))
