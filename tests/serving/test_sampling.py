"""How a token is chosen: the distribution against formulas, and each knob against its definition."""

from typing import Any

import pytest
import torch
from torch import Tensor

from sparseflow.serving.messages import Job
from sparseflow.serving.sampling import Sampler

VOCAB = 40


def fresh_logits() -> Tensor:
    return 3 * torch.randn(VOCAB)


def sampler(index: int = 0, prompt: tuple[int, ...] = (1, 2), eos: tuple[int, ...] = (0,), **fields: Any) -> Sampler:
    return Sampler(Job(1, index, **fields), prompt, eos)


def shares(logits: Tensor, n: int = 4000, **fields: Any) -> Tensor:
    """How often each token is chosen, of `n` choices of a first token."""
    counts = torch.zeros(VOCAB)
    for seed in range(n):
        counts[sampler(seed=seed, **fields).choose(logits)] += 1
    return counts / n


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_tokens_come_as_often_as_softmax_says(temperature: float) -> None:
    logits = fresh_logits()
    expected = (logits / temperature).softmax(-1)
    error = (expected * (1 - expected) / 4000).sqrt()
    assert bool(((shares(logits, temperature=temperature) - expected).abs() < 5 * error + 1e-3).all())


@pytest.mark.parametrize("temperature", [1e-6, 1e-40, 1e-320])
def test_temperature_of_almost_0_is_0(temperature: float) -> None:
    logits = fresh_logits()
    assert sampler(temperature=temperature).choose(logits) == int(logits.argmax())


def test_temperature_0_is_the_likeliest_token() -> None:
    logits = fresh_logits()
    assert sampler(temperature=0.0).choose(logits) == int(logits.argmax())


def test_top_k_top_p_and_min_p_leave_those_they_name() -> None:
    logits = fresh_logits()
    order, probabilities = logits.argsort(descending=True).tolist(), logits.softmax(-1)
    assert set(shares(logits, 400, top_k=3).nonzero()[:, 0].tolist()) <= set(order[:3])
    sums = probabilities[order].cumsum(0)
    n_kept = int((sums < 0.7).sum()) + 1
    assert set(shares(logits, 400, top_p=0.7).nonzero()[:, 0].tolist()) <= set(order[:n_kept])
    likely = (probabilities >= 0.3 * probabilities.max()).nonzero()[:, 0].tolist()
    assert set(shares(logits, 400, min_p=0.3).nonzero()[:, 0].tolist()) <= set(likely)


def test_frequency_and_presence_penalties_count_what_was_made_and_not_the_prompt() -> None:
    logits = torch.zeros(VOCAB)
    logits[5], logits[6], logits[7] = 3.0, 2.5, 1.9
    choosing = sampler(prompt=(5, 6, 7), temperature=0.0, frequency_penalty=0.4, presence_penalty=0.3)
    scores, made = logits.clone(), []
    for _ in range(8):
        expected = int(scores.argmax())
        made.append(expected)
        assert choosing.choose(logits) == expected
        for token in range(VOCAB):
            scores[token] = logits[token] - 0.4 * made.count(token) - 0.3 * (token in made)
    assert len(set(made)) > 1


def test_repetition_penalty_counts_the_prompt_too() -> None:
    logits = torch.full((VOCAB,), -5.0)
    logits[2], logits[3] = 2.0, 1.9
    assert sampler(prompt=(1, 2), temperature=0.0).choose(logits) == 2
    assert sampler(prompt=(1, 2), temperature=0.0, repetition_penalty=1.2).choose(logits) == 3


def test_bias_is_added() -> None:
    logits = fresh_logits()
    assert sampler(temperature=0.0, logit_bias={9: 100.0}).choose(logits) == 9
    best = int(logits.argmax())
    assert sampler(temperature=0.0, logit_bias={best: -100.0}).choose(logits) == int(logits.argsort()[-2])


def test_logits_are_left_as_they_are() -> None:
    """Their probabilities are told afterwards."""
    logits = fresh_logits()
    before = logits.clone()
    knobs = {"frequency_penalty": 1.0, "repetition_penalty": 1.5, "logit_bias": {3: 4.0}, "min_tokens": 9, "top_k": 4}
    choosing = sampler(temperature=0.7, **knobs)
    for _ in range(3):
        choosing.choose(logits)
    assert torch.equal(logits, before)


def test_end_waits_for_min_tokens() -> None:
    logits = torch.zeros(VOCAB)
    logits[0] = 50.0
    choosing = sampler(temperature=0.0, min_tokens=3)
    assert [choosing.choose(logits) == 0 for _ in range(4)] == [False, False, False, True]


def test_same_seed_and_index_give_the_same_tokens() -> None:
    rows = [fresh_logits() for _ in range(20)]

    def made(index: int, seed: int | None) -> list[int]:
        choosing = sampler(index=index, seed=seed)
        return [choosing.choose(row) for row in rows]

    assert made(0, 7) == made(0, 7)
    assert made(1, 7) != made(0, 7)
    assert made(0, None) != made(0, None)
    assert made(0, -3) == made(0, -3)
