"""Choosing the next token from logits, by transformers' processors and a generator of the choice's own."""

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from sparseflow.serving.messages import Job

_GREEDY = 1e-5  # below this, logits over the temperature may be no numbers


class Sampler:
    """Chooses the tokens of one choice. The same seed and index give the same tokens."""

    def __init__(self, job: Job, prompt_ids: Sequence[int], eos_ids: Sequence[int]) -> None:
        self._job = job
        self._ids = list(prompt_ids)
        self._made: Counter[int] = Counter()
        self._n_made = 0
        self._eos_ids = list(eos_ids)
        self._generator = torch.Generator()
        if job.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed((job.seed + job.index) % 2**63)
        self._penalty = RepetitionPenaltyLogitsProcessor(job.repetition_penalty)
        self._warpers = _warpers(job)

    def choose(self, logits: Tensor) -> int:
        """The next token.

        Args:
            logits: (vocab_size,) float32, on the CPU; left as they are.
        """
        scores = self._adjusted(logits[None])
        if self._job.temperature < _GREEDY:
            chosen = int(scores.argmax())
        else:
            probabilities = self._warpers(None, scores).softmax(-1)
            chosen = int(torch.multinomial(probabilities, 1, generator=self._generator))
        self._ids.append(chosen)
        self._made[chosen] += 1
        self._n_made += 1
        return chosen

    def _adjusted(self, scores: Tensor) -> Tensor:
        """With penalties and biases; (1, vocab_size)."""
        job = self._job
        if job.repetition_penalty != 1:
            scores = self._penalty(torch.tensor([self._ids]), scores)
        biases = dict(job.logit_bias)
        if job.frequency_penalty or job.presence_penalty:
            for token_id, count in self._made.items():
                penalty = job.frequency_penalty * count + job.presence_penalty
                biases[token_id] = biases.get(token_id, 0.0) - penalty
        may_not_end = job.ignore_eos or self._n_made < job.min_tokens
        if biases or may_not_end:
            scores = scores.clone()
        if biases:
            scores[0, list(biases)] += torch.tensor(list(biases.values()))
        if may_not_end:
            scores[0, self._eos_ids] = -torch.inf
        return scores


def _warpers(job: Job) -> LogitsProcessorList:
    warpers = LogitsProcessorList()
    if job.temperature >= _GREEDY and job.temperature != 1:
        warpers.append(TemperatureLogitsWarper(float(job.temperature)))
    if job.top_k > 0:
        warpers.append(TopKLogitsWarper(job.top_k))
    if job.top_p < 1:
        warpers.append(TopPLogitsWarper(job.top_p))
    if job.min_p > 0:
        warpers.append(MinPLogitsWarper(job.min_p))
    return warpers
