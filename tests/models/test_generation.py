"""The sparse model's text is the dense model's text, whatever way of generating."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import opt_family
import pytest
import torch
from pairs import Pair, check_sparse, make_pair
from transformers import (
    AutoTokenizer,
    DynamicCache,
    OPTForCausalLM,
    StaticCache,
    TextIteratorStreamer,
    TextStreamer,
)

from sparseflow import DiskWeightStore, SparseFlowConfig, SparseOPTForCausalLM

PROMPTS = ["In the beginning", "HAMLET.\nTo be, or not to be,", "And Moses said unto the children of Israel, Hear ye"]
FIDELITIES = ["exact", "certified"]

# Largest difference of logits, relative to the largest logit: a few units in the last place of sums over a layer's
# width, which the two models add in different orders; in 16 bits also the activations that dense rounds and we do not.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 6e-2}


@pytest.fixture(scope="module")
def tokenizer(demo_model: Path) -> Any:
    return AutoTokenizer.from_pretrained(demo_model, padding_side="left")


@pytest.fixture(scope="module", params=FIDELITIES)
def demo_pair(request: pytest.FixtureRequest, demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARSEFLOW_HOME", str(tmp_path_factory.mktemp("home")))
        return make_pair(demo_model, torch.float32, request.param)


def generated(pair: Pair, inputs: Any, **settings: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids of the dense and of the sparse model, from the same seed."""
    pair.sparse.reset_stats()
    outputs = []
    for model in pair:
        torch.manual_seed(3)
        outputs.append(model.generate(**inputs, **settings))
    return outputs[0], outputs[1]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_ids_equal_dense_over_200_tokens(demo_pair: Pair, tokenizer: Any, prompt: str) -> None:
    inputs = tokenizer(prompt, return_tensors="pt")
    dense, sparse = generated(demo_pair, inputs, max_new_tokens=200, min_new_tokens=200, do_sample=False)
    assert torch.equal(dense, sparse)
    check_sparse(demo_pair.sparse)


SETTINGS = {
    "beams": {"num_beams": 4, "do_sample": False},
    "sampling": {"do_sample": True, "temperature": 0.9, "top_p": 0.95},
    "sampled beams": {"num_beams": 3, "do_sample": True},
    "prompt lookup": {"prompt_lookup_num_tokens": 5, "do_sample": False},
    "several sequences": {"num_return_sequences": 3, "do_sample": True},
    "static cache": {"cache_implementation": "static", "do_sample": False},
    "no cache": {"use_cache": False, "do_sample": False, "max_new_tokens": 12},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_ids_equal_dense_in_every_way_of_generating(demo_pair: Pair, tokenizer: Any, name: str) -> None:
    inputs = tokenizer(PROMPTS[2], return_tensors="pt")
    dense, sparse = generated(demo_pair, inputs, **({"max_new_tokens": 40} | SETTINGS[name]))
    assert torch.equal(dense, sparse)
    if name != "no cache":
        check_sparse(demo_pair.sparse)


def test_left_padded_batch_equals_dense(demo_pair: Pair, tokenizer: Any) -> None:
    inputs = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    assert (inputs.attention_mask == 0).any()
    dense, sparse = generated(demo_pair, inputs, max_new_tokens=80, do_sample=False)
    assert torch.equal(dense, sparse)
    check_sparse(demo_pair.sparse)


def test_assisted_decoding_equals_dense(demo_pair: Pair, tokenizer: Any, family_checkpoint: Any) -> None:
    inputs = tokenizer(PROMPTS[1], return_tensors="pt")
    plain = demo_pair.dense.generate(**inputs, max_new_tokens=60, do_sample=False)
    demo_pair.sparse.reset_stats()
    helped = demo_pair.sparse.generate(**inputs, max_new_tokens=60, do_sample=False, assistant_model=demo_pair.dense)
    assert torch.equal(plain, helped)
    check_sparse(demo_pair.sparse)


def test_inputs_embeds_equal_dense(demo_pair: Pair, tokenizer: Any) -> None:
    ids = tokenizer(PROMPTS[1], return_tensors="pt").input_ids
    inputs = {"inputs_embeds": demo_pair.dense.get_input_embeddings()(ids).detach()}
    dense, sparse = generated(demo_pair, inputs, max_new_tokens=40, do_sample=False)
    assert torch.equal(dense, sparse)


def test_streamers_print_what_generate_returns(
    demo_pair: Pair, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    inputs = tokenizer(PROMPTS[0], return_tensors="pt")
    output = demo_pair.sparse.generate(
        **inputs, max_new_tokens=30, do_sample=False, streamer=TextStreamer(tokenizer, skip_special_tokens=True)
    )
    assert capsys.readouterr().out.strip() == tokenizer.decode(output[0], skip_special_tokens=True).strip()
    iterator = TextIteratorStreamer(tokenizer, skip_special_tokens=True, timeout=30)
    demo_pair.sparse.generate(**inputs, max_new_tokens=30, do_sample=False, streamer=iterator)
    assert "".join(iterator).strip() == tokenizer.decode(output[0], skip_special_tokens=True).strip()


@pytest.mark.parametrize("make_cache", [lambda m: DynamicCache(config=m.config), lambda m: StaticCache(m.config, 64)])
def test_a_cache_of_the_callers_own_is_used(demo_pair: Pair, tokenizer: Any, make_cache: Callable[[Any], Any]) -> None:
    ids = tokenizer(PROMPTS[2], return_tensors="pt").input_ids
    logits = []
    for model in demo_pair:
        cache = make_cache(model)
        with torch.inference_mode():
            model(ids[:, :5], past_key_values=cache)
            logits.append(model(ids[:, 5:], past_key_values=cache).logits)
    assert_close(logits[0], logits[1], torch.float32)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("fidelity", FIDELITIES)
def test_teacher_forced_logits_agree_position_by_position(
    demo_model: Path, tokenizer: Any, dtype: torch.dtype, fidelity: str
) -> None:
    text = (demo_model / "heldout.txt").read_text(encoding="utf-8")[:2000]
    ids = tokenizer(text, return_tensors="pt").input_ids[:, :64]
    pair = make_pair(demo_model, dtype, fidelity)
    dense, sparse = teacher_forced(pair, ids)
    assert_close(dense, sparse, dtype)
    if dtype == torch.float32:
        assert torch.equal(dense.argmax(-1), sparse.argmax(-1))
    check_sparse(pair.sparse)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bits_are_no_further_from_float32_than_dense_ones(
    demo_model: Path, tokenizer: Any, dtype: torch.dtype
) -> None:
    ids = tokenizer((demo_model / "heldout.txt").read_text(encoding="utf-8")[:200], return_tensors="pt").input_ids
    exact, _ = teacher_forced(make_pair(demo_model, torch.float32, "dense"), ids)
    dense, sparse = teacher_forced(make_pair(demo_model, dtype, "exact"), ids)
    dense_error, sparse_error = ((logits - exact).norm(dim=-1).median() for logits in (dense, sparse))
    assert sparse_error < 1.25 * dense_error


@pytest.mark.parametrize("fidelity", FIDELITIES)
@pytest.mark.parametrize("member", opt_family.FAMILY)
def test_every_member_of_the_family_generates_what_dense_does(
    member: str, fidelity: str, family_checkpoint: Any
) -> None:
    pair = make_pair(family_checkpoint(member), torch.float32, fidelity)
    ids = opt_family.random_ids(pair.dense.config, 1, 6)
    batch = opt_family.random_ids(pair.dense.config, 3, 9)
    mask = torch.ones_like(batch)
    for row, n_padding in enumerate((0, 3, 5)):
        batch[row, :n_padding], mask[row, :n_padding] = pair.dense.config.pad_token_id, 0
    length = {"max_new_tokens": 24, "min_new_tokens": 24}
    for inputs, settings in (
        ({"input_ids": ids}, {"do_sample": False}),
        ({"input_ids": ids}, {"do_sample": True}),
        ({"input_ids": ids}, {"do_sample": False, "num_beams": 3}),
        ({"input_ids": ids}, {"do_sample": False, "prompt_lookup_num_tokens": 4}),
        ({"input_ids": batch, "attention_mask": mask}, {"do_sample": False}),
    ):
        dense, sparse = generated(pair, inputs, **length, **settings)
        assert torch.equal(dense, sparse), settings
        check_sparse(pair.sparse)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("member", opt_family.FAMILY)
def test_every_member_of_the_family_agrees_in_every_dtype(
    member: str, dtype: torch.dtype, family_checkpoint: Any
) -> None:
    checkpoint = family_checkpoint(member, str(dtype).removeprefix("torch."))
    pair = make_pair(checkpoint, dtype, "exact")
    dense, sparse = teacher_forced(pair, opt_family.random_ids(pair.dense.config, 2, 40))
    assert_close(dense, sparse, dtype)
    check_sparse(pair.sparse)


def test_the_oracle_computes_only_active_neurons(demo_model: Path, tokenizer: Any) -> None:
    pair = make_pair(demo_model, torch.float32, "oracle")
    inputs = tokenizer(PROMPTS[0], return_tensors="pt")
    dense, sparse = generated(pair, inputs, max_new_tokens=40, do_sample=False)
    assert torch.equal(dense, sparse)
    counts = pair.sparse.stats.decode
    assert counts.fetched == pytest.approx(counts.active_pairs, rel=1e-3)  # but for signs that rounding decides


def test_dense_fidelity_equals_dense_and_says_so(demo_model: Path, tokenizer: Any) -> None:
    pair = make_pair(demo_model, torch.float32, "dense")
    dense, sparse = generated(pair, tokenizer(PROMPTS[0], return_tensors="pt"), max_new_tokens=40, do_sample=False)
    assert torch.equal(dense, sparse)
    assert pair.sparse.fidelity == "dense"
    assert pair.sparse.stats.decode.dense_layer_share == 1


def test_the_api_of_the_first_description_works_unchanged(demo_model: Path, tokenizer: Any) -> None:
    from sparseflow import OffloadStrategy

    model_name = str(demo_model)
    hf_config = OPTForCausalLM.config_class.from_pretrained(model_name)
    strategy = OffloadStrategy(
        gpu_cache_ratio=0.3,
        cpu_cache_ratio=1.0,
        aggressive_offload=False,
        activation_threshold=1.0,
        use_lru_eviction=True,
        async_transfer=True,
    )
    config = SparseFlowConfig.from_transformers_config(hf_config, strategy=strategy)
    store = DiskWeightStore(model_name)
    store.initialize_from_pretrained(hf_config)
    model = SparseOPTForCausalLM(config, store)
    ids = tokenizer(PROMPTS[0], return_tensors="pt").input_ids
    assert model.generate(ids, max_new_tokens=100).shape == (1, ids.shape[1] + 100)


def teacher_forced(pair: Pair, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits at every position, (batch, length, vocabulary), of decoding the given ids one at a time."""
    logits = []
    for model in pair:
        cache = DynamicCache(config=model.config)
        with torch.inference_mode():
            steps = [model(ids[:, n : n + 1], past_key_values=cache).logits for n in range(ids.shape[1])]
        logits.append(torch.cat(steps, 1).float())
    return logits[0], logits[1]


def assert_close(dense: torch.Tensor, sparse: torch.Tensor, dtype: torch.dtype) -> None:
    """Every position's largest difference, relative to that position's largest logit."""
    error = (dense - sparse).abs().amax(-1) / dense.abs().amax(-1)
    assert error.max() < TOLERANCE[dtype], f"largest {error.max():.2e}, median {error.median():.2e}"
