"""What was computed and what was spared, counted while running."""

from dataclasses import dataclass, field

from sparseflow.engine.counts import FetchCounts
from sparseflow.orchestration.recall_sums import RecallSums


@dataclass
class DeviceCounts:
    """Sums over layer steps whose bundles have slots on a device; all but bytes by layer."""

    candidates: list[int]
    misses: list[int]
    """Candidates that were in no slot."""
    hinted: list[int]
    """Bundles that were moved before they were asked for."""
    foreseen: list[int]
    """Of those, asked for in the very step that they were moved for."""
    nbytes_moved: int = 0
    """From host memory to the device."""

    @classmethod
    def zeros(cls, n_layers: int) -> "DeviceCounts":
        """Of so many layers, before any step."""
        return cls([0] * n_layers, [0] * n_layers, [0] * n_layers, [0] * n_layers)

    @property
    def hit_rate(self) -> float | None:
        """Share of candidates that were in a slot."""
        share_missed = _ratio(sum(self.misses), sum(self.candidates))
        return None if share_missed is None else 1 - share_missed

    @property
    def hit_rates(self) -> list[float | None]:
        """The same by layer."""
        return [1 - n_misses / n if n else None for n, n_misses in zip(self.candidates, self.misses, strict=True)]


@dataclass
class StepCounts:
    """Sums over layer steps. One layer step is one layer's MLP in one forward pass."""

    layer_steps: int = 0
    dense_layer_steps: int = 0
    neurons: int = 0
    """Neurons of those layers."""
    fetched: int = 0
    """Neurons computed; all of them in a dense step."""
    halves_read: int = 0
    """Halves of bundles read: fc1's of each neuron computed, fc2's of each active one (of all, in a dense step)."""
    predictor_nbytes: int = 0
    """Bytes of predictor weights read to choose neurons."""
    pairs: int = 0
    """Pairs of token and neuron."""
    active_pairs: int = 0
    """Those whose pre-activation was above 0."""
    audited: int = 0
    """Truly active neurons in audited layer steps."""
    missed: int = 0
    """Those that were not computed."""
    sampled: RecallSums = field(default_factory=RecallSums)
    """What live sampling found; nothing in prompts."""
    fetches: FetchCounts | None = None
    """What reading them cost; None where all bundles are resident."""
    device: DeviceCounts | None = None
    """None where bundles are computed in host memory."""

    @property
    def candidate_share(self) -> float | None:
        """Share of neurons fetched."""
        return _ratio(self.fetched, self.neurons)

    @property
    def active_share(self) -> float | None:
        """Share of neurons truly active, token by token."""
        return _ratio(self.active_pairs, self.pairs)

    @property
    def dense_layer_share(self) -> float | None:
        """Share of layer steps computed dense."""
        return _ratio(self.dense_layer_steps, self.layer_steps)

    @property
    def predictor_nbytes_per_layer(self) -> float:
        """Bytes of predictor weights read in a layer step."""
        return self.predictor_nbytes / self.layer_steps if self.layer_steps else 0.0

    @property
    def halves_share(self) -> float | None:
        """Halves of bundles read, as a share of all halves."""
        return _ratio(self.halves_read, 2 * self.neurons)


@dataclass
class RunStats:
    """Counts by phase: the first pass over a prompt, and all that follows."""

    prefill: StepCounts = field(default_factory=StepCounts)
    decode: StepCounts = field(default_factory=StepCounts)

    @property
    def fetches(self) -> FetchCounts | None:
        """What reading bundles cost in both phases; None where all are resident."""
        if self.prefill.fetches is None or self.decode.fetches is None:
            return self.prefill.fetches or self.decode.fetches
        return self.prefill.fetches + self.decode.fetches

    @property
    def recall(self) -> float | None:
        """Share of what is truly active that was computed: of neurons in audited layer steps of both phases.

        Where there was no audit: of pairs of token and neuron in sparse decode steps, as live sampling estimates it.
        """
        missed = self.prefill.missed + self.decode.missed
        return 1 - missed / self._audited if self._audited else self.decode.sampled.measured.recall

    @property
    def recall_error(self) -> float | None:
        """One standard error of an estimate; None for an audit, which estimates nothing."""
        return None if self._audited else self.decode.sampled.measured.recall_error

    @property
    def recall_samples(self) -> int:
        """What `recall` rests on: active neurons audited; else skipped neurons that were computed after all."""
        return self._audited or self.decode.sampled.samples

    @property
    def _audited(self) -> int:
        return self.prefill.audited + self.decode.audited


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None
