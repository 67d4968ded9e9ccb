"""Dense weights of layers that a device does not hold: two layers' memory there, filled in turn from host memory.

Each streamed layer's tensors are views of one of two buffers for good. While one layer computes, the next one's weights
come. `with stream.turn(k):` is where the k-th may be read.
"""

from collections.abc import Mapping, Sequence
from types import TracebackType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sparseflow.core.weight_source import HostMemory
from sparseflow.cuda.page_lock import PageLock, whole_pages
from sparseflow.engine.arena import Arena
from sparseflow.orchestration.device.transport import lock_memory

_ALIGNMENT = 256  # bytes, of each tensor in a buffer


class LayerStream:
    """Weights of some layers in host memory, page-locked where that works, and two buffers on a device."""

    def __init__(self, layers: Sequence[Mapping[str, Tensor]], device: torch.device) -> None:
        """layers: of each the same names, shapes and dtypes; copied here."""
        self._device = device
        self._places: dict[str, tuple[int, Tensor]] = {}  # where each begins, and one like it
        end = 0
        for name, weight in layers[0].items():
            self._places[name] = end, weight
            end += -(-weight.nbytes // _ALIGNMENT) * _ALIGNMENT
        end = whole_pages(end)
        self.n_layers, self.layer_nbytes = len(layers), end
        self._arena = Arena(len(layers), end)
        for slot, weights in zip(self._arena.slots, layers, strict=True):
            for name, (start, like) in self._places.items():
                slot[start : start + like.nbytes] = weights[name].contiguous().view(-1).view(torch.uint8).numpy()
        self._host = torch.from_numpy(self._arena.slots)
        self._lock = _locked(self._arena.slots, device)
        self.reason = self._lock if isinstance(self._lock, str) else ""
        """Why it is not page-locked, so that copies wait for each other; empty where it is."""
        self._buffers = torch.empty(2, end, dtype=torch.uint8, device=device)
        self._brought: int | None = None  # the layer brought last
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)
            self._has_come = [torch.cuda.Event() for _ in range(2)]
            self._is_read = [torch.cuda.Event() for _ in range(2)]

    @property
    def nbytes(self) -> int:
        """What the buffers take on the device."""
        return self._buffers.nbytes

    def tensors(self, k: int) -> dict[str, Tensor]:
        """The k-th layer's, as views of its buffer: what they hold is right within its turn."""
        buffer = self._buffers[k % 2]
        return {
            name: buffer[start : start + like.nbytes].view(like.dtype).view(like.shape)
            for name, (start, like) in self._places.items()
        }

    def turn(self, k: int) -> "Turn":
        """The k-th layer's. Turns are taken from the first to the last, again and again."""
        return Turn(self, k)

    def begin(self, k: int) -> None:
        """The device waits until the k-th layer's weights have come; the next one's are sent for."""
        if k == 0 or self._brought != k:
            self._bring(k)
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).wait_event(self._has_come[k % 2])
        if k + 1 < self.n_layers:
            self._bring(k + 1)

    def end(self, k: int) -> None:
        """What comes after does not read them."""
        if self._device.type == "cuda":
            self._is_read[k % 2].record()

    def _bring(self, k: int) -> None:
        turn = k % 2
        self._brought = k
        if self._device.type != "cuda":
            self._buffers[turn].copy_(self._host[k])
            return
        here = torch.cuda.current_stream(self._device)
        if k < 2:  # of the last round both are read by now; and so a graph begins where its caller does
            self._stream.wait_stream(here)
        else:
            self._stream.wait_event(self._is_read[turn])
        with torch.cuda.stream(self._stream):
            self._buffers[turn].copy_(self._host[k], non_blocking=True)
            self._has_come[turn].record()

    def close(self) -> None:
        """Let go of both memories. May be called twice."""
        if not isinstance(self._lock, str):
            torch.cuda.synchronize(self._device)
            self._lock.close()
            self._lock = "closed"
        self._buffers = self._buffers[:0].clone()


class Turn:
    """See `LayerStream.turn`."""

    def __init__(self, stream: LayerStream, k: int) -> None:
        self._stream, self._k = stream, k

    def __enter__(self) -> None:
        self._stream.begin(self._k)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.end(self._k)


def _locked(slots: NDArray[np.uint8], device: torch.device) -> PageLock | str:
    if device.type != "cuda":
        return "the device is the CPU"
    memory = HostMemory(slots.ctypes.data, slots.nbytes, is_read_only=False, owner=slots)
    return lock_memory(memory, device, slots.shape[1])
