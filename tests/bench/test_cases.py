"""Cases as they are written, and the partial offloads that are tried."""

from pathlib import Path

import pytest

from sparseflow.bench.cases import Case, layer_nbytes, one_layer_more, partial_candidates
from sparseflow.errors import BadRequest


@pytest.mark.parametrize(
    "text", ["transformers", "partial_offload", "sparseflow:fidelity=calibrated:0.98,io=map", "airllm:gc=stubbed"]
)
def test_a_case_is_labelled_as_it_was_written(text: str) -> None:
    assert Case.parse(text).label == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("flexgen", "give one of sparseflow, "),
        ("sparseflow:io=tape", "'io=tape' is not an option of sparseflow"),
        ("sparseflow:speed=high", "'speed=high' is not an option"),
        ("sparseflow:io", "'io' is not an option"),
        ("disk_offload:io=map", "it has none"),
    ],
)
def test_a_wrong_case_says_what_there_is(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Case.parse(text)


def test_layers_are_measured_from_headers(demo_model: Path) -> None:
    sizes = layer_nbytes(demo_model)
    attention, mlp, norms = 4 * (256 + 1) * 256, 2 * 256 * 1024 + 1024 + 256, 4 * 256
    assert sizes[:-1] == [2 * (attention + mlp + norms)] * 8
    assert sizes[-1] == 2 * ((4096 + 514) * 256 + 2 * 256)


def test_partial_offload_is_tried_around_what_fits() -> None:
    tried = partial_candidates((), [10] * 24 + [20], room_nbytes=100)
    assert [case.label.removeprefix("device_map:") for case in tried] == [
        "layers=6,copied=yes", "layers=7,copied=yes", "layers=8,copied=yes", "layers=9,copied=yes",
        "layers=7,copied=no", "layers=24,copied=no",
    ]  # fmt: skip
    given = partial_candidates([3], [10] * 24 + [20], room_nbytes=100)
    assert [case.options for case in given] == [("layers=3", "copied=yes"), ("layers=3", "copied=no")]
    with pytest.raises(BadRequest, match="25: the model has 24 layers"):
        partial_candidates([25], [10] * 24 + [20], room_nbytes=100)


def test_one_layer_more_ends_with_the_model() -> None:
    fewer = Case.parse("device_map:layers=23,copied=yes")
    last = one_layer_more(fewer, n_layers=24)
    assert last == Case.parse("device_map:layers=24,copied=yes")
    assert one_layer_more(last, n_layers=24) is None
