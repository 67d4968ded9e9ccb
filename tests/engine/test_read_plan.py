"""Plans carried out byte by byte in Python: what is wanted arrives where it shall, once, and nothing else does."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from shards import neurons, some_ids

from sparseflow.engine.read_plan import Reads, group, scatter
from sparseflow.engine.read_queue import MOST_IOVECS

SCRAP = 1 << 40  # far from every slot
SLOTS = 1 << 20  # where the first slot lies


def reads_of(reads: Reads, ids: NDArray[np.uint32]) -> list[list[int]]:
    """The ids of each read."""
    return [part.tolist() for part in np.split(ids, reads.first[1:-1])] if len(ids) else []


def carried_out(
    ids: NDArray[np.uint32], slots: NDArray[np.int64], reads: Reads, bundle_nbytes: int, gap_nbytes: int, n_ids: int
) -> NDArray[np.int64]:
    """The arena after all reads of a file whose bytes are numbered: (n_slots, bundle_nbytes) of those numbers.

    Byte by byte; a byte that goes anywhere but to a slot that is still empty, or the scrap, fails.
    """
    arena = np.full((len(slots) + 2, bundle_nbytes), -1, np.int64)
    memory = arena.reshape(-1)
    addresses = (SLOTS + slots * bundle_nbytes).astype(np.uint64)
    vectors = scatter(ids, addresses, reads, bundle_nbytes, SCRAP)
    assert len(vectors.first) == len(reads) + 1
    assert vectors.first[-1] == len(vectors.iovecs)
    for number, its in enumerate(reads_of(reads, ids)):
        iovecs = vectors.iovecs[vectors.first[number] : vectors.first[number + 1]]
        assert 1 <= len(iovecs) <= MOST_IOVECS
        offset = its[0] * bundle_nbytes
        for address, nbytes in iovecs.tolist():
            assert nbytes > 0
            if address == SCRAP:
                assert nbytes <= gap_nbytes
            else:
                for n in range(nbytes):
                    assert memory[address - SLOTS + n] == -1, "written twice"
                    memory[address - SLOTS + n] = offset + n
            offset += nbytes
        assert offset == (its[-1] + 1) * bundle_nbytes <= n_ids * bundle_nbytes
    return arena


def group_slowly(ids: list[int], bundle_nbytes: int, gap_nbytes: int) -> list[list[int]]:
    """Runs: neighbours with no gap between them that is too long."""
    runs: list[list[int]] = []
    for id_ in ids:
        if runs and (id_ - runs[-1][-1] - 1) * bundle_nbytes <= gap_nbytes:
            runs[-1].append(id_)
        else:
            runs.append([id_])
    return runs


sizes = st.integers(1, 40)


@settings(max_examples=300, deadline=None, database=None)
@given(
    chosen=st.sets(st.integers(0, 59), max_size=40),
    bundle_nbytes=sizes,
    gap_nbytes=st.integers(0, 200),
    longest_nbytes=st.integers(0, 300),
    seed=st.integers(0, 99),
)
def test_every_byte_arrives_once_and_only_gaps_go_to_the_scrap(
    chosen: set[int], bundle_nbytes: int, gap_nbytes: int, longest_nbytes: int, seed: int
) -> None:
    ids = neurons(*sorted(chosen))
    slots = np.random.default_rng(seed).permutation(len(ids) + 2)[: len(ids)]
    reads = group(ids, bundle_nbytes, gap_nbytes, longest_nbytes)
    arena = carried_out(ids, slots, reads, bundle_nbytes, gap_nbytes, 60)
    expected = np.full_like(arena, -1)
    expected[slots] = ids.astype(np.int64)[:, None] * bundle_nbytes + np.arange(bundle_nbytes)
    assert np.array_equal(arena, expected)


@settings(max_examples=300, deadline=None, database=None)
@given(
    chosen=st.sets(st.integers(0, 200)),
    bundle_nbytes=sizes,
    gap_nbytes=st.integers(0, 200),
    longest=st.integers(0, 300),
)
def test_reads_are_runs_cut_no_more_often_than_their_length_asks_for(
    chosen: set[int], bundle_nbytes: int, gap_nbytes: int, longest: int
) -> None:
    ids = sorted(chosen)
    reads = reads_of(group(neurons(*ids), bundle_nbytes, gap_nbytes, longest), neurons(*ids))
    assert [id_ for read in reads for id_ in read] == ids
    for read in reads:
        assert (read[-1] - read[0] + 1) * bundle_nbytes <= max(longest, bundle_nbytes)
    most_bundles = max(1, longest // bundle_nbytes)
    for run in group_slowly(ids, bundle_nbytes, gap_nbytes):
        its = [read for read in reads if read[0] in run]
        assert {id_ for read in its for id_ in read} == set(run), "a gap too long was read along"
        assert len(its) <= -(-(run[-1] - run[0] + 1) // most_bundles)


def test_named_examples() -> None:
    ids = neurons(0, 1, 4, 9, 10, 11, 12)
    assert reads_of(group(ids, 100, 0, 10_000), ids) == [[0, 1], [4], [9, 10, 11, 12]]
    assert reads_of(group(ids, 100, 199, 10_000), ids) == [[0, 1], [4], [9, 10, 11, 12]]
    assert reads_of(group(ids, 100, 200, 10_000), ids) == [[0, 1, 4], [9, 10, 11, 12]]
    assert reads_of(group(ids, 100, 10_000, 10_000), ids) == [[0, 1, 4, 9, 10, 11, 12]]
    assert reads_of(group(ids, 100, 0, 299), ids) == [[0, 1], [4], [9, 10], [11, 12]]
    assert reads_of(group(ids, 100, 0, 1), ids) == [[0], [1], [4], [9], [10], [11], [12]]
    assert reads_of(group(neurons(), 100, 0, 1), neurons()) == []


def test_one_read_never_has_more_pieces_than_the_kernel_takes(rng: np.random.Generator) -> None:
    """Tiny bundles, every second one, and no limit else: as many pieces as there can be."""
    every_second = np.arange(0, 6000, 2, dtype=np.uint32)
    for ids in (every_second, np.arange(3000, dtype=np.uint32), some_ids(rng, 6000, 3000)):
        reads = group(ids, 1, 1 << 30, 1 << 30)
        addresses = np.arange(len(ids), dtype=np.uint64)
        assert np.diff(scatter(ids, addresses, reads, 1, SCRAP).first).max() <= MOST_IOVECS
    assert len(group(every_second, 1, 1 << 30, 1 << 30)) == 12  # 512 bundles each


@pytest.mark.parametrize("bundle_nbytes", [96, 4096, 147456])
def test_sizes_of_real_models_keep_the_limits(rng: np.random.Generator, bundle_nbytes: int) -> None:
    for share in (0.01, 0.1, 0.5, 1):
        ids = some_ids(rng, 16384, int(16384 * share))
        gap_nbytes, longest_nbytes = int(rng.integers(0, 200_000)), 256 << 10
        reads = group(ids, bundle_nbytes, gap_nbytes, longest_nbytes)
        slots = rng.permutation(len(ids))
        vectors = scatter(ids, (SLOTS + slots * bundle_nbytes).astype(np.uint64), reads, bundle_nbytes, SCRAP)
        nbytes = np.add.reduceat(vectors.iovecs["nbytes"], vectors.first[:-1])
        assert nbytes.max() <= max(longest_nbytes, bundle_nbytes)
        is_scrap = vectors.iovecs["address"] == SCRAP
        assert not is_scrap.any() or vectors.iovecs["nbytes"][is_scrap].max() <= gap_nbytes
        assert np.count_nonzero(~is_scrap) == len(ids)
        assert np.diff(vectors.first).max() <= MOST_IOVECS
