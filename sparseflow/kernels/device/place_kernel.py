"""The kernel of `Placement.place`, whose `place_ref` says in PyTorch what it does.

One program goes over all neurons of the layer, then over all slots.
"""

import triton
import triton.language as tl


@triton.jit
def _halved(uses, stamp, step, HALVING_STEPS: tl.constexpr):
    """A count as it is in `step`, of what was used in step `stamp`."""
    periods = step // HALVING_STEPS - stamp // HALVING_STEPS
    return uses >> tl.minimum(periods, 31)


@triton.jit
def place(
    mask_ptr, slot_of_ptr, uses_ptr, stamp_ptr, neuron_in_ptr,
    ids_ptr, slots_ptr, missing_ptr, missing_at_ptr, place_ptr, counts_ptr, clock_ptr, totals_ptr,
    n_tokens, n_neurons, n_slots, first_rank, end_rank,
    BLOCK: tl.constexpr, SLOTS: tl.constexpr, HALVING_STEPS: tl.constexpr, USE: tl.constexpr, MOST: tl.constexpr,
    BITS: tl.constexpr,
):  # fmt: skip
    step = tl.load(clock_ptr) + 1
    n_seen = 0
    n_missing = 0
    for first in range(0, n_neurons, BLOCK):
        neuron = first + tl.arange(0, BLOCK)
        is_neuron = neuron < n_neurons
        chosen = tl.zeros([BLOCK], tl.int32)
        for token in range(n_tokens):
            chosen |= tl.load(mask_ptr + token * n_neurons + neuron, mask=is_neuron, other=0).to(tl.int32)
        rank = n_seen + tl.cumsum(chosen, 0) - chosen
        n_seen += tl.sum(chosen, 0)
        is_chosen = (chosen != 0) & (rank >= first_rank) & (rank < end_rank)
        rank -= first_rank
        slot = tl.load(slot_of_ptr + neuron, mask=is_chosen, other=0)
        is_missing = is_chosen & (slot < 0)
        missing = is_missing.to(tl.int32)
        nth = n_missing + tl.cumsum(missing, 0) - missing
        n_missing += tl.sum(missing, 0)
        tl.store(ids_ptr + rank, neuron, mask=is_chosen)
        tl.store(slots_ptr + rank, tl.where(is_missing, -1 - nth, slot), mask=is_chosen)
        tl.store(missing_ptr + nth, neuron, mask=is_missing)
        tl.store(missing_at_ptr + nth, rank, mask=is_missing)
        uses = tl.load(uses_ptr + neuron, mask=is_chosen, other=0)
        stamp = tl.load(stamp_ptr + neuron, mask=is_chosen, other=0)
        tl.store(uses_ptr + neuron, tl.minimum(_halved(uses, stamp, step, HALVING_STEPS) + USE, MOST), mask=is_chosen)
        tl.store(stamp_ptr + neuron, step, mask=is_chosen)
    tl.debug_barrier()
    n_chosen = tl.maximum(tl.minimum(n_seen, end_rank) - first_rank, 0)

    slot = tl.arange(0, SLOTS)
    is_slot = slot < n_slots
    before = tl.load(neuron_in_ptr + slot, mask=is_slot, other=-1)
    is_full = before >= 0
    stamp = tl.load(stamp_ptr + before, mask=is_full, other=0)
    uses = tl.load(uses_ptr + before, mask=is_full, other=0)
    worth = tl.where(is_full, 1 + _halved(uses, stamp, step, HALVING_STEPS), 0)
    may_go = is_slot & ~(is_full & (stamp == step))
    n_placed = tl.minimum(n_missing, tl.sum(may_go.to(tl.int32), 0))
    limit = 0  # becomes the least worth that n_placed of those that may go do not exceed
    for bit in tl.static_range(BITS, -1, -1):
        tried = limit + (1 << bit)
        n_below = tl.sum((may_go & (worth < tried)).to(tl.int32), 0)
        limit = tl.where(n_below < n_placed, tried, limit)
    is_below = may_go & (worth < limit)
    is_equal = may_go & (worth == limit)
    n_below = tl.sum(is_below.to(tl.int32), 0)
    equal = is_equal.to(tl.int32)
    goes = is_below | (is_equal & (tl.cumsum(equal, 0) - equal < n_placed - n_below))
    going = goes.to(tl.int32)
    nth = tl.cumsum(going, 0) - going
    goes = goes & (nth < n_placed)
    neuron = tl.load(missing_ptr + nth, mask=goes, other=0)
    rank = tl.load(missing_at_ptr + nth, mask=goes, other=0)
    tl.store(slot_of_ptr + before, tl.full([SLOTS], -1, tl.int32), mask=goes & is_full)
    tl.store(neuron_in_ptr + slot, neuron, mask=goes)
    tl.store(slots_ptr + rank, slot, mask=goes)
    tl.store(place_ptr + nth, slot, mask=goes)
    tl.store(slot_of_ptr + neuron, slot, mask=goes)
    tl.store(counts_ptr, n_chosen)
    tl.store(counts_ptr + 1, n_missing)
    tl.store(counts_ptr + 2, n_placed)
    tl.store(clock_ptr, step)
    tl.store(totals_ptr, tl.load(totals_ptr) + 1)
    tl.store(totals_ptr + 1, tl.load(totals_ptr + 1) + n_chosen)
    tl.store(totals_ptr + 2, tl.load(totals_ptr + 2) + n_missing)
