"""`sparseflow chat` with lines that come by a pipe: what is computed, what is said, and what it costs."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, OPTForCausalLM

from sparseflow.cli.main import main
from sparseflow.models.opt_sparse import SparseOPTForCausalLM

Capture = pytest.CaptureFixture[str]
Type = Callable[..., None]


@contextmanager
def tokens_given(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many tokens the model is given, one number a step."""
    given: list[int] = []
    forward = SparseOPTForCausalLM.forward

    def counting(self: SparseOPTForCausalLM, input_ids: torch.Tensor, *rest: Any, **named: Any) -> Any:
        given.append(input_ids.shape[1])
        return forward(self, input_ids, *rest, **named)

    with monkeypatch.context() as patch:
        patch.setattr(SparseOPTForCausalLM, "forward", counting)
        yield given


def turns(arguments: list[str], capsys: Capture) -> list[dict[str, Any]]:
    """What a chat says, with --json."""
    capsys.readouterr()
    assert main(["chat", *arguments, "--json"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def dense_continuation(folder: Path, ids: list[int], n: int) -> list[int]:
    """By transformers' dense model, of all tokens at once."""
    dense = OPTForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        output = dense.generate(torch.tensor([ids]), max_new_tokens=n, do_sample=False)
    return output[0, len(ids) :].tolist()


def test_only_new_tokens_are_computed_and_the_text_is_that_of_the_dense_model(
    demo_store: Path, demo_model: Path, typed: Type, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    typed("To be, or", "And then he said", "Who is there?")
    with tokens_given(monkeypatch) as given:
        said = turns([str(demo_store), "--max-new-tokens", "12"], capsys)
    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    lines = [
        tokenizer("To be, or").input_ids,
        *(tokenizer("\n" + line, add_special_tokens=False).input_ids for line in ("And then he said", "Who is there?")),
    ]
    # The last token of an answer has not been given to the model yet: it comes with the next line.
    expected = [n for k, line in enumerate(lines) for n in (len(line) + (k > 0), *[1] * 11)]
    assert given == expected
    assert [turn["prompt_tokens"] for turn in said] == [len(lines[0]), len(lines[1]) + 1, len(lines[2]) + 1]
    ids: list[int] = []
    for line, turn in zip(lines, said, strict=True):
        ids += line
        assert turn["token_ids"] == dense_continuation(demo_model, ids, 12)
        assert turn["text"] == tokenizer.decode(turn["token_ids"])
        ids += turn["token_ids"]
    assert said[-1]["positions_used"] == len(ids)
    assert said[-1]["positions"] == 512


def test_after_a_reset_the_same_line_gets_the_same_answer(demo_store: Path, typed: Type, capsys: Capture) -> None:
    typed("To be, or", "That is", "/reset", "", "To be, or")
    first, second, third = turns([str(demo_store), "--max-new-tokens", "10"], capsys)
    assert third["token_ids"] == first["token_ids"] != second["token_ids"]
    assert third["prompt_tokens"] == first["prompt_tokens"]
    assert first["placement"]["mapped"] > 0
    assert "placement" not in third


def test_answers_stream_to_stdout_and_all_else_to_stderr(demo_store: Path, typed: Type, capsys: Capture) -> None:
    typed("To be, or", "/help", "/nothing of that", "That is", "/exit", "Never said")
    assert main(["chat", str(demo_store), "--max-new-tokens", "10", "--stop", "\n"]) == 0
    out, err = capsys.readouterr()
    typed("To be, or", "That is")
    said = turns([str(demo_store), "--max-new-tokens", "10", "--stop", "\n"], capsys)
    assert out == "".join(turn["text"] + "\n" for turn in said)
    assert "no chat template in the tokenizer" in err
    assert "/reset" in err
    assert "no command /nothing; there are /reset, /help, /exit" in err
    assert "weights:  " in err


def test_a_chat_template_writes_the_turns_and_still_only_new_tokens_are_computed(
    chat_store: Path, demo_model: Path, typed: Type, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    typed("Who is there?", "And then?")
    with tokens_given(monkeypatch) as given:
        said = turns([str(chat_store), "--max-new-tokens", "8", "--system", "Be brief."], capsys)
    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    first = tokenizer("system: Be brief.\nuser: Who is there?\nassistant: ", add_special_tokens=False).input_ids
    second = tokenizer("\nuser: And then?\nassistant: ", add_special_tokens=False).input_ids
    assert given == [len(first), *[1] * 7, 1 + len(second), *[1] * 7]
    assert said[0]["token_ids"] == dense_continuation(demo_model, first, 8)
    assert said[1]["token_ids"] == dense_continuation(demo_model, first + said[0]["token_ids"] + second, 8)


def test_an_answer_that_a_stop_text_cut_is_told_to_the_template_without_it(
    chat_store: Path, demo_model: Path, typed: Type, capsys: Capture
) -> None:
    typed("Who is there?", "And then?")
    arguments = [str(chat_store), "--max-new-tokens", "40", "--stop", "\n"]
    first, second = turns(arguments, capsys)
    assert first["finish_reason"] == "stop"
    assert "\n" not in first["text"]
    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    text = f"user: Who is there?\nassistant: {first['text']}\nuser: And then?\nassistant: "
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert second["positions_used"] == len(ids) + len(second["token_ids"])
    assert second["prompt_tokens"] < len(ids)  # the beginning was kept
    assert second["token_ids"] == dense_continuation(demo_model, ids, 40)[: len(second["token_ids"])]


def test_a_system_text_without_a_template_is_refused(demo_store: Path, typed: Type, capsys: Capture) -> None:
    typed("To be, or")
    assert main(["chat", str(demo_store), "--system", "Be brief."]) == 2
    assert "--system: the model's tokenizer has no chat template" in capsys.readouterr().err


def test_when_the_positions_are_taken_it_says_so_and_what_to_do(checkpoint: Path, typed: Type, capsys: Capture) -> None:
    typed("a", "a", "/reset", "a")
    assert main(["chat", str(checkpoint), "--json"]) == 1
    out, err = capsys.readouterr()
    first, second, third = map(json.loads, out.splitlines())
    assert first["positions_used"] == first["positions"] == 64
    assert first["finish_reason"] == "length"
    assert "all 64 positions of the model are taken; /reset begins a new one" in err
    assert "the model has 64 positions" in second["error"]
    assert f"sparseflow: error: {second['error']}" in err.splitlines()
    assert third["token_ids"] == first["token_ids"]


def test_sampling_is_repeatable_under_a_seed(demo_store: Path, typed: Type, capsys: Capture) -> None:
    said = []
    for seed in ("5", "5", "6"):
        typed("To be, or", "That is")
        arguments = [str(demo_store), "--temperature", "1", "--seed", seed, "--max-new-tokens", "12"]
        said.append([turn["token_ids"] for turn in turns(arguments, capsys)])
    assert said[0] == said[1] != said[2]


def test_input_that_is_no_text_is_named(
    demo_store: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "lines").write_bytes(b"\xff\xfe\n")
    with open(tmp_path / "lines", encoding="utf-8") as lines:
        monkeypatch.setattr("sys.stdin", lines)
        assert main(["chat", str(demo_store)]) == 2
    assert "standard input is no text" in capsys.readouterr().err
