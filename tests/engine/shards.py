"""Stores of bundles that say which they are: every byte follows from layer and neuron, so nothing has to be kept."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sparseflow.store.manifest import Manifest, shard_name
from sparseflow.store.profile import ModelProfile
from sparseflow.store.shard_format import (
    FileEntry,
    TensorFileWriter,
    bundle_checksums,
    hash_table,
    read_checksum_table,
    read_places,
    shard_specs,
)

STRAIGHT = 512  # bytes of a bundle: a multiple of what direct I/O asks for on most disks
BUNDLE_SIZES = {"512": 512, "4096": 4096, "96": 96, "128": 128, "1600": 1600}


def content_of(layer: int, ids: NDArray[np.integer], nbytes: int) -> NDArray[np.uint8]:
    """(n, nbytes) uint8: what the bundles hold. splitmix64 of layer, neuron and position."""
    words = -(-nbytes // 8)
    start = (np.uint64(layer) << np.uint64(40)) + (np.asarray(ids, np.uint64) << np.uint64(16))
    x = (start[:, None] + np.arange(words, dtype=np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (x ^ (x >> np.uint64(31))).view(np.uint8)[:, :nbytes]


class Shards:
    """A folder with the shards of a model, and ways to damage them. An engine needs no more of a store."""

    def __init__(self, folder: Path, *, n_layers: int = 3, ffn_dim: int = 61, bundle_nbytes: int = STRAIGHT) -> None:
        hidden = bundle_nbytes // 4  # two rows of float16
        self.folder = folder
        self.profile = ModelProfile("self-describing", hidden, ffn_dim, n_layers, 1, 8, 8, dtype="float16")
        assert self.profile.bundle_nbytes == bundle_nbytes
        self.n_layers, self.ffn_dim, self.bundle_nbytes = n_layers, ffn_dim, bundle_nbytes
        (folder / "neurons").mkdir(parents=True)
        files = {shard_name(n): self._write(n) for n in range(n_layers)}
        tables = {shard_name(n): hash_table(read_checksum_table(self.path(n))) for n in range(n_layers)}
        self.manifest = Manifest(self.profile, files, {}, tables)
        self.start = read_places(self.path(0))["bundles"].offset

    def _write(self, layer: int) -> FileEntry:
        with TensorFileWriter(
            self.path(layer), shard_specs(self.ffn_dim, self.profile.hidden_dimension, "float16")
        ) as w:
            bundles = content_of(layer, np.arange(self.ffn_dim), self.bundle_nbytes)
            w.write(bundles)
            w.write(bundle_checksums(np.ascontiguousarray(bundle) for bundle in bundles))
            return w.finish()

    @property
    def n_bundles(self) -> int:
        """Of all layers."""
        return self.n_layers * self.ffn_dim

    def path(self, layer: int) -> Path:
        """A layer's shard."""
        return self.folder / shard_name(layer)

    def content(self, layer: int, ids: NDArray[np.integer]) -> NDArray[np.uint8]:
        """(n, bundle_nbytes) uint8: what bundles must hold."""
        return content_of(layer, ids, self.bundle_nbytes)

    def flip(self, layer: int, neuron: int, byte: int = 0) -> None:
        """Change one bit of a bundle, in place; a second time changes it back."""
        offset = self.start + neuron * self.bundle_nbytes + byte
        fd = os.open(self.path(layer), os.O_RDWR)
        try:
            os.pwrite(fd, bytes([os.pread(fd, 1, offset)[0] ^ 0x40]), offset)
        finally:
            os.close(fd)

    @contextmanager
    def flipped(self, layer: int, *neurons: int, byte: int = 0) -> Iterator[None]:
        """Bundles with one wrong bit each, for a while."""
        for neuron in neurons:
            self.flip(layer, neuron, byte)
        try:
            yield
        finally:
            for neuron in neurons:
                self.flip(layer, neuron, byte)

    @contextmanager
    def cut(self, layer: int, neuron: int, extra: int = 0) -> Iterator[None]:
        """The file ends `extra` bytes into a bundle, for a while."""
        whole = self.path(layer).read_bytes()
        kept = self.start + neuron * self.bundle_nbytes + extra
        os.truncate(self.path(layer), kept)
        try:
            yield
        finally:
            fd = os.open(self.path(layer), os.O_WRONLY)
            try:
                os.pwrite(fd, whole[kept:], kept)
            finally:
                os.close(fd)


def some_ids(rng: np.random.Generator, ffn_dim: int, n: int) -> NDArray[np.uint32]:
    """(n,) uint32, ascending, no repeats."""
    return np.sort(rng.choice(ffn_dim, n, replace=False)).astype(np.uint32)


def neurons(*ids: int) -> NDArray[np.uint32]:
    """Neuron ids as they are written down."""
    return np.array(ids, np.uint32)
