"""The kernel of `Placement.place` and `hint`, whose `place_ref` and `hint_ref` say in PyTorch what they do.

One program lists the candidates, then goes over that list, then over the slots. What takes long in it is waiting, for
memory and for its other warps: so of a layer's neurons it looks at the mask alone, and counts two things in one scan.
"""

import triton
import triton.language as tl

SLOT_LIMIT = 2**16 - 1
"""No more slots than this: counts of them are packed in 16 bits."""


@triton.jit
def _halved(uses, stamp, step, HALVING_STEPS: tl.constexpr):
    """A count as it is in `step`. stamp: of `Placement`."""
    periods = step // HALVING_STEPS - tl.abs(stamp) // HALVING_STEPS
    return uses >> tl.minimum(periods, 31)


@triton.jit
def _count_before(low, high):
    """For each place, how many of either lie before it. low, high: 0 or 1, int32."""
    packed = low + (high << 16)
    before = tl.cumsum(packed, 0) - packed
    return before & 0xFFFF, (before >> 16) & 0xFFFF


@triton.jit
def _bin_of_nth(values, is_counted, n, BINS: tl.constexpr):
    """The n-th smallest of what is counted, and how many are smaller. values: from 0 to BINS - 1."""
    up_to = tl.cumsum(tl.histogram(values, BINS, mask=is_counted), 0)
    is_before = up_to < n
    return tl.sum(is_before.to(tl.int32), 0), tl.max(tl.where(is_before, up_to, 0), 0)


@triton.jit
def _nth_least(worth, may_go, n, BITS: tl.constexpr):
    """The n-th least worth, below 2^BITS, of those that may go; and how many of them are worth less."""
    LOW: tl.constexpr = (BITS + 1) // 2
    high, n_below = _bin_of_nth(worth >> LOW, may_go, n, 1 << (BITS - LOW))
    is_low = may_go & (worth >> LOW == high)
    low, n_below_there = _bin_of_nth(worth & ((1 << LOW) - 1), is_low, n - n_below, 1 << LOW)
    return (high << LOW) + low, n_below + n_below_there


@triton.jit
def _list_candidates(
    mask_ptr, ids_ptr, n_tokens, n_neurons, first_rank, end_rank, BLOCK: tl.constexpr
):  # fmt: skip
    """Fill `ids`. Returns how many."""
    n_seen = 0
    for first in range(0, n_neurons, BLOCK):
        neuron = first + tl.arange(0, BLOCK)
        chosen = tl.load(mask_ptr + neuron, mask=neuron < n_neurons, other=0).to(tl.int32)
        for token in range(1, n_tokens):
            chosen |= tl.load(mask_ptr + token * n_neurons + neuron, mask=neuron < n_neurons, other=0).to(tl.int32)
        rank = n_seen + tl.cumsum(chosen, 0) - chosen
        n_seen += tl.sum(chosen, 0)
        tl.store(ids_ptr + rank - first_rank, neuron, mask=(chosen != 0) & (rank >= first_rank) & (rank < end_rank))
    return tl.maximum(tl.minimum(n_seen, end_rank) - first_rank, 0)


@triton.jit
def _use_candidates(
    ids_ptr, slots_ptr, missing_ptr, missing_at_ptr, slot_of_ptr, uses_ptr, stamp_ptr, n_chosen, step,
    LISTED: tl.constexpr, HALVING_STEPS: tl.constexpr, USE: tl.constexpr, MOST: tl.constexpr, IS_HINT: tl.constexpr,
):  # fmt: skip
    """Count their uses; fill `slots` and what tells of the missing. Returns how many are missing, and were foreseen."""
    n_missing = 0
    n_foreseen = 0
    for first in range(0, n_chosen, LISTED):
        rank = first + tl.arange(0, LISTED)
        is_chosen = rank < n_chosen
        neuron = tl.load(ids_ptr + rank, mask=is_chosen, other=0)
        slot = tl.load(slot_of_ptr + neuron, mask=is_chosen, other=0)
        uses = tl.load(uses_ptr + neuron, mask=is_chosen, other=0)
        stamp = tl.load(stamp_ptr + neuron, mask=is_chosen, other=0)
        is_missing = slot < 0
        missing = is_missing.to(tl.int32)
        nth = n_missing + tl.cumsum(missing, 0) - missing
        n_missing += tl.sum(missing, 0)
        tl.store(slots_ptr + rank, tl.where(is_missing, -1 - nth, slot), mask=is_chosen)
        tl.store(missing_ptr + nth, neuron, mask=is_missing)
        tl.store(missing_at_ptr + nth, rank, mask=is_missing)
        n_foreseen += tl.sum((is_chosen & (slot >= 0) & (stamp == -step)).to(tl.int32), 0)
        uses = tl.minimum(_halved(uses, stamp, step, HALVING_STEPS) + USE, MOST)
        tl.store(uses_ptr + neuron, uses, mask=is_chosen)
        now = tl.zeros([LISTED], tl.int32) + step
        if IS_HINT:
            now = tl.where(is_missing, -now, now)
        tl.store(stamp_ptr + neuron, now, mask=is_chosen)
    return n_missing, n_foreseen


@triton.jit
def _add(total_ptr, n):
    tl.store(total_ptr, tl.load(total_ptr) + n)


@triton.jit
def place(
    mask_ptr, slot_of_ptr, uses_ptr, stamp_ptr, neuron_in_ptr,
    ids_ptr, slots_ptr, missing_ptr, missing_at_ptr, place_ptr, counts_ptr, clock_ptr, totals_ptr,
    n_tokens, n_neurons, n_slots, first_rank, end_rank,
    BLOCK: tl.constexpr, LISTED: tl.constexpr, SLOTS: tl.constexpr, HALVING_STEPS: tl.constexpr,
    USE: tl.constexpr, MOST: tl.constexpr, BITS: tl.constexpr, IS_HINT: tl.constexpr,
):  # fmt: skip
    """As `Placement.place` and `hint` are told."""
    step = tl.load(clock_ptr) + 1
    slot = tl.arange(0, SLOTS)
    is_slot = slot < n_slots
    before = tl.load(neuron_in_ptr + slot, mask=is_slot, other=-1)
    is_full = before >= 0
    n_chosen = _list_candidates(mask_ptr, ids_ptr, n_tokens, n_neurons, first_rank, end_rank, BLOCK)
    tl.debug_barrier()
    # Counts may change below while they are read here, but only those of neurons whose slots stay.
    uses = tl.load(uses_ptr + before, mask=is_full, other=0)
    stamp = tl.load(stamp_ptr + before, mask=is_full, other=0)
    worth = tl.where(is_full, 1 + _halved(uses, stamp, step, HALVING_STEPS), 0)
    n_missing, n_foreseen = _use_candidates(
        ids_ptr, slots_ptr, missing_ptr, missing_at_ptr, slot_of_ptr, uses_ptr, stamp_ptr, n_chosen, step,
        LISTED, HALVING_STEPS, USE, MOST, IS_HINT,
    )  # fmt: skip
    tl.debug_barrier()

    may_go = is_slot & ~(is_full & (tl.abs(tl.load(stamp_ptr + before, mask=is_full, other=0)) == step))
    n_placed = tl.minimum(n_missing, tl.sum(may_go.to(tl.int32), 0))
    limit, n_below = _nth_least(worth, may_go, n_placed, BITS)
    is_below = may_go & (worth < limit)
    is_equal = may_go & (worth == limit)
    n_equal = n_placed - n_below  # so many of these go, the first ones
    below, equal = _count_before(is_below.to(tl.int32), is_equal.to(tl.int32))
    goes = is_below | (is_equal & (equal < n_equal))
    nth = below + tl.minimum(equal, n_equal)
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
    # Totals lie in the order of `placement.N_STEPS` and those beside it.
    if IS_HINT:
        _add(totals_ptr + 3, 1)
        _add(totals_ptr + 4, n_placed)
    else:
        tl.store(clock_ptr, step)
        if first_rank == 0:
            _add(totals_ptr, 1)
        _add(totals_ptr + 1, n_chosen)
        _add(totals_ptr + 2, n_missing)
        _add(totals_ptr + 5, n_foreseen)
