"""transformers' text-generation pipeline takes the sparse model as it is."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, pipeline

from sparseflow import SparseOPTForCausalLM

PROMPTS = ["In the beginning", "HAMLET.\nTo be, or not to be,"]
GREEDY = {"max_new_tokens": 24, "do_sample": False}


@pytest.fixture(scope="module")
def tokenizer(demo_model: Path) -> Any:
    return AutoTokenizer.from_pretrained(demo_model, padding_side="left")


@pytest.fixture
def model(demo_model: Path) -> SparseOPTForCausalLM:
    return SparseOPTForCausalLM.from_pretrained(demo_model, dtype="float32")


@pytest.mark.parametrize("batch_size", [1, 2])
def test_pipeline_gives_the_text_of_generate(model: SparseOPTForCausalLM, tokenizer: Any, batch_size: int) -> None:
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
    assert generator.model is model
    outputs = generator(PROMPTS, batch_size=batch_size, **GREEDY)
    for prompt, (output,) in zip(PROMPTS, outputs, strict=True):
        ids = model.generate(**tokenizer(prompt, return_tensors="pt"), **GREEDY)
        assert output["generated_text"] == tokenizer.decode(ids[0], skip_special_tokens=True)
        assert len(output["generated_text"]) > len(prompt)
    assert model.stats.decode.layer_steps > 0
