"""On a GPU too, no neuron that is active is ever skipped, and few more are chosen than the twin chooses."""

import numpy as np
import pytest
import torch

from sparseflow.kernels.bounds import CodedRows, Margin, upper_bounds_ref
from sparseflow.kernels.device import scoring
from sparseflow.kernels.device.scoring import DeviceScorer, Shape
from sparseflow.kernels.device.token_codes import TokenSums, normalise_and_sum, sum_tokens
from sparseflow.store.codes import GROUP, code_rows, draw_dither

FAILURE_PROBABILITY = 1e-12
SIZES = [(1, 1), (2, 63), (33, 128), (50, 129), (40, 300)]  # neurons, hidden


def coded(rng: np.random.Generator, weight: np.ndarray, bias: np.ndarray) -> CodedRows:
    dither = draw_dither(weight.shape[1], rng)
    codes = {"dither": dither} | code_rows(weight, dither)._asdict()
    tensors = {name: torch.from_numpy(array) for name, array in codes.items()}
    return CodedRows(**tensors, bias=torch.from_numpy(bias.astype(np.float32)))


def bounds_of(
    rows: CodedRows, x: torch.Tensor, margin: Margin, device: torch.device, threshold: float = 1.0, planes: int = 2
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """mask (n_tokens, n) bool, bounds (n_tokens, n) and how many fine rows were read."""
    there = CodedRows(*(tensor.to(device) for tensor in rows))
    scorer = DeviceScorer(there, margin, FAILURE_PROBABILITY, threshold, planes)
    sums = TokenSums(len(x), scorer.n_groups, device)
    mask = torch.full((len(x), scorer.n_neurons), 7, dtype=torch.int8, device=device)
    bounds = torch.full(mask.shape, -7.0, device=device)
    n_fine_rows = torch.zeros(1, dtype=torch.int64, device=device)
    scorer.sum_tokens(x.to(device), sums)
    scorer.select(x.to(device), sums, mask, n_fine_rows, bounds)
    assert set(mask.unique().tolist()) <= {0, 1}
    return mask.cpu().bool(), bounds.cpu(), int(n_fine_rows)


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    if device.type == "cpu":  # where each takes its time
        monkeypatch.setattr(scoring, "SHAPE", Shape(rows=64, open_rows=16))


@pytest.mark.parametrize(("n_neurons", "hidden"), SIZES)
@pytest.mark.parametrize("margin", Margin, ids=lambda margin: margin.name.lower())
@pytest.mark.parametrize("planes", [1, 2])
def test_bounds_are_the_twins_and_a_little_more(
    n_neurons: int, hidden: int, margin: Margin, planes: int, device: torch.device
) -> None:
    rng = np.random.default_rng()
    weight, bias = rng.normal(size=(n_neurons, hidden)), rng.normal(size=n_neurons) - 1
    rows = coded(rng, weight, bias)
    x = torch.from_numpy(rng.normal(size=(2, hidden)).astype(np.float32))
    mask, bounds, n_fine_rows = bounds_of(rows, x, margin, device, planes=planes)
    # where a bound is close to 0 on the coarse plane, only one of the two may have read the fine one
    coarse, last = (upper_bounds_ref(rows, x, margin, FAILURE_PROBABILITY, planes=each) for each in (1, planes))
    room = rows.norms.double() * x.double().norm(dim=1, keepdim=True) * 1e-4 + 1e-6
    is_close = coarse.abs() <= room
    assert ((bounds >= last) | is_close).all()
    assert ((bounds <= last + room) | is_close).all()
    assert (mask == ~(bounds <= 0)).all()
    assert not (~mask & (last > 0) & (coarse > 0)).any()
    assert (n_fine_rows == 0) if planes == 1 else (n_fine_rows >= int((coarse > 0).sum()))


@pytest.mark.parametrize("margin", Margin, ids=lambda margin: margin.name.lower())
def test_no_active_neuron_is_skipped(margin: Margin, device: torch.device) -> None:
    rng = np.random.default_rng()
    weight, x = rng.normal(size=(120, 300)), rng.normal(size=(2, 300)).astype(np.float32)
    bias = -np.median(weight @ x.astype(np.float64).T, axis=1) + rng.normal(size=120) * 1e-3
    rows = coded(rng, weight, bias)
    mask, _, _ = bounds_of(rows, torch.from_numpy(x), margin, device)
    active = x.astype(np.float64) @ weight.T + rows.bias.numpy().astype(np.float64) > 0
    assert not (active & ~mask.numpy()).any()
    assert not mask.all()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_a_candidate(broken: float, device: torch.device) -> None:
    rng = np.random.default_rng()
    rows = coded(rng, rng.normal(size=(40, 150)), rng.normal(size=40) - 100)
    x = torch.from_numpy(rng.normal(size=(2, 150)).astype(np.float32))
    x[1, 70] = broken
    mask, _, _ = bounds_of(rows, x, Margin.EXACT, device)
    assert not mask[0].any()
    assert mask[1].all()


@pytest.mark.parametrize("size", [1e-25, 1e-20, 1e-12, 1e15])
def test_small_and_large_tokens_too_have_their_bound(size: float, device: torch.device) -> None:
    rng = np.random.default_rng()
    rows = coded(rng, rng.normal(size=(30, 200)), np.zeros(30))
    x = torch.from_numpy((rng.normal(size=(1, 200)) * size).astype(np.float32))
    _, bounds, _ = bounds_of(rows, x, Margin.EXACT, device)
    coarse, last = (upper_bounds_ref(rows, x, Margin.EXACT, FAILURE_PROBABILITY, planes=each) for each in (1, 2))
    assert ((bounds >= last) | (bounds >= coarse)).all()
    room = rows.norms.double() * x.double().norm(dim=1, keepdim=True) * 1e-4 + 1e-6
    assert ((bounds <= last + room) | (bounds <= coarse + room)).all()


@pytest.mark.parametrize("shape", [Shape(16, 2, 16, 4), Shape(8, 16, 64, 4)], ids=str)
def test_how_the_kernel_is_cut_changes_roundings_alone(
    shape: Shape, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng()
    rows = coded(rng, rng.normal(size=(40, 300)), rng.normal(size=40) * 10)
    x = torch.from_numpy(rng.normal(size=(1, 300)).astype(np.float32))
    _, bounds, _ = bounds_of(rows, x, Margin.EXACT, device, planes=1)
    _, fine_bounds, n_fine = bounds_of(rows, x, Margin.EXACT, device)
    monkeypatch.setattr(scoring, "SHAPE", shape)
    _, others, _ = bounds_of(rows, x, Margin.EXACT, device, planes=1)
    _, fine_others, n_others = bounds_of(rows, x, Margin.EXACT, device)
    torch.testing.assert_close(others, bounds, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(fine_others, fine_bounds, rtol=1e-5, atol=1e-4)
    assert abs(n_others - n_fine) <= 1  # one bound may lie at 0
    assert n_fine > 2


def test_dot_products_of_bytes_are_those_of_their_codes(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    if device.type != "cuda":
        pytest.skip("only a GPU has the instruction")
    rng = np.random.default_rng()
    rows = coded(rng, rng.normal(size=(100, 700)), rng.normal(size=100))
    x = torch.from_numpy(rng.normal(size=(2, 700)).astype(np.float32))
    _, bounds, _ = bounds_of(rows, x, Margin.EXACT, device)
    monkeypatch.setattr(DeviceScorer, "uses_dp4a", False)
    torch.testing.assert_close(bounds_of(rows, x, Margin.EXACT, device)[1], bounds, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("hidden", [5, 300])
def test_a_norm_and_its_sums_can_be_had_together(dtype: torch.dtype, hidden: int, device: torch.device) -> None:
    stream, weight, bias = (torch.randn(hidden, device=device).to(dtype) for _ in range(3))
    n_groups = -(-hidden // GROUP)
    dither = torch.from_numpy(draw_dither(hidden, np.random.default_rng())).to(device)
    apart, together = (TokenSums(1, n_groups, device) for _ in range(2))
    x = torch.full((1, hidden), float("nan"), device=device)
    normalise_and_sum(stream, weight, bias, 1e-5, dither, x[0], together)
    expected = torch.nn.functional.layer_norm(stream.double(), (hidden,), weight.double(), bias.double())
    assert (x[0].double() - expected).norm() < 1e-5 * expected.norm()
    sum_tokens(x, dither, apart)
    assert torch.equal(together.codes, apart.codes)
    for name in ("steps", "squares", "coarse_offsets", "fine_offsets", "errors"):
        torch.testing.assert_close(getattr(together, name), getattr(apart, name), rtol=1e-6, atol=1e-6)


def test_a_threshold_scales_the_margin(device: torch.device) -> None:
    rng = np.random.default_rng()
    rows = coded(rng, rng.normal(size=(120, 256)), rng.normal(size=120) * 8)
    x = torch.from_numpy(rng.normal(size=(1, 256)).astype(np.float32))
    chosen = [int(bounds_of(rows, x, Margin.EXACT, device, threshold)[0].sum()) for threshold in (0.0, 1.0, 4.0)]
    assert chosen[0] < chosen[1] < chosen[2]
