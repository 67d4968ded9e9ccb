"""Recall measured while decoding is the recall that evaluation finds on the same text."""

from pathlib import Path

import pytest
import torch

from sparseflow.evaluation.evaluate import evaluate
from sparseflow.models.opt_sparse import SparseOPTForCausalLM
from sparseflow.utils.tokenizer import token_windows, tokenizer_of

WINDOW = 128


@pytest.mark.parametrize("n_tokens", [256, pytest.param(512, marks=pytest.mark.slow)])
@pytest.mark.parametrize("fidelity", ["calibrated:0.9", "calibrated:0.99"])
def test_live_recall_agrees_with_evaluation_within_its_error(
    calibrated_demo_store: Path, demo_model: Path, fidelity: str, n_tokens: int
) -> None:
    text = [demo_model / "heldout.txt"]
    model = SparseOPTForCausalLM.from_pretrained(calibrated_demo_store, fidelity=fidelity)
    model.coordinator.live_recall.every_step = True
    with torch.inference_mode():
        for ids in token_windows(tokenizer_of(model.source.model_files), text, WINDOW, n_tokens):
            cache = None
            for token in ids.view(-1, 1, 1):  # the text is given, so that both see the same
                cache = model(token, past_key_values=cache, use_cache=True).past_key_values
    live, error, samples = model.stats.recall, model.stats.recall_error, model.stats.recall_samples
    evaluated = evaluate(model, text, [fidelity], n_tokens=n_tokens, window=WINDOW)["fidelities"][0]
    model.close()
    assert live is not None
    assert error is not None
    assert samples > 1000
    assert 0 < error < 0.01
    assert live < 1
    assert abs(live - evaluated["recall"]) < 4 * error
