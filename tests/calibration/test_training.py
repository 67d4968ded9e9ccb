"""A trained predictor learns which neurons fire."""

import numpy as np
import pytest
import torch

from sparseflow.calibration.activations import LayerActivity
from sparseflow.calibration.cuts import fit_cuts
from sparseflow.calibration.reduced_rank import Moments
from sparseflow.calibration.training import train
from sparseflow.orchestration.low_rank import LowRank

HIDDEN, FFN, N_TRAINING, N_TOKENS = 32, 96, 3000, 4000


@pytest.fixture(scope="module")
def activity() -> LayerActivity:
    """Neurons that fire by a few directions of the input, about one in ten."""
    rng = torch.Generator().manual_seed(5)  # of ten thousand draws, one leaves nothing to be improved
    x = torch.randn(N_TOKENS, HIDDEN, generator=rng)
    weight = torch.randn(FFN, 6, generator=rng) @ torch.randn(6, HIDDEN, generator=rng) / 15
    weight += 0.02 * torch.randn(FFN, HIDDEN, generator=rng)
    z = x @ weight.T
    bias = -z.quantile(0.9, dim=0)
    return LayerActivity(x, np.packbits((z + bias > 0).numpy(), axis=1), weight, bias)


def candidate_share(predictor: LowRank, activity: LayerActivity, recall: float) -> float:
    """Of held-out neurons, that must be computed to find so many of the active ones. Chance: the recall itself."""
    rows = slice(N_TRAINING, N_TOKENS)
    scores = predictor.scores(activity.x[rows])
    return fit_cuts(scores, torch.ones(FFN), activity.labels(rows), (recall,)).candidate_shares[0]


def test_labels_are_the_neurons_that_fire(activity: LayerActivity) -> None:
    fires = activity.x @ activity.weight.T + activity.bias > 0
    assert torch.equal(activity.labels(slice(None)), fires)
    assert torch.equal(activity.labels(np.array([5, 0])), fires[[5, 0]])


def test_a_tiny_predictor_beats_chance_by_a_wide_margin(activity: LayerActivity) -> None:
    rng = torch.Generator().manual_seed(1)
    from_nothing = LowRank(
        0.1 * torch.randn(8, HIDDEN, generator=rng), 0.1 * torch.randn(FFN, 8, generator=rng), torch.zeros(FFN)
    )
    trained = train(from_nothing, torch.ones(FFN), activity, N_TRAINING, 100, 0, quiet=True)
    assert candidate_share(from_nothing, activity, 0.95) > 0.5  # untrained, it knows nothing
    assert candidate_share(trained, activity, 0.95) < 0.25  # a tenth fires


def test_training_improves_on_the_guess_it_starts_from(activity: LayerActivity) -> None:
    moments = Moments(HIDDEN)
    moments.add(activity.x[:N_TRAINING], activity.x[:N_TRAINING])
    guess = moments.fit(activity.weight, activity.bias)
    start = guess.predictor(4)
    trained = train(start, guess.spread(4), activity, N_TRAINING, 30, 0, quiet=True)
    assert trained.rank == 4
    assert candidate_share(trained, activity, 0.95) < candidate_share(start, activity, 0.95)


def test_the_same_seed_trains_the_same_predictor_and_leaves_the_global_generator_alone(activity: LayerActivity) -> None:
    start = LowRank(torch.zeros(4, HIDDEN), torch.ones(FFN, 4), torch.zeros(FFN))
    before = torch.get_rng_state()
    one, other = (train(start, torch.ones(FFN), activity, 1024, 1, 7, quiet=True) for _ in range(2))
    assert torch.equal(one.up, other.up)
    assert torch.equal(one.down, other.down)
    assert torch.equal(before, torch.get_rng_state())
