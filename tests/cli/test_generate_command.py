"""`sparseflow generate`: where prompts come from, how tokens are chosen, where a text ends."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, OPTForCausalLM

from sparseflow.cli.main import main

Capture = pytest.CaptureFixture[str]
PROMPT = "To be, or"


def generated(store: Path, capsys: Capture, *options: str, prompt: tuple[str, ...] = ("--prompt", PROMPT)) -> Any:
    """The result, with --json."""
    capsys.readouterr()
    assert main(["generate", str(store), *prompt, "--max-new-tokens", "24", *options, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_prompt_comes_from_the_command_line_a_file_or_standard_input(
    demo_store: Path, tmp_path: Path, typed: Callable[..., None], capsys: Capture
) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text(PROMPT + "\n", encoding="utf-8")
    texts = [generated(demo_store, capsys)["text"]]
    texts.append(generated(demo_store, capsys, prompt=("--prompt-file", str(file)))["text"])
    typed(PROMPT)
    texts.append(generated(demo_store, capsys, prompt=())["text"])
    typed(PROMPT)
    texts.append(generated(demo_store, capsys, prompt=("--prompt", "-"))["text"])
    assert len(set(texts)) == 1


def test_a_prompt_file_that_is_no_text_is_named(demo_store: Path, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "prompt").write_bytes(b"\xff\xfe")
    for path in (tmp_path / "prompt", tmp_path / "missing"):
        assert main(["generate", str(demo_store), "--prompt-file", str(path)]) == 1
        assert f"{path}: cannot be read as text" in capsys.readouterr().err


def test_what_streams_to_stdout_is_the_text_alone(demo_store: Path, capsys: Capture) -> None:
    result = generated(demo_store, capsys)
    assert main(["generate", str(demo_store), "--prompt", PROMPT, "--max-new-tokens", "24"]) == 0
    assert capsys.readouterr().out == result["text"] + "\n"
    assert result["finish_reason"] == "length"


def test_the_first_stop_text_ends_the_text_and_is_no_part_of_it(demo_store: Path, capsys: Capture) -> None:
    whole = generated(demo_store, capsys)
    words = whole["text"].split()
    early, late = words[2][:2], words[4]
    end = min(whole["text"].index(early), whole["text"].index(late))
    cut = generated(demo_store, capsys, "--stop", late, "--stop", early)
    assert cut["text"] == whole["text"][:end]
    assert cut["finish_reason"] == "stop"
    assert cut["token_ids"] == whole["token_ids"][: len(cut["token_ids"])]
    assert len(cut["token_ids"]) < 24
    assert main(["generate", str(demo_store), "--prompt", PROMPT, "--stop", late, "--stop", early]) == 0
    assert capsys.readouterr().out == cut["text"] + "\n"


def test_top_k_1_is_greedy_and_other_samplings_differ(demo_store: Path, capsys: Capture) -> None:
    greedy = generated(demo_store, capsys)["token_ids"]
    hot = ("--temperature", "1.5", "--seed", "3")
    assert generated(demo_store, capsys, *hot, "--top-k", "1")["token_ids"] == greedy
    assert generated(demo_store, capsys, *hot, "--top-p", "0.0001", "--top-k", "0")["token_ids"] == greedy
    sampled = generated(demo_store, capsys, *hot)["token_ids"]
    assert sampled != greedy
    assert generated(demo_store, capsys, *hot, "--top-k", "0")["token_ids"] != sampled


def test_sampling_is_that_of_the_dense_model_under_the_same_seed(
    demo_store: Path, demo_model: Path, capsys: Capture
) -> None:
    options = {"temperature": 0.9, "top_p": 0.8, "top_k": 30, "repetition_penalty": 1.2}
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    result = generated(demo_store, capsys, *words, "--seed", "11")
    dense = OPTForCausalLM.from_pretrained(demo_model, dtype=torch.float32).eval()
    inputs = AutoTokenizer.from_pretrained(demo_model)(PROMPT, return_tensors="pt")
    torch.manual_seed(11)
    with torch.inference_mode():
        output = dense.generate(**inputs, max_new_tokens=24, do_sample=True, **options)
    assert result["token_ids"] == output[0, inputs.input_ids.shape[1] :].tolist()


def test_a_repetition_penalty_works_without_sampling_too(demo_store: Path, capsys: Capture) -> None:
    plain = generated(demo_store, capsys)["token_ids"]
    penalised = generated(demo_store, capsys, "--repetition-penalty", "5")["token_ids"]
    assert len(set(penalised)) > len(set(plain))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--stop", ""], "argument --stop: an empty text ends nothing"),
        (["--repetition-penalty", "0"], "argument --repetition-penalty: 0 is out of range"),
        (["--prompt", "a", "--prompt-file", "b"], "not allowed with argument --prompt"),
        (["--top-k", "-1"], "argument --top-k: -1 is out of range: give a number at least 0"),
    ],
)
def test_wrong_sampling_is_refused_before_anything_is_opened(options: list[str], message: str, capsys: Capture) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["generate", "store", *options])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_a_model_of_a_server_needs_the_server(capsys: Capture) -> None:
    assert main(["generate", "store", "--model", "one"]) == 2
    assert "--model one: is of a server; name that with --server" in capsys.readouterr().err
