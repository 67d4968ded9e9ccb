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
        cache: only a `DynamicCache` on this device grows in place; any other does it its own way.
        key, value: (n_sequences, n_heads, length, head_dim).

    Returns:
        All keys and all values of the layer, the given ones last.
    """
    growing = cache.layers[layer] if layer < len(cache.layers) else None
    if type(cache) is not DynamicCache or type(growing) is not DynamicLayer or cache.offloading:
        updated: tuple[Tensor, Tensor] = cache.update(key, value, layer)
        return updated
    if not growing.is_initialized:
        growing.lazy_initialization(key, value)
    buffers = getattr(growing, _ROOM, (None, None))
    growing.keys, keys = _appended(growing.keys, key, buffers[0])
    growing.values, values = _appended(growing.values, value, buffers[1])
    setattr(growing, _ROOM, (keys, values))
    return growing.keys, growing.values


def _appended(held: Tensor, new: Tensor, buffer: Tensor | None) -> tuple[Tensor, Tensor]:
    """`held` and `new` together, and the buffer in which they lie. held: may have no element yet."""
    before = held.shape[-2] if held.numel() else 0
    length = before + new.shape[-2]
    is_beginning = (
        buffer is not None
        and held.data_ptr() == buffer.data_ptr()
        and held.stride() == buffer.stride()
        and len(held) == len(buffer)
    )
    if buffer is None or not is_beginning or length > buffer.shape[-2]:
        room = length + max(_LEAST_ROOM, length // _GROWTH)
        buffer = new.new_empty(*new.shape[:-2], room, new.shape[-1])
        if before:
            buffer[..., :before, :] = held
    buffer[..., before:length, :] = new
    return buffer[..., :length, :], buffer
