"""The arena of one run of the server, seen from here."""

from typing import TYPE_CHECKING

from sparseflow.client.shared_map import SharedMap
from sparseflow.core.tensor_views import view_bundles
from sparseflow.store.profile import ModelProfile

if TYPE_CHECKING:
    from torch import Tensor


class ArenaView:
    """base: (n_slots, 2, hidden), the store's dtype; read-only."""

    def __init__(self, arena: SharedMap, profile: ModelProfile) -> None:
        self.base = view_bundles(arena.content, profile)
        self._ffn_dim = profile.ffn_dimension

    def layer(self, layer: int) -> "Tensor":
        """(ffn_dim, 2, hidden): a layer's bundles, where every bundle is in the arena."""
        return self.base[layer * self._ffn_dim : (layer + 1) * self._ffn_dim]
