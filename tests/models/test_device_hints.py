"""Bundles that come before they are asked for change no text, whenever the device does what is beside.

The slots are kept on the CPU here: the same decisions as on a GPU, in plain PyTorch.
"""

import contextlib
import itertools
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import opt_family
import pytest
import torch
from late_lane import Late

from sparseflow import OffloadStrategy, SparseOPTForCausalLM
from sparseflow.kernels.device.placement import N_FORESEEN, N_HINTED, N_HINTS, N_MISSED, N_TOTALS
from sparseflow.orchestration.device import hints as device_hints
from sparseflow.orchestration.device.coordinator import DeviceCoordinator
from sparseflow.orchestration.device.hints import DeviceHints, Lane

MakeFolder = Callable[[str, str], Path]


def hints_of(model: SparseOPTForCausalLM) -> DeviceHints:
    assert isinstance(model.coordinator, DeviceCoordinator)
    assert model.coordinator.hints is not None
    return model.coordinator.hints


def opened(
    checkpoint: Path, *, ratio: float = 0.1, cpu_ratio: float = 1.0, hints: bool = True, lane: Lane | None = None
) -> SparseOPTForCausalLM:
    strategy = OffloadStrategy(ratio, cpu_ratio, device_cache="copy", device_hints=hints)
    model = SparseOPTForCausalLM.from_pretrained(checkpoint, strategy=strategy)
    if lane is not None:
        hints_of(model).lane = lane
    return model


def continued(model: SparseOPTForCausalLM, ids: torch.Tensor, n: int = 12) -> torch.Tensor:
    with torch.inference_mode():
        return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, do_sample=False)


@pytest.fixture
def lanes() -> list[Late]:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    return [Late(seed, hurry) for hurry in (0.0, 0.5, 1.0)]


@pytest.mark.parametrize("n_sequences", [1, 3])
@pytest.mark.parametrize("member", ["base", "post_norm", "projected", "no_affine", "odd_sizes"])
def test_the_same_text_whenever_it_is_done(
    member: str, n_sequences: int, family_checkpoint: MakeFolder, lanes: list[Late]
) -> None:
    checkpoint = family_checkpoint(member, "float32")
    plain = opened(checkpoint, hints=False)
    ids = opt_family.random_ids(plain.config, n_sequences, 9)
    expected = continued(plain, ids)
    moved = []
    for lane in lanes:
        model = opened(checkpoint, lane=lane)
        assert torch.equal(continued(model, ids), expected)
        counts = model.stats.decode.device
        assert counts is not None
        moved.append((counts.hinted, counts.foreseen, counts.misses))
        assert lane.n_waited > 0
    assert moved[0] == moved[1] == moved[2]
    assert sum(moved[0][0]) > 0


def test_what_is_moved_is_counted_and_what_is_foreseen_need_not_be_moved_again(demo_model: Path) -> None:
    ids = torch.arange(10, 20)[None]
    counts = {}
    for hints in (False, True):
        model = opened(demo_model, hints=hints)
        continued(model, ids, 40)
        decode, bundle_nbytes = model.stats.decode, model.source.profile.bundle_nbytes
        assert decode.device is not None
        counts[hints] = decode.device
        assert decode.device.nbytes_moved == bundle_nbytes * sum(decode.device.misses + decode.device.hinted)
    assert sum(counts[False].hinted) == 0
    found = counts[True]
    assert found.hinted[0] == 0  # nothing comes before the first layer
    late_layers = range(2, len(found.hinted))
    assert sum(found.foreseen[n] for n in late_layers) > 0.5 * sum(found.hinted[n] for n in late_layers)
    assert sum(found.misses[n] for n in late_layers) < 0.7 * sum(counts[False].misses[n] for n in late_layers)


def test_layers_that_gain_nothing_get_no_hints_after_the_trial(
    demo_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_hints, "TRIAL_TOKENS", 20)
    model = opened(demo_model)
    ids = torch.arange(10, 20)[None]
    continued(model, ids, 21)
    is_on = hints_of(model).is_on
    assert not is_on[0]
    assert not is_on[1]  # whose input is mostly what attention adds
    assert all(is_on[3:])
    before = model.stats.decode.device
    assert before is not None
    n_before = list(before.hinted)
    continued(model, ids, 10)
    after = model.stats.decode.device
    assert after is not None
    assert [n > n_then for n, n_then in zip(after.hinted, n_before, strict=True)] == is_on


@pytest.mark.parametrize(
    ("n_hinted", "n_foreseen", "n_missed", "is_on"),
    [(100, 50, 50, True), (100, 49, 50, False), (100, 50, 201, False), (0, 0, 0, False), (0, 0, 9, False)],
)
def test_a_layer_gains_where_enough_is_foreseen_and_used(
    n_hinted: int, n_foreseen: int, n_missed: int, is_on: bool, family_checkpoint: MakeFolder
) -> None:
    hints = hints_of(opened(family_checkpoint("base", "float32")))
    totals = [0] * N_TOTALS
    totals[N_HINTS], totals[N_HINTED], totals[N_FORESEEN], totals[N_MISSED] = 64, n_hinted, n_foreseen, n_missed
    hints.note(1, totals)
    hints.decide()
    assert hints.is_on[1] is is_on
    assert not hints.is_on[0]


def test_a_trial_begins_when_bundles_can_be_moved(demo_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_hints, "TRIAL_TOKENS", 4)
    model = opened(demo_model, cpu_ratio=0.5)
    assert isinstance(model.coordinator, DeviceCoordinator)
    ids = torch.arange(10, 20)[None]
    continued(model, ids, 10)
    assert hints_of(model).is_on == [False] + [True] * 7
    assert model.stats.decode.device is not None
    assert sum(model.stats.decode.device.hinted) == 0


@pytest.mark.parametrize("part", ["hint", "gather", "compute"])
@pytest.mark.parametrize("nth", [1, 10, 23])
def test_what_was_interrupted_leaves_no_slot_that_lacks_its_bundle(
    part: str, nth: int, demo_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, model = opened(demo_model, hints=False), opened(demo_model, lane=Late(0, hurry=0.0))
    assert isinstance(model.coordinator, DeviceCoordinator)
    ids = torch.arange(10, 20)[None]
    ops = model.coordinator.layers.ops
    whole, n_calls = getattr(ops, part), itertools.count(1)

    def interrupted(*words: Any) -> None:
        if next(n_calls) == nth:
            raise KeyboardInterrupt
        whole(*words)

    monkeypatch.setattr(ops, part, interrupted)
    with pytest.raises(KeyboardInterrupt):
        continued(model, ids)
    assert torch.equal(continued(model, ids), continued(plain, ids))
    source, layers = model.source, model.coordinator.layers
    for layer, memory in enumerate(layers.memory):
        bundles = source.resident_bundles(layer)
        assert bundles is not None
        for slot, neuron in enumerate(memory.placement.neuron_in.tolist()):
            assert neuron < 0 or torch.equal(memory.slab[slot], bundles[neuron])


class FakeStream:
    """Notes what waits for what."""

    def __init__(self, name: str, log: list[str]) -> None:
        self._name, self._log = name, log

    def wait_stream(self, other: "FakeStream") -> None:
        self._log.append(f"{self._name} waits for {other._name}")

    def wait_event(self, event: "FakeEvent") -> None:
        self._log.append(f"{self._name} waits for {event.place}")


class FakeEvent:
    """Is where it was recorded last."""

    place = "nothing"

    def record(self, stream: FakeStream) -> None:
        self.place = f"the mark in {stream._name}"


def test_a_stream_waits_for_what_was_told_before_and_is_waited_for_when_it_has_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    log: list[str] = []
    current = [FakeStream("main", log)]

    @contextlib.contextmanager
    def on(stream: FakeStream) -> Iterator[None]:
        current.append(stream)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: FakeStream("beside", log))
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current[-1])
    monkeypatch.setattr(torch.cuda, "stream", on)
    lane = device_hints.StreamLane(torch.device("cuda"))
    lane.join()
    lane.run(lambda: log.append(f"work in {current[-1]._name}"))
    lane.mark()
    lane.wait_for_mark()
    lane.join()
    lane.join()
    assert log == [
        "beside waits for main",
        "work in beside",
        "main waits for the mark in beside",
        "main waits for beside",
    ]
