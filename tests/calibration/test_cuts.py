"""Cuts find the share of active neurons that they are fitted for, with as few candidates as the scores allow."""

import numpy as np
import pytest
import torch

from sparseflow.calibration.cuts import RECALLS, fit_cuts


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(int(np.random.default_rng().integers(2**31)))


@pytest.mark.parametrize("shape", [(1, 7), (300, 40), (1000, 64)])
def test_a_cut_finds_the_recall_it_is_fitted_for_and_no_smaller_one_does(
    shape: tuple[int, int], rng: torch.Generator
) -> None:
    truth = torch.randn(shape, generator=rng) - 1
    is_active = truth > 0
    is_active[0, 0] = True
    scores = truth + 0.3 * torch.randn(shape, generator=rng)
    spread = 0.1 + torch.rand(shape[1], generator=rng)
    n_active = int(is_active.sum())
    found = fit_cuts(scores, spread, is_active)
    for recall, cut, share, measured in zip(RECALLS, *found, strict=True):
        is_chosen = scores + cut * spread > 0
        assert int((is_chosen & is_active).sum()) >= min(n_active, np.ceil(recall * n_active))
        fewer = scores + (cut - 1e-3 * max(1, abs(cut))) * spread > 0
        assert int((fewer & is_active).sum()) < np.ceil(recall * n_active) or n_active == 1
        assert share == pytest.approx(float(is_chosen.float().mean()), abs=1e-3)
        assert measured == pytest.approx(int((is_chosen & is_active).sum()) / n_active, abs=2 / n_active)


def test_a_spread_for_each_pair_counts_too(rng: torch.Generator) -> None:
    scores, spread = torch.randn(50, 20, generator=rng), 0.5 + torch.rand(50, 20, generator=rng)
    is_active = torch.rand(50, 20, generator=rng) < 0.3
    cuts = fit_cuts(scores, spread, is_active, (0.9,)).cuts
    n_active, n_found = int(is_active.sum()), int((scores + cuts[0] * spread > 0)[is_active].sum())
    assert np.ceil(0.9 * n_active) <= n_found <= np.ceil(0.9 * n_active) + 1


def test_where_nothing_fires_nothing_is_chosen() -> None:
    found = fit_cuts(torch.randn(4, 5), torch.ones(5), torch.zeros(4, 5, dtype=torch.bool))
    assert found.candidate_shares == [0.0] * len(RECALLS)
