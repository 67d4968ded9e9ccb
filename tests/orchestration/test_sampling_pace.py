"""When to sample, by a clock that goes on when it is told to."""

from dataclasses import dataclass, field

import numpy as np
import pytest

from sparseflow.orchestration.sampling_pace import SamplingPace

SHARE = 0.01
N_LAYERS = 24


@dataclass
class Decoding:
    """A model that decodes, with steps and samples of given costs."""

    rng: np.random.Generator
    step_s: float
    sample_s: float
    pause_s: float = 0.0
    """Before each token."""
    first_sample_s: float = 0.0
    """What the first costs beyond that."""
    now_s: float = 1000.0
    steps_s: float = 0.0
    samples_s: float = 0.0
    sampled: list[int] = field(default_factory=list)
    """The layers."""

    def __post_init__(self) -> None:
        self.pace = SamplingPace(SHARE, self.rng, lambda: self.now_s)

    def decode(self, n_tokens: int) -> None:
        for step in range(n_tokens * N_LAYERS):
            layer = step % N_LAYERS
            self.now_s += self.pause_s if layer == 0 else 0.0
            step_s = self.step_s * self.rng.uniform(0.5, 1.5)
            self.now_s += step_s
            self.steps_s += step_s
            if self.pace.is_due(layer):
                self._sample(layer)

    def _sample(self, layer: int) -> None:
        sample_s = self.sample_s * self.rng.uniform(0.5, 1.5) + (0 if self.sampled else self.first_sample_s)
        self.now_s += sample_s
        self.samples_s += sample_s
        self.sampled.append(layer)
        self.pace.sampled()

    def share_of(self, n_tokens: int) -> float:
        """What samples cost over so many more tokens."""
        self.steps_s = self.samples_s = 0.0
        self.decode(n_tokens)
        return self.samples_s / self.steps_s


@pytest.mark.parametrize(("step_s", "sample_s"), [(5e-3, 2e-3), (5e-3, 2e-2), (3e-4, 1e-3), (2e-2, 2e-3)])
def test_samples_cost_their_share_of_the_time(rng: np.random.Generator, step_s: float, sample_s: float) -> None:
    decoding = Decoding(rng, step_s, sample_s)
    decoding.decode(50)
    n_tokens = int(500 * sample_s / step_s / SHARE / N_LAYERS)  # some 500 samples
    assert decoding.share_of(n_tokens) == pytest.approx(SHARE, rel=0.25)


def test_samples_cost_their_share_when_steps_become_faster_or_slower(rng: np.random.Generator) -> None:
    decoding = Decoding(rng, 5e-3, 5e-3)
    decoding.decode(100)
    for decoding.step_s, decoding.sample_s in ((5e-4, 5e-3), (2e-2, 5e-3), (5e-3, 5e-2), (5e-3, 1e-3)):
        decoding.decode(1000)  # a while to notice
        assert decoding.share_of(2000) == pytest.approx(SHARE, rel=0.4)


def test_samples_that_cost_next_to_nothing_are_taken_of_every_step_and_no_more(rng: np.random.Generator) -> None:
    decoding = Decoding(rng, 5e-3, 1e-6)
    decoding.decode(20)
    decoding.sampled.clear()
    decoding.decode(10)
    assert len(decoding.sampled) == 10 * N_LAYERS


def test_no_layer_is_favoured(rng: np.random.Generator) -> None:
    decoding = Decoding(rng, 5e-3, 1.2e-3)  # every 24th step on average, as there are layers
    decoding.decode(6000)
    counts = np.bincount(decoding.sampled, minlength=N_LAYERS)
    mean = counts.mean()
    assert mean > 150
    assert (abs(counts - mean) < 5 * np.sqrt(mean)).all()


def test_pauses_between_tokens_are_no_time_of_decoding(rng: np.random.Generator) -> None:
    decoding = Decoding(rng, 5e-3, 5e-3, pause_s=60.0)
    decoding.decode(100)
    assert decoding.pace.interval == pytest.approx(100, rel=0.5)


def test_first_sample_that_waits_for_a_compiler_does_not_put_off_the_next_ones(rng: np.random.Generator) -> None:
    decoding = Decoding(rng, 5e-3, 5e-3, first_sample_s=10.0)
    decoding.decode(40)
    assert len(decoding.sampled) > 4
