"""Reads of bundles that go wrong on purpose, as on a failing disk: SPARSEFLOW_FAULT=POINT:RATE:SEED[,POINT:RATE:SEED].

    read-error     the disk refuses (EIO)
    read-short     half of what was asked for comes
    read-corrupt   one bit is another

RATE is the share of reads, SEED where their choice begins. What is done with such reads is what is done with real ones.
Nothing else goes wrong, and without the variable none of this is on the way of a read.
"""

import ctypes
import errno
import os
import random
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparseflow.engine.read_queue import IOVEC, Finished, ReadQueue
from sparseflow.errors import BadRequest

VARIABLE = "SPARSEFLOW_FAULT"


@dataclass
class Fault:
    """One point: which reads it hits, and how often it has."""

    point: str
    rate: float
    seed: int
    n_done: int = 0
    _random: random.Random = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)

    def hits(self) -> bool:
        """Whether the next read goes wrong."""
        return self._random.random() < self.rate

    def apply(self, result: int, memory: NDArray[np.void]) -> int:
        """What a read of `result` bytes gives instead. memory: (n,) IOVEC, where they came to."""
        if result <= 0:
            return result  # it went wrong by itself
        self.n_done += 1
        return _POINTS[self.point](self._random, result, memory)


def _refuse(_: random.Random, result: int, memory: NDArray[np.void]) -> int:
    return -errno.EIO


def _cut(_: random.Random, result: int, memory: NDArray[np.void]) -> int:
    return result // 2


def _flip(choice: random.Random, result: int, memory: NDArray[np.void]) -> int:
    at = choice.randrange(result)
    for address, nbytes in memory.tolist():
        if at < nbytes:
            ctypes.c_uint8.from_address(address + at).value ^= 1 << choice.randrange(8)
            break
        at -= nbytes
    return result


_POINTS: dict[str, Callable[[random.Random, int, NDArray[np.void]], int]] = {
    "read-error": _refuse,
    "read-short": _cut,
    "read-corrupt": _flip,
}


def faults_asked_for() -> list[Fault]:
    """Those of the environment.

    Raises:
        BadRequest: the variable names none.
    """
    return [_parse(text) for text in os.environ.get(VARIABLE, "").split(",") if text]


def _parse(text: str) -> Fault:
    point, _, numbers = text.partition(":")
    rate, _, seed = numbers.partition(":")
    try:
        fault = Fault(point, float(rate), int(seed))
        if point in _POINTS and 0 <= fault.rate <= 1:
            return fault
    except ValueError:
        pass
    raise BadRequest(
        f"{VARIABLE}={text!r}: give POINT:RATE:SEED with a point of {', '.join(_POINTS)}, a rate from 0 to 1 and a "
        "whole number; or unset it"
    )


class FaultyQueue:
    """A `ReadQueue` some of whose reads go wrong."""

    def __init__(self, queue: ReadQueue, faults: list[Fault]) -> None:
        self._queue = queue
        self.faults = faults
        self.name = queue.name
        self._memory: dict[int, NDArray[np.void]] = {}  # by token, of reads under way
        self._lock = threading.Lock()  # one thread may take while another submits

    def submit(self, reads: NDArray[np.void]) -> int:
        """As `ReadQueue.submit`."""
        with self._lock:
            for read in reads:  # before they begin: they may have ended when `submit` returns
                nbytes = int(read["n_iovecs"]) * IOVEC.itemsize
                pieces: Any = (ctypes.c_uint8 * nbytes).from_address(int(read["iovecs"]))
                self._memory[int(read["token"])] = np.frombuffer(pieces, IOVEC)
            return self._queue.submit(reads)

    def wait(self, least: int, timeout_s: float) -> None:
        """As `ReadQueue.wait`."""
        self._queue.wait(least, timeout_s)

    def take(self) -> Finished:
        """As `ReadQueue.take`."""
        finished = self._queue.take()
        results = finished.results.copy()
        with self._lock:
            for n, token in enumerate(finished.tokens.tolist()):
                memory = self._memory.pop(token)
                for fault in self.faults:
                    if fault.hits():
                        results[n] = fault.apply(int(results[n]), memory)
        return Finished(finished.tokens, results)

    @property
    def threads(self) -> list[threading.Thread]:
        """As `ReadQueue.threads`."""
        return self._queue.threads

    def close(self) -> None:
        """As `ReadQueue.close`."""
        self._queue.close()
        self._memory.clear()
