"""What sampled layer steps say of recall: sums, an estimate, and how far it may be off."""

from dataclasses import dataclass
from typing import NamedTuple

from sparseflow.protocol.measured_recall import MeasuredRecall


class StepSample(NamedTuple):
    """What computing some of the skipped neurons of one layer step says. Misses are pairs of token and neuron."""

    missed: float
    """Estimated misses of the step, without bias."""
    variance: float
    """Of that estimate, without bias."""
    n_skipped: int
    n_sampled: int


@dataclass
class RecallSums:
    """Sums over the sparse decode steps of a run, of which some were sampled.

    With f found and m missed in a sampled step, recall R = F / (F + M), a ratio of sums. Its residual in a step is
    d = f - R (f + m), and the variance of R is that of the sum of d over (F + M)^2 (the delta method; for steps drawn
    at random, and neurons drawn at random within them, W. G. Cochran, Sampling Techniques, 3rd ed., 6.4 and 10.3):

        (1 - p) n / (n - 1) sum d^2 + p R^2 sum v

    p is the share of steps sampled, n their number, v the variance within a step. Where few steps show no difference,
    R^2 sum v is the least that the first term may be. Misses too rare to be seen leave no variance, so w^2 is added,
    w being the skipped neurons for which one sampled neuron stands on average: what one miss more would have added, as
    a sum of counts with weights w has the variance sum w^2 (G. Bohm and G. Zech, Nucl. Instr. Meth. A 748, 2014).
    Without any miss the error is thus w / F, about the bound of one count of a Poisson distribution that showed none.
    """

    steps: int = 0
    """Sparse steps, sampled or not."""
    sampled_steps: int = 0
    found: int = 0
    """Active pairs among computed neurons, in sampled steps."""
    missed: float = 0.0
    samples: int = 0
    """Skipped neurons that were computed after all."""
    skipped: int = 0
    """Of which these are a sample."""
    _found_squared: float = 0.0
    _product: float = 0.0
    _missed_squared: float = 0.0
    _within: float = 0.0

    def add(self, n_found: int, sample: StepSample) -> None:
        """One sampled step, in which `n_found` active pairs were computed."""
        self.sampled_steps += 1
        self.found += n_found
        self.missed += sample.missed
        self.samples += sample.n_sampled
        self.skipped += sample.n_skipped
        self._found_squared += n_found**2
        self._product += n_found * sample.missed
        self._missed_squared += sample.missed**2
        self._within += sample.variance

    @property
    def measured(self) -> MeasuredRecall:
        """The estimate so far."""
        return MeasuredRecall(float(self.found), self.missed, self._variance, float(self.samples))

    @property
    def _variance(self) -> float:
        """Of the sum of residuals."""
        active = self.found + self.missed
        if not active:
            return 0.0
        recall, n = self.found / active, self.sampled_steps
        lost = 1 - recall
        squares = lost**2 * self._found_squared - 2 * lost * recall * self._product + recall**2 * self._missed_squared
        within = recall**2 * self._within
        between = max(within, squares * n / (n - 1)) if n > 1 else within
        share = n / max(n, self.steps)
        weight = self.skipped / self.samples if self.samples else 1.0
        return (1 - share) * between + share * within + weight**2
