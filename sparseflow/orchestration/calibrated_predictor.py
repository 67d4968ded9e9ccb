"""Predictors fitted to a recall on text: for each layer the one that reads the fewest bytes a token.

    coarse    the coarse plane of fc1's codes, a neuron chosen where its score plus `cut` margins is above 0
    codes     both planes, with the same cut
    svd       the best linear guess of a rank
    trained   two trained layers

What was chosen and why is in `Calibration`; the recall that comes out is measured while running (`live_recall`).
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sparseflow.core.weight_source import WeightSource
from sparseflow.errors import BadRequest, DiskError, ShardCorrupt
from sparseflow.kernels.bounds import Margin
from sparseflow.orchestration.device.choosers import Chooser, ChooserByLowRank, Mover
from sparseflow.orchestration.low_rank import LowRank
from sparseflow.orchestration.neuron_predictor import (
    CodesOfLayer,
    LayeredPredictor,
    LayerPredictor,
    coded_rows,
    failure_probability,
)
from sparseflow.store.calibration import PROFILE_NAME, Calibration
from sparseflow.store.profile import ModelProfile


class LowRankOfLayer:
    """Chooses where the score of a `LowRank` is not <= 0."""

    scorer = None

    def __init__(self, low_rank: LowRank) -> None:
        self._low_rank = low_rank
        self.nbytes_read = 0

    def on_device(self, move: Mover) -> Chooser:
        """As `LayerPredictor.on_device`."""
        return ChooserByLowRank(self._low_rank, move)

    def select(self, x: Tensor) -> NDArray[np.uint32]:
        """As `NeuronPredictor.select`."""
        self.nbytes_read += self._low_rank.nbytes
        is_chosen = (~(self._low_rank.scores(x) <= 0)).any(0)
        return is_chosen.nonzero().flatten().numpy().astype(np.uint32)

    def bounds(self, x: Tensor) -> Tensor:
        """As `NeuronPredictor.bounds`."""
        self.nbytes_read += len(x) * self._low_rank.nbytes
        return self._low_rank.scores(x)


def calibration_of(source: WeightSource) -> Calibration | None:
    """What the source's profile.json says; None where the store was never calibrated.

    Raises:
        ShardCorrupt: it is not a profile of this model.
    """
    content = source.model_files.get(PROFILE_NAME)
    return None if content is None else Calibration.from_json(content, source.profile)


def calibrated_predictor(
    source: WeightSource, calibration: Calibration, recall: float | None, kind: str | None, threshold: float = 1.0
) -> LayeredPredictor:
    """
    Args:
        recall: of the active neurons; None: what the store was calibrated for.
        kind: the same for every layer; None: in each layer the cheapest.
        threshold: multiplies all cuts; 1.0 is as calibrated.

    Raises:
        BadRequest: no such kind here, or a recall outside of what was calibrated.
    """
    recall = calibration.recall if recall is None else recall
    calibration.require_recall(recall)
    tensors = source.predictor_tensors()
    rows = coded_rows(source)
    layers: list[LayerPredictor] = []
    kinds = []
    for n, record in enumerate(calibration.layers):
        chosen = kind or calibration.choose(n, recall, source.profile)
        kept = [kind for kind, predictor in record.predictors.items() if predictor.is_kept]
        if chosen not in kept:
            raise BadRequest(
                f"predictor {chosen!r}: layer {n} of this store has {', '.join(kept)}; name one of these, or none for "
                "the cheapest, or calibrate the store with --keep-all"
            )
        kinds.append(chosen)
        cut = threshold * record.predictors[chosen].cut(recall, calibration.recalls)
        if chosen in ("coarse", "codes"):
            planes = 1 if chosen == "coarse" else 2
            layers.append(CodesOfLayer(rows[n], Margin.EXACT, failure_probability(source.profile), cut, planes))
        else:
            layers.append(LowRankOfLayer(_low_rank(tensors, f"{n}.{chosen}", cut, source.profile)))
    name = f"calibrated:{recall:g}" + (f":{kind}" if kind else "")
    return LayeredPredictor(layers, kinds, name if threshold == 1 else f"threshold:{threshold:g}")


def lookahead_predictors(source: WeightSource, distance: int) -> dict[int, LowRank]:
    """By layer: what foresees it from what entered the layer `distance` before it.

    The first layers are foreseen from the first. Empty where the store has no such predictors.
    """
    calibration = calibration_of(source)
    if calibration is None:
        return {}
    tensors = source.predictor_tensors()
    found = {}
    for layer, record in enumerate(calibration.layers):
        nearest = min(distance, len(record.lookahead) - 1)
        if nearest >= 0 and record.lookahead[nearest].is_kept:
            found[layer] = _low_rank(tensors, f"{layer}.lookahead{nearest}", 0.0, source.profile)
    return found


def given_predictor(source: WeightSource, folder: str | Path) -> LayeredPredictor:
    """Predictors made elsewhere, two weights a layer with ReLU between.

    They lie in `layer_{i}_predictor_fc1.pt`, (rank, hidden), and `layer_{i}_predictor_fc2.pt`, (ffn_dim, rank).

    Raises:
        DiskError: a file is missing or holds something else.
    """
    profile = source.profile
    layers: list[LayerPredictor] = []
    for n in range(profile.num_layers):
        down, up = (_given_weight(Path(folder) / f"layer_{n}_predictor_fc{part}.pt") for part in (1, 2))
        if (
            down.dim() != 2
            or up.shape != (profile.ffn_dimension, len(down))
            or down.shape[1] != profile.hidden_dimension
        ):
            raise DiskError(
                f"{folder}: predictor of layer {n} is {tuple(down.shape)} and {tuple(up.shape)}; this model needs "
                f"(rank, {profile.hidden_dimension}) and ({profile.ffn_dimension}, rank)"
            )
        low_rank = LowRank(down, up.to(down.dtype), torch.zeros(profile.ffn_dimension), has_relu=True)
        layers.append(LowRankOfLayer(low_rank))
    return LayeredPredictor(layers, ["given"] * len(layers), "given")


def _low_rank(tensors: Mapping[str, Tensor], name: str, cut: float, profile: ModelProfile) -> LowRank:
    """
    Raises:
        ShardCorrupt: it is missing, of another model's sizes, or not finite.
    """
    try:
        down, up, bias = (tensors[f"{name}.{part}"] for part in ("down", "up", "bias"))
    except KeyError as error:
        raise ShardCorrupt(f"predictor {name} is not in the store, but in its profile; calibrate it again") from error
    spread = tensors.get(f"{name}.spread")
    rank, row = len(down) if down.dim() else 0, (profile.ffn_dimension,)
    expected: list[tuple[Tensor, tuple[int, ...], torch.dtype]] = [
        (down, (rank, profile.hidden_dimension), down.dtype),
        (up, (*row, rank), down.dtype),
        *[(part, row, torch.float32) for part in (bias, spread) if part is not None],
    ]
    if not down.is_floating_point() or any((p.shape, p.dtype) != (shape, dtype) for p, shape, dtype in expected):
        raise ShardCorrupt(f"predictor {name} has shapes that do not fit this model; calibrate the store again")
    low_rank = LowRank(down, up, bias if spread is None else bias + cut * spread)
    for part in (down, up, low_rank.bias):
        if part.numel() and not all(bound.isfinite() for bound in part.aminmax()):  # NaN comes through
            raise ShardCorrupt(f"predictor {name} holds NaN or infinity; calibrate the store again")
    return low_rank


def _given_weight(path: Path) -> Tensor:
    try:
        weight = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise DiskError(f"{path}: file is missing; predictor_weights_path needs two for each layer") from error
    except Exception as error:  # whatever the unpickler says of bytes that are no tensor
        raise DiskError(f"{path}: not a tensor saved by torch.save ({error})") from error
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        raise DiskError(f"{path}: holds {type(weight).__name__}, a tensor of floats is needed")
    return weight.contiguous()
