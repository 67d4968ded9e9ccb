"""What clients may ask for, what jobs it makes, and how what they may not is told."""

import itertools
from typing import Any

import pytest
from pydantic import ValidationError

from sparseflow.serving.messages import Job
from sparseflow.serving.requests import ChatRequest, CompletionRequest


def jobs(**fields: Any) -> list[Job]:
    return CompletionRequest(**fields).jobs(itertools.count(1))


def chat_job(**fields: Any) -> Job:
    (job,) = ChatRequest(**{"messages": [{"role": "user", "content": "hi"}]} | fields).jobs(itertools.count(1))
    return job


def test_defaults_are_those_of_openai() -> None:
    (job,) = jobs(prompt="a")
    assert job == Job(1, prompt="a", max_tokens=16)
    assert (job.temperature, job.top_p, job.logprobs, job.echo) == (1.0, 1.0, None, False)
    assert chat_job().max_tokens is None


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1, 2], [3]], [[1, 2], [3]]),
        ("", [""]),
    ],
)
def test_prompts_of_every_form_make_a_job_each(prompt: Any, expected: list[Any]) -> None:
    assert [job.prompt for job in jobs(prompt=prompt)] == expected
    assert [job.id for job in jobs(prompt=prompt)] == list(range(1, len(expected) + 1))


def test_every_choice_of_every_prompt_is_a_job() -> None:
    found = jobs(prompt=["a", "b"], n=3)
    assert [(job.prompt, job.index) for job in found] == [("a", 0), ("a", 1), ("a", 2), ("b", 0), ("b", 1), ("b", 2)]
    assert [job.id for job in found] == list(range(1, 7))


@pytest.mark.parametrize("name", ["n", "temperature", "max_tokens", "stream", "echo", "stop", "seed", "logit_bias"])
def test_null_is_what_is_not_given(name: str) -> None:
    assert jobs(prompt="a", **{name: None}) == jobs(prompt="a")


def test_fields_that_no_text_depends_on_are_taken() -> None:
    common = {"user": "u", "metadata": {"a": "b"}, "store": False, "service_tier": "auto", "safety_identifier": "x"}
    assert jobs(prompt="a", prompt_cache_key="k", **common) == jobs(prompt="a")
    assert chat_job(tools=[], parallel_tool_calls=True, **common) == chat_job()
    assert chat_job(messages=[{"role": "assistant", "content": None}]).messages == [
        {"role": "assistant", "content": ""}
    ]
    assert jobs(prompt="a", top_k=-1) == jobs(prompt="a")


def test_list_with_wrong_items_costs_no_time() -> None:
    """An error for each of them would."""
    for prompt in ([1.5] * 1_000_000, [[1.5]] * 200, ["a"] * 255 + [1.5]):
        with pytest.raises(ValidationError) as refused:
            CompletionRequest(prompt=prompt)
        assert len(refused.value.errors()) < 10
    with pytest.raises(ValidationError) as refused:
        CompletionRequest(prompt="a", logit_bias={f"x{n}": 1 for n in range(100_000)})
    assert len(refused.value.errors()) == 1


def test_stop_is_one_or_several() -> None:
    assert jobs(prompt="a", stop="x")[0].stop == ["x"]
    assert jobs(prompt="a", stop=["x", "y"])[0].stop == ["x", "y"]
    assert jobs(prompt="a", stop=None)[0].stop == []


def test_keys_of_a_bias_are_token_ids() -> None:
    assert jobs(prompt="a", logit_bias={"17": -1})[0].logit_bias == {17: -1.0}


def test_chat_is_told_as_templates_take_it() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    job = chat_job(messages=[{"role": "system", "content": "s"}, {"role": "user", "content": parts, "name": "Eve"}])
    assert job.messages == [{"role": "system", "content": "s"}, {"role": "user", "content": "ab", "name": "Eve"}]
    assert chat_job(max_completion_tokens=5).max_tokens == 5
    assert chat_job(logprobs=True).logprobs == 0
    assert chat_job(logprobs=True, top_logprobs=4).logprobs == 4


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [1.5]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": ["a"] * 257}, "256"),
        ({"prompt": "a", "max_tokens": 0}, "echo"),
        ({"prompt": "a", "max_tokens": -1}, "max_tokens"),
        ({"prompt": "a", "temperature": -0.1}, "temperature"),
        ({"prompt": "a", "temperature": float("nan")}, "temperature"),
        ({"prompt": "a", "top_p": 0}, "top_p"),
        ({"prompt": "a", "n": 0}, "n"),
        ({"prompt": "a", "n": 129}, "n"),
        ({"prompt": "a", "logprobs": 21}, "logprobs"),
        ({"prompt": "a", "stop": ""}, "stop"),
        ({"prompt": "a", "stop": ["x"] * 17}, "stop"),
        ({"prompt": "a", "best_of": 3}, "best_of=3"),
        ({"prompt": "a", "suffix": "z"}, "suffix"),
        ({"prompt": "a", "temprature": 1}, "temprature"),
        ({"prompt": "a", "seed": 1.5}, "seed"),
        ({"prompt": "a", "seed": 2**64}, "seed"),
        ({"prompt": [2**64]}, "prompt"),
        ({"prompt": "a", "max_tokens": 2**64}, "max_tokens"),
        ({"prompt": "a", "min_tokens": 2**64}, "min_tokens"),
        ({"prompt": "a", "top_k": 2**64}, "top_k"),
        ({"prompt": "a", "logit_bias": {str(2**64): 1}}, "logit_bias"),
        ({"prompt": "a", "repetition_penalty": 1e-320}, "repetition_penalty"),
        ({"prompt": "a\ud800"}, "lone surrogate"),
        ({"prompt": ["a", "\ud800"]}, "lone surrogate"),
        ({"prompt": "a", "stop": "\ud800"}, "lone surrogate"),
        ({"prompt": "a", "stop": ["\ud800"]}, "lone surrogate"),
        ({"prompt": "a", "logit_bias": {"x": 1}}, "logit_bias"),
        ({"prompt": "a", "logit_bias": {"1": 101}}, "logit_bias"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        CompletionRequest(**fields)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "content"),
        ({"top_logprobs": 2}, "logprobs=true"),
        ({"max_tokens": 4, "max_completion_tokens": 5}, "one thing"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"messages": [{"role": "\ud800", "content": "a"}]}, "role"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "lone surrogate"),
        ({"messages": [{"role": "user", "content": "a"}] * 4097}, "4096"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
    ],
)
def test_what_cannot_be_served_of_a_chat_is_refused_by_name(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        chat_job(**fields)
