"""Which reads bring some bundles of one shard: neighbours together, gaps read along where that is cheaper.

A read covers the bundles of neighbouring ids and, between them, gaps whose bytes cost less than a read of their own;
those bytes go to a scrap of memory that nobody looks at.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sparseflow.engine.read_queue import IOVEC, MOST_IOVECS

LONGEST_READ_NBYTES = 256 << 10  # beyond that a longer read is hardly faster, and more of them go on at once


class Reads(NamedTuple):
    """Read r covers the ids from position first[r] up to first[r + 1] of those asked for. first: (n_reads + 1,)."""

    first: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.first) - 1


def group(ids: NDArray[np.uint32], bundle_nbytes: int, gap_nbytes: int, longest_nbytes: int) -> Reads:
    """Group ascending ids into reads.

    Args:
        gap_nbytes: the longest gap worth reading along.
        longest_nbytes: of a read; at least one bundle is read.
    """
    is_start = np.ones(len(ids) + 1, bool)  # and the end
    is_start[1:-1] = ids[1:] - ids[:-1] > gap_nbytes // bundle_nbytes + 1
    first = is_start.nonzero()[0]
    longest = max(1, min(longest_nbytes // bundle_nbytes, MOST_IOVECS // 2))  # bundles
    if len(ids) and (ids[first[1:] - 1] - ids[first[:-1]] >= longest).any():
        run_start = np.repeat(ids[first[:-1]], first[1:] - first[:-1])
        part = (ids - run_start) // longest
        is_start[1:-1] |= part[1:] != part[:-1]
        first = is_start.nonzero()[0]
    return Reads(first if len(ids) else first[:1])


class Vectors(NamedTuple):
    """The memory that reads fill. iovecs: (n,) IOVEC. first: (n_reads + 1,), where each read's begin."""

    iovecs: NDArray[np.void]
    first: NDArray[np.int64]


def scatter(
    ids: NDArray[np.uint32], addresses: NDArray[np.uint64], reads: Reads, bundle_nbytes: int, scrap: int
) -> Vectors:
    """Where each byte of some reads goes: bundles to their addresses, gaps to the scrap.

    Args:
        addresses: (n,) uint64, of each bundle's slot.
        scrap: address of memory at least as long as the longest gap.
    """
    n = len(ids)
    gap = np.zeros(n, np.int64)  # bundles before each one that its read brings along
    gap[1:] = ids[1:] - ids[:-1] - 1
    gap[reads.first[:-1]] = 0
    has_gap = gap > 0
    if not has_gap.any():
        iovecs = np.empty(n, IOVEC)
        iovecs["address"] = addresses
        iovecs["nbytes"] = bundle_nbytes
        return Vectors(iovecs, reads.first)
    place = np.arange(n) + np.cumsum(has_gap)  # of each bundle among the iovecs; its gap comes right before it
    iovecs = np.empty(n + np.count_nonzero(has_gap), IOVEC)
    iovecs["address"][place] = addresses
    iovecs["nbytes"][place] = bundle_nbytes
    iovecs["address"][place[has_gap] - 1] = scrap
    iovecs["nbytes"][place[has_gap] - 1] = gap[has_gap] * bundle_nbytes
    return Vectors(iovecs, np.append(place[reads.first[:-1]], len(iovecs)))
