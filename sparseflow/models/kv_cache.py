"""Keys and values appended where they lie, with room to spare: transformers' cache copies all of them for a token."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

_ROOM = "_sparseflow_room"  # attribute of a cache layer: its `Room`
_LEAST_ROOM = 64  # positions
_CPU = torch.device("cpu")
_GROWTH = 4  # a buffer that is full grows by one part in so many


def append(cache: Cache, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Append to one layer, as `Cache.update` does.

    Args:
        key, value: (n_sequences, n_heads, length, head_dim).

    Returns:
        All keys and all values of the layer, the given ones last.
    """
    length = key.shape[2]
    reserved = reserve(cache, layer, key.shape, key.dtype, key.device)
    if reserved is None:
        updated: tuple[Tensor, Tensor] = cache.update(key, value, layer)
        return updated
    keys, values = reserved
    keys[:, :, -length:] = key
    values[:, :, -length:] = value
    return keys, values


def reserve(
    cache: Cache, layer: int, shape: Sequence[int], dtype: torch.dtype, device: torch.device = _CPU
) -> tuple[Tensor, Tensor] | None:
    """Make positions more in one layer, for the caller to write.

    Args:
        shape: of what will be appended, (n_sequences, n_heads, length, head_dim).

    Returns:
        All keys and all values of the layer; those of the last positions are not yet set. None for a cache that is not
        a `DynamicCache` in this memory: any other keeps what it holds in its own way.
    """
    if not can_reserve(cache, layer):
        return None
    growing = cache.layers[layer]
    if not growing.is_initialized:
        nothing = torch.empty(0, dtype=dtype, device=device)
        growing.lazy_initialization(nothing, nothing)
    room: Room | None = getattr(growing, _ROOM, None)
    before = growing.keys.shape[2] if growing.keys.numel() else 0
    after = before + shape[2]
    # Whoever has replaced what we left here (cropped, reordered, copied it) may still read what lies behind.
    if room is None or growing.keys is not room.keys or growing.values is not room.values or after > room.length:
        room = Room(growing.keys, growing.values, before, after, shape, dtype, device)
        setattr(growing, _ROOM, room)
    room.keys, room.values = room.key_buffer.narrow(2, 0, after), room.value_buffer.narrow(2, 0, after)
    growing.keys, growing.values = room.keys, room.values
    return room.keys, room.values


def can_reserve(cache: Cache, layer: int) -> bool:
    """Whether `reserve` knows how this layer keeps what it holds."""
    if type(cache) is not DynamicCache or cache.offloading or layer >= len(cache.layers):
        return False
    return type(cache.layers[layer]) is DynamicLayer


def room_of(cache: Cache, layer: int) -> "Room | None":
    """The buffers whose beginnings one layer's keys and values are; None where these are not as `reserve` left them."""
    growing = cache.layers[layer]
    room: Room | None = getattr(growing, _ROOM, None)
    return room if room is not None and growing.keys is room.keys and growing.values is room.values else None


class Room:
    """Buffers of one layer, (n_sequences, n_heads, length, head_dim) each, and the beginnings handed out last."""

    def __init__(
        self,
        keys: Tensor,
        values: Tensor,
        before: int,
        after: int,
        shape: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Room for `after` positions and some more, holding the `before` that there are."""
        n_sequences, n_heads, _, head_dim = shape
        self.length = after + max(_LEAST_ROOM, after // _GROWTH)
        self.keys, self.values = keys, values
        self.key_buffer = torch.empty(n_sequences, n_heads, self.length, head_dim, dtype=dtype, device=device)
        self.value_buffer = torch.empty_like(self.key_buffer)
        if before:
            self.key_buffer[:, :, :before] = keys
            self.value_buffer[:, :, :before] = values
