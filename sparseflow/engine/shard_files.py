"""The open shards of a store: descriptors, where bundles begin, and the checksum of each bundle."""

import errno
import mmap
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sparseflow.errors import DiskError, ShardCorrupt
from sparseflow.store.manifest import Manifest, check_size, shard_name
from sparseflow.store.shard_format import (
    TensorPlace,
    TensorSpec,
    bundle_checksums,
    hash_table,
    read_checksum_table,
    read_places,
    shard_specs,
)

_ALIGNMENTS = (512, 1024, 2048, 4096)  # bytes; what direct I/O asks for on the disks there are
_REFUSALS = (errno.EINVAL, errno.EOPNOTSUPP)  # what file systems without direct I/O answer


class ShardFiles:
    """One descriptor a layer. Bundle `id` of any layer begins at `start + id * bundle_nbytes`."""

    def __init__(self, store: Path, manifest: Manifest) -> None:
        """
        Raises:
            DiskError: a shard is missing or cannot be read. ShardCorrupt: it is not a shard of this model.
        """
        profile = manifest.profile
        self.bundle_nbytes = profile.bundle_nbytes
        self.ffn_dim = profile.ffn_dimension
        self.paths = [store / shard_name(layer) for layer in range(profile.num_layers)]
        expected = shard_specs(profile.ffn_dimension, profile.hidden_dimension, profile.dtype)
        self.checksums = np.empty((profile.num_layers, profile.ffn_dimension), np.uint64)
        for layer, path in enumerate(self.paths):
            check_size(store, shard_name(layer), manifest.files[shard_name(layer)])
            self.start = require_shard(path, expected)["bundles"].offset
            self.checksums[layer] = read_checksum_table(path)
            if hash_table(self.checksums[layer]) != manifest.checksum_tables[shard_name(layer)]:
                raise ShardCorrupt(
                    f"{path}: layer {layer}, its checksums are not those of this store; "
                    "remove the store and convert the model again"
                )
        self.fds: list[int] = []

    def open(self, *, direct: bool) -> int | None:
        """Open all shards. Returns the alignment that reads need, in bytes; None if `direct` is refused here.

        The alignment is found by trying: offset, length and memory of a read must be multiples of it.
        """
        flags = os.O_RDONLY | os.O_CLOEXEC | (os.O_DIRECT if direct else 0)
        try:
            for path in self.paths:
                self.fds.append(os.open(path, flags))
        except OSError as error:
            self.close()
            if direct and error.errno in _REFUSALS:
                return None
            remedy = "raise `ulimit -n`" if error.errno == errno.EMFILE else "check its permissions"
            raise DiskError(f"{error.filename}: cannot be opened ({error.strerror}); {remedy}") from error
        if not direct:
            for fd in self.fds:
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)  # no read-ahead: neighbours are seldom wanted
            return 1
        alignment = None
        try:
            alignment = next((n for n in _ALIGNMENTS if _reads_aligned_to(self.fds[0], n)), None)
        finally:
            if alignment is None:
                self.close()
        return alignment

    def are_intact(
        self, layer: int, ids: NDArray[np.uint32], memory: NDArray[np.uint8], slots: NDArray[np.int64]
    ) -> NDArray[np.bool_]:
        """Whether each bundle's bytes have its checksum, (n,) bool. memory: (n_slots, bundle_nbytes) uint8."""
        found = bundle_checksums(map(memory.__getitem__, slots.tolist()))
        return np.asarray(found == self.checksums[layer, ids])

    def drop_cached_pages(self) -> None:
        """Give the page cache's copies of the shards back: with direct reads nobody looks at them."""
        for fd in self.fds:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """Close all. May be called twice."""
        for fd in self.fds:
            os.close(fd)
        self.fds = []


def require_shard(path: Path, expected: Sequence[TensorSpec]) -> dict[str, TensorPlace]:
    """Where the tensors of a shard lie.

    Raises:
        ShardCorrupt: it holds others than `expected`.
    """
    places = read_places(path)
    if [place.spec for place in places.values()] != list(expected):
        raise ShardCorrupt(
            f"{path}: holds {list(places)}, not the bundles of this model; remove the store and convert the model again"
        )
    return places


def _reads_aligned_to(fd: int, alignment: int) -> bool:
    memory = memoryview(mmap.mmap(-1, 2 * mmap.PAGESIZE))[alignment : 2 * alignment]
    try:
        return os.preadv(fd, [memory], alignment) >= 0
    except OSError as error:
        if error.errno in _REFUSALS:
            return False
        raise DiskError(f"direct I/O: {error.strerror}; use buffered reads (io='buffered')") from error
