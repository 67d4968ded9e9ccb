"""One row of kernels computes a token as the modules do; whatever is no such token goes through the modules.

Without a GPU the kernels are interpreted, and there is no graph.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from late_lane import Late
from transformers import DynamicCache, OPTConfig, OPTForCausalLM, StaticCache

from sparseflow import OffloadStrategy, SparseOPTForCausalLM
from sparseflow.kernels.device import linear
from sparseflow.kernels.device.ops import TritonOps
from sparseflow.models.token_step import TokenStep
from sparseflow.orchestration.device.choosers import Mover
from sparseflow.orchestration.device.coordinator import DeviceCoordinator
from sparseflow.orchestration.device.hints import DeviceHints, InTurn

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = OPTConfig(
        hidden_size=12,  # so small because interpreted kernels take milliseconds a program
        num_hidden_layers=2,
        num_attention_heads=2,
        ffn_dim=14,
        vocab_size=16,
        max_position_embeddings=90,
        word_embed_proj_dim=12,
        init_std=0.3,
    )
    folder = tmp_path_factory.mktemp("checkpoint")
    with torch.random.fork_rng(devices=[]):
        OPTForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """An interpreted program takes as long with many rows as with few."""
    monkeypatch.setattr(linear, "_FEW_ROWS", 64)


@pytest.fixture
def model(checkpoint: Path) -> Iterator[SparseOPTForCausalLM]:
    """Its token steps are those of a GPU, interpreted."""
    made = SparseOPTForCausalLM.from_pretrained(
        checkpoint, strategy=OffloadStrategy(device_cache="copy", gpu_cache_ratio=0.3)
    )
    interpret(made)
    yield made
    made.close()


def interpret(model: SparseOPTForCausalLM) -> None:
    coordinator, profile = model.coordinator, model.source.profile
    assert isinstance(coordinator, DeviceCoordinator)
    coordinator.layers.ops = TritonOps(8, profile.ffn_dimension, profile.hidden_dimension, CPU)
    if coordinator.predictor is not None:
        coordinator.layers.choosers = [layer.on_device(Mover(CPU)) for layer in coordinator.predictor.layers]
    model.token_step = TokenStep(model, coordinator)


def prompt(model: SparseOPTForCausalLM, length: int = 9) -> tuple[torch.Tensor, DynamicCache]:
    """Ids of the next token, and a cache that holds a prompt."""
    ids = torch.randint(4, model.config.vocab_size, (1, length))
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        logits = model(ids, past_key_values=cache, use_cache=True).logits
    return logits[:, -1:].argmax(-1), cache


def both(model: SparseOPTForCausalLM, ids: torch.Tensor, cache: DynamicCache) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits by the step and by the modules, which see the same cache."""
    assert model.token_step is not None
    twin = DynamicCache(config=model.config)
    for layer, held in enumerate(cache.layers):
        twin.update(held.keys.clone(), held.values.clone(), layer)
    with torch.inference_mode():
        found = model.token_step(ids, torch.ones(1, cache.get_seq_length() + 1), None, cache)
        step, model.token_step = model.token_step, None
        expected = model(ids, past_key_values=twin, use_cache=True).logits
        model.token_step = step
    assert found is not None
    for held, kept in zip(cache.layers, twin.layers, strict=True):
        assert held.keys.shape == kept.keys.shape
        torch.testing.assert_close(held.keys, kept.keys)
        torch.testing.assert_close(held.values, kept.values)
    return found, expected


def test_a_token_is_computed_as_the_modules_do(model: SparseOPTForCausalLM) -> None:
    ids, cache = prompt(model)
    for _ in range(2):
        found, expected = both(model, ids, cache)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        ids = found.argmax(-1)


def test_a_cache_that_outgrows_its_room_is_followed(model: SparseOPTForCausalLM) -> None:
    ids, cache = prompt(model, length=1)
    room = 1 + 64  # what the first token's cache has
    with torch.inference_mode():
        many = torch.randint(4, model.config.vocab_size, (1, room - 2))
        model(many, past_key_values=cache, use_cache=True)
    for _ in range(3):
        found, expected = both(model, ids, cache)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert cache.get_seq_length() == room + 2


def test_what_a_graph_knows_the_address_of_stays_where_it_is(model: SparseOPTForCausalLM) -> None:
    coordinator = model.coordinator
    assert isinstance(coordinator, DeviceCoordinator)

    def addresses() -> list[int]:
        sums = [chooser._sums for chooser in coordinator.layers.choosers]  # type: ignore[attr-defined]
        of_sums = [tensor.data_ptr() for each in sums for tensor in vars(each).values()]
        layers = coordinator.layers
        return [*of_sums, layers.masks.data_ptr(), layers.inputs.data_ptr(), layers.step.told.data_ptr()]

    before = addresses()
    for n_sequences in (1, 3, 1):
        ids = torch.arange(4, 8).repeat(n_sequences, 1)
        with torch.inference_mode():
            model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, min_new_tokens=2)
    assert addresses() == before


def test_another_cache_is_found(model: SparseOPTForCausalLM) -> None:
    (one, first), (other, second) = prompt(model), prompt(model)
    for ids, cache in ((one, first), (other, second)):
        found, expected = both(model, ids, cache)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_generation_uses_it_and_counts_its_tokens(model: SparseOPTForCausalLM) -> None:
    ids = torch.arange(4, 13)[None]  # more than are computed sparse together
    with torch.inference_mode():
        found = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, min_new_tokens=3)
    decode = model.stats.decode
    assert decode.layer_steps == 2 * model.config.num_hidden_layers
    assert decode.device is not None
    assert decode.fetched == sum(decode.device.candidates) > 0
    model.token_step = None
    with torch.inference_mode():
        assert torch.equal(
            model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, min_new_tokens=3), found
        )


def test_what_is_no_such_step_is_left_to_the_modules(model: SparseOPTForCausalLM) -> None:
    step = model.token_step
    assert step is not None
    ids, cache = prompt(model)
    n = cache.get_seq_length()
    with torch.inference_mode():
        assert step(ids, torch.tensor([[0] + [1] * n]), None, cache) is None  # padded
        assert step(ids.repeat(2, 1), None, None, cache) is None
        assert step(ids.repeat(1, 2), None, None, cache) is None
        assert step(None, None, None, cache) is None
        assert step(ids, None, None, None) is None
        assert step(ids, None, torch.tensor([[n + 1]]), cache) is None
        assert step(ids, None, None, DynamicCache(config=model.config)) is None  # the prompt itself
        assert step(ids, None, None, StaticCache(config=model.config, max_cache_len=20)) is None
        handle = model.model.decoder.layers[1].fc1.register_forward_hook(lambda *_: None)
        assert step(ids, None, None, cache) is None
        handle.remove()
    assert cache.get_seq_length() == n  # nothing was changed


def check_streams(hints: DeviceHints, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a layer is foreseen from must be as it was, whenever that is done."""
    foresee, choose, streams = hints.foresee, hints._choose, []

    def noting(layer: int, stream: torch.Tensor) -> None:
        streams.append(stream.clone())
        foresee(layer, stream)

    def checking(layer: int, stream: torch.Tensor, mask: torch.Tensor) -> None:
        assert torch.equal(stream, streams.pop()), "what comes after has changed it"
        choose(layer, stream, mask)

    monkeypatch.setattr(hints, "foresee", noting)
    monkeypatch.setattr(hints, "_choose", checking)


def test_hints_change_nothing_but_what_is_missing(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    strategy = OffloadStrategy(device_cache="copy", gpu_cache_ratio=0.6, device_hints=True)
    first, moved = torch.tensor([[5]]), []
    for lane in (InTurn(), Late(0, hurry=0.0)):
        model = SparseOPTForCausalLM.from_pretrained(checkpoint, strategy=strategy)
        interpret(model)
        assert isinstance(model.coordinator, DeviceCoordinator)
        assert model.coordinator.hints is not None
        hints = model.coordinator.hints
        hints.lane = lane
        check_streams(hints, monkeypatch)
        ids, cache = first, DynamicCache(config=model.config)
        with torch.inference_mode():
            model(torch.arange(4, 13)[None], past_key_values=cache, use_cache=True)
        for _ in range(2):
            found, expected = both(model, ids, cache)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
            ids = found.argmax(-1)
        counts = model.stats.decode.device
        assert counts is not None
        moved.append((counts.hinted, counts.foreseen, counts.misses))
        model.close()
    assert moved[0] == moved[1]
    assert moved[0][0][0] == 0 < moved[0][0][1]
    assert moved[0][1][1] > 0


def test_recall_is_measured(model: SparseOPTForCausalLM) -> None:
    assert isinstance(model.coordinator, DeviceCoordinator)
    model.coordinator.live_recall.every_step = True
    ids = torch.arange(4, 13)[None]
    with torch.inference_mode():
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, min_new_tokens=3)
    assert model.stats.recall == 1
    assert model.stats.decode.sampled.found == model.stats.decode.active_pairs


def test_hidden_states_are_still_to_be_had(model: SparseOPTForCausalLM) -> None:
    ids, cache = prompt(model)
    with torch.inference_mode():
        output = model(ids, past_key_values=cache, use_cache=True, output_hidden_states=True)
    assert len(output.hidden_states) == model.config.num_hidden_layers + 1


def test_a_dense_model_whose_neurons_all_have_slots_steps_too(checkpoint: Path) -> None:
    model = SparseOPTForCausalLM.from_pretrained(
        checkpoint, fidelity="dense", strategy=OffloadStrategy(device_cache="copy", gpu_cache_ratio=1.0)
    )
    interpret(model)
    ids, cache = prompt(model)
    found, expected = both(model, ids, cache)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    model.reset_stats()
    both(model, ids, cache)
    assert model.stats.decode.dense_layer_share == 1
    model.close()
