"""Device slots are given as a plain list of neurons would be kept, and no two neurons ever share one."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some

from sparseflow.errors import BadRequest
from sparseflow.kernels.device import placement as module
from sparseflow.kernels.device.placement import (
    N_CANDIDATES,
    N_FORESEEN,
    N_HINTED,
    N_MISSES,
    N_PLACED,
    PlacedStep,
    Placement,
    Shape,
)

HERE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def mask_of(ids: set[int], n_neurons: int, n_tokens: int = 1) -> torch.Tensor:
    """Each candidate is one for one of the tokens."""
    mask = torch.zeros(n_tokens, n_neurons, dtype=torch.int8)
    for k, neuron in enumerate(sorted(ids)):
        mask[k % n_tokens, neuron] = 1
    return mask.to(HERE)


class Model:
    """What placement must come to, neuron by neuron."""

    def __init__(self, n_slots: int) -> None:
        self.neuron_in: list[int | None] = [None] * n_slots
        self.foreseen: set[int] = set()  # what a hint has given slots for the step that comes
        self.stays: set[int] = set()  # until then
        self.n_hinted = self.n_foreseen = 0
        self.uses: dict[int, int] = {}
        self.used_in: dict[int, int] = {}
        self.step = 0

    def worth(self, neuron: int) -> int:
        periods = self.step // module.HALVING_STEPS - self.used_in.get(neuron, 0) // module.HALVING_STEPS
        return self.uses.get(neuron, 0) >> periods

    def hint(self, ids: list[int]) -> None:
        """Slots for what may come next; of what is there already it stays."""
        ids = ids[: len(self.neuron_in) // 2]
        missing = [neuron for neuron in ids if neuron not in self.neuron_in]
        self.step += 1
        kept = {neuron: (self.worth(neuron), self.step) for neuron in ids}
        self._give(missing, set(ids))
        for neuron, (worth, step) in kept.items():
            self.uses[neuron], self.used_in[neuron] = worth, step
        self.step -= 1
        placed = {neuron for neuron in missing if neuron in self.neuron_in}
        self.foreseen, self.stays = placed, set(ids)
        self.n_hinted += len(placed)

    def place(self, ids: list[int]) -> tuple[list[int | None], list[int]]:
        """Slots of ids, None for none; and the missing ones."""
        self.step += 1
        missing = [neuron for neuron in ids if neuron not in self.neuron_in]
        for neuron in ids:
            self.uses[neuron] = self.worth(neuron) + 16
            self.used_in[neuron] = self.step
        self._give(missing, {*ids, *self.stays})
        self.n_foreseen += len(self.foreseen & set(ids))
        self.foreseen, self.stays = set(), set()
        return [self.neuron_in.index(neuron) if neuron in self.neuron_in else None for neuron in ids], missing

    def _give(self, missing: list[int], stays: set[int]) -> None:
        may_go = [slot for slot, neuron in enumerate(self.neuron_in) if neuron not in stays]

        def worth_in(slot: int) -> int:
            neuron = self.neuron_in[slot]
            return -1 if neuron is None else self.worth(neuron)

        going = sorted(sorted(may_go, key=worth_in)[: len(missing)])
        for slot, neuron in zip(going, missing, strict=False):
            self.neuron_in[slot] = neuron


def check(placement: Placement, step: PlacedStep, model: Model, ids: list[int]) -> None:
    slots, missing = model.place(ids)
    counts = step.counts.tolist()
    n_placed = counts[N_PLACED]
    assert counts[N_CANDIDATES] == len(ids)
    assert counts[N_MISSES] == len(missing)
    assert int(placement.clock) == model.step
    assert step.ids[: len(ids)].tolist() == ids
    assert step.missing[: len(missing)].tolist() == missing
    found = step.slots[: len(ids)].tolist()
    assert [slot if slot >= 0 else None for slot in found] == slots
    assert [-1 - slot for slot in found if slot < 0] == list(range(n_placed, len(missing)))
    placed = [slots[ids.index(neuron)] for neuron in missing[:n_placed]]
    assert step.places[:n_placed].tolist() == placed
    assert placement.neuron_in.tolist() == [-1 if neuron is None else neuron for neuron in model.neuron_in]
    slot_of = placement.slot_of.tolist()
    assert {neuron: slot for neuron, slot in enumerate(slot_of) if slot >= 0} == {
        neuron: slot for slot, neuron in enumerate(model.neuron_in) if neuron is not None
    }
    assert placement.totals[N_HINTED] == model.n_hinted
    assert placement.totals[N_FORESEEN] == model.n_foreseen


def check_hinted(steps: list[PlacedStep], model: Model) -> None:
    """What has to be moved for a hint is said."""
    for step in steps:
        n_placed = int(step.counts[N_PLACED])
        moved = dict(zip(step.missing[:n_placed].tolist(), step.places[:n_placed].tolist(), strict=True))
        assert moved == {neuron: model.neuron_in.index(neuron) for neuron in model.foreseen}


@settings(max_examples=10, deadline=None)
@given(some.data())
def test_slots_are_given_as_a_list_would_be_kept(data: some.DataObject) -> None:
    n_neurons, n_slots = data.draw(some.integers(1, 40)), data.draw(some.integers(1, 20))
    fast, twin = (Placement(n_neurons, n_slots, HERE) for _ in range(2))
    steps = [PlacedStep.empty(n_neurons, HERE) for _ in range(2)]
    models = [Model(n_slots), Model(n_slots)]
    for _ in range(data.draw(some.integers(1, 6))):
        if data.draw(some.booleans()):
            foreseen = data.draw(some.sets(some.integers(0, n_neurons - 1)))
            mask = mask_of(foreseen, n_neurons, data.draw(some.integers(1, 3)))
            fast.hint(mask, steps[0])
            twin.hint_ref(mask, steps[1])
            for model in models:
                model.hint(sorted(foreseen))
            check_hinted(steps, models[0])
        ids = data.draw(some.sets(some.integers(0, n_neurons - 1)))
        mask = mask_of(ids, n_neurons, data.draw(some.integers(1, 3)))
        fast.place(mask, steps[0])
        twin.place_ref(mask, steps[1])
        for placement, step, model in zip((fast, twin), steps, models, strict=True):
            check(placement, step, model, sorted(ids))
        assert fast.totals.tolist() == twin.totals.tolist()


def test_long_runs_forget_what_was_used_long_ago(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HALVING_STEPS", 8)
    generator = torch.Generator().manual_seed(torch.seed() % 2**31)
    n_neurons, n_slots = 300, 64
    fast, model = Placement(n_neurons, n_slots, HERE), Model(n_slots)
    step = PlacedStep.empty(n_neurons, HERE)
    weights = 1 / torch.arange(1, n_neurons + 1)
    for _ in range(3 * module.HALVING_STEPS):
        ids = sorted(torch.multinomial(weights, 24, generator=generator).tolist())
        fast.place(mask_of(set(ids), n_neurons), step)
        check(fast, step, model, ids)


@pytest.mark.parametrize("shape", [Shape(block=16, listed=8), Shape(block=64, listed=32, warps=16)], ids=str)
def test_how_the_kernel_is_cut_changes_nothing(shape: Shape, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SHAPE", shape)
    fast, model = Placement(100, 30, HERE), Model(30)
    step = PlacedStep.empty(100, HERE)
    for share in (0.2, 0.5, 0.3, 0.3, 0.3):
        ids = (torch.rand(100) < share).nonzero().flatten().tolist()
        fast.place(mask_of(set(ids), 100), step)
        check(fast, step, model, ids)


def test_what_was_foreseen_in_vain_goes_first_and_what_was_used_is_kept() -> None:
    for hint, place in ((Placement.hint, Placement.place), (Placement.hint_ref, Placement.place_ref)):
        placement, step = Placement(20, 8, HERE), PlacedStep.empty(20, HERE)
        place(placement, mask_of({0, 1, 2, 3, 4}, 20), step)
        hint(placement, mask_of({10, 11, 12}, 20), step)  # 10 will not be used
        place(placement, mask_of({0, 11, 12}, 20), step)
        assert int(step.counts[N_MISSES]) == 0
        place(placement, mask_of({13}, 20), step)
        assert set(placement.neuron_in.tolist()) == {0, 1, 2, 3, 4, 11, 12, 13}
        assert placement.totals.tolist() == [3, 5 + 3 + 1, 5 + 1, 1, 3, 2]


def test_more_slots_than_can_be_counted_are_refused() -> None:
    with pytest.raises(BadRequest, match="at most 65535"):
        Placement(70000, 70000, HERE).place(torch.zeros(1, 70000, dtype=torch.int8), PlacedStep.empty(70000, HERE))


def test_a_range_of_the_candidates_is_placed_as_if_there_were_no_others() -> None:
    fast, twin, whole = Placement(50, 8, HERE), Placement(50, 8, HERE), Model(8)
    step = PlacedStep.empty(50, HERE)
    mask = mask_of(set(range(0, 50, 3)), 50)
    for first in range(0, 17, 8):
        ids = list(range(0, 50, 3))[first : first + 8]
        fast.place(mask, step, first, first + 8)
        check(fast, step, whole, ids)
        twin.place_ref(mask, step, first, first + 8)
    assert twin.neuron_in.tolist() == fast.neuron_in.tolist()
