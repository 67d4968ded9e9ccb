"""Fitted predictors of a store that anybody may have made: sizes of this model, and finite, or one error."""

from typing import Any

import pytest
import torch
from torch import Tensor

from sparseflow.errors import ShardCorrupt
from sparseflow.orchestration.calibrated_predictor import calibrated_predictor, lookahead_predictors
from sparseflow.store.calibration import Calibration, LayerRecord, LookaheadRecord, PredictorRecord
from sparseflow.store.codes import code_specs
from sparseflow.store.profile import ModelProfile

HIDDEN, FFN_DIM, RANK = 24, 40, 8
RECALLS = [0.8, 0.9]
PROFILE = ModelProfile("tiny", HIDDEN, FFN_DIM, 1, 4, 16, 100, dtype="float32")
DTYPES = {"F32": torch.float32, "I16": torch.int16}
NAN, INF = float("nan"), float("inf")


def calibration(cuts: list[float]) -> Calibration:
    record = PredictorRecord([1.0, 2.0], RANK, cuts, [0.5, 0.6], [0.8, 0.9])
    lookahead = [LookaheadRecord(RANK, 0.7, 0.5)]
    return Calibration(0.9, 10, RECALLS, [LayerRecord(0.1, 0.5, [1] * FFN_DIM, [], {"svd": record}, lookahead)])


class Source:
    """One layer: codes of zeros, and predictors of low rank."""

    def __init__(self) -> None:
        self.profile = PROFILE
        self.tensors: dict[str, Tensor] = {
            f"0.{spec.name}": torch.zeros(spec.shape, dtype=DTYPES[spec.dtype]) for spec in code_specs(FFN_DIM, HIDDEN)
        }
        for kind in ("svd", "lookahead0"):
            self.tensors[f"0.{kind}.down"] = torch.ones(RANK, HIDDEN, dtype=torch.float16)
            self.tensors[f"0.{kind}.up"] = torch.ones(FFN_DIM, RANK, dtype=torch.float16)
            self.tensors[f"0.{kind}.bias"] = torch.ones(FFN_DIM)
        self.tensors["0.svd.spread"] = torch.ones(FFN_DIM)
        self.model_files = {"profile.json": calibration([1.0, 2.0]).to_json()}

    def predictor_tensors(self) -> dict[str, Tensor]:
        return self.tensors

    def dense(self) -> dict[str, Tensor]:
        return {}


def used(source: Source, kind: str, cuts: list[float] | None = None) -> Any:
    given: Any = source
    if kind == "svd":
        return calibrated_predictor(given, calibration(cuts or [1.0, 2.0]), 0.9, "svd")
    return lookahead_predictors(given, 1)


KINDS = pytest.mark.parametrize("kind", ["svd", "lookahead0"])


@KINDS
def test_predictor_as_it_was_fitted_is_used(kind: str) -> None:
    assert used(Source(), kind)


@KINDS
@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("part", ["down", "up", "bias"])
def test_weight_that_is_not_finite_is_refused(part: str, value: float, kind: str) -> None:
    source = Source()
    source.tensors[f"0.{kind}.{part}"].view(-1)[-1] = value
    with pytest.raises(ShardCorrupt, match=rf"predictor 0\.{kind} holds NaN or infinity; calibrate the store again"):
        used(source, kind)


def test_spread_and_cut_that_are_finite_but_not_together_are_refused() -> None:
    source = Source()
    source.tensors["0.svd.spread"][0] = 1e30
    with pytest.raises(ShardCorrupt, match="holds NaN or infinity"):
        used(source, "svd", [1.0, 1e30])


WRONG_SHAPES: dict[str, tuple[str, tuple[int, ...]]] = {
    "more neurons than the layer has": ("up", (FFN_DIM + 5, RANK)),
    "fewer neurons": ("up", (FFN_DIM - 1, RANK)),
    "another rank": ("up", (FFN_DIM, RANK + 1)),
    "another width": ("down", (RANK, HIDDEN + 1)),
    "no matrix": ("down", (RANK * HIDDEN,)),
    "a number": ("down", ()),
    "a bias for one": ("bias", (1,)),
    "a bias of columns": ("bias", (FFN_DIM, 1)),
}


@KINDS
@pytest.mark.parametrize(("part", "shape"), WRONG_SHAPES.values(), ids=WRONG_SHAPES)
def test_shape_of_another_model_is_refused(part: str, shape: tuple[int, ...], kind: str) -> None:
    source = Source()
    source.tensors[f"0.{kind}.{part}"] = torch.ones(shape, dtype=source.tensors[f"0.{kind}.{part}"].dtype)
    with pytest.raises(ShardCorrupt, match=rf"predictor 0\.{kind} has shapes that do not fit"):
        used(source, kind)


def test_all_parts_together_of_another_number_of_neurons_are_refused() -> None:
    """Each fits the others, and the ids it would choose are of no bundle."""
    source = Source()
    for part, shape in (("up", (FFN_DIM + 64, RANK)), ("bias", (FFN_DIM + 64,)), ("spread", (FFN_DIM + 64,))):
        source.tensors[f"0.svd.{part}"] = torch.ones(shape, dtype=source.tensors[f"0.svd.{part}"].dtype)
    with pytest.raises(ShardCorrupt, match="has shapes that do not fit"):
        used(source, "svd")


@KINDS
@pytest.mark.parametrize(("part", "dtype"), [("down", torch.int8), ("up", torch.float32), ("bias", torch.float16)])
def test_another_dtype_is_refused(part: str, dtype: torch.dtype, kind: str) -> None:
    source = Source()
    name = f"0.{kind}.{part}"
    source.tensors[name] = source.tensors[name].to(dtype)
    with pytest.raises(ShardCorrupt, match="do not fit"):
        used(source, kind)


def test_missing_part_is_named() -> None:
    source = Source()
    del source.tensors["0.svd.up"]
    with pytest.raises(ShardCorrupt, match=r"0\.svd is not in the store"):
        used(source, "svd")
