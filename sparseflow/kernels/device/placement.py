"""Device slots of one layer, with all bookkeeping on the device: who lies where, and who goes when others come.

One program lists a layer's candidates, finds those without a slot, and gives them the slots of the neurons that were
least used of late, the first slots of those equally used. A use counts `_USE`; a count is halved with every
`HALVING_STEPS` layer steps (so it is between one and two such periods that a use is remembered well); what the layer
step uses itself stays. Counts are whole numbers: `Placement.place_ref` does the same in plain PyTorch, to the bit.

A hint gives slots beforehand, without counting uses: what it foresees stays until the layer step has been placed, and
what that does not use is among the first to go after it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sparseflow.errors import BadRequest

HALVING_STEPS = 32
_USE = 16
_MOST = 2 * _USE * HALVING_STEPS  # no count is larger
_BITS = (_MOST + 1).bit_length()  # of 1 + a count


@dataclass(frozen=True, slots=True)
class Shape:
    """How the kernel is cut. block, listed: neurons and candidates that it takes at once. warps: of its one program."""

    block: int = 4096
    listed: int = 1024
    warps: int = 16


SHAPE = Shape()

N_CANDIDATES, N_MISSES, N_PLACED = range(3)
"""Places in `PlacedStep.counts`."""
_N_COUNTS = 4
N_STEPS, N_CHOSEN, N_MISSED, N_HINTS, N_HINTED, N_FORESEEN = range(6)
"""Places in `Placement.totals`: layer steps, candidates, those without a slot; hints, what they gave slots, and what of
that the layer step used."""
N_TOTALS = 6


@dataclass(frozen=True, slots=True)
class PlacedStep:
    """What a layer step computes, and what it has to move first. All int32; shared by the layers of a model.

    ids: (ffn_dim,) candidates, ascending. slots: (ffn_dim,), where each lies or will lie once it was moved; -1 - k for
    the k-th missing where it has no slot. missing_at: (ffn_dim,), where in `ids` each missing one stands. places:
    (ffn_dim,), slots of those that got one, the first N_PLACED of the missing. told: how much of these is set
    (`counts`) and the missing ones (`missing`), ascending, together, so that one copy tells them to the host.
    """

    ids: Tensor
    slots: Tensor
    missing_at: Tensor
    places: Tensor
    told: Tensor

    @classmethod
    def empty(cls, n_neurons: int, device: torch.device) -> "PlacedStep":
        """For a layer of so many neurons."""
        lists = torch.zeros(4, n_neurons, dtype=torch.int32, device=device)
        ids, slots, missing_at, places = lists
        told = torch.zeros(_N_COUNTS + n_neurons, dtype=torch.int32, device=device)
        return cls(ids, slots, missing_at, places, told)

    def fill_with_all(self) -> None:
        """Every neuron, each in the slot of its own id."""
        for each in (self.ids, self.slots):
            torch.arange(len(each), out=each)
        self.counts[N_CANDIDATES] = len(self.ids)

    @property
    def counts(self) -> Tensor:
        """(3,): N_CANDIDATES, N_MISSES, N_PLACED."""
        return self.told[:3]

    @property
    def missing(self) -> Tensor:
        """(ffn_dim,): candidates that had no slot."""
        return self.told[_N_COUNTS:]


class Placement:
    """Which neurons of one layer lie in which of its device slots."""

    def __init__(self, n_neurons: int, n_slots: int, device: torch.device, totals: Tensor | None = None) -> None:
        """totals: (N_TOTALS,) int64 on the device, to which is added."""
        self.n_neurons, self.n_slots = n_neurons, n_slots
        self.slot_of = torch.full((n_neurons,), -1, dtype=torch.int32, device=device)
        self.neuron_in = torch.full((n_slots,), -1, dtype=torch.int32, device=device)
        self.uses = torch.zeros(n_neurons, dtype=torch.int32, device=device)
        self.stamp = torch.zeros(n_neurons, dtype=torch.int32, device=device)
        """The layer step that each was used in last, or foreseen for; negative: given a slot for, and not used in."""
        self.clock = torch.zeros(1, dtype=torch.int32, device=device)
        """Layer steps so far."""
        self.totals = torch.zeros(N_TOTALS, dtype=torch.int64, device=device) if totals is None else totals

    def place(self, mask: Tensor, step: PlacedStep, first: int = 0, end: int = 2**31 - 1) -> None:
        """List the candidates of a layer step, and give those without a slot one, as far as there are others to go.

        Args:
            mask: (n_tokens, ffn_dim) int8, 1 for a candidate.
            step: to be filled.
            first, end: of all candidates, in ascending order, those of this range only. A range that begins later is of
                the same layer step; as the slots before may go again, it counts as a step of its own for that alone.
        """
        self._place(mask, step, first, end, is_hint=False)

    def hint(self, mask: Tensor, step: PlacedStep) -> None:
        """Give slots to what the next layer step may need: the first of it, for at most half of all slots.

        mask, step: as `place` is told.
        """
        self._place(mask, step, 0, self.n_slots // 2, is_hint=True)

    def _place(self, mask: Tensor, step: PlacedStep, first: int, end: int, *, is_hint: bool) -> None:
        import triton

        from sparseflow.kernels.device.place_kernel import SLOT_LIMIT, place

        if self.n_slots > SLOT_LIMIT:
            raise BadRequest(f"{self.n_slots} slots, and a GPU keeps at most {SLOT_LIMIT} a layer; give it less memory")
        place[(1,)](
            mask, self.slot_of, self.uses, self.stamp, self.neuron_in,
            step.ids, step.slots, step.missing, step.missing_at, step.places, step.counts, self.clock, self.totals,
            len(mask), self.n_neurons, self.n_slots, first, end,
            BLOCK=min(SHAPE.block, triton.next_power_of_2(self.n_neurons)),
            LISTED=min(SHAPE.listed, triton.next_power_of_2(self.n_neurons)),
            SLOTS=triton.next_power_of_2(self.n_slots), HALVING_STEPS=HALVING_STEPS, USE=0 if is_hint else _USE,
            MOST=_MOST, BITS=_BITS, IS_HINT=is_hint, num_warps=SHAPE.warps,
        )  # fmt: skip

    def empty(self) -> None:
        """Forget what lies in slots; not how often it was used."""
        self.slot_of.fill_(-1)
        self.neuron_in.fill_(-1)

    def forget(self, step: PlacedStep) -> None:
        """Take the slots back that a step has given, for bundles that have not come."""
        n = int(step.counts[N_PLACED])
        self.slot_of[step.missing[:n].long()] = -1
        self.neuron_in[step.places[:n].long()] = -1

    def place_ref(self, mask: Tensor, step: PlacedStep, first: int = 0, end: int = 2**31 - 1) -> None:
        """`place` in plain PyTorch, on any device."""
        ids = mask.any(0).nonzero().flatten()[first:end]
        n_foreseen = int(((self.stamp[ids] == -1 - self.clock) & (self.slot_of[ids] >= 0)).sum())
        n_missing, _ = self._place_ref(ids, step, _USE)
        self.clock += 1
        self._add_to_totals({N_STEPS: first == 0, N_CHOSEN: len(ids), N_MISSED: n_missing, N_FORESEEN: n_foreseen})

    def hint_ref(self, mask: Tensor, step: PlacedStep) -> None:
        """`hint` in plain PyTorch, on any device."""
        ids = mask.any(0).nonzero().flatten()[: self.n_slots // 2]
        _, n_placed = self._place_ref(ids, step, 0)
        missing = step.missing[: int(step.counts[N_MISSES])].long()
        self.stamp[missing] = -1 - self.clock
        self._add_to_totals({N_HINTS: 1, N_HINTED: n_placed})

    def _place_ref(self, ids: Tensor, step: PlacedStep, use: int) -> tuple[int, int]:
        """Fill `step`; each of `ids` is stamped with the step that comes. Returns how many missed, and were placed."""
        now = int(self.clock) + 1
        slots = self.slot_of[ids]
        missing_at = (slots < 0).nonzero().flatten()
        missing = ids[missing_at]
        slots[missing_at] = -1 - torch.arange(len(missing), dtype=torch.int32, device=ids.device)
        self.uses[ids] = (self._halved(ids, now) + use).clamp_max(_MOST)
        self.stamp[ids] = now
        is_full = self.neuron_in >= 0
        before = self.neuron_in.clamp_min(0).long()
        worth = torch.where(is_full, 1 + self._halved(before, now), 0)
        may_go = (~is_full | (self.stamp[before].abs() != now)).nonzero().flatten()
        n_placed = min(len(missing), len(may_go))
        going = may_go[torch.sort(worth[may_go], stable=True).indices[:n_placed]].sort().values
        victims = self.neuron_in[going]
        self.slot_of[victims[victims >= 0].long()] = -1
        self.neuron_in[going] = missing[:n_placed].int()
        self.slot_of[missing[:n_placed]] = going.int()
        slots[missing_at[:n_placed]] = going.int()
        for filled, values in zip(
            (step.ids, step.slots, step.missing, step.missing_at, step.places),
            (ids, slots, missing, missing_at, going), strict=True,
        ):  # fmt: skip
            filled[: len(values)] = values
        step.counts[:] = torch.tensor([len(ids), len(missing), n_placed], dtype=torch.int32)
        return len(missing), n_placed

    def _add_to_totals(self, found: dict[int, int]) -> None:
        for place, n in found.items():
            self.totals[place] += n

    def _halved(self, neurons: Tensor, step: int) -> Tensor:
        periods = step // HALVING_STEPS - self.stamp[neurons].abs() // HALVING_STEPS
        return self.uses[neurons] >> periods.clamp_max(31)
