"""The fully resident case: every shard mapped whole, verified once when it is read, never evicted."""

import mmap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from sparseflow.engine.shard_files import require_shard
from sparseflow.errors import ShardCorrupt
from sparseflow.store.manifest import Manifest, check_size, shard_name
from sparseflow.store.shard_format import bundle_checksums, map_file, shard_specs


class ResidentShards:
    """The bundles of all layers in one process's memory, backed by the page cache and shared through it.

    Opening reads every bundle and compares its checksum, so that a flipped byte is an error before the first token.
    """

    def __init__(self, store: Path, manifest: Manifest) -> None:
        """
        Raises:
            DiskError, ShardCorrupt: naming file, layer and neuron.
        """
        layers = range(manifest.profile.num_layers)
        for layer in layers:
            name = shard_name(layer)
            check_size(store, name, manifest.files[name])
        with ThreadPoolExecutor() as pool:
            shards = list(pool.map(lambda layer: _map_shard(store, layer, manifest), layers))
        self._maps: list[mmap.mmap] = [mapping for mapping, _ in shards]
        self._bundles = [bundles for _, bundles in shards]

    def layer(self, layer: int) -> NDArray[np.uint8]:
        """(ffn_dim, bundle_nbytes) uint8; copy-on-write, so treat it as read-only."""
        return self._bundles[layer]

    def close(self) -> None:
        """Forget the maps. Their memory is returned once nobody holds a view of it."""
        self._bundles.clear()
        self._maps.clear()


def _map_shard(store: Path, layer: int, manifest: Manifest) -> tuple[mmap.mmap, NDArray[np.uint8]]:
    profile, path = manifest.profile, store / shard_name(layer)
    expected = shard_specs(profile.ffn_dimension, profile.hidden_dimension, profile.dtype)
    places = require_shard(path, expected)
    mapping = map_file(path)
    content = np.frombuffer(mapping, np.uint8)
    start, end = places["bundles"].offset, places["checksums"].offset
    bundles = content[start:end].reshape(profile.ffn_dimension, profile.bundle_nbytes)
    mapping.madvise(mmap.MADV_WILLNEED)
    if xxhash.xxh3_64_hexdigest(content.data) != manifest.files[shard_name(layer)].xxh3_64:
        wrong = np.flatnonzero(bundle_checksums(bundles) != content[end:].view(np.uint64))
        what = f"{len(wrong)} of {len(bundles)} bundles, neuron {wrong[0]} first," if len(wrong) else "bytes"
        raise ShardCorrupt(
            f"{path}: layer {layer}, {what} differ from their checksum; remove the store and convert the model again"
        )
    return mapping, bundles
