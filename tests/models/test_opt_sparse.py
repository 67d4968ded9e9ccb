"""What the sparse model promises beside its text: real attributes, clear refusals, counts, threads."""

import threading
import time
from pathlib import Path
from typing import Any

import opt_family
import pytest
import torch
from pairs import make_pair

from sparseflow import DiskWeightStore, SparseFlowConfig, SparseOPTForCausalLM
from sparseflow.errors import BadRequest, FingerprintMismatch, PromptTooLong
from sparseflow.orchestration.density import FixedCrossover, MeasuredCrossover


@pytest.fixture
def model(family_checkpoint: Any) -> SparseOPTForCausalLM:
    return SparseOPTForCausalLM.from_pretrained(family_checkpoint("base"))


def test_attributes_are_real(model: SparseOPTForCausalLM) -> None:
    assert model.device == torch.device("cpu")
    assert model.dtype == torch.float32
    assert model.config.hidden_size == 64
    assert model.generation_config.eos_token_id == model.config.eos_token_id
    assert not model.training
    assert not any(parameter.is_meta or parameter.requires_grad for parameter in model.parameters())


def test_building_a_model_leaves_the_global_generator_alone(family_checkpoint: Any) -> None:
    before = torch.get_rng_state()
    SparseOPTForCausalLM.from_pretrained(family_checkpoint("base"))
    assert torch.equal(before, torch.get_rng_state())


def test_moving_where_it_is_does_nothing(model: SparseOPTForCausalLM) -> None:
    assert model.to("cpu").to(torch.float32).float().cpu().eval() is model


@pytest.mark.parametrize("move", ["half", "bfloat16", "double", "cuda"])
def test_moving_elsewhere_is_refused_with_the_remedy(model: SparseOPTForCausalLM, move: str) -> None:
    with pytest.raises(BadRequest, match=r"leave the model|open the checkpoint with dtype"):
        getattr(model, move)()


def test_training_and_saving_are_refused(model: SparseOPTForCausalLM, tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match="train the dense checkpoint"):
        model.train()
    with pytest.raises(BadRequest, match="keep the checkpoint"):
        model.save_pretrained(tmp_path / "copy")
    assert not list(tmp_path.iterdir())


def test_a_prompt_longer_than_the_model_is_refused(model: SparseOPTForCausalLM) -> None:
    ids = opt_family.random_ids(model.config, 1, 65)
    with pytest.raises(PromptTooLong, match=r"65 tokens.*64 positions"):
        model(ids)
    with pytest.raises(PromptTooLong, match="64 positions"):
        model.generate(ids, max_new_tokens=1)


def test_a_continuation_past_the_last_position_is_refused_before_it_starts(model: SparseOPTForCausalLM) -> None:
    ids = opt_family.random_ids(model.config, 1, 60)
    with pytest.raises(PromptTooLong, match=r"70 tokens.*lower max_new_tokens"):
        model.generate(ids, max_new_tokens=10)
    assert model.stats.prefill.layer_steps == 0
    assert model.generate(ids, max_new_tokens=4, min_new_tokens=4).shape == (1, 64)


def test_padding_does_not_count_as_positions(model: SparseOPTForCausalLM) -> None:
    ids = opt_family.random_ids(model.config, 1, 66)
    mask = torch.ones_like(ids)
    mask[:, :4] = 0
    with torch.inference_mode():
        assert model(ids, attention_mask=mask).logits.shape == (1, 66, 128)


def test_another_models_configuration_is_refused(family_checkpoint: Any) -> None:
    store = DiskWeightStore(family_checkpoint("base")).initialize_from_pretrained()
    other = DiskWeightStore(family_checkpoint("odd_sizes")).initialize_from_pretrained()
    with pytest.raises(FingerprintMismatch, match="the source holds"):
        SparseOPTForCausalLM(SparseFlowConfig(other.profile), store)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"primary_device": "cuda"}, "computes on the CPU"),
        ({"compute_dtype": torch.float16}, "--dtype float16"),
    ],
)
def test_a_configuration_that_cannot_be_served_is_refused(
    family_checkpoint: Any, settings: dict[str, Any], message: str
) -> None:
    store = DiskWeightStore(family_checkpoint("base")).initialize_from_pretrained()
    with pytest.raises(BadRequest, match=message):
        SparseOPTForCausalLM(SparseFlowConfig(store.profile, **settings), store)


def test_an_unknown_fidelity_is_refused(family_checkpoint: Any) -> None:
    with pytest.raises(BadRequest, match=r"'perfect'.*exact, certified"):
        SparseOPTForCausalLM.from_pretrained(family_checkpoint("base"), fidelity="perfect")


def test_a_scaled_margin_is_never_called_exact(family_checkpoint: Any) -> None:
    from sparseflow import OffloadStrategy

    strategy = OffloadStrategy(activation_threshold=0.5)
    model = SparseOPTForCausalLM.from_pretrained(family_checkpoint("base"), strategy=strategy)
    assert model.fidelity == "threshold:0.5"


def test_a_margin_too_small_is_seen_by_the_audit(demo_model: Path) -> None:
    from sparseflow import OffloadStrategy

    strategy = OffloadStrategy(activation_threshold=0.0)
    model = SparseOPTForCausalLM.from_pretrained(demo_model, strategy=strategy)
    model.coordinator.audit_every = 1
    model.coordinator.crossover = FixedCrossover(1.0)
    ids = opt_family.random_ids(model.config, 1, 200)
    with torch.inference_mode():
        model(ids)
    counts = model.stats.prefill
    assert counts.missed > 0
    assert counts.recall is not None
    assert 0.9 < counts.recall < 1


def test_a_step_goes_dense_past_the_crossover_and_says_so(family_checkpoint: Any) -> None:
    pair = make_pair(family_checkpoint("base"), torch.float32, "exact")
    pair.sparse.coordinator.crossover = FixedCrossover(0.05)
    ids = opt_family.random_ids(pair.dense.config, 2, 30)
    with torch.inference_mode():
        logits = [model(ids).logits for model in pair]
    assert pair.sparse.stats.prefill.dense_layer_share == 1
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-4, atol=1e-4)


def test_sparse_and_dense_prompts_agree(family_checkpoint: Any) -> None:
    pair = make_pair(family_checkpoint("base"), torch.float32, "exact")
    ids = opt_family.random_ids(pair.dense.config, 2, 30)
    with torch.inference_mode():
        logits = [model(ids).logits for model in pair]
    assert pair.sparse.stats.prefill.dense_layer_share == 0
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-4, atol=1e-4)


def test_the_crossover_is_measured_for_prompts_and_never_for_one_token() -> None:
    asked: list[int] = []
    crossover = MeasuredCrossover(asked.append, asked.append, asked.append)
    assert crossover.density(1) == 1
    assert asked == []
    assert 0 <= crossover.density(100) <= 1
    assert set(asked) == {128}
    n_asked = len(asked)
    crossover.density(128)
    assert len(asked) == n_asked


@pytest.mark.parametrize(
    ("choose_ms", "compute_ms", "dense_ms", "density"), [(10, 80, 50, 0.5), (0, 20, 80, 1.0), (60, 20, 30, 0.0)]
)
def test_the_measured_crossover_is_where_both_cost_the_same(
    choose_ms: float, compute_ms: float, dense_ms: float, density: float
) -> None:
    runs = [lambda _n, ms=ms: time.sleep(ms / 1000) for ms in (choose_ms, compute_ms, dense_ms)]
    assert MeasuredCrossover(*runs).density(4) == pytest.approx(density, abs=0.15)


def test_two_threads_generate_at_once(family_checkpoint: Any) -> None:
    pair = make_pair(family_checkpoint("base"), torch.float32, "exact")
    prompts = [opt_family.random_ids(pair.dense.config, 1, 8, seed) for seed in range(2)]
    settings = {"max_new_tokens": 50, "min_new_tokens": 50, "do_sample": False}
    expected = [pair.dense.generate(ids, **settings) for ids in prompts]
    wrong: list[int] = []

    def generate(number: int) -> None:
        for _ in range(4):
            if not torch.equal(pair.sparse.generate(prompts[number], **settings), expected[number]):
                wrong.append(number)

    threads = [threading.Thread(target=generate, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
        assert not thread.is_alive()
    assert wrong == []


def test_hidden_states_and_attentions_are_recorded_as_transformers_does(family_checkpoint: Any) -> None:
    pair = make_pair(family_checkpoint("base"), torch.float32, "exact")
    ids = opt_family.random_ids(pair.dense.config, 1, 10)
    for model in pair:
        model.set_attn_implementation("eager")
    with torch.inference_mode():
        dense, sparse = (model(ids, output_hidden_states=True, output_attentions=True) for model in pair)
    assert len(sparse.hidden_states) == len(dense.hidden_states) == 3
    for one, other in zip(
        dense.hidden_states + dense.attentions, sparse.hidden_states + sparse.attentions, strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_labels_give_the_dense_loss(family_checkpoint: Any) -> None:
    pair = make_pair(family_checkpoint("base"), torch.float32, "exact")
    ids = opt_family.random_ids(pair.dense.config, 2, 20)
    with torch.inference_mode():
        dense, sparse = (model(ids, labels=ids).loss for model in pair)
    torch.testing.assert_close(dense, sparse)
