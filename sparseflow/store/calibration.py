"""profile.json: what text showed of each layer, and what its predictors cost at each recall. Written by calibration.

    {"version": 1, "recall": 0.99, "tokens": N, "recalls": [...], "layers": [
        {"active_share": a, "overlap": o, "active_counts": [ffn_dim], "miss_curve": [...],
         "predictors": {"coarse": {"nbytes": [...], "rank": null, "cuts": [...], "candidate_shares": [...],
                                   "found": [...], "is_kept": true}, ...},
         "lookahead": [{"rank": r, "recall": f, "candidate_share": c, "is_kept": true}, ...]}, ...]}

`nbytes`, `cuts`, `candidate_shares` and `found` go with `recalls`, one each, and come from tokens that no predictor was
fitted to.
"""

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

from sparseflow.errors import BadRequest, ShardCorrupt
from sparseflow.store.checks import MOST_OF_A_SIZE, listing, mapping, number, reason_of, shown, truth, whole_number
from sparseflow.store.profile import ModelProfile

PROFILE_NAME = "profile.json"
PROFILE_VERSION = 1
_MOST_TOKENS = 1 << 50
_LARGEST = 1e39  # of any figure; they were float32 once

# Predictors of one layer, as they are called everywhere.
KINDS = ("coarse", "codes", "svd", "trained")


def calibrated_name(layer: int) -> str:
    """Path of a layer's fitted predictors inside the store."""
    return f"predictors/calibrated-{layer:03d}.safetensors"


@dataclass(frozen=True)
class PredictorRecord:
    """What one predictor of one layer costs, for each recall of the grid."""

    nbytes: Sequence[float]
    """Bytes of its weights that one token reads."""
    rank: int | None
    cuts: Sequence[float]
    """How many times its margin a neuron may stay below 0."""
    candidate_shares: Sequence[float]
    found: Sequence[float]
    """Recall that validation tokens showed."""
    is_kept: bool = True
    """Whether its weights are in the store: one that is cheapest at no recall is left out."""

    def cut(self, recall: float, recalls: Sequence[float]) -> float:
        """The cut for a recall between those of the grid."""
        return _between(recall, recalls, self.cuts)

    def bytes_per_token(
        self, recall: float, recalls: Sequence[float], active_share: float, profile: ModelProfile
    ) -> float:
        """Bytes of the predictor, and of bundles fetched in vain."""
        candidates = _between(recall, recalls, self.candidate_shares)
        useful = active_share * _between(recall, recalls, self.found)
        return (
            _between(recall, recalls, self.nbytes)
            + max(0.0, candidates - useful) * profile.ffn_dimension * profile.bundle_nbytes
        )


@dataclass(frozen=True)
class LookaheadRecord:
    """A predictor that sees the residual stream some layers earlier."""

    rank: int
    recall: float
    candidate_share: float
    is_kept: bool = True


@dataclass(frozen=True)
class LayerRecord:
    """One layer. Shares from 0 to 1."""

    active_share: float
    overlap: float
    """Of the neurons active for a token, those also active for the next."""
    active_counts: Sequence[int]
    """(ffn_dim,): for how many tokens each neuron was active."""
    miss_curve: Sequence[float]
    """Misses a token of an LRU cache of this layer alone, at evenly spaced numbers of slots from 0 to ffn_dim."""
    predictors: Mapping[str, PredictorRecord]
    lookahead: Sequence[LookaheadRecord]
    """By how many layers earlier: 0, 1, 2; fewer in the first layers, none where only cuts on codes were fitted."""


@dataclass(frozen=True)
class Calibration:
    """The whole of profile.json. recall: what `calibrated` means without a number. tokens: how many were seen."""

    recall: float
    tokens: int
    recalls: Sequence[float]
    layers: Sequence[LayerRecord]
    version: int = PROFILE_VERSION

    def choose(self, layer: int, recall: float, profile: ModelProfile) -> str:
        """The kind that reads the fewest bytes a token at this recall, of those in the store."""
        costs = self.costs(layer, recall, profile)
        kept = [kind for kind, record in self.layers[layer].predictors.items() if record.is_kept]
        return min(kept, key=costs.__getitem__)

    def costs(self, layer: int, recall: float, profile: ModelProfile) -> dict[str, float]:
        """Bytes a token of each kind: of the predictor, and of bundles fetched in vain."""
        record = self.layers[layer]
        return {
            kind: found.bytes_per_token(recall, self.recalls, record.active_share, profile)
            for kind, found in record.predictors.items()
        }

    def require_recall(self, recall: float) -> None:
        """
        Raises:
            BadRequest: outside of what was calibrated.
        """
        if not self.recalls[0] <= recall <= self.recalls[-1]:
            raise BadRequest(
                f"recall {recall:g}: this store is calibrated from {self.recalls[0]:g} to {self.recalls[-1]:g}; "
                "give a recall between, or use exact"
            )

    def to_json(self) -> bytes:
        """As it stands in the store."""
        return json.dumps(asdict(self), separators=(",", ":")).encode()

    @classmethod
    def from_json(cls, content: bytes, profile: ModelProfile) -> Self:
        """
        Raises:
            ShardCorrupt: not a profile of this model, or of another version.
        """
        try:
            return cls._parse(json.loads(content), profile)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ShardCorrupt(f"{PROFILE_NAME}: {reason_of(error)}; calibrate the store again") from error

    @classmethod
    def _parse(cls, content: dict[str, Any], profile: ModelProfile) -> Self:
        if type(content["version"]) is not int or content["version"] != PROFILE_VERSION:
            raise ValueError(f"version {shown(content['version'])}, this SparseFlow reads {PROFILE_VERSION}")
        recalls = _numbers(content["recalls"], "recalls")
        are_ascending = all(one < other for one, other in itertools.pairwise(recalls))
        if len(recalls) < 2 or not are_ascending or not 0 < recalls[0] < recalls[-1] < 1:
            raise ValueError(f"recalls {shown(recalls)} do not ascend between 0 and 1")
        layers = [parse_layer(layer, len(recalls), profile) for layer in listing(content["layers"], "layers")]
        if len(layers) != profile.num_layers:
            raise ValueError(f"{len(layers)} layers, the model has {profile.num_layers}")
        recall = number(content["recall"], "recall", recalls[0], recalls[-1])
        return cls(recall, whole_number(content["tokens"], "tokens", 0, _MOST_TOKENS), recalls, layers)


def parse_layer(content: dict[str, Any], n_recalls: int, profile: ModelProfile) -> LayerRecord:
    """One layer of profile.json.

    Raises:
        ValueError, KeyError, TypeError: it is not one.
    """
    predictors = {
        kind: _predictor(record, n_recalls) for kind, record in mapping(content["predictors"], "predictors").items()
    }
    if not any(record.is_kept for record in predictors.values()) or not set(predictors) <= set(KINDS):
        raise ValueError(f"predictors {shown(sorted(predictors))}; known are {', '.join(KINDS)}")
    counts = listing(content["active_counts"], "active_counts")
    if len(counts) != profile.ffn_dimension:
        raise ValueError(f"{len(counts)} counts of neurons, a layer has {profile.ffn_dimension}")
    return LayerRecord(
        number(content["active_share"], "active_share", 0, 1),
        number(content["overlap"], "overlap", 0, 1),
        [whole_number(n, "a count of a neuron", 0, _MOST_TOKENS) for n in counts],
        _numbers(content["miss_curve"], "miss_curve"),
        predictors,
        [_lookahead(record) for record in listing(content["lookahead"], "lookahead")],
    )


def _lookahead(content: dict[str, Any]) -> LookaheadRecord:
    return LookaheadRecord(
        whole_number(content["rank"], "rank", 1, MOST_OF_A_SIZE),
        number(content["recall"], "recall", 0, 1),
        number(content["candidate_share"], "candidate_share", 0, 1),
        truth(content["is_kept"], "is_kept"),
    )


def _predictor(content: dict[str, Any], n_recalls: int) -> PredictorRecord:
    nbytes, *rows = [_numbers(content[name], name) for name in ("nbytes", "cuts", "candidate_shares", "found")]
    if any(len(row) != n_recalls for row in (nbytes, *rows)):
        raise ValueError("a predictor has other numbers of recalls than the profile")
    rank = None if content["rank"] is None else whole_number(content["rank"], "rank", 1, MOST_OF_A_SIZE)
    return PredictorRecord(nbytes, rank, rows[0], rows[1], rows[2], truth(content["is_kept"], "is_kept"))


def _numbers(values: object, what: str) -> list[float]:
    return [number(value, f"one of {what}", -_LARGEST, _LARGEST) for value in listing(values, what)]


def _between(recall: float, recalls: Sequence[float], values: Sequence[float]) -> float:
    """Linear in the logarithm of what is missed, which cuts nearly are."""
    x, xs = math.log1p(-recall), [math.log1p(-r) for r in recalls]
    for n in range(1, len(xs)):
        if x >= xs[n] or n + 1 == len(xs):
            weight = (x - xs[n - 1]) / (xs[n] - xs[n - 1])
            return values[n - 1] + weight * (values[n] - values[n - 1])
    raise ValueError("a profile has two recalls at least")
