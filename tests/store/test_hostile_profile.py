"""profile.json by somebody hostile: every figure of the type and range that is documented, or one error."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from sparseflow.errors import ShardCorrupt
from sparseflow.store.calibration import Calibration, LayerRecord, LookaheadRecord, PredictorRecord
from sparseflow.store.profile import ModelProfile

PROFILE = ModelProfile("tiny", 8, 4, 2, 2, 16, 100)
SVD = PredictorRecord([10.0, 20.0], 8, [-0.5, 1.5], [0.1, 0.2], [0.8, 0.9])
COARSE = PredictorRecord([5.0, 5.0], None, [0.1, 0.4], [0.2, 0.3], [0.8, 0.9], is_kept=False)
LAYER = LayerRecord(0.1, 0.5, [3, 0, 1, 7], [2.0, 1.0], {"svd": SVD, "coarse": COARSE}, [LookaheadRecord(8, 0.7, 0.4)])
CALIBRATION = Calibration(0.9, 1000, [0.8, 0.9], [LAYER, LAYER])

Content = dict[str, Any]
Edit = Callable[[Content], object]
NAN, INF = float("nan"), float("inf")


def test_profile_comes_back_as_it_was_written() -> None:
    assert Calibration.from_json(CALIBRATION.to_json(), PROFILE) == CALIBRATION


def of_layer(**changes: object) -> Edit:
    return lambda content: content["layers"][1].update(changes)


def of_svd(**changes: object) -> Edit:
    return lambda content: content["layers"][1]["predictors"]["svd"].update(changes)


def of_lookahead(**changes: object) -> Edit:
    return lambda content: content["layers"][0]["lookahead"][0].update(changes)


EDITS: dict[str, tuple[Edit, str]] = {
    "version is true": (lambda c: c.update(version=True), "version True"),
    "version is a fraction": (lambda c: c.update(version=1.0), "version 1.0"),
    "recall is a text": (lambda c: c.update(recall="0.9"), "recall is '0.9'"),
    "recall is infinite": (lambda c: c.update(recall=INF), "recall is inf"),
    "recall that was not fitted": (lambda c: c.update(recall=0.99), "recall is 0.99"),
    "tokens are infinite": (lambda c: c.update(tokens=INF), "tokens is inf"),
    "tokens are negative": (lambda c: c.update(tokens=-1), "tokens is -1"),
    "one recall": (lambda c: c.update(recalls=[0.9]), "recalls"),
    "recalls that are equal": (lambda c: c.update(recalls=[0.9, 0.9]), "do not ascend"),
    "recalls of which two are equal": (lambda c: c.update(recalls=[0.8, 0.8, 0.9]), "do not ascend"),
    "recalls that descend": (lambda c: c.update(recalls=[0.9, 0.8]), "do not ascend"),
    "recalls of all": (lambda c: c.update(recalls=[0.8, 1.0]), "do not ascend"),
    "recalls as an object": (lambda c: c.update(recalls={"0.8": 1}), "recalls is"),
    "layers as an object": (lambda c: c.update(layers={}), "layers is {}"),
    "a layer too few": (lambda c: c["layers"].pop(), "1 layers, the model has 2"),
    "layer is a number": (lambda c: c.update(layers=[1, 2]), "calibrate"),
    "share above all": (of_layer(active_share=1.5), "active_share is 1.5"),
    "share is NaN": (of_layer(active_share=NAN), "active_share is nan"),
    "overlap is null": (of_layer(overlap=None), "overlap is None"),
    "counts are infinite": (of_layer(active_counts=[INF, 0, 0, 0]), "a count of a neuron is inf"),
    "counts are negative": (of_layer(active_counts=[-1, 0, 0, 0]), "a count of a neuron is -1"),
    "counts are true": (of_layer(active_counts=[True, 0, 0, 0]), "a count of a neuron is True"),
    "counts of 4000 digits": (of_layer(active_counts=[10**4000, 0, 0, 0]), "a count of a neuron is 1"),
    "counts of more neurons": (of_layer(active_counts=[0] * 5), "5 counts of neurons"),
    "counts as a text": (of_layer(active_counts="0000"), "active_counts is '0000'"),
    "curve is infinite": (of_layer(miss_curve=[INF, 0.0]), "one of miss_curve is inf"),
    "no predictor": (of_layer(predictors={}), "predictors []"),
    "unknown predictor": (of_layer(predictors={"oracle": {}}), "calibrate"),
    "predictors as a list": (of_layer(predictors=["svd"]), "predictors is ['svd']"),
    "lookahead is null": (of_layer(lookahead=None), "lookahead is None"),
    "cut is NaN": (of_svd(cuts=[NAN, 1.0]), "one of cuts is nan"),
    "cut of 400 digits": (of_svd(cuts=[10**400, 1]), "one of cuts is 1000"),
    "cut is a text": (of_svd(cuts=["1", 1.0]), "one of cuts is '1'"),
    "cut is true": (of_svd(cuts=[True, 1.0]), "one of cuts is True"),
    "a cut too few": (of_svd(cuts=[1.0]), "other numbers of recalls"),
    "rank is a fraction": (of_svd(rank=8.0), "rank is 8.0"),
    "rank is 0": (of_svd(rank=0), "rank is 0"),
    "kept is a text": (of_svd(is_kept="false"), "is_kept is 'false'"),
    "lookahead of rank infinite": (of_lookahead(rank=INF), "rank is inf"),
    "lookahead that is kept 1 times": (of_lookahead(is_kept=1), "is_kept is 1"),
    "lookahead of a share of -1": (of_lookahead(candidate_share=-1), "candidate_share is -1"),
}


@pytest.mark.parametrize(("edit", "named"), EDITS.values(), ids=EDITS)
def test_figure_that_cannot_be_is_named(edit: Edit, named: str) -> None:
    content = json.loads(CALIBRATION.to_json())
    edit(content)
    with pytest.raises(ShardCorrupt) as caught:
        Calibration.from_json(json.dumps(content).encode(), PROFILE)
    assert str(caught.value).startswith("profile.json: ")
    assert named in str(caught.value)
    assert "calibrate the store again" in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("content", [b"", b"null", b"[]", b"1", b"{}", b"\xff", b"[" * 100_000], ids=repr)
def test_what_is_no_profile_is_refused(content: bytes) -> None:
    with pytest.raises(ShardCorrupt, match="calibrate the store again"):
        Calibration.from_json(content, PROFILE)
