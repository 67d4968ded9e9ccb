"""What a worker makes of a job, on the demo model: against transformers' dense model and `generate`."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import OPTForCausalLM

from sparseflow.errors import BadRequest, PromptTooLong
from sparseflow.models.opt_sparse import SparseOPTForCausalLM
from sparseflow.serving.generation import Generator
from sparseflow.serving.messages import Alive, Begun, Cancelled, Finished, Job, Message, Piece, ScoredToken
from sparseflow.utils.tokenizer import tokenizer_of

PROMPT = "In the beginning God created the heaven"
Run = Callable[..., list[Message]]


@pytest.fixture(scope="module")
def model(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SparseOPTForCausalLM]:
    model = SparseOPTForCausalLM.from_pretrained(
        demo_model, dtype="float32", cache_dir=tmp_path_factory.mktemp("stores")
    )
    yield model
    model.close()


@pytest.fixture(scope="module")
def dense(demo_model: Path) -> OPTForCausalLM:
    return OPTForCausalLM.from_pretrained(demo_model, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer(model: SparseOPTForCausalLM) -> Any:
    return tokenizer_of(model.source.model_files)


@pytest.fixture
def run(model: SparseOPTForCausalLM, tokenizer: Any) -> Run:
    """Runs jobs on one generator, whose cache stays from job to job."""
    generator = Generator(model, tokenizer)

    def run_job(**fields: Any) -> list[Message]:
        told: list[Message] = []
        generator.run(Job(1, **({"prompt": PROMPT, "temperature": 0} | fields)), told.append, lambda: False)
        return told

    return run_job


def text_of(told: list[Message]) -> str:
    return "".join(message.text for message in told if isinstance(message, Piece))


def tokens_of(told: list[Message]) -> list[ScoredToken]:
    return [token for message in told if isinstance(message, Piece) for token in message.tokens]


def end_of(told: list[Message]) -> Finished:
    (end,) = [message for message in told if isinstance(message, Finished)]
    return end


def test_greedy_text_is_that_of_the_dense_model(run: Run, dense: OPTForCausalLM, tokenizer: Any) -> None:
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    expected = dense.generate(ids, max_new_tokens=40, do_sample=False)[0, ids.shape[1] :]
    told = run(max_tokens=40)
    assert text_of(told) == tokenizer.decode(expected, skip_special_tokens=True)
    assert told[0] == Begun(1, ids.shape[1], 0)
    assert end_of(told) == Finished(1, "length", 40)


def test_prompt_of_token_ids_is_taken_as_it_is(run: Run, tokenizer: Any) -> None:
    ids = tokenizer(PROMPT).input_ids
    assert text_of(run(prompt=ids, max_tokens=9)) == text_of(run(max_tokens=9))
    without = tokenizer(PROMPT, add_special_tokens=False).input_ids
    assert run(add_special_tokens=False, max_tokens=1)[0].prompt_tokens == len(without) == len(ids) - 1


def test_text_that_begins_as_the_last_one_did_is_not_computed_anew_and_comes_out_the_same(
    run: Run, model: SparseOPTForCausalLM, tokenizer: Any
) -> None:
    first = text_of(run(max_tokens=20))
    longer = PROMPT + first + " and then"
    n_prompt = len(tokenizer(longer).input_ids)
    again = run(prompt=longer, max_tokens=10)
    assert again[0].cached_tokens > n_prompt - 8
    fresh: list[Message] = []
    Generator(model, tokenizer).run(Job(1, prompt=longer, temperature=0, max_tokens=10), fresh.append, lambda: False)
    assert text_of(again) == text_of(fresh)
    other = run(prompt="Enter HAMLET", max_tokens=1)
    assert other[0].cached_tokens <= 1  # the first token of every prompt


def test_echoed_prompt_has_the_probabilities_of_the_dense_model(
    run: Run, dense: OPTForCausalLM, tokenizer: Any
) -> None:
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    with torch.inference_mode():
        expected = dense(ids).logits[0].log_softmax(-1)
    tokens = tokens_of(run(echo=True, logprobs=3, max_tokens=1))
    assert len(tokens) == ids.shape[1] + 1
    assert tokens[0].logprob is None
    assert tokens[0].top == []
    for position in range(1, ids.shape[1]):
        row = expected[position - 1]
        assert tokens[position].logprob == pytest.approx(float(row[ids[0, position]]), abs=1e-4)
        values = [logprob for _, logprob in tokens[position].top]
        assert values == pytest.approx(row.topk(3).values.tolist(), abs=1e-4)
    assert tokens[-1].logprob == pytest.approx(float(expected[-1].max()), abs=1e-4)


def test_long_prompt_is_scored_as_a_short_one_is(run: Run, dense: OPTForCausalLM, tokenizer: Any) -> None:
    """More positions than are scored at once."""
    ids = torch.randint(3, 4096, (1, 200), generator=torch.Generator().manual_seed(5))
    with torch.inference_mode():
        expected = dense(ids).logits[0].log_softmax(-1)[:-1].gather(1, ids[0, 1:, None])[:, 0]
    tokens = tokens_of(run(prompt=ids[0].tolist(), echo=True, logprobs=0, max_tokens=0))
    assert torch.allclose(torch.tensor([token.logprob for token in tokens[1:]]), expected, atol=1e-3)


def test_echo_comes_before_the_text_and_offsets_count_on(run: Run) -> None:
    told = run(echo=True, logprobs=1, max_tokens=12)
    text = text_of(told)
    assert text.startswith(PROMPT)
    tokens = tokens_of(told)
    for token, following in zip(tokens, [*tokens[1:], None], strict=True):
        end = len(text) if following is None else following.offset
        shown = text[token.offset : end]
        assert shown == token.name.text or token.name.text == "</s>"


def test_token_that_ends_the_text_is_among_the_scored_ones(run: Run, model: SparseOPTForCausalLM) -> None:
    """Programs that score texts rely on as many as were made."""
    eos = model.generation_config.eos_token_id
    told = run(logprobs=1, max_tokens=5, logit_bias={eos: 100.0})
    assert [token.name.text for token in tokens_of(told)] == ["</s>"]
    assert text_of(told) == ""
    assert end_of(told) == Finished(1, "stop", 1)


@pytest.mark.parametrize("field", [{"ignore_eos": True}, {"min_tokens": 5}])
def test_text_does_not_end_where_it_may_not(run: Run, model: SparseOPTForCausalLM, field: dict[str, Any]) -> None:
    eos = model.generation_config.eos_token_id
    assert end_of(run(max_tokens=5, logit_bias={eos: 100.0}, **field)).completion_tokens == 5


def test_text_ends_before_a_stop_string_wherever_tokens_end(run: Run) -> None:
    whole = text_of(run(max_tokens=40))
    for stop in (whole[10:14], whole[3], whole[20:31]):
        told = run(max_tokens=40, stop=["never to be seen", stop], logprobs=0)
        assert text_of(told) == whole[: whole.index(stop)]
        assert end_of(told).reason == "stop"
        assert all(token.offset < len(text_of(told)) for token in tokens_of(told))


def test_seed_and_index_decide_the_text(run: Run) -> None:
    how = {"temperature": 1.0, "max_tokens": 20, "seed": 11}
    first, second = text_of(run(**how)), text_of(run(**how, index=1))
    assert first != second
    assert text_of(run(**how)) == first
    assert text_of(run(**how | {"seed": 12})) == second
    assert text_of(run(temperature=1.0, max_tokens=20)) != text_of(run(temperature=1.0, max_tokens=20))


def test_every_step_is_told_of_even_where_there_is_nothing_to_show(run: Run) -> None:
    """Whoever waits takes silence for a worker that is stuck."""
    told = run(prompt=[5] * 500, max_tokens=4, stop=["never to be seen"])
    assert len([message for message in told if isinstance(message, Alive | Piece)]) >= 1 + 4


def test_generated_text_is_no_part_of_a_prompt_that_ends_in_half_a_character(run: Run, tokenizer: Any) -> None:
    half = tokenizer(PROMPT + " 🙂").input_ids[:-1]
    assert PROMPT not in text_of(run(prompt=half, max_tokens=5))
    assert text_of(run(prompt=half, max_tokens=5, echo=True)).count(PROMPT) == 1


@pytest.mark.parametrize(
    "template", ["{{ raise_exception('no') }}", "{{ messages[0].content.nothing.at_all }}", "{% if %}"]
)
def test_error_of_a_chat_template_is_a_bad_request(
    model: SparseOPTForCausalLM, tokenizer: Any, template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", template)
    with pytest.raises(BadRequest, match="the chat template refuses them"):
        Generator(model, tokenizer).run(
            Job(1, messages=[{"role": "user", "content": "a"}]), lambda message: None, lambda: False
        )


def test_nothing_is_left_of_what_one_job_asked_for(run: Run) -> None:
    """Of a penalty, a seed, a stop string."""
    plain = text_of(run(max_tokens=15))
    run(max_tokens=15, temperature=2.0, seed=3, stop=["a"], frequency_penalty=2.0)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    run(max_tokens=15, temperature=1.0)
    assert torch.equal(torch.get_rng_state(), before)
    assert text_of(run(max_tokens=15)) == plain


def test_as_many_tokens_are_made_as_there_are_positions(run: Run, model: SparseOPTForCausalLM, tokenizer: Any) -> None:
    n_positions = model.config.max_position_embeddings
    ids = [5] * (n_positions - 3)
    assert end_of(run(prompt=ids, max_tokens=None, ignore_eos=True)).completion_tokens == 3
    for n_prompt, max_tokens in ((n_positions - 3, 4), (n_positions, None), (n_positions + 1, 0)):
        with pytest.raises(PromptTooLong, match=f"{n_prompt} tokens.*{n_positions} positions"):
            run(prompt=[5] * n_prompt, max_tokens=max_tokens, echo=True)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"prompt": [1, 4096]}, "token id 4096 is none"),
        ({"prompt": []}, "no tokens"),
        ({"prompt": "", "add_special_tokens": False}, "no tokens"),
        ({"logit_bias": {9999: 1.0}}, "9999 is no token"),
    ],
)
def test_wrong_tokens_are_refused(run: Run, fields: dict[str, Any], said: str) -> None:
    with pytest.raises(BadRequest, match=said):
        run(max_tokens=1, **fields)


def test_cancelled_job_ends_at_its_next_step_and_the_next_one_is_right(
    model: SparseOPTForCausalLM, tokenizer: Any
) -> None:
    generator = Generator(model, tokenizer)
    told: list[Message] = []
    with pytest.raises(Cancelled):
        generator.run(Job(1, prompt=PROMPT, max_tokens=400), told.append, lambda: len(told) > 6)
    assert len(told) < 10
    after: list[Message] = []
    generator.run(Job(2, prompt=PROMPT, temperature=0, max_tokens=8), after.append, lambda: False)
    fresh: list[Message] = []
    Generator(model, tokenizer).run(Job(2, prompt=PROMPT, temperature=0, max_tokens=8), fresh.append, lambda: False)
    assert text_of(after) == text_of(fresh)
