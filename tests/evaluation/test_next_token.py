"""Distances between next-token distributions, against torch's own distributions in float64."""

import pytest
import torch
from torch.distributions import Categorical, kl_divergence

from sparseflow.evaluation.next_token import distance, log_probabilities


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_distances_are_the_textbooks(dtype: torch.dtype) -> None:
    tokens = torch.randint(31, (17,))
    logits = [(3 * torch.randn(17, 31)).to(dtype) for _ in range(2)]
    dense, sparse = (Categorical(logits=one[:-1].double()) for one in logits)
    found = distance(*map(log_probabilities, logits), tokens)
    assert found.divergence == pytest.approx(float(kl_divergence(dense, sparse).mean()), rel=1e-5)
    assert found.agreement == float((dense.probs.argmax(1) == sparse.probs.argmax(1)).double().mean())
    log_ratio = (dense.log_prob(tokens[1:]) - sparse.log_prob(tokens[1:])).mean()
    assert found.log_ratio == pytest.approx(float(log_ratio), rel=1e-5, abs=1e-6)


def test_a_distribution_is_no_distance_from_itself() -> None:
    log_p = log_probabilities(torch.randn(9, 50))
    assert distance(log_p, log_p, torch.randint(50, (9,))) == (0, 1, 0)
