"""The best linear guess of each rank: against least squares, and against other guesses of the same rank."""

import numpy as np
import pytest
import torch

from sparseflow.calibration.reduced_rank import Moments, ReducedRank
from sparseflow.orchestration.low_rank import LowRank, half_precision, normalised

N_TOKENS, HIDDEN, FFN = 4000, 24, 60


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(int(np.random.default_rng().integers(2**31)))


class Layer:
    """Inputs with a few strong directions and a mean, an earlier view of them, and fc1."""

    def __init__(self, rng: torch.Generator) -> None:
        strength = torch.logspace(0, -2, HIDDEN)
        turn = torch.linalg.qr(torch.randn(HIDDEN, HIDDEN, generator=rng))[0]
        self.n = torch.randn(N_TOKENS, HIDDEN, generator=rng) * strength @ turn + torch.randn(HIDDEN, generator=rng)
        mix = torch.randn(HIDDEN, HIDDEN, generator=rng) / HIDDEN**0.5
        self.x = self.n @ mix + 0.05 * torch.randn(N_TOKENS, HIDDEN, generator=rng)
        self.weight = torch.randn(FFN, HIDDEN, generator=rng)
        self.bias = torch.randn(FFN, generator=rng)
        self.z = self.x @ self.weight.T + self.bias

    def guess(self, seen: torch.Tensor) -> ReducedRank:
        moments = Moments(HIDDEN)
        for part in torch.arange(N_TOKENS).split(700):
            moments.add(self.x[part], seen[part])
        return moments.fit(self.weight, self.bias)


@pytest.fixture
def layer(rng: torch.Generator) -> Layer:
    return Layer(rng)


def error(predictor: LowRank, seen: torch.Tensor, z: torch.Tensor) -> float:
    return float((predictor.scores(seen) - z).square().mean())


def test_at_full_rank_the_mlp_input_gives_the_pre_activations(layer: Layer) -> None:
    guess = layer.guess(layer.x).predictor(HIDDEN)
    assert error(guess, layer.x, layer.z) < 2e-3 * float(layer.z.var())


def test_at_full_rank_an_earlier_view_gives_what_least_squares_gives(layer: Layer) -> None:
    design = torch.cat((layer.n, torch.ones(N_TOKENS, 1)), 1).double()
    solution = torch.linalg.lstsq(design, layer.z.double()).solution
    best = float((design @ solution - layer.z).square().mean())
    assert error(layer.guess(layer.n).predictor(HIDDEN), layer.n, layer.z) < 1.02 * best + 2e-3 * float(layer.z.var())


@pytest.mark.parametrize("rank", [1, 4, 8])
def test_no_plain_decomposition_of_the_weights_guesses_better(layer: Layer, rank: int) -> None:
    u, s, v = torch.linalg.svd(layer.weight, full_matrices=False)
    kept = (u[:, :rank] * s[:rank]) @ v[:rank]
    plain_error = float(((layer.x - layer.x.mean(0)) @ kept.T + layer.z.mean(0) - layer.z).square().mean())
    assert error(layer.guess(layer.x).predictor(rank), layer.x, layer.z) < 1.01 * plain_error


@pytest.mark.parametrize("rank", [2, 8, 16])
def test_the_spread_is_what_the_guess_leaves_open(layer: Layer, rank: int) -> None:
    guess = layer.guess(layer.n)
    left = (guess.predictor(rank).scores(layer.n) - layer.z).square().mean(0).sqrt()
    torch.testing.assert_close(guess.spread(rank), left, rtol=0.1, atol=0.02 * float(layer.z.std()))


def test_half_precision_keeps_the_product_whatever_the_scales(rng: torch.Generator) -> None:
    down, up = torch.randn(3, 10, generator=rng), torch.randn(20, 3, generator=rng)
    wild = torch.tensor([1e8, 1e-9, 1.0])
    halves = half_precision(down * wild[:, None], up / wild)
    assert all(bool(half.isfinite().all()) for half in halves)
    torch.testing.assert_close(halves[1].float() @ halves[0].float(), up @ down, rtol=2e-2, atol=2e-2)


def test_the_normalised_stream_has_mean_0_and_variance_1(rng: torch.Generator) -> None:
    seen = normalised((torch.randn(5, 64, generator=rng) * 30 + 7).half())
    torch.testing.assert_close(seen.mean(1), torch.zeros(5), atol=1e-4, rtol=0)
    torch.testing.assert_close(seen.var(1, unbiased=False), torch.ones(5), atol=1e-2, rtol=0)
