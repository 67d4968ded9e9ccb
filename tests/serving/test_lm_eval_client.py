"""lm_eval's `local-completions` against the server finds what its HFLM finds in transformers' dense model."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from api_server import DEADLINE_S, ApiServer
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.models.openai_completions import LocalCompletionsAPI
from transformers import AutoTokenizer, OPTForCausalLM

pytestmark = pytest.mark.slow

CONTINUATIONS = [
    ("In the beginning", " of the Lord Jesus Christ."),  # what the model would say
    ("In the beginning God", " created the heaven and the earth."),
    ("HAMLET.\nTo be, or not to be,", " that is the question:"),
    ("And the LORD", " said unto Moses"),
    ("", "And it came to pass"),
    ("é ☃", " 🙂"),
]
TASK = """
task: next_words
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: choices
doc_to_target: 0
target_delimiter: ""
metric_list: [{metric: acc}]
"""


@pytest.fixture(scope="module")
def harnesses(api: ApiServer, chat_model: Path) -> tuple[Any, Any]:
    """Around the server, and around the dense model in the dtype that is served."""
    served = LocalCompletionsAPI(
        base_url=f"{api.url}/completions",
        model="chat_model",
        tokenizer=str(chat_model),
        tokenizer_backend="huggingface",
        tokenized_requests=True,
        add_bos_token=True,  # as this tokenizer does by itself, and HFLM lets it
        max_length=512,
        batch_size=2,
        num_concurrent=2,
        max_retries=1,
    )
    dense = OPTForCausalLM.from_pretrained(chat_model, dtype=torch.float32)
    return served, HFLM(pretrained=dense, tokenizer=AutoTokenizer.from_pretrained(chat_model))


def requests(kind: str, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(kind, {}, argument, n) for n, argument in enumerate(arguments)]


def test_likelihoods_of_continuations_are_those_of_the_dense_model(harnesses: tuple[Any, Any]) -> None:
    found, expected = (
        harness.loglikelihood(requests("loglikelihood", CONTINUATIONS), disable_tqdm=True) for harness in harnesses
    )
    for (value, is_greedy), (dense_value, dense_is_greedy) in zip(found, expected, strict=True):
        assert value == pytest.approx(dense_value, rel=5e-3)  # the dense model's are in float32
        assert is_greedy == dense_is_greedy
    assert any(is_greedy for _, is_greedy in found)
    assert not all(is_greedy for _, is_greedy in found)


def test_likelihood_of_a_whole_text_is_that_of_the_dense_model(harnesses: tuple[Any, Any], chat_model: Path) -> None:
    text = (chat_model / "heldout.txt").read_text(encoding="utf-8")[
        :1200
    ]  # one window, which the two would cut differently
    (found,), (expected,) = (
        harness.loglikelihood_rolling(requests("loglikelihood_rolling", [(text,)]), disable_tqdm=True)
        for harness in harnesses
    )
    assert expected < -300
    assert found == pytest.approx(expected, rel=1e-3)


def test_generation_until_a_stop_is_the_dense_models(harnesses: tuple[Any, Any]) -> None:
    stops = {"until": ["."], "max_gen_toks": 16, "do_sample": False}
    asked = [(context, stops) for context, _ in CONTINUATIONS[1:4]]
    found, expected = (
        harness.generate_until(requests("generate_until", asked), disable_tqdm=True) for harness in harnesses
    )
    assert found == expected
    assert all(found)


def test_command_line_evaluates_a_task(api: ApiServer, chat_model: Path, tmp_path: Path) -> None:
    """As people run it, on a task from local files."""
    rows = [
        {"text": "In the beginning God", "choices": [" created the heaven and the earth", " xylophone engine of"]},
        {"text": "And the LORD", "choices": [" said unto Moses", " gigabyte"]},
    ]
    (tmp_path / "rows.json").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "next_words.yaml").write_text(TASK.replace("DATA", str(tmp_path / "rows.json")))
    how = f"model=chat_model,base_url={api.url}/completions,tokenizer={chat_model},num_concurrent=2,max_length=512"
    command = [sys.executable, "-m", "lm_eval", "--model", "local-completions", "--model_args", how]
    command += ["--tasks", "next_words", "--include_path", str(tmp_path), "--output_path", str(tmp_path / "out")]
    environment = os.environ | {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    finished = subprocess.run(
        command, capture_output=True, text=True, timeout=DEADLINE_S, env=environment, check=False
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    (results,) = tmp_path.glob("out/**/results_*.json")
    assert json.loads(results.read_text())["results"]["next_words"]["acc,none"] == 1.0
