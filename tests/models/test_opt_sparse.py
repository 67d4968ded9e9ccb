"""What the sparse model promises beside its text: real attributes, clear refusals, counts, threads."""

import copy
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import opt_family
import pytest
import torch
from pairs import make_pair
from transformers import DynamicCache

from sparseflow import DiskWeightStore, SparseFlowConfig, SparseOPTForCausalLM
from sparseflow.core.weight_source import HostBundles
from sparseflow.engine.counts import ReadTimes
from sparseflow.errors import BadRequest, FingerprintMismatch, PromptTooLong
from sparseflow.orchestration.density import FixedCrossover, MeasuredCrossover, Trial


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
        ({"primary_device": "mps"}, "'cuda:N'"),
        ({"primary_device": "banana"}, "'cuda:N'"),
        ({"secondary_device": "cuda:7"}, "weights wait in host memory"),
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
    assert model.stats.recall is not None
    assert 0.9 < model.stats.recall < 1


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
    crossover = MeasuredCrossover(asked.append, Trial(asked.append, 1.0), Trial(asked.append, 0.5), ReadTimes(0, 0))
    assert crossover.density(1) == 1
    assert asked == []
    assert 0 <= crossover.density(100) <= 1
    assert set(asked) == {100}
    n_asked = len(asked)
    crossover.density(128)
    assert len(asked) == n_asked


@pytest.mark.parametrize(
    ("choose_ms", "sparse_ms", "dense_ms", "reading", "density"),
    [
        (10, 10, 50, ReadTimes(0, 0), 0.5),
        (0, 5, 80, ReadTimes(0, 0), 1.0),
        (60, 5, 30, ReadTimes(0, 0), 0.0),
        (10, 10, 50, ReadTimes(0.04, 0.12), 0.4),  # (50 + 40 - 10) / (80 + 120)
    ],
)
def test_the_measured_crossover_is_where_both_cost_the_same(
    monkeypatch: pytest.MonkeyPatch,
    choose_ms: float,
    sparse_ms: float,
    dense_ms: float,
    reading: ReadTimes,
    density: float,
) -> None:
    now_s = 0.0

    def lasts(ms: float) -> Callable[[int], None]:
        def work(_n: int) -> None:
            nonlocal now_s
            now_s += ms / 1000

        return work

    monkeypatch.setattr("sparseflow.orchestration.density.time", SimpleNamespace(perf_counter=lambda: now_s))
    choose, sparse, dense = lasts(choose_ms), lasts(sparse_ms), lasts(dense_ms / 2)
    crossover = MeasuredCrossover(choose, Trial(sparse, 1 / 8), Trial(dense, 1 / 2), reading)
    assert crossover.density(4) == pytest.approx(density)


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


def test_a_compiled_model_gives_the_same_logits(family_checkpoint: Any) -> None:
    pair = make_pair(family_checkpoint("base"), torch.float32, "exact")
    ids = opt_family.random_ids(pair.dense.config, 1, 12)
    with torch.no_grad():
        compiled = torch.compile(pair.sparse, backend="eager")(ids).logits
        torch.testing.assert_close(pair.dense(ids).logits, compiled, rtol=1e-4, atol=1e-4)


def test_gradients_are_refused(model: SparseOPTForCausalLM) -> None:
    embeddings = torch.randn(1, 4, 64, requires_grad=True)
    with pytest.raises(BadRequest, match=r"use torch\.no_grad"):
        model(inputs_embeds=embeddings)
    with torch.no_grad():
        assert model(inputs_embeds=embeddings).logits.shape == (1, 4, 128)


def test_a_copy_is_refused(model: SparseOPTForCausalLM) -> None:
    with pytest.raises(BadRequest, match="open it there again"):
        copy.deepcopy(model)


def test_the_head_multiplies_slices_as_a_plain_matrix(family_checkpoint: Any) -> None:
    """As a batch, torch would copy the transposed head for each sequence."""
    pair = make_pair(family_checkpoint("base"), torch.float16, "exact")
    ids = opt_family.random_ids(pair.dense.config, 3, 10)
    from torch.profiler import ProfilerActivity, profile

    with torch.inference_mode(), profile(activities=[ProfilerActivity.CPU]) as recorded:
        pair.sparse(ids, logits_to_keep=1)
    assert "aten::bmm" not in {event.key for event in recorded.key_averages()}


def test_what_cannot_be_served_is_refused_before_anything_is_converted(
    family_checkpoint: Any, sparseflow_home: Path
) -> None:
    for wrong in (
        {"device": "cuda"},
        {"fidelity": "exakt"},
        {"memory": "6 pounds"},
        {"dtype": "int8"},
        {"device_map": "auto"},
    ):
        with pytest.raises(BadRequest):
            SparseOPTForCausalLM.from_pretrained(family_checkpoint("base"), **wrong)
    assert not list(sparseflow_home.rglob("*"))


def test_the_attention_implementation_can_be_chosen(family_checkpoint: Any) -> None:
    model = SparseOPTForCausalLM.from_pretrained(family_checkpoint("base"), attn_implementation="eager")
    assert model.config._attn_implementation == "eager"


def test_profiling_can_be_switched_off(family_checkpoint: Any) -> None:
    store = DiskWeightStore(family_checkpoint("base")).initialize_from_pretrained()
    model = SparseOPTForCausalLM(SparseFlowConfig(store.profile, enable_profiling=False), store)
    model.generate(opt_family.random_ids(model.config, 1, 4), max_new_tokens=4)
    assert model.stats.decode.layer_steps == 0


def test_an_audit_visits_every_layer_whatever_its_period(family_checkpoint: Any) -> None:
    model = SparseOPTForCausalLM.from_pretrained(family_checkpoint("post_norm"))
    audited: set[int] = set()
    count = model.coordinator._count

    def spy(counts: Any, layer: int, *rest: Any) -> None:
        before = counts.audited
        count(counts, layer, *rest)
        if counts.audited > before:
            audited.add(layer)

    model.coordinator._count = spy
    model.coordinator.audit_every = model.config.num_hidden_layers
    model.generate(opt_family.random_ids(model.config, 1, 4), max_new_tokens=30, min_new_tokens=30)
    assert audited == set(range(model.config.num_hidden_layers))


def test_a_dense_model_touches_all_its_weights(family_checkpoint: Any) -> None:
    model = SparseOPTForCausalLM.from_pretrained(family_checkpoint("untied"), fidelity="dense")
    model.generate(opt_family.random_ids(model.config, 1, 4), max_new_tokens=4, min_new_tokens=4)
    dense = sum(tensor.nbytes for name, tensor in model.source.dense().items() if "embed_" not in name)
    assert model.bytes_touched_per_token() == dense + model.source.profile.neurons_nbytes


def test_one_token_steps_never_go_dense_under_the_measured_crossover(demo_model: Path) -> None:
    model = SparseOPTForCausalLM.from_pretrained(demo_model)
    model.generate(opt_family.random_ids(model.config, 1, 40), max_new_tokens=30, min_new_tokens=30)
    assert model.stats.decode.dense_layer_share == 0


def test_a_dense_step_follows_the_slots_wherever_bundles_lie(family_checkpoint: Any) -> None:
    """As in an arena, where a neuron's slot is not its id."""
    pair = make_pair(family_checkpoint("base"), torch.float32, "dense")
    source = pair.sparse.source
    fetch, order = source.fetch, torch.randperm(source.profile.ffn_dimension)

    class Moved:
        """A fetch of the same bundles, elsewhere."""

        def __init__(self, layer: int, ids: Any, keep: bool = True) -> None:
            self.bundles = fetch(layer, ids, keep).wait(1)

        def wait(self, timeout_s: float) -> HostBundles:
            slots = torch.argsort(order)[torch.from_numpy(self.bundles.slots.astype("int64"))]
            return HostBundles(self.bundles.base[order], slots.numpy().astype("uint32"))

        def __enter__(self) -> "Moved":
            return self

        def __exit__(self, *error: object) -> None:
            pass

    source.fetch = Moved
    ids = opt_family.random_ids(pair.dense.config, 1, 12)
    with torch.inference_mode():
        dense, moved = (model(ids).logits for model in pair)
    torch.testing.assert_close(dense, moved, rtol=1e-4, atol=1e-4)


def test_one_token_in_one_call_is_what_its_parts_give(demo_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = SparseOPTForCausalLM.from_pretrained(demo_model)
    ids = torch.randint(4, model.config.vocab_size, (1, 12))

    def decoded() -> tuple[list[torch.Tensor], object]:
        model.reset_stats()
        model.coordinator.live_recall.is_on = False
        cache = DynamicCache(config=model.config)
        with torch.inference_mode():
            logits = [model(token, past_key_values=cache, use_cache=True).logits for token in ids.split(1, 1)]
        return logits, (model.stats.prefill, model.stats.decode)

    at_once, counts = decoded()
    monkeypatch.setattr(model.source, "resident_bundles", lambda layer: None)
    in_parts, counts_in_parts = decoded()
    assert all(torch.equal(*pair) for pair in zip(at_once, in_parts, strict=True))
    assert counts == counts_in_parts
    assert model.stats.decode.layer_steps == 11 * 8
    model.close()
