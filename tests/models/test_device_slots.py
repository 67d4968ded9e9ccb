"""With device slots the model says what it says without them, whatever their number, and counts what it moved.

The slots are kept on the CPU here: the same decisions as on a GPU, in plain PyTorch.
"""

import dataclasses
import itertools
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import opt_family
import pytest
import torch

from sparseflow import DiskWeightStore, OffloadStrategy, SparseFlowConfig, SparseOPTForCausalLM
from sparseflow.errors import ArenaBusy, BadRequest, NotEnoughMemory, ServerError
from sparseflow.orchestration.device.choosers import Mover
from sparseflow.orchestration.device.coordinator import DeviceCoordinator
from sparseflow.orchestration.device.slots import HINTS_NBYTES, LEAST_SHARE, DevicePlan
from sparseflow.orchestration.device.transport import HostMemoryReplaced

MakeFolder = Callable[[str, str], Path]
RATIOS = [0.02, 0.3, 1.0]
SLOTS = OffloadStrategy(device_cache="copy")


def opened(checkpoint: Path, ratio: float | None, **settings: Any) -> SparseOPTForCausalLM:
    """None: computed in host memory."""
    strategy = settings.pop("strategy", OffloadStrategy())
    if ratio is not None:
        strategy = dataclasses.replace(strategy, device_cache="copy", gpu_cache_ratio=ratio)
    return SparseOPTForCausalLM.from_pretrained(checkpoint, strategy=strategy, **settings)


def continued(model: SparseOPTForCausalLM, ids: torch.Tensor, n: int = 12, **settings: Any) -> torch.Tensor:
    mask = settings.pop("attention_mask", torch.ones_like(ids))
    with torch.inference_mode():
        output = model.generate(ids, attention_mask=mask, max_new_tokens=n, do_sample=False, **settings)
    return output[:, ids.shape[1] :]


@pytest.mark.parametrize("member", ["base", "post_norm", "projected", "no_bias", "odd_sizes"])
@pytest.mark.parametrize("ratio", RATIOS)
def test_the_same_text_with_any_number_of_slots(member: str, ratio: float, family_checkpoint: MakeFolder) -> None:
    checkpoint = family_checkpoint(member, "float32")
    plain, slotted = opened(checkpoint, None), opened(checkpoint, ratio)
    ids = opt_family.random_ids(plain.config, 1, 9)
    assert torch.equal(continued(plain, ids), continued(slotted, ids))
    counts = slotted.stats.decode
    assert counts.active_pairs == plain.stats.decode.active_pairs
    assert counts.fetched == plain.stats.decode.fetched
    assert counts.layer_steps == plain.stats.decode.layer_steps


@pytest.mark.parametrize("fidelity", ["exact", "certified", "dense"])
def test_the_same_text_for_several_sequences_with_padding(fidelity: str, family_checkpoint: MakeFolder) -> None:
    checkpoint = family_checkpoint("base", "float16")
    plain, slotted = opened(checkpoint, None, fidelity=fidelity), opened(checkpoint, 0.3, fidelity=fidelity)
    ids = opt_family.random_ids(plain.config, 3, 9)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    assert torch.equal(continued(plain, ids, attention_mask=mask), continued(slotted, ids, attention_mask=mask))


@pytest.mark.parametrize("cpu_ratio", [0.5, 0.05])
@pytest.mark.parametrize("ratio", [0.02, 0.3])
def test_the_same_text_with_bundles_on_disk(cpu_ratio: float, ratio: float, family_checkpoint: MakeFolder) -> None:
    checkpoint = family_checkpoint("base", "float32")
    plain, slotted = (
        opened(checkpoint, each, strategy=OffloadStrategy(cpu_cache_ratio=cpu_ratio)) for each in (None, ratio)
    )
    ids = opt_family.random_ids(plain.config, 1, 9)
    assert torch.equal(continued(plain, ids), continued(slotted, ids))
    decode, fetches = slotted.stats.decode, slotted.stats.decode.fetches
    assert fetches is not None
    assert fetches.misses > 0
    assert decode.layer_steps == plain.stats.decode.layer_steps  # in however many parts
    assert decode.active_pairs == plain.stats.decode.active_pairs


def test_what_is_counted_adds_up(family_checkpoint: MakeFolder) -> None:
    model = opened(family_checkpoint("base", "float32"), 0.3)
    continued(model, opt_family.random_ids(model.config, 1, 9))
    counts = model.stats.decode
    assert counts.device is not None
    assert sum(counts.device.candidates) == counts.fetched
    assert 0 < sum(counts.device.misses) < counts.fetched
    assert counts.device.nbytes_moved == sum(counts.device.misses) * model.source.profile.bundle_nbytes
    assert counts.device.hit_rate == 1 - sum(counts.device.misses) / counts.fetched
    assert counts.predictor_nbytes > 0
    prompt = model.stats.prefill
    assert prompt.dense_layer_share == 1
    assert prompt.device is not None
    assert prompt.device.nbytes_moved == model.source.profile.neurons_nbytes


def test_dense_moves_what_has_no_slot(family_checkpoint: MakeFolder) -> None:
    model = opened(family_checkpoint("base", "float32"), 0.25, fidelity="dense")
    continued(model, opt_family.random_ids(model.config, 1, 9), n=5)
    counts, profile = model.stats.decode, model.source.profile
    assert counts.device is not None
    assert counts.dense_layer_share == 1
    assert counts.device.nbytes_moved == 4 * profile.neurons_nbytes * 3 // 4


def test_calibrated_layers_share_the_slots_by_what_they_gain(calibrated_demo_store: Path) -> None:
    model = opened(calibrated_demo_store, 0.1, fidelity="calibrated:0.99")
    assert isinstance(model.coordinator, DeviceCoordinator)
    slots = model.device_report()["slots"]
    assert sum(slots) == int(0.1 * model.source.profile.num_layers * model.source.profile.ffn_dimension)
    assert len(set(slots)) > 1
    ids = torch.arange(10, 30)[None]
    plain = opened(calibrated_demo_store, None, fidelity="calibrated:0.99")
    assert torch.equal(continued(plain, ids), continued(model, ids))


def test_the_report_says_what_lies_there_and_how_it_comes(family_checkpoint: MakeFolder) -> None:
    model = opened(family_checkpoint("base", "float32"), 0.3)
    report, profile = model.device_report(), model.source.profile
    assert report["transport"] == "host"
    assert report["nbytes"]["slots"] == report["n_slots"] * profile.bundle_nbytes
    assert report["uses_graph"] is False
    assert opened(family_checkpoint("base", "float32"), None).device_report() == {}


def test_a_closed_model_computes_no_more(family_checkpoint: MakeFolder) -> None:
    model = opened(family_checkpoint("base", "float32"), 0.3)
    ids = opt_family.random_ids(model.config, 1, 9)
    continued(model, ids, n=2)
    counted = model.stats.decode.layer_steps
    continued(model, ids, n=2)
    model.close()
    model.close()
    assert model.stats.decode.layer_steps == 2 * counted
    with pytest.raises(BadRequest, match="closed"):
        model(ids)


@pytest.mark.parametrize(("n_kept", "hints"), [(0, False), (1, False), (5, False), (1, True)])
def test_the_same_text_with_layers_streamed(n_kept: int, hints: bool, demo_model: Path) -> None:
    plain = opened(demo_model, None)
    layer_nbytes = sum(weight.nbytes for weight in plain.model.decoder.layers[0].self_attn.parameters())
    dense_nbytes = sum(weight.nbytes for weight in plain.source.dense().values())
    profile = plain.source.profile
    fixed = DevicePlan(plain.source, torch.device("cpu"), "auto").fixed_nbytes
    others = dense_nbytes - profile.num_layers * layer_nbytes + int(LEAST_SHARE * profile.neurons_nbytes)
    others += HINTS_NBYTES * hints
    strategy = OffloadStrategy(device_hints=hints)
    model = opened(demo_model, 0.3, strategy=strategy, device_memory=fixed + others + (n_kept + 2) * layer_nbytes)
    assert model.device_report()["n_streamed_layers"] == profile.num_layers - n_kept
    ids = torch.arange(10, 30)[None]
    assert torch.equal(continued(plain, ids), continued(model, ids))
    with pytest.raises(NotEnoughMemory, match="allow more"):
        opened(demo_model, 0.3, strategy=strategy, device_memory=fixed + others + layer_nbytes)


@pytest.mark.parametrize("mode", ["off", "before"])
def test_the_same_text_whether_or_not_reads_begin_a_layer_earlier(mode: str, demo_model: Path) -> None:
    plain = opened(demo_model, None)
    slotted = opened(demo_model, 0.1, strategy=OffloadStrategy(cpu_cache_ratio=0.2))
    slotted.coordinator.lookahead.mode = mode
    ids = torch.arange(10, 20)[None]
    assert torch.equal(continued(plain, ids), continued(slotted, ids))
    fetches = slotted.stats.decode.fetches
    assert fetches is not None
    assert (fetches.hints_useful > 0) is (mode == "before")
    assert fetches.hinted >= fetches.hints_useful


def test_what_foreseeing_costs_is_not_judged_by_the_first_time(
    demo_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = opened(demo_model, 0.1, strategy=OffloadStrategy(cpu_cache_ratio=0.2))
    lookahead, source, noted, n_hints = model.coordinator.lookahead, model.source, [], itertools.count()
    lookahead.mode, lookahead._bundle_read_s = "auto", 0.01  # a slow disk
    note, hint = lookahead.note, source.hint

    def noting(scoring_s: float, n_read: int, *hints: int) -> None:
        noted.append(n_read)
        note(scoring_s, n_read, *hints)

    def hinting(layer: int, ids: Any) -> None:
        if next(n_hints) == 0:
            time.sleep(0.5)  # kernels are compiled, say
        hint(layer, ids)

    monkeypatch.setattr(lookahead, "note", noting)
    monkeypatch.setattr(source, "hint", hinting)
    continued(model, torch.arange(10, 20)[None])
    assert next(n_hints) > 10 * (model.source.profile.num_layers - 1) - 10  # but where little is read
    assert max(noted) < model.source.profile.ffn_dimension  # a dense prompt's reads are none of a step


def test_a_model_can_be_closed_after_its_source(family_checkpoint: MakeFolder) -> None:
    model = opened(family_checkpoint("base", "float32"), 0.3)
    coordinator = model.coordinator
    continued(model, opt_family.random_ids(model.config, 1, 9), n=3)
    model.source.close()
    model.close()
    assert isinstance(coordinator, DeviceCoordinator)
    assert sum(each.numel() for each in (coordinator.layers.slab, coordinator.layers.masks)) == 0
    assert model.stats.decode.layer_steps == 2 * model.config.num_hidden_layers


@pytest.mark.parametrize("fails_at", [0, 1, 7])
def test_what_has_not_come_is_not_taken_for_being_there(
    fails_at: int, family_checkpoint: MakeFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, strategy = family_checkpoint("base", "float32"), OffloadStrategy(cpu_cache_ratio=0.5)
    plain, slotted = (opened(checkpoint, each, strategy=strategy) for each in (None, 0.3))
    ids = opt_family.random_ids(plain.config, 1, 4)  # few enough to be computed sparse from the prompt on
    bring, n_brought = slotted.coordinator.bringer.transport.bring, itertools.count()

    def failing(*words: Any) -> Any:
        if next(n_brought) == fails_at:
            raise TimeoutError("the disk does not answer")
        return bring(*words)

    monkeypatch.setattr(slotted.coordinator.bringer.transport, "bring", failing)
    with pytest.raises(TimeoutError):
        continued(slotted, ids)
    assert torch.equal(continued(plain, ids), continued(slotted, ids))


def test_memory_that_was_replaced_is_asked_again(
    family_checkpoint: MakeFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, strategy = family_checkpoint("base", "float32"), OffloadStrategy(cpu_cache_ratio=0.5)
    plain, slotted = (opened(checkpoint, each, strategy=strategy) for each in (None, 0.3))
    ids = opt_family.random_ids(plain.config, 1, 4)
    bring, n_brought = slotted.coordinator.bringer.transport.bring, itertools.count()

    def moving(*words: Any) -> Any:
        if next(n_brought) % 5 == 3:
            raise HostMemoryReplaced
        return bring(*words)

    monkeypatch.setattr(slotted.coordinator.bringer.transport, "bring", moving)
    assert torch.equal(continued(plain, ids), continued(slotted, ids))


@pytest.mark.parametrize("length", [4, 12], ids=["sparse prompt", "dense prompt"])
def test_a_successor_that_brings_less_at_once_is_asked_for_less(
    length: int, family_checkpoint: MakeFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, strategy = family_checkpoint("base", "float32"), OffloadStrategy(cpu_cache_ratio=0.5)
    plain, slotted = (opened(checkpoint, each, strategy=strategy) for each in (None, 0.3))
    ids = opt_family.random_ids(plain.config, 1, length)
    transport, n_brought = slotted.coordinator.bringer.transport, itertools.count()
    bring = transport.bring

    def shrinking(source: Any, layer: int, asked: Any) -> Any:
        if next(n_brought) == 1:
            transport.limit = 5
            raise ArenaBusy("the arena is smaller now")
        assert len(asked) <= transport.limit
        return bring(source, layer, asked)

    monkeypatch.setattr(transport, "bring", shrinking)
    assert torch.equal(continued(plain, ids), continued(slotted, ids))
    monkeypatch.setattr(transport, "bring", lambda *_: raise_busy())
    with pytest.raises(ArenaBusy):  # where nothing has changed, once more is of no use
        continued(slotted, ids)


def raise_busy() -> None:
    raise ArenaBusy("all slots are leased")


def test_threads_take_turns(family_checkpoint: MakeFolder) -> None:
    model = opened(family_checkpoint("base", "float32"), 0.1)
    prompts = [opt_family.random_ids(model.config, 1, 9, seed) for seed in range(3)]
    expected = [continued(model, ids) for ids in prompts]
    with ThreadPoolExecutor(3) as pool:
        assert all(map(torch.equal, pool.map(lambda ids: continued(model, ids), prompts, timeout=60), expected))


class Lent:
    """A server that lends what it has, until `ends`."""

    def __init__(self, source: DiskWeightStore) -> None:
        self.is_closed = self.ends = False
        self._dense = {name: tensor.clone() for name, tensor in source.dense().items()}
        self._predictors = {name: tensor.clone() for name, tensor in source.predictor_tensors().items()}

    def require(self) -> None:
        if self.ends:
            raise ServerError("what was lent is gone")

    def dense(self, device: torch.device) -> dict[str, torch.Tensor]:
        return self._dense

    def predictor_tensors(self, device: torch.device) -> dict[str, torch.Tensor]:
        return self._predictors

    def close(self) -> None:
        self.is_closed = True


def test_dense_weights_can_be_borrowed(family_checkpoint: MakeFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = opened(family_checkpoint("base", "float32"), None)
    store = DiskWeightStore(family_checkpoint("base", "float32")).initialize_from_pretrained()
    lent = Lent(store)
    config = SparseFlowConfig(store.profile, SLOTS, borrows_dense=True)
    with pytest.raises(BadRequest, match="only a server"):
        SparseOPTForCausalLM(config, store)
    monkeypatch.setattr(store, "borrow_dense", lambda index: lent, raising=False)
    model = SparseOPTForCausalLM(config, store)
    borrowed = lent.dense(torch.device("cpu"))["model.decoder.embed_tokens.weight"]
    assert model.model.decoder.embed_tokens.weight.data_ptr() == borrowed.data_ptr()
    report = model.device_report()
    assert report["borrows_dense"]
    assert report["nbytes"]["dense"] == 0
    ids = opt_family.random_ids(plain.config, 1, 9)
    assert torch.equal(continued(plain, ids), continued(model, ids))
    lent.ends = True
    with pytest.raises(ServerError, match="gone"):
        model(ids)
    model.close()
    assert lent.is_closed


def test_codes_that_are_lent_are_not_moved(family_checkpoint: MakeFolder) -> None:
    store = DiskWeightStore(family_checkpoint("base", "float32")).initialize_from_pretrained()
    here = store.predictor_tensors()
    there = {name: tensor.clone() for name, tensor in here.items()}
    move = Mover(torch.device("cpu"), {tensor.data_ptr(): there[name] for name, tensor in here.items()})
    assert move(here["1.coarse"]).data_ptr() == there["1.coarse"].data_ptr()
    assert move.nbytes == 0
    own = torch.ones(3)
    assert torch.equal(move(own), own)
    assert move.nbytes == own.nbytes
    assert move(here["1.coarse"][:0]).numel() == 0


def test_what_device_slots_cannot_do_is_refused(family_checkpoint: MakeFolder) -> None:
    checkpoint = family_checkpoint("base", "float32")
    with pytest.raises(BadRequest, match="oracle"):
        opened(checkpoint, 0.3, fidelity="oracle")
    with pytest.raises(BadRequest, match="audit"):
        opened(checkpoint, 0.3).coordinator.audit_every = 1
    with pytest.raises(BadRequest, match="device_cache"):
        OffloadStrategy(device_cache="sometimes")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
@pytest.mark.parametrize("device", ["cuda", "cuda:1", "mps", "cuda:x"])
def test_a_device_that_is_not_there_is_named(device: str, family_checkpoint: MakeFolder) -> None:
    with pytest.raises(BadRequest, match=device):
        SparseOPTForCausalLM.from_pretrained(family_checkpoint("base", "float32"), device=device)
