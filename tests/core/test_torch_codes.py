"""The encoder in torch gives what numpy's gives."""

import os
from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from sparseflow.core import torch_codes
from sparseflow.store import codes
from sparseflow.store.codes import GROUP, layer_dither

Draw = Callable[[np.random.Generator, int, int], NDArray[np.float64]]


def scaled(scale: float) -> Draw:
    return lambda rng, n, hidden: (rng.standard_normal((n, hidden)) * scale).astype(np.float32).astype(np.float64)


def any_float16(rng: np.random.Generator, n: int, hidden: int) -> NDArray[np.float64]:
    bits = rng.integers(0, 1 << 16, (n, hidden)).astype(np.uint16)
    return np.nan_to_num(bits.view(np.float16), posinf=65504, neginf=-65504).astype(np.float64)


def with_zero_groups(rng: np.random.Generator, n: int, hidden: int) -> NDArray[np.float64]:
    weight = rng.standard_normal((n, hidden))
    weight[n // 2] = 0
    weight[:, : GROUP // 2] = 0
    return weight


@pytest.fixture
def rng() -> np.random.Generator:
    """Fresh numbers in each run; a failure shows the seed."""
    seed = int.from_bytes(os.urandom(4), "little")
    print(f"seed {seed}")
    return np.random.default_rng(seed)


WEIGHTS: dict[str, Draw] = {
    "normal": scaled(1),
    "float64": lambda rng, n, hidden: rng.standard_normal((n, hidden)),
    "any float16": any_float16,
    "many magnitudes": lambda rng, n, hidden: (
        rng.standard_normal((n, hidden)) * 10.0 ** rng.integers(-9, 5, (n, hidden))
    ),
    "on the steps": lambda rng, n, hidden: rng.integers(-120, 121, (n, hidden)).astype(np.float64),
    "1e37": scaled(1e37),
    "largest float32": lambda rng, n, hidden: np.finfo(np.float32).max * rng.choice([-1.0, 1.0], (n, hidden)),
    "float32 denormals": scaled(1e-40),
    "smallest float32": scaled(2e-45),
    "zeros": lambda rng, n, hidden: np.zeros((n, hidden)),
    "zero groups": with_zero_groups,
}


@pytest.mark.parametrize("draw", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("hidden", [1, 63, GROUP - 1, GROUP, GROUP + 1, 3 * GROUP + 8])
def test_codes_are_numpy_s_and_norms_are_within_a_digit(rng: np.random.Generator, draw: Draw, hidden: int) -> None:
    weight, dither = draw(rng, 41, hidden), layer_dither(hidden, 3)
    expected = codes.code_rows(weight, dither)
    found = torch_codes.code_rows(torch.from_numpy(weight), torch.from_numpy(dither))
    for name, values in expected._asdict().items():
        other = getattr(found, name).numpy()
        assert other.dtype == values.dtype
        assert other.shape == values.shape
        if "norms" in name:  # a float64 sum in another order may round to the next float32
            low, high = np.minimum(values, other), np.maximum(values, other)
            assert ((low == high) | (np.nextafter(low, np.float32(np.inf)) == high)).all(), name
        else:
            np.testing.assert_array_equal(other, values, name)


@pytest.mark.parametrize("draw", WEIGHTS.values(), ids=WEIGHTS)
def test_norms_are_upper_bounds(rng: np.random.Generator, draw: Draw) -> None:
    hidden = 2 * GROUP + 5
    weight, dither = draw(rng, 40, hidden), layer_dither(hidden, 0)
    found = torch_codes.TensorCodes(*torch_codes.code_rows(torch.from_numpy(weight), torch.from_numpy(dither)))
    steps = found.scales.double().repeat_interleave(GROUP, 1).numpy()
    nibbles = []
    for plane in (found.coarse, found.fine):
        words = plane.numpy().view(np.uint16).reshape(40, -1, 32).astype(np.int64)
        nibbles.append(np.concatenate([words >> 4 * place & 15 for place in range(4)], 2).reshape(40, -1))
    upper = 16.0 * (nibbles[0] - 8) - dither
    for plane, rows in (("coarse", steps * (upper + 8)), ("fine", steps * (upper + nibbles[1] + 0.5))):
        for stored, values in ((found.norms, rows[:, :hidden]), (None, weight - rows[:, :hidden])):
            bound = (getattr(found, f"{plane}_error_norms") if stored is None else stored).numpy()
            assert (bound >= np.sqrt((values.astype(np.longdouble) ** 2).sum(1))).all()
    assert (found.norms.numpy() >= 112 * np.sqrt((found.scales.numpy().astype(np.longdouble) ** 2).sum(1))).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_layer_is_coded_block_by_block_as_its_rows(
    dtype: torch.dtype, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = torch.from_numpy(rng.standard_normal((300, GROUP + 1))).to(dtype)
    dither = torch.from_numpy(layer_dither(GROUP + 1, 1))
    whole = torch_codes.code_rows(weight.double(), dither)
    monkeypatch.setattr(torch_codes, "_ELEMENTS_AT_ONCE", 129 * len(dither))
    for part, expected in zip(torch_codes.code_layer(weight, dither), whole, strict=True):
        assert part.equal(expected)
