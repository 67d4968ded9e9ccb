"""lm_eval's HFLM takes the sparse model as it is, and finds what it finds in the dense one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import AutoTokenizer, OPTForCausalLM

from sparseflow import SparseOPTForCausalLM

TOLERANCE = 1e-4  # nats, of a whole continuation

CONTINUATIONS = [
    ("In the beginning God", " created the heaven and the earth."),
    ("HAMLET.\nTo be, or not to be,", " that is the question:"),
    ("", "And it came to pass"),
]


@pytest.fixture(scope="module")
def harnesses(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[HFLM]:
    """Around the dense model, and around the sparse one. Batches of two, so that there is padding."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARSEFLOW_HOME", str(tmp_path_factory.mktemp("home")))
        sparse = SparseOPTForCausalLM.from_pretrained(demo_model, dtype="float32")
    dense = OPTForCausalLM.from_pretrained(demo_model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    return [HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2) for model in (dense, sparse)]


def requests(kind: str, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(kind, {}, argument, n) for n, argument in enumerate(arguments)]


def both(harnesses: list[HFLM], ask: Callable[[HFLM], Any]) -> tuple[Any, Any]:
    dense, sparse = (ask(harness) for harness in harnesses)
    return dense, sparse


def test_likelihoods_of_continuations_are_those_of_the_dense_model(harnesses: list[HFLM]) -> None:
    asked = requests("loglikelihood", CONTINUATIONS)
    dense, sparse = both(harnesses, lambda lm: lm.loglikelihood(asked, disable_tqdm=True))
    assert len(sparse) == len(CONTINUATIONS)
    for (expected, is_greedy), (found, found_greedy) in zip(dense, sparse, strict=True):
        assert found == pytest.approx(expected, abs=TOLERANCE)
        assert found_greedy == is_greedy


def test_the_likelihood_of_a_text_longer_than_the_model_is_the_dense_models(
    harnesses: list[HFLM], demo_model: Path
) -> None:
    asked = requests("loglikelihood_rolling", [((demo_model / "heldout.txt").read_text()[:3000],)])
    (dense,), (sparse,) = both(harnesses, lambda lm: lm.loglikelihood_rolling(asked, disable_tqdm=True))
    assert sparse < -1000
    assert sparse == pytest.approx(dense, rel=1e-6)


def test_generation_until_a_stop_is_the_dense_models(harnesses: list[HFLM]) -> None:
    stops = {"until": ["."], "max_gen_toks": 24}
    asked = requests("generate_until", [(context, stops) for context, _ in CONTINUATIONS[:2]])
    dense, sparse = both(harnesses, lambda lm: lm.generate_until(asked, disable_tqdm=True))
    assert sparse == dense
    assert all(sparse)
