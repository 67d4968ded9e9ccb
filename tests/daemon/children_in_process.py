"""GPU children without processes: the child's real work over a driver that is none, each step of it the test's."""

import os
from types import SimpleNamespace
from typing import Any

from fake_driver import FakeDriver, World
from sparseflow_daemon.gpu.children import GpuChild, GpuRecord
from sparseflow_daemon.gpu.desk import Ask, GpuDesk
from sparseflow_daemon.gpu.work import GpuWork

from sparseflow.protocol.codec import decode, encode
from sparseflow.protocol.device_messages import ChildReady
from sparseflow.protocol.messages import Message


class ChildrenInProcess:
    """In place of `GpuChildren`. Messages travel as bytes."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.on_told: list[Any] = []
        self.on_gone: list[Any] = []
        self.alive: list[GpuChild] = []
        self.works: dict[GpuChild, GpuWork] = {}
        self.drivers: dict[GpuChild, FakeDriver] = {}
        self.now = 0.0

    def of(self, uuid: bytes) -> GpuChild:
        for child in self.alive:
            if child.uuid == uuid and child.desk.is_usable:
                return child
        return self._start(uuid)

    def start_lender(self, device: int) -> GpuChild:
        child = self._start(b"")
        child.is_lender = True
        return child

    def _start(self, uuid: bytes) -> GpuChild:
        desk = GpuDesk(self.now, start_timeout_s=30, answer_timeout_s=10)
        process: Any = SimpleNamespace(pid=4711)
        child = GpuChild(GpuRecord(uuid), desk, process, process, -1)
        self.alive.append(child)
        self.drivers[child] = FakeDriver(self.world)
        self.works[child] = GpuWork(self.drivers[child])
        return child

    def ask(self, child: GpuChild, ask: Ask) -> None:
        child.desk.ask(ask)

    def step(self, child: GpuChild) -> None:
        """It gets ready, or does the next thing, and the server hears of it."""
        if child.desk.state == "starting":
            self.hear(child, ChildReady("x", self.drivers[child].uuid))
            return
        ask = child.desk.to_send()
        if ask is not None:
            child.desk.sent(self.now)
            for reply in self.works[child].handle(decode(encode(ask.message)), [os.dup(fd) for fd in ask.descriptors]):
                self.hear(child, reply)
        for reply in self.works[child].copied():
            self.hear(child, reply)

    def settle(self) -> None:
        """Everything that was asked is done."""
        while busy := [child for child in self.alive if child.desk.is_waiting]:
            for child in busy:
                self.step(child)

    def die(self, child: GpuChild) -> None:
        """As when it is killed: the driver takes back what it had."""
        child.desk.end("it was killed")
        self.alive.remove(child)
        for allocation in self.drivers[child].opened.values():
            allocation.n_opened -= 1
        unanswered = child.desk.gone()
        for listener in self.on_gone:
            listener(child, unanswered)

    def hear(self, child: GpuChild, message: Message) -> None:
        """The server hears it."""
        for told in child.desk.hear(decode(encode(message)), self.now):
            for listener in self.on_told:
                listener(told)
