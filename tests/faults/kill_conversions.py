"""Kill conversions, look at what they leave, finish them. Run by test_conversion_kills.py in a process of its own.

    kill_conversions.py CHECKPOINT WORK moments N SEED     rounds of one or two kills at random moments, until N hit
    kill_conversions.py CHECKPOINT WORK steps              a kill before each change a conversion makes to the disk

Prints one JSON object a round. torch and transformers are imported once; each conversion runs in a forked child.
"""

import hashlib
import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import OPTConfig  # noqa: F401  imported here once, not by each child

from sparseflow.core.checkpoint import Checkpoint
from sparseflow.core.converter import convert
from sparseflow.core.weight_manager import DiskWeightStore

DEADLINE_S = 60
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class Conversion:
    """Children that convert one checkpoint to one place."""

    def __init__(self, checkpoint: Path, folder: Path) -> None:
        self.checkpoint = checkpoint
        self.store = folder / "store"
        self.partial = folder / "store.partial"
        folder.mkdir(parents=True)

    def run(self, kill_after_s: float = DEADLINE_S, fatal_change: int | None = None) -> bool:
        """Convert; whether it was killed. A failure of its own is an error."""
        status = in_child(lambda: self._convert(fatal_change), kill_after_s)
        assert status in (0, signal.SIGKILL), f"wait status {status}"
        return status == signal.SIGKILL

    def _convert(self, fatal_change: int | None) -> None:
        if fatal_change is not None:
            kill_at_change(self.store.parent, fatal_change)
        convert(Checkpoint(self.checkpoint), self.store, quiet=True)

    def opens(self) -> bool:
        """Whether the store opens fully, every checksum compared."""
        return in_child(lambda: DiskWeightStore(self.store).initialize_from_pretrained(), DEADLINE_S) == 0

    def finished_files(self) -> dict[str, int]:
        """Files that the journal of an unfinished conversion calls finished, and their times."""
        try:
            lines = (self.partial / "journal.jsonl").read_text().split()
        except FileNotFoundError:
            return {}
        names = []
        for line in lines[1:]:
            try:
                names.append(json.loads(line)["name"])
            except ValueError:
                assert line is lines[-1], "only the last line can be cut short"
        return {name: (self.partial / name).stat().st_mtime_ns for name in names}

    def content(self) -> dict[str, str]:
        """Every file of the store, and a hash of its bytes."""
        files = [path for path in self.store.rglob("*") if path.is_file()]
        return {str(path.relative_to(self.store)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def in_child(work: Callable[[], Any], kill_after_s: float) -> int:
    """Wait status of a forked child that does `work` and is killed if it takes longer than that."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    deadline = time.monotonic() + kill_after_s
    while (ended := os.waitpid(pid, os.WNOHANG))[0] == 0:
        if time.monotonic() >= deadline:
            os.kill(pid, signal.SIGKILL)
            ended = os.waitpid(pid, 0)
            break
        time.sleep(0.0005)
    return ended[1]


def kill_at_change(folder: Path, number: int) -> None:
    """From now on, die just before the `number`th change to what is in `folder`."""
    seen = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        is_change = event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir")
        if event == "open":
            is_change = bool(arguments[2] & WRITING)
        if not is_change or not str(arguments[0]).startswith(str(folder)):
            return
        seen += 1
        if seen > number:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def finish(job: Conversion, reference: dict[str, str], record: dict[str, Any]) -> dict[str, Any]:
    """What the kill left, and what a rerun makes of it; `violations` is empty if all is as promised."""
    violations = []
    record["existed"] = job.store.exists()
    if record["existed"]:
        if not job.opens():
            violations.append("the store exists but does not open")
    else:
        finished = job.finished_files()
        record["n_finished"] = len(finished)
        job.run()
        for name, mtime_ns in finished.items():
            if (job.store / name).stat().st_mtime_ns != mtime_ns:
                violations.append(f"{name} was finished, and written again")
    content = job.content()
    violations += [f"{name} differs" for name in reference if content.get(name) != reference[name]]
    violations += [f"{name} is left" for name in content.keys() - reference.keys()]
    violations += [f"{path.name} is left" for path in job.store.parent.iterdir() if path != job.store]
    return record | {"violations": violations}


def main() -> None:
    torch.set_num_threads(1)
    checkpoint, work, mode, *arguments = sys.argv[1:]
    Conversion(Path(checkpoint), Path(work) / "first").run()  # takes longer than those that follow
    whole = Conversion(Path(checkpoint), Path(work) / "whole")
    started = time.monotonic()
    whole.run()
    duration_s = time.monotonic() - started
    reference = whole.content()
    print(json.dumps({"duration_s": duration_s, "n_files": len(reference)}))
    number = 0
    if mode == "steps":
        killed = True
        while killed:
            job = Conversion(Path(checkpoint), Path(work) / str(number))
            killed = job.run(fatal_change=number)
            print(json.dumps(finish(job, reference, {"moment": number, "killed": killed})), flush=True)
            number += 1
        return
    draw = random.Random(int(arguments[1]))
    n_to_kill = int(arguments[0])
    for number in range(4 * n_to_kill):
        job = Conversion(Path(checkpoint), Path(work) / str(number))
        moments = []
        killed = False
        while len(moments) < 1 + number % 2 and not job.store.exists():
            moments.append(draw.uniform(0, duration_s))
            was_hit = job.run(kill_after_s=moments[-1])
            if not (was_hit or killed):
                duration_s = moments[-1]  # so little is enough: the first one ran on a busier machine
            killed = killed or was_hit
        print(json.dumps(finish(job, reference, {"moment": moments, "killed": killed})), flush=True)
        n_to_kill -= killed
        if n_to_kill == 0:
            return


if __name__ == "__main__":
    main()
