"""The real `openai` client against the real server: every answer has the form that its types ask for."""

from pathlib import Path
from typing import Any

import openai
import pytest
from api_server import CHAT_TEMPLATE, ApiServer
from jinja2 import Template
from transformers import AutoTokenizer, OPTForCausalLM

PROMPT = "In the beginning"


@pytest.fixture(scope="module")
def client(api: ApiServer) -> Any:
    with openai.OpenAI(base_url=api.url, api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def tokenizer(chat_model: Path) -> Any:
    return AutoTokenizer.from_pretrained(chat_model)


@pytest.fixture(scope="module")
def continued(chat_model: Path, tokenizer: Any) -> Any:
    """(text, n_tokens) -> how transformers' dense model goes on, in the checkpoint's own dtype."""
    dense = OPTForCausalLM.from_pretrained(chat_model).eval()

    def go_on(text: str, n_tokens: int) -> str:
        ids = tokenizer(text, return_tensors="pt").input_ids
        made = dense.generate(ids, max_new_tokens=n_tokens, do_sample=False)[0, ids.shape[1] :]
        return str(tokenizer.decode(made, skip_special_tokens=True))

    return go_on


def complete(client: openai.OpenAI, **fields: Any) -> Any:
    return client.completions.create(**{"model": "chat_model", "prompt": PROMPT, "temperature": 0} | fields)


def test_models_are_listed(client: openai.OpenAI) -> None:
    (model,) = client.models.list()
    assert model.id == "chat_model"
    assert client.models.retrieve("chat_model").id == "chat_model"
    with pytest.raises(openai.NotFoundError, match="ask for 'chat_model'"):
        client.models.retrieve("gpt-4")


def test_completion_is_the_dense_models_text_and_counts_tokens(
    client: openai.OpenAI, continued: Any, tokenizer: Any
) -> None:
    answer = complete(client, max_tokens=24)
    (choice,) = answer.choices
    assert choice.text == continued(PROMPT, 24)
    assert choice.finish_reason == "length"
    n_prompt = len(tokenizer(PROMPT).input_ids)
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (n_prompt, 24)
    assert answer.usage.total_tokens == n_prompt + 24
    assert answer.object == "text_completion"
    assert answer.id.startswith("cmpl-")


def test_stream_is_the_same_text_in_pieces_with_usage_last(client: openai.OpenAI) -> None:
    whole = complete(client, max_tokens=24).choices[0].text
    events = list(complete(client, max_tokens=24, stream=True, stream_options={"include_usage": True}))
    *pieces, last, usage = events
    assert "".join(piece.choices[0].text for piece in pieces) == whole
    assert len(pieces) > 10
    assert last.choices[0].finish_reason == "length"
    assert usage.choices == []
    assert usage.usage.completion_tokens == 24
    assert len({event.id for event in events}) == 1


def test_several_prompts_and_choices_come_under_their_index(client: openai.OpenAI) -> None:
    prompts = [PROMPT, "Enter HAMLET"]
    answer = complete(client, prompt=prompts, n=2, temperature=1, seed=5, max_tokens=8)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    for number, prompt in enumerate(prompts):
        one = complete(client, prompt=prompt, temperature=1, seed=5, max_tokens=8)
        assert answer.choices[2 * number].text == one.choices[0].text
    streamed = [""] * 4
    for event in complete(client, prompt=prompts, n=2, temperature=1, seed=5, max_tokens=8, stream=True):
        streamed[event.choices[0].index] += event.choices[0].text
    assert streamed == [choice.text for choice in answer.choices]


def test_prompt_of_token_ids_and_its_echo(client: openai.OpenAI, tokenizer: Any) -> None:
    ids = tokenizer(PROMPT).input_ids
    answer = complete(client, prompt=[ids, ids], echo=True, max_tokens=6, logprobs=2)
    for choice in answer.choices:
        assert choice.text == PROMPT + complete(client, max_tokens=6).choices[0].text
        scores = choice.logprobs
        assert len(scores.tokens) == len(scores.token_logprobs) == len(scores.top_logprobs) == len(ids) + 6
        assert scores.token_logprobs[0] is None
        for token, value, top in zip(
            scores.tokens[1:], scores.token_logprobs[1:], scores.top_logprobs[1:], strict=True
        ):
            assert top[token] == value <= max(top.values()) <= 0
            assert 2 <= len(top) <= 3


def test_echo_alone_makes_no_token(client: openai.OpenAI) -> None:
    answer = complete(client, echo=True, max_tokens=0)
    assert answer.choices[0].text == PROMPT
    assert answer.usage.completion_tokens == 0


def test_stop_ends_the_text_before_it(client: openai.OpenAI) -> None:
    whole = complete(client, max_tokens=24).choices[0].text
    stop = whole[12:16]
    choice = complete(client, max_tokens=24, stop=[stop]).choices[0]
    assert choice.text == whole[: whole.index(stop)]
    assert choice.finish_reason == "stop"


def test_chat_is_the_text_after_the_template(client: openai.OpenAI) -> None:
    messages: Any = [{"role": "system", "content": "Speak."}, {"role": "user", "content": "Who is there?"}]
    rendered = Template(CHAT_TEMPLATE).render(messages=messages, add_generation_prompt=True)
    # The template writes no first token of its own.
    plain = complete(client, prompt=rendered, max_tokens=16, extra_body={"add_special_tokens": False})
    answer = client.chat.completions.create(model="chat_model", messages=messages, temperature=0, max_tokens=16)
    assert answer.choices[0].message.content == plain.choices[0].text
    assert answer.choices[0].message.role == "assistant"
    assert answer.usage == plain.usage
    assert answer.object == "chat.completion"


def test_streamed_chat_begins_with_who_speaks(client: openai.OpenAI) -> None:
    messages: Any = [{"role": "user", "content": "Who is there?"}]
    how: dict[str, Any] = {"model": "chat_model", "messages": messages, "temperature": 0, "max_tokens": 16}
    whole = client.chat.completions.create(**how)
    events = list(client.chat.completions.create(**how, stream=True, logprobs=True, top_logprobs=2))
    assert events[0].choices[0].delta.role == "assistant"
    assert "".join(event.choices[0].delta.content or "" for event in events) == whole.choices[0].message.content
    assert events[-1].choices[0].finish_reason == "length"
    scored = [token for event in events if event.choices[0].logprobs for token in event.choices[0].logprobs.content]
    assert len(scored) == 16
    for token in scored:
        assert token.token == token.top_logprobs[0].token  # greedy
        assert bytes(token.bytes).decode() == token.token
        assert len(token.top_logprobs) == 2


def test_logprobs_are_those_of_the_model_whatever_the_temperature(client: openai.OpenAI) -> None:
    cold = complete(client, max_tokens=1, logprobs=5).choices[0].logprobs.top_logprobs[0]
    hot = complete(client, max_tokens=1, logprobs=5, temperature=2.0, seed=1).choices[0].logprobs.top_logprobs[0]
    assert all(hot[name] == pytest.approx(value, abs=2e-2) for name, value in cold.items())


@pytest.mark.parametrize(
    ("fields", "error", "code", "said"),
    [
        ({"model": "gpt-4"}, openai.NotFoundError, "model_not_found", "'gpt-4' is not served"),
        ({"max_tokens": 9000}, openai.BadRequestError, "context_length_exceeded", "512 positions"),
        ({"temperature": -1}, openai.BadRequestError, "invalid_value", "temperature"),
        ({"extra_body": {"beams": 4}}, openai.BadRequestError, "unknown_field", "beams: not known here"),
        ({"prompt": [5000]}, openai.BadRequestError, "bad_request", "token id 5000"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_errors_have_a_status_a_name_and_a_remedy(
    client: openai.OpenAI,
    fields: dict[str, Any],
    error: type[openai.APIStatusError],
    code: str,
    said: str,
    stream: bool,
) -> None:
    """A stream's too, as long as nothing was sent."""
    with pytest.raises(error, match=said) as raised:
        complete(client, stream=stream, **fields)
    assert raised.value.code == code
