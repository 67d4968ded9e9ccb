"""Dense weights and predictors that the server's child keeps on a GPU, as tensors of this process.

    lent --close--> returned
      \\--the child, the server or the session ends, or the server says that it is about to--> lost --close--> returned

Memory whose process has ended is not to be touched: whoever computes asks `require` before each step, which looks and
raises. What lies there is not to be written to either, though nothing would stop it: it is everybody's.
"""

import os
import select
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from sparseflow.client.attachment import Attachment
from sparseflow.core.tensor_views import predictors_by_layer
from sparseflow.cuda.driver import Driver
from sparseflow.cuda.ipc import OpenedSlab
from sparseflow.cuda.tickets import SlabTicket
from sparseflow.cuda.undo import Undo
from sparseflow.errors import ServerError, ShardCorrupt, SparseFlowError, of_wire_code
from sparseflow.protocol.device_messages import DenseLent, ReturnDense
from sparseflow.protocol.messages import ErrorReply
from sparseflow.store.manifest import DENSE_NAME
from sparseflow.store.shard_format import TensorSpec, places_in

if TYPE_CHECKING:
    from torch import Tensor, device

    from sparseflow.client.weight_client import WeightClient

BORROW_TIMEOUT_S = 300.0  # all of it may still have to be copied to the GPU
_RETURN_TIMEOUT_S = 5.0


class LentDense:
    """Borrowed until closed. Tensors made of it are not to be used afterwards."""

    def __init__(
        self,
        client: "WeightClient",
        driver: Driver,
        part: Callable[[str, str], memoryview],
        parts: Mapping[str, Mapping[str, list[int]]],
        *,
        on_close: Callable[[], object] = lambda: None,
    ) -> None:
        """Borrow.

        Args:
            driver: of the GPU that computes.
            part: a file of a region, as it lies in host memory: its header says what lies on the GPU.
            parts: region -> file -> where it begins in the region, and its bytes.
            on_close: called at the end, once.

        Raises:
            BadRequest: the server lends nothing, or on another GPU. ServerError: it cannot.
        """
        self._client, self._part, self._parts = client, part, parts
        self.state: Literal["lent", "lost", "returned"] = "lent"
        self.why = ""
        """Of its loss."""
        self._undo = Undo(self, "what the server has lent")
        self._undo.add(on_close)
        try:
            line = client.line()
            self._attachment: Attachment = line.attachment
            reply, fd = line.borrow_dense(driver.device_uuid(), time.monotonic() + BORROW_TIMEOUT_S)
            if fd is not None:
                self._undo.add(lambda: os.close(fd))
            if not isinstance(reply, DenseLent) or fd is None:
                raise _error(reply)
            self._poll = select.poll()
            self._poll.register(fd, select.POLLIN)
            self._slab = OpenedSlab(driver, SlabTicket.from_dict(reply.slab), 0)
            self._undo.add(self._slab.close)
            self._offsets = _checked(reply.offsets, self._slab.nbytes, parts)
        except BaseException:
            self._undo.run()
            raise

    def require(self) -> None:
        """Look whether it may still be touched; a few microseconds.

        Raises:
            ServerError: it may not, now and ever after. BadRequest: it was returned, or this is a forked child.
        """
        self._undo.require()
        if self.state == "lent":
            if self._poll.poll(0):
                self._lose("the server's process that had them on the GPU has ended")
            elif self._attachment is not self._client.attachment or self._attachment.has_ended():
                self._lose("the server has ended")
            elif self._attachment.has_news():
                self._lose("the server is about to end")
        if self.state == "lost":
            raise ServerError(
                f"dense weights that the server had lent are gone: {self.why}; close the model and open it again"
            )

    def _lose(self, why: str) -> None:
        self.state, self.why = "lost", why

    def dense(self, device: "device") -> "dict[str, Tensor]":
        """As `WeightSource.dense`, on the GPU.

        Raises:
            ServerError: lost.
        """
        return self._tensors("dense", DENSE_NAME, device)

    def predictor_tensors(self, device: "device") -> "dict[str, Tensor]":
        """As `WeightSource.predictor_tensors`, on the GPU.

        Raises:
            ServerError: lost.
        """
        return predictors_by_layer(
            self._client.profile,
            self._parts["predictors"],
            lambda name, *expected: self._tensors("predictors", name, device, *expected),
        )

    def _tensors(
        self, region: str, name: str, device: "device", expected: list[TensorSpec] | None = None
    ) -> "dict[str, Tensor]":
        import torch

        self.require()
        places = places_in(np.frombuffer(self._part(region, name), np.uint8), Path(name))
        if expected is not None and [place.spec for place in places.values()] != expected:
            raise ShardCorrupt(f"{name}: not laid out as this version of SparseFlow reads it; convert the model again")
        first, nbytes = self._parts[region][name]
        content = bytes_at(self._slab.address + self._offsets[region] + first, nbytes, device)
        dtypes = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
        dtypes |= {"I8": torch.int8, "I16": torch.int16, "U64": torch.uint64}
        return {
            tensor: content[place.offset : place.offset + place.spec.nbytes]
            .view(dtypes[place.spec.dtype])
            .view(place.spec.shape)
            for tensor, place in places.items()
        }

    def close(self) -> None:
        """Unmap and return it: nothing reads it any more. May be called twice.

        Raises:
            ServerError: the server does not answer. DeviceError: unmapping failed.
        """
        if not self._undo.has_steps:
            return
        errors = self._undo.run()
        was, self.state = self.state, "returned"
        if was == "lost":  # then the driver may say anything, and nobody waits for it
            return
        if self._attachment is self._client.attachment and not self._attachment.has_ended():
            line = self._client.line()
            line.reply(line.ask(ReturnDense), time.monotonic() + _RETURN_TIMEOUT_S)
        if errors:
            raise errors[0]


class _DeviceBytes:
    """Device memory as torch takes it."""

    def __init__(self, address: int, nbytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (address, False),
            "strides": None,
            "version": 3,
        }


def bytes_at(address: int, nbytes: int, device: "device") -> "Tensor":
    """(nbytes,) uint8, memory that lies there, which has to outlive it. device: what it is of; cpu in tests."""
    import ctypes

    import torch

    if device.type == "cpu":
        return torch.frombuffer((ctypes.c_ubyte * nbytes).from_address(address), dtype=torch.uint8)
    return torch.as_tensor(_DeviceBytes(address, nbytes), device=device)


def _checked(offsets: dict[str, Any], nbytes: int, parts: Mapping[str, Mapping[str, list[int]]]) -> dict[str, int]:
    """
    Raises:
        ServerError: a file does not lie inside of what was lent.
    """
    for region, files in parts.items():
        first = offsets.get(region)
        end = max((start + size for start, size in files.values()), default=0)
        if type(first) is not int or not 0 <= first <= nbytes - end:
            raise ServerError(f"the server lent {nbytes} bytes, {region} at {first!r}; is it of our version?")
    return offsets


def _error(reply: object) -> SparseFlowError:
    if isinstance(reply, ErrorReply):
        return of_wire_code(reply.code, reply.text)
    return ServerError(f"the server answered with {type(reply).__name__}; is it of our version?")
