"""Progress bars: of what takes longer than two seconds, and only for people who look."""

import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

DELAY_S = 2.0
_TICK_S = 0.5
_ELAPSED = "{desc}: {elapsed}"
OF_BYTES: dict[str, Any] = {"unit": "B", "unit_scale": True}


def is_silent(quiet: bool) -> bool:
    """Whether bars are left out: where asked to, where stderr is no terminal, or by `HF_HUB_DISABLE_PROGRESS_BARS`."""
    told = os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS", "").upper() in ("1", "ON", "YES", "TRUE")
    return quiet or told or not sys.stderr.isatty()


def progress(iterable: Iterable[Any] | None = None, desc: str = "", *, quiet: bool, **how: Any) -> Any:
    """tqdm's bar, which takes the other arguments, shown once `DELAY_S` have passed."""
    from tqdm import tqdm

    return tqdm(iterable, desc, disable=is_silent(quiet), delay=DELAY_S, **how)


@contextmanager
def waiting(
    desc: str, *, quiet: bool, total: int | None = None, n_done: Callable[[], int] | None = None
) -> Iterator[None]:
    """A line while something runs that tells nothing: the time that it has taken, or what `n_done` finds of `total`.

    Args:
        total: bytes.
        n_done: asked from a thread of its own, twice a second.
    """
    if is_silent(quiet):
        yield
        return
    shape = OF_BYTES | {"total": total} if n_done else {"bar_format": _ELAPSED}
    bar = progress(desc=desc, quiet=quiet, leave=False, miniters=0, mininterval=0, **shape)
    over = threading.Event()

    def tick() -> None:
        is_over = over.wait(DELAY_S)
        while not is_over:
            if n_done is not None:
                bar.n = max(bar.n, min(n_done(), total or 0))
            bar.update(0)
            is_over = over.wait(_TICK_S)

    ticking = threading.Thread(target=tick, name="progress", daemon=True)
    ticking.start()
    try:
        yield
    finally:
        over.set()
        ticking.join()
        bar.close()
