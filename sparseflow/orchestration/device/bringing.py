"""Bundles of one model on their way to a device: the transport that works, its limits, and leases until all is read."""

from collections.abc import Callable
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from sparseflow.core.weight_source import Fetch, WeightSource
from sparseflow.errors import ArenaBusy
from sparseflow.kernels.device.ops import ReachableBundles
from sparseflow.orchestration.device.transport import Brought, HostMemoryReplaced, Transport, open_transport

T = TypeVar("T")


class Bringer:
    """Brings bundles, whatever becomes of the server that they come from."""

    def __init__(self, source: WeightSource, device: torch.device) -> None:
        self._source, self._device = source, device
        self.transport = self._opened()
        self._leases: list[Fetch] = []

    def reach(self, layer: int) -> ReachableBundles | None:
        """A layer's bundles where the device reads them by itself; None: they have to be brought."""
        bundles = self._source.resident_bundles(layer)
        if bundles is None:
            return None
        self._renew()
        return self.transport.resident(bundles)

    def bring(self, layer: int, ids: NDArray[np.uint32]) -> Brought:
        """As `Transport.bring`.

        Raises:
            ArenaBusy: more than `limit`. TimeoutError, ServerError: as fetches do.
        """
        while True:
            self._renew()
            if len(ids) > self.transport.limit:
                raise ArenaBusy(
                    f"{len(ids)} bundles are asked for together, {self.transport.name} brings {self.transport.limit}"
                )
            try:
                return self.transport.bring(self._source, layer, ids)
            except HostMemoryReplaced:
                continue  # by that of a server's successor, which the fetch has gone to

    @property
    def limit(self) -> int:
        """Bundles that can be brought together."""
        return min(self._source.fetch_limit, self.transport.limit)

    def once_more_with_less(self, run: Callable[[], T]) -> T:
        """Again where less can be brought at once than when it began: a server's successor may have a smaller arena."""
        while True:
            limit = self.limit
            try:
                return run()
            except ArenaBusy:
                if self.limit >= limit:
                    raise

    def hold(self, lease: Fetch | None) -> None:
        """Until `release`."""
        self._leases += [] if lease is None else [lease]

    @property
    def is_idle(self) -> bool:
        """Whether nothing is held."""
        return not self._leases

    def release(self) -> None:
        """The device has read all that was held."""
        for lease in self._leases:
            lease.release()
        self._leases.clear()

    def close(self) -> None:
        """Before the source is closed. May be called twice."""
        self.release()
        self.transport.close()

    def _renew(self) -> None:
        """Where the source has other memory than before, find the best way from there."""
        if not self.transport.is_of(self._source):
            self.transport.close()
            self.transport = self._opened()

    def _opened(self) -> Transport:
        n_staged = min(self._source.fetch_limit, self._source.profile.ffn_dimension)
        return open_transport(self._source, self._device, n_staged)
