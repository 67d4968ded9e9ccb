"""All predictors of one layer, fitted and priced."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparseflow.calibration.activations import LayerActivity
from sparseflow.calibration.cuts import RECALLS, Cuts, fit_cuts
from sparseflow.calibration.reduced_rank import Moments, ReducedRank
from sparseflow.calibration.training import train
from sparseflow.kernels.bounds import CodedRows, Margin
from sparseflow.orchestration.lookahead import DEFAULT_DISTANCE, LEAST_USEFUL
from sparseflow.orchestration.low_rank import LowRank
from sparseflow.orchestration.neuron_predictor import CodesOfLayer
from sparseflow.store.calibration import LookaheadRecord, PredictorRecord
from sparseflow.store.profile import ModelProfile

# Of the active neurons, that a lookahead predictor finds. What it misses is only read later, what it names in vain
# costs the disk: on the demo model, seen from one layer earlier, 0.7 of the active are 0.6-0.7 of those named, 0.9 of
# them 0.4.
LOOKAHEAD_RECALL = 0.7
_LOOKAHEAD_RANK_SHARE = 8  # hidden / rank: with 4 a tenth more of those named are active, for twice the bytes

_MOMENT_TOKENS = 16384  # enough for products of a few thousand columns
_VALIDATION_ELEMENTS = 1 << 24  # pairs of token and neuron that are held at once
_VALIDATION_TOKENS = 4096  # at most
_LEAST_RANK = 8
_AT_ONCE = 256


# What a predictor sees of some tokens, given their indices: (n, width) float32.
Seen = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class LayerFit:
    """records: kind -> what it costs. lookahead: by how many layers earlier; may be empty. tensors: by name, stored."""

    records: dict[str, PredictorRecord]
    lookahead: list[LookaheadRecord]
    tensors: dict[str, Tensor]


class LayerFitter:
    """Fits on the first tokens, sets cuts and counts costs on the others."""

    def __init__(
        self,
        profile: ModelProfile,
        activity: LayerActivity,
        n_training: int,
        recall: float,
        *,
        epochs: int,
        keeps_all: bool,
        codes_only: bool,
        quiet: bool,
    ) -> None:
        """
        Args:
            n_training: tokens that predictors are fitted to; the cuts are set on the rest.
            recall: ranks are the cheapest at this one.
            epochs: of training; 0: no trained predictors.
            keeps_all: store also what is the cheapest at no recall, to compare it.
            codes_only: fit nothing of low rank.
        """
        self._profile, self._activity, self._recall = profile, activity, recall
        self._n_training, self._epochs, self._keeps_all, self._quiet = n_training, epochs, keeps_all, quiet
        self._codes_only = codes_only
        n_tokens, ffn_dim = len(activity.x), len(activity.bias)
        n_validation = max(1, min(n_tokens - n_training, _VALIDATION_TOKENS, _VALIDATION_ELEMENTS // ffn_dim))
        self._validation = torch.linspace(n_training, n_tokens - 1, n_validation).long()
        self._is_active = activity.labels(self._validation.numpy())
        self._active_share = float(self._is_active.float().mean())

    def fit(self, codes: CodedRows, failure_probability: float, streams: Sequence[Seen], seed: int) -> LayerFit:
        """
        Args:
            codes: the layer's.
            streams: what enters this layer, the one before, and the one before that, as lookahead predictors see it.
        """
        records = self._code_records(codes, failure_probability)
        if self._codes_only:
            return LayerFit(records, [], {})
        tensors: dict[str, Tensor] = {}
        own = self._reduced_rank(self._seen)
        rank, records["svd"] = self._cheapest_rank(own)
        tensors |= _stored("svd", own.predictor(rank), own.spread(rank))
        if self._epochs:
            trained, records["trained"] = self._trained(own, rank, seed)
            tensors |= _stored("trained", trained, torch.ones_like(trained.bias))
        lookahead = []
        for distance, stream in enumerate(streams):
            predictor, record = self._lookahead(stream)
            lookahead.append(record)
            tensors |= _stored(f"lookahead{distance}", predictor)
        return self._kept(records, lookahead, tensors)

    def _kept(
        self, records: dict[str, PredictorRecord], lookahead: list[LookaheadRecord], tensors: dict[str, Tensor]
    ) -> LayerFit:
        """Without the weights that nobody would use."""
        if self._keeps_all:
            return LayerFit(records, lookahead, tensors)
        chosen = {min(records, key=lambda kind: self._cost(records[kind], recall)) for recall in RECALLS}
        nearest = min(DEFAULT_DISTANCE, len(lookahead) - 1)
        used = {*chosen, f"lookahead{nearest}"} if self._foresees(lookahead[nearest]) else chosen
        kept = {name: tensor for name, tensor in tensors.items() if name.split(".")[0] in used}
        # Codes are in every store, and `exact` needs them.
        records = {kind: replace(r, is_kept=kind in used or r.rank is None) for kind, r in records.items()}
        return LayerFit(records, [replace(r, is_kept=f"lookahead{n}" in used) for n, r in enumerate(lookahead)], kept)

    def _foresees(self, record: LookaheadRecord) -> bool:
        """Whether enough of those it names are active: it would be resident, and is not used where it reads in vain."""
        return self._active_share * record.recall > LEAST_USEFUL * record.candidate_share

    # --- codes

    def _code_records(self, codes: CodedRows, failure_probability: float) -> dict[str, PredictorRecord]:
        """The cut is in units of the margin of `exact`; where both planes are read, the coarse one needs most of it."""
        at_zero, at_one = (self._bounds(codes, failure_probability, cut, 1) for cut in (0.0, 1.0))
        spread = (at_one[0] - at_zero[0]).clamp_min(1e-30)
        coarse = fit_cuts(at_zero[0], spread, self._is_active)
        missed_by_coarse = tuple(1 - 0.9 * (1 - recall) for recall in RECALLS)
        cuts = fit_cuts(at_zero[0], spread, self._is_active, missed_by_coarse).cuts
        nbytes, shares, found = [], [], []
        for cut in cuts:
            bounds, nbytes_read = self._bounds(codes, failure_probability, cut, 2)
            is_chosen = ~(bounds <= 0)
            nbytes.append(nbytes_read)
            shares.append(float(is_chosen.float().mean()))
            found.append(float(is_chosen[self._is_active].float().mean()) if self._is_active.any() else 1.0)
        both = Cuts(cuts, shares, found)
        return {
            "coarse": PredictorRecord([at_zero[1]] * len(RECALLS), None, *coarse),
            "codes": PredictorRecord(nbytes, None, *both),
        }

    def _bounds(self, codes: CodedRows, failure_probability: float, cut: float, planes: int) -> tuple[Tensor, float]:
        """(n_validation, ffn_dim), and the bytes that a token read."""
        predictor = CodesOfLayer(codes, Margin.EXACT, failure_probability, cut, planes)
        parts = [predictor.bounds(self._seen(rows)) for rows in self._validation.split(_AT_ONCE)]
        return torch.cat(parts), predictor.nbytes_read / len(self._validation)

    # --- low ranks

    def _seen(self, rows: Tensor) -> Tensor:
        """The MLP's input, which all but lookahead predictors see."""
        return self._activity.x[rows].float()

    def _reduced_rank(self, seen: Seen) -> ReducedRank:
        moments = Moments(self._activity.x.shape[1])
        rows = torch.linspace(0, self._n_training - 1, min(self._n_training, _MOMENT_TOKENS)).long().unique()
        for part in rows.split(2048):
            moments.add(self._seen(part), seen(part))
        return moments.fit(self._activity.weight, self._activity.bias)

    def _cheapest_rank(self, guesses: ReducedRank) -> tuple[int, PredictorRecord]:
        hidden = self._activity.x.shape[1]
        ranks = [rank for n in range(16) if (rank := _LEAST_RANK << n) <= max(_LEAST_RANK, hidden // 4)]
        ranks = [min(rank, hidden) for rank in ranks]
        records = {rank: self._priced(guesses.predictor(rank), guesses.spread(rank)) for rank in ranks}
        best = min(records, key=lambda rank: self._cost(records[rank]))
        return best, records[best]

    def _trained(self, guesses: ReducedRank, rank: int, seed: int) -> tuple[LowRank, PredictorRecord]:
        """Of that rank, or of half, where training makes up for it."""
        found = []
        for tried in {max(_LEAST_RANK, rank // 2), rank}:
            start, spread = guesses.predictor(tried), guesses.spread(tried)
            predictor = train(start, spread, self._activity, self._n_training, self._epochs, seed, quiet=self._quiet)
            found.append((predictor, self._priced(predictor, torch.ones_like(predictor.bias))))
        return min(found, key=lambda pair: self._cost(pair[1]))

    def _lookahead(self, stream: Seen) -> tuple[LowRank, LookaheadRecord]:
        """A hint that comes too late costs time and nothing else, so the cut is set for fewer of the neurons."""
        guesses = self._reduced_rank(stream)
        hidden = self._activity.x.shape[1]
        rank = min(max(_LEAST_RANK, hidden // _LOOKAHEAD_RANK_SHARE), hidden)
        predictor, spread = guesses.predictor(rank), guesses.spread(rank)
        cuts = fit_cuts(self._scores(predictor, stream), spread, self._is_active, (LOOKAHEAD_RECALL,))
        foresees = LowRank(predictor.down, predictor.up, predictor.bias + cuts.cuts[0] * spread)
        return foresees, LookaheadRecord(rank, cuts.found[0], cuts.candidate_shares[0])

    def _priced(self, predictor: LowRank, spread: Tensor) -> PredictorRecord:
        cuts = fit_cuts(self._scores(predictor, self._seen), spread, self._is_active)
        return PredictorRecord([predictor.nbytes] * len(RECALLS), predictor.rank, *cuts)

    def _scores(self, predictor: LowRank, seen: Seen) -> Tensor:
        return torch.cat([predictor.scores(seen(rows)) for rows in self._validation.split(_AT_ONCE)])

    def _cost(self, record: PredictorRecord, recall: float | None = None) -> float:
        return record.bytes_per_token(recall or self._recall, RECALLS, self._active_share, self._profile)


def _stored(name: str, predictor: LowRank, spread: Tensor | None = None) -> dict[str, Tensor]:
    tensors: Mapping[str, Tensor | None] = {
        "down": predictor.down,
        "up": predictor.up,
        "bias": predictor.bias,
        "spread": spread,
    }
    return {f"{name}.{part}": tensor for part, tensor in tensors.items() if tensor is not None}
