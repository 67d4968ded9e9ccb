"""Work beside what a device does otherwise, done when a device might do it that is in no hurry."""

import random
from collections.abc import Callable


class Late:
    """As `hints.Lane`: does its work as late as it may, or some of it earlier, by chance."""

    def __init__(self, seed: int, hurry: float) -> None:
        self._random, self._hurry = random.Random(seed), hurry
        self._work: list[Callable[[], None]] = []
        self._n_to_mark = 0
        self.n_waited = 0

    def run(self, work: Callable[[], None]) -> None:
        self._work.append(work)
        if self._random.random() < self._hurry:
            self._do(self._random.randint(0, len(self._work)))

    def mark(self) -> None:
        self._n_to_mark = len(self._work)

    def wait_for_mark(self) -> None:
        self._do(self._n_to_mark)

    def join(self) -> None:
        self.n_waited += bool(self._work)
        self._do(len(self._work))

    def _do(self, n: int) -> None:
        for work in self._work[:n]:
            work()
        del self._work[:n]
        self._n_to_mark = max(0, self._n_to_mark - n)
