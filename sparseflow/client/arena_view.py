"""The arena of one run of the server, seen from here: its slots, and the table that says where bundles lie."""

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from sparseflow.client.shared_map import SharedMap
from sparseflow.core.tensor_views import view_bundles
from sparseflow.engine.slot_table import ABSENT, is_filled, table_views
from sparseflow.store.profile import ModelProfile

if TYPE_CHECKING:
    from torch import Tensor


class ArenaView:
    """base: (n_slots, 2, hidden), the store's dtype; read-only."""

    def __init__(self, arena: SharedMap, table: SharedMap, profile: ModelProfile) -> None:
        self.base = view_bundles(arena.content, profile)
        self._slot_of, self._turn_of = table_views(table.content, profile.num_layers, profile.ffn_dimension)
        self._ffn_dim = profile.ffn_dimension

    def layer(self, layer: int) -> "Tensor":
        """(ffn_dim, 2, hidden): a layer's bundles, where every bundle is in the arena."""
        return self.base[layer * self._ffn_dim : (layer + 1) * self._ffn_dim]

    def look_up(self, layer: int, ids: NDArray[np.uint32]) -> "Sighting":
        """Which bundles the arena holds now. Nothing keeps them there."""
        slots = self._slot_of[layer, ids]
        positions = np.flatnonzero(slots != ABSENT)
        slots = slots[positions]
        turns = self._turn_of[slots]
        filled = is_filled(turns)
        if not filled.all():
            positions, slots, turns = positions[filled], slots[filled], turns[filled]
        return Sighting(self, positions, slots.astype(np.uint32), turns)


class Sighting:
    """What was seen without a lease."""

    __slots__ = ("_turns", "_view", "positions", "slots")

    def __init__(
        self, view: ArenaView, positions: NDArray[np.int64], slots: NDArray[np.uint32], turns: NDArray[np.uint32]
    ) -> None:
        self._view, self._turns = view, turns
        self.positions = positions
        """(n,) int64, among the ids that were looked up."""
        self.slots = slots
        """(n,) uint32."""

    def held(self, view: ArenaView, slots: NDArray[np.uint32]) -> bool:
        """Whether the bundles were there all the time. slots: of all ids, leased by now, of the arena of `view`."""
        return (
            view is self._view
            and np.array_equal(slots[self.positions], self.slots)
            and np.array_equal(view._turn_of[self.slots], self._turns)
        )
