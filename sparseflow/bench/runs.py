"""Runs cases in turn, each in a process of its own, all under the same conditions.

With a limit, each run has a fresh memory cgroup, which counts page cache too; where none can be made, the weights'
files are taken out of memory before every token instead. Files to be read cold are dropped from the page cache before
each run.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sparseflow.bench.cases import PARTIAL, Case, layer_nbytes, one_layer_more, partial_candidates
from sparseflow.bench.child import CONVERTERS
from sparseflow.bench.memory_cgroup import GroupParent, GroupUsage, MemoryGroup, drop_page_cache, swap_nbytes
from sparseflow.errors import BadRequest
from sparseflow.utils.progress import waiting
from sparseflow.utils.sizes import format_size

CHILD = Path(__file__).with_name("child.py")
DEMO_MODEL = Path(__file__).parents[1] / "assets" / "demo_model"
_WHOLE_MACHINE = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
Run = dict[str, Any]


@dataclass
class Conditions:
    """What all runs of a benchmark share.

    checkpoint: a transformers folder. model: its name for people. store: the same, converted. limit_nbytes: of each
    run, page cache included. memory: for SparseFlow's weights. is_cold: files are dropped before each run. pythons:
    peer -> the interpreter that has it. converted: peer -> the folder that it reads.
    """

    checkpoint: Path
    store: Path
    model: str = ""
    limit_nbytes: int | None = None
    memory: int | str | None = None
    reserve_nbytes: int = 64 << 20
    tokens: int = 12
    search_tokens: int = 4
    prompt_tokens: int = 8
    threads: int = 2
    dtype: str | None = None
    seed: int = 1
    is_cold: bool = False
    deadline_s: float = 900
    pythons: dict[str, str] = field(default_factory=dict)
    converted: dict[str, str] = field(default_factory=dict)


class Bench:
    """Runs cases, and reports each, however it ends."""

    def __init__(
        self,
        conditions: Conditions,
        parent: GroupParent | None,
        scratch: Path,
        say: Callable[[str], None],
        *,
        quiet: bool = True,
    ) -> None:
        """
        Args:
            parent: where groups are made; None: a limit is stood for by eviction.
            scratch: a folder for what peers write.
            say: told of each finished run.
            quiet: not how long the one takes that runs.
        """
        self.conditions, self.parent = conditions, parent
        self._scratch, self._say, self._quiet = scratch, say, quiet
        self.libraries: list[Path] = []
        """Dropped from the page cache too, so that each run pays for its own."""

    @property
    def _weights(self) -> list[Path]:
        conditions = self.conditions
        folders = [conditions.checkpoint, conditions.store, *map(Path, conditions.converted.values())]
        return [path for folder in folders for path in folder.rglob("*") if path.is_file()]

    def run(self, case: Case, limit_nbytes: int | None = None, **replaced: Any) -> Run:
        """One run. `replaced`: settings other than the conditions'."""
        is_cold = self.conditions.is_cold or limit_nbytes is not None
        left = [drop_page_cache(paths) for paths in (self._weights, self.libraries)] if is_cold else [None, None]
        load_average, start = os.getloadavg()[0], time.perf_counter()
        with waiting(case.label, quiet=self._quiet):
            status, output, usage = self._finished(case, limit_nbytes, replaced)
        report: Run = {
            "peer": case.peer,
            "label": case.label,
            "status": status,
            "wall_s": time.perf_counter() - start,
            "cached_before_nbytes": {"weights": left[0], "libraries": left[1]},
            "load_average_before": load_average,
            "group": None if usage is None else asdict(usage),
        }
        if status == "ok":
            report |= json.loads(output.splitlines()[-1])
        rate = f"{report['decode_tokens_per_s']:.3g} tokens/s, " if "decode_tokens_per_s" in report else ""
        self._say(f"{case.label}: {rate}{status}, {report['wall_s']:.0f} s")
        return report

    def convert(self, peer: str) -> None:
        """Make the folder that a peer reads, unless it is there.

        Raises:
            BadRequest: that failed.
        """
        folder = Path(self.conditions.converted.setdefault(peer, str(self._scratch / f"converted-{peer}")))
        if peer not in CONVERTERS or folder.exists():
            return
        self._say(f"converting for {peer}: {folder}")
        status, _, _ = self._finished(Case(peer), None, {"convert": True})
        if status != "ok":
            raise BadRequest(f"the model cannot be converted for {peer}: {status}")

    def _finished(
        self, case: Case, limit_nbytes: int | None, replaced: dict[str, Any]
    ) -> tuple[str, str, GroupUsage | None]:
        """How the child ended, what it said, and what its group used."""
        output, errors = self._scratch / "output", self._scratch / "errors"
        with (
            self._limited(limit_nbytes) as group,
            output.open("w", encoding="utf-8") as out,
            errors.open("w", encoding="utf-8") as err,
        ):
            command = self._command(case, limit_nbytes, replaced)
            process = subprocess.Popen(
                command if group is None else group.command(command),
                stdout=out, stderr=err, env=os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"},
            )  # fmt: skip
            try:
                process.wait(self.conditions.deadline_s)
                status = None
            except subprocess.TimeoutExpired:
                status = f"killed after its deadline of {self.conditions.deadline_s:g} s"
            finally:
                process.kill() if group is None else group.kill()
                process.wait()
            usage = None if group is None else group.usage()
        n_killed = 0 if usage is None else usage.oom_kills
        said = errors.read_text("utf-8", errors="replace")
        return status or _status(process.returncode, n_killed, said), output.read_text("utf-8"), usage

    @contextmanager
    def _limited(self, limit_nbytes: int | None) -> Iterator[MemoryGroup | None]:
        if self.parent is None:
            yield None
            return
        with MemoryGroup(self.parent, limit_nbytes or _WHOLE_MACHINE) as group:
            yield group

    def _command(self, case: Case, limit_nbytes: int | None, replaced: dict[str, Any]) -> list[str]:
        conditions = self.conditions
        names = ("checkpoint", "store", "memory", "tokens", "prompt_tokens", "threads", "dtype", "seed", "converted")
        settings = {name: getattr(conditions, name) for name in names} | {
            "peer": case.peer,
            "options": dict(option.split("=", 1) for option in case.options),
            "scratch": self._scratch,
            "evicted": list(map(str, self._weights)) if limit_nbytes is not None and self.parent is None else [],
        }
        python = conditions.pythons.get(case.peer, sys.executable)
        return [python, str(CHILD), json.dumps(settings | replaced, default=str)]


def _status(exit_code: int, oom_kills: int, errors: str) -> str:
    if oom_kills:
        return "killed: out of memory"
    if exit_code == 0:
        return "ok"
    how = f"signal {signal.Signals(-exit_code).name}" if exit_code < 0 else f"exit status {exit_code}"
    return f"{how}: {(errors.strip().splitlines() or ['no message'])[-1]}"


def take_libraries(bench: Bench, limit_nbytes: int) -> dict[str, int]:
    """Bytes that each library takes to run a model of a few MB, measured under the limit.

    The first run of each is a rehearsal: kernels are compiled, and the files to be dropped become known.

    Raises:
        BadRequest: one does not run at all.
    """
    base_nbytes = {}
    demo = {"checkpoint": DEMO_MODEL, "store": DEMO_MODEL, "memory": "auto", "tokens": 2}
    for case in (Case("device_map"), Case("sparseflow")):
        for limit in (None, limit_nbytes):
            report = bench.run(case, limit, **demo)
            if report["status"] != "ok":
                raise BadRequest(
                    f"{case.peer} with the demo model under {format_size(limit or _WHOLE_MACHINE)}: "
                    f"{report['status']}; raise --limit (now {format_size(limit_nbytes)}) or --deadline-s, or mend the "
                    "environment"
                )
            mapped = {*bench.libraries, *map(Path, report["mapped_files"])}
            bench.libraries = sorted(path for path in mapped if path.is_file())
        names = ("anonymous_nbytes", "mapped_nbytes", "page_table_nbytes")
        base_nbytes[case.peer] = sum(report[name] for name in names)
    return base_nbytes


def give_memory(bench: Bench) -> dict[str, int]:
    """Under a limit: what libraries take, and SparseFlow's memory from what they leave. Returns bytes by library.

    Raises:
        BadRequest: they leave nothing.
    """
    conditions = bench.conditions
    if conditions.limit_nbytes is None:
        return {}
    base_nbytes = take_libraries(bench, conditions.limit_nbytes)
    room_nbytes = conditions.limit_nbytes - base_nbytes["sparseflow"] - conditions.reserve_nbytes
    if conditions.memory is None:
        if room_nbytes <= 0:
            raise BadRequest(
                f"--limit {format_size(conditions.limit_nbytes)}: the libraries take "
                f"{format_size(base_nbytes['sparseflow'])} and {format_size(conditions.reserve_nbytes)} are reserved; "
                "raise --limit or lower --reserve"
            )
        conditions.memory = room_nbytes
    return base_nbytes


def search_partial(bench: Bench, given: Sequence[int], base_nbytes: dict[str, int]) -> tuple[list[Run], Case]:
    """Try partial offloads with few tokens, and more layers while that is faster; the runs, and the fastest."""
    conditions = bench.conditions
    limit = conditions.limit_nbytes
    room_nbytes = (limit or _WHOLE_MACHINE) - base_nbytes.get("device_map", 0) - conditions.reserve_nbytes
    sizes = layer_nbytes(conditions.checkpoint)
    candidates = partial_candidates(given, sizes, room_nbytes)
    n_tokens = min(conditions.tokens, conditions.search_tokens)
    runs: list[Run] = []
    for case in candidates:  # which may grow meanwhile
        runs.append(bench.run(case, limit, tokens=n_tokens))
        rates = [run.get("decode_tokens_per_s", 0.0) for run in runs]
        best = candidates[rates.index(max(rates))]
        more = one_layer_more(best, n_layers=len(sizes) - 1)
        if not given and len(runs) == len(candidates) and more is not None and more not in candidates:
            candidates.append(more)
    return runs, best


def run_rounds(
    bench: Bench, cases: Sequence[Case], n_rounds: int, given_layers: Sequence[int], measure: Callable[[], None]
) -> tuple[list[Run], list[Run], dict[str, int]]:
    """All cases in turn, each round beginning with another.

    Args:
        given_layers: of partial offloads to try; else about as many as fit.
        measure: called before each round: the machine at that moment.

    Returns:
        The runs; those of the search for the best partial offload; and what libraries take under a limit.
    """
    base_nbytes = give_memory(bench)
    cases = list(cases)
    searched: list[Run] = []
    if Case(PARTIAL) in cases:
        searched, best = search_partial(bench, given_layers, base_nbytes)
        cases[cases.index(Case(PARTIAL))] = best
    runs = []
    for n_round in range(n_rounds):
        measure()
        first = n_round % len(cases)
        for case in (*cases[first:], *cases[:first]):
            runs.append(bench.run(case, bench.conditions.limit_nbytes) | {"round": n_round})
    return runs, searched, base_nbytes


def could_swap(bench: Bench) -> bool:
    """Whether a limit might be met by swapping."""
    if swap_nbytes() == 0 or bench.parent is None:
        return swap_nbytes() > 0
    with MemoryGroup(bench.parent, 1 << 30) as group:
        return not group.swap_is_limited
