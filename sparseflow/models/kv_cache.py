"""Keys and values appended where they lie, with room to spare; transformers' own cache copies all of them for a token."""

from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

_ROOM = "_sparseflow_room"  # attribute of a cache layer: the buffers that its keys and values are the beginning of
_LEAST_ROOM = 64  # positions
_GROWTH = 4  # a buffer that is full grows by one part in so many


def append(cache: Cache, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Append to one layer, as `Cache.update` does.

    Args:
        key, value: (n_sequences, n_heads, length, head_dim).

    Returns:
        All keys and all values of the layer, the given ones last.
    """
    length = key.shape[-2]
    reserved = reserve(cache, layer, key, length)
    if reserved is None:
        updated: tuple[Tensor, Tensor] = cache.update(key, value, layer)
        return updated
    keys, values = reserved
    keys[..., -length:, :] = key
    values[..., -length:, :] = value
    return keys, values


def reserve(cache: Cache, layer: int, like: Tensor, length: int) -> tuple[Tensor, Tensor] | None:
    """Make so many positions more in one layer, for the caller to write.

    Args:
        like: (n_sequences, n_heads, any, head_dim), of the dtype to be held.

    Returns:
        All keys and all values of the layer; those of the last positions are not yet set. None for a cache that is not
        a `DynamicCache` in this memory: any other keeps what it holds in its own way.
    """
    growing = cache.layers[layer] if layer < len(cache.layers) else None
    if type(cache) is not DynamicCache or type(growing) is not DynamicLayer or cache.offloading:
        return None
    if not growing.is_initialized:
        growing.lazy_initialization(like, like)
    buffers = getattr(growing, _ROOM, (None, None))
    growing.keys, keys = _lengthened(growing.keys, like, length, buffers[0])
    growing.values, values = _lengthened(growing.values, like, length, buffers[1])
    setattr(growing, _ROOM, (keys, values))
    return growing.keys, growing.values


def _lengthened(held: Tensor, like: Tensor, length: int, buffer: Tensor | None) -> tuple[Tensor, Tensor]:
    """`held` and so many positions more, and the buffer in which they lie. held: may have no element yet."""
    before = held.shape[-2] if held.numel() else 0
    after = before + length
    if buffer is None or after > buffer.shape[-2] or not _is_beginning(held, buffer):
        n_sequences, n_heads, _, head_dim = like.shape
        buffer = like.new_empty(n_sequences, n_heads, after + max(_LEAST_ROOM, after // _GROWTH), head_dim)
        if before:
            buffer[:, :, :before] = held
    return buffer[:, :, :after], buffer


def _is_beginning(held: Tensor, buffer: Tensor) -> bool:
    is_there = held.data_ptr() == buffer.data_ptr() and held.stride() == buffer.stride()
    return is_there and len(held) == len(buffer)
