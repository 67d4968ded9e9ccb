"""Decode speed where a model is larger than memory: SparseFlow beside accelerate, cold, under one memory limit.

    python scripts/bench/below_memory.py --checkpoint DIR --store DIR --limit 2.15GiB

Every run is a fresh process in a fresh memory cgroup, which counts page cache too (the weights' files and the libraries
are dropped from the cache before). All rivals read the same prompt and decode the same given random tokens.

    sparseflow        the store, with --memory for its weights
    disk_offload      transformers with accelerate: every decoder layer on disk, the rest on the cpu
    partial_offload   the same with some layers on the cpu; how many is searched for before the rounds

SparseFlow's own ways are compared by options, such as

    --rivals sparseflow sparseflow:lookahead=off sparseflow:async_transfer=no sparseflow:io=map sparseflow:eviction=fifo

transformers leaves weights "on the cpu" mapped from the file, so the page cache may drop them; `copied` layers were
copied to private memory after loading, which transformers does not offer and which spares accelerate that. Rates are
over the decode steps after the first. Bytes from disk are the kernel's count for the process (`read_bytes`).
"""

import argparse
import json
import mmap
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from below_memory_child import OPTIONS
from memory_cgroup import (
    GroupParent,
    MemoryGroup,
    NoColdReadError,
    NoMemoryGroupError,
    disk_bandwidth,
    drop_page_cache,
    find_group_parent,
    swap_nbytes,
)

from sparseflow.errors import SparseFlowError
from sparseflow.utils.sizes import format_size, parse_size

RIVALS = ("sparseflow", "disk_offload", "partial_offload")
DEMO_MODEL = Path(__file__).parents[2] / "sparseflow" / "assets" / "demo_model"
SEQUENTIAL_NBYTES = 1 << 20


class UsageError(Exception):
    """Arguments, or a machine, with which nothing can be measured."""


@dataclass(frozen=True)
class Rival:
    """What one child runs. options: of sparseflow, each as `name=value`."""

    name: str
    n_resident: int = 0
    copied: bool = False
    options: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> "Rival":
        """One of RIVALS; for sparseflow perhaps with options, as in `sparseflow:io=map,lookahead=off`."""
        name, _, options = text.partition(":")
        split = tuple(filter(None, options.split(",")))
        wrong = [option for option in split if not _is_option(*option.partition("=")[::2])]
        if name not in RIVALS or wrong or (split and name != "sparseflow"):
            raise argparse.ArgumentTypeError(
                f"{text!r}: give one of {', '.join(RIVALS)}; after `sparseflow:` options of {OPTIONS}"
            )
        return cls(name, options=split)

    @property
    def label(self) -> str:
        """For people."""
        if self.name != "partial_offload":
            return " ".join((self.name, *self.options))
        return f"partial_offload {self.n_resident} {'copied' if self.copied else 'mapped'}"


@dataclass
class Bench:
    """What all children of one benchmark share."""

    parent: GroupParent
    scratch: Path
    arguments: argparse.Namespace
    cold_files: list[Path]
    libraries: list[Path]

    def run(self, rival: Rival, limit_nbytes: int, **replaced: Any) -> dict[str, Any]:
        """One cold run in a group of its own. `replaced`: arguments other than the command line's."""
        weights_left, libraries_left = drop_page_cache(self.cold_files), drop_page_cache(self.libraries)
        load_average = os.getloadavg()[0]
        output, errors = self.scratch / "output", self.scratch / "errors"
        with (
            MemoryGroup(self.parent, limit_nbytes) as group,
            output.open("w", encoding="utf-8") as out,
            errors.open("w", encoding="utf-8") as err,
        ):
            start = time.perf_counter()
            process = subprocess.Popen(
                group.command(self._command(rival, replaced)),
                stdout=out,
                stderr=err,
                env=os.environ | {"HF_HUB_OFFLINE": "1"},
            )
            try:
                process.wait(self.arguments.deadline_s)
                status = None
            except subprocess.TimeoutExpired:
                status = f"killed after its deadline of {self.arguments.deadline_s:g} s"
            finally:
                group.kill()
                process.wait()
            usage = group.usage()
            report = {
                "rival": rival.name,
                "label": rival.label,
                "status": status or _status(process.returncode, usage.oom_kills, errors.read_text("utf-8")),
                "wall_s": time.perf_counter() - start,
                "cached_before_nbytes": {"weights": weights_left, "libraries": libraries_left},
                "load_average_before": load_average,
                "could_swap": swap_nbytes() > 0 and not group.swap_is_limited,
                "group": asdict(usage),
            }
        if report["status"] == "ok":
            report |= json.loads(output.read_text("utf-8").splitlines()[-1])
        return report

    def _command(self, rival: Rival, replaced: dict[str, Any]) -> list[str]:
        settings = {name: getattr(self.arguments, name) for name in
                    ("checkpoint", "store", "memory", "tokens", "prompt_tokens", "seed")}  # fmt: skip
        settings |= {"child": rival.name, "resident": rival.n_resident, "scratch": self.scratch} | replaced
        command = [sys.executable, str(Path(__file__).with_name("below_memory_child.py"))]
        for name, value in settings.items():
            if value is not None:
                command += [f"--{name.replace('_', '-')}", str(value)]
        return [*command, "--option", *rival.options, *(["--copy"] if rival.copied else [])]


def _is_option(name: str, value: str) -> bool:
    return name in OPTIONS and value in (OPTIONS[name] or (value,))


def _status(exit_code: int, oom_kills: int, errors: str) -> str:
    if oom_kills:
        return "killed: out of memory"
    if exit_code == 0:
        return "ok"
    how = f"signal {signal.Signals(-exit_code).name}" if exit_code < 0 else f"exit status {exit_code}"
    return f"{how}: {(errors.strip().splitlines() or ['no message'])[-1]}"


def take_libraries(bench: Bench, limit_nbytes: int, dtype: str) -> dict[str, int]:
    """Bytes that each library takes to run a model of a few MB, measured under the limit.

    The first run of each is a rehearsal: kernels are compiled, and the files to be dropped become known.

    Raises:
        UsageError: one does not run at all.
    """
    base_nbytes = {}
    demo = {"checkpoint": DEMO_MODEL, "store": DEMO_MODEL, "memory": "auto", "dtype": dtype}
    for rival in (Rival("disk_offload"), Rival("sparseflow")):
        for limit in (os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), limit_nbytes):
            report = bench.run(rival, limit, **demo)
            if report["status"] != "ok":
                raise UsageError(
                    f"{rival.name} with the demo model under {format_size(limit)}: {report['status']}; "
                    f"raise --limit (now {format_size(limit_nbytes)}) or --deadline-s, or mend the environment"
                )
            mapped = {*bench.libraries, *map(Path, report["mapped_files"])}
            bench.libraries = sorted(path for path in mapped if path.is_file())
        names = ("anonymous_nbytes", "mapped_nbytes", "page_table_nbytes")
        base_nbytes[rival.name] = sum(report[name] for name in names)
    return base_nbytes


def layer_nbytes(checkpoint: Path) -> list[int]:
    """Bytes of each decoder layer, and last of all that belongs to none, from the headers of its safetensors files."""
    sizes: dict[int, int] = {}
    for path in checkpoint.glob("*.safetensors"):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        for name, place in header.items():
            if name == "__metadata__":
                continue
            match = re.search(r"\blayers\.(\d+)\.", name)
            layer = int(match[1]) if match else -1
            sizes[layer] = sizes.get(layer, 0) + place["data_offsets"][1] - place["data_offsets"][0]
    return [sizes[layer] for layer in sorted(sizes, key=lambda layer: (layer < 0, layer))]


def partial_candidates(given: Sequence[int], sizes: Sequence[int], room_nbytes: int) -> list[Rival]:
    """Which partial offloads to try.

    Copied layers, which the kernel cannot take back, around as many as fit beside the rest and one layer on its way;
    mapped ones, which compete for the page cache, as many, and all: that is transformers without accelerate.

    Raises:
        UsageError: no number given is possible.
    """
    *layers, rest = sizes
    n_fitting = max(0, min(len(layers), (room_nbytes - rest - max(layers)) // max(layers)))
    copied = given or range(n_fitting - 1, n_fitting + 3)
    mapped = given or (n_fitting, len(layers))
    tried = [(n, True) for n in copied] + [(n, False) for n in mapped]
    candidates = [Rival("partial_offload", n, way) for n, way in dict.fromkeys(tried) if 0 < n <= len(layers)]
    if not candidates:
        raise UsageError(
            f"--partial-layers {' '.join(map(str, given))}: the model has {len(layers)} layers; give 1 or more"
        )
    return candidates


def say(report: dict[str, Any]) -> None:
    """One line on stderr for a finished run."""
    rate = f"{report['decode_tokens_per_s']:.3g} tokens/s, " if report["status"] == "ok" else ""
    print(f"{report['label']}: {rate}{report['status']}, {report['wall_s']:.0f} s", file=sys.stderr, flush=True)


def search_partial(bench: Bench, candidates: Sequence[Rival], limit_nbytes: int) -> tuple[list[dict[str, Any]], Rival]:
    """Try each with few tokens; the reports, and the fastest that lived."""
    reports = []
    n_tokens = min(bench.arguments.tokens, bench.arguments.search_tokens)
    for rival in candidates:
        reports.append(bench.run(rival, limit_nbytes, tokens=n_tokens))
        say(reports[-1])
    rates = [report.get("decode_tokens_per_s", 0.0) for report in reports]
    return reports, candidates[rates.index(max(rates))]


def note_agreement(runs: Sequence[dict[str, Any]]) -> None:
    """Add to each finished run the share of positions where its likeliest token is the dense model's."""
    dense = next((run["likeliest"] for run in runs if run["rival"] == "disk_offload" and run["status"] == "ok"), None)
    for run in runs:
        if dense and run["status"] == "ok":
            run["same_as_dense"] = statistics.mean(a == b for a, b in zip(run["likeliest"], dense, strict=True))


def summarise(runs: Sequence[dict[str, Any]], bandwidth: float) -> dict[str, dict[str, Any]]:
    """Label -> medians over its finished runs, lowest and highest rate, and how each other run ended."""
    medians = (
        "decode_tokens_per_s", "time_to_first_token_s", "first_step_s", "load_s", "bytes_from_disk_per_token",
        "bytes_from_disk_per_s", "cpu_s_per_token", "major_faults_per_token", "anonymous_nbytes", "same_as_dense",
    )  # fmt: skip
    table: dict[str, dict[str, Any]] = {}
    for label in dict.fromkeys(run["label"] for run in runs):
        own = [run for run in runs if run["label"] == label]
        finished = [run for run in own if run["status"] == "ok"]
        row: dict[str, Any] = {"n_runs": len(own), "n_finished": len(finished)}
        row["failures"] = [run["status"] for run in own if run["status"] != "ok"]
        row["peak_nbytes"] = max((run["group"]["peak_nbytes"] or 0 for run in own), default=0)
        row["limit_hits"] = statistics.median(run["group"]["limit_hits"] for run in own)
        if finished:
            row |= {name: statistics.median(run[name] for run in finished) for name in medians if name in finished[0]}
            rates = [run["decode_tokens_per_s"] for run in finished]
            row |= {"lowest_tokens_per_s": min(rates), "highest_tokens_per_s": max(rates)}
            row["share_of_random_reads"] = row["bytes_from_disk_per_s"] / bandwidth
            nbytes = row["bytes_from_disk_per_token"]
            row["disk_limit_tokens_per_s"] = bandwidth / nbytes if nbytes else None
        table[label] = row
    return table


COLUMNS = (  # heading, key, unit, digits
    ("prompt s", "time_to_first_token_s", 1, 2),
    ("1st step s", "first_step_s", 1, 2),
    ("load s", "load_s", 1, 1),
    ("MB/token", "bytes_from_disk_per_token", 1e6, 1),
    ("MB/s", "bytes_from_disk_per_s", 1e6, 0),
    ("of random reads", "share_of_random_reads", 1, 2),
    ("disk's limit tokens/s", "disk_limit_tokens_per_s", 1, 2),
    ("cpu s/token", "cpu_s_per_token", 1, 2),
    ("faults/token", "major_faults_per_token", 1, 0),
    ("private MiB", "anonymous_nbytes", 1 << 20, 0),
    ("peak MiB", "peak_nbytes", 1 << 20, 0),
    ("as dense", "same_as_dense", 1, 3),
)


def format_table(summary: dict[str, dict[str, Any]]) -> str:
    """For people: a line a rival, and a line for each run that did not finish."""
    lines = [["", "runs", "tokens/s (lowest-highest)", *(heading for heading, *_ in COLUMNS)]]
    for label, row in summary.items():
        rate = "-"
        if row["n_finished"]:
            lowest, highest = row["lowest_tokens_per_s"], row["highest_tokens_per_s"]
            rate = f"{row['decode_tokens_per_s']:.3f} ({lowest:.3f}-{highest:.3f})"
        cells = [f"{row[key] / unit:.{n}f}" if row.get(key) is not None else "-" for _, key, unit, n in COLUMNS]
        lines.append([label, f"{row['n_finished']}/{row['n_runs']}", rate, *cells])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines]
    text += [f"{label}: {failure}" for label, row in summary.items() for failure in row["failures"]]
    return "\n".join(text)


class Disk:
    """The disk's bandwidth, measured whenever asked, at the store's bundle size and at 1 MiB."""

    def __init__(self, store: Path) -> None:
        manifest = json.loads((store / "manifest.json").read_bytes())
        self.bundle_nbytes = -(-manifest["stride_nbytes"] // mmap.PAGESIZE) * mmap.PAGESIZE  # O_DIRECT reads blocks
        self._shards = sorted((store / "neurons").iterdir())
        self._random: list[float] = []
        self._sequential: list[float] = []
        self._how = ""

    def measure(self) -> None:
        """Once, both sizes."""
        rate, self._how = disk_bandwidth(self._shards, self.bundle_nbytes)
        self._random.append(rate)
        self._sequential.append(disk_bandwidth(self._shards, SEQUENTIAL_NBYTES)[0])

    @property
    def random_bytes_per_s(self) -> float:
        """Median so far."""
        return statistics.median(self._random)

    def report(self) -> dict[str, Any]:
        """For the JSON file."""
        return {
            "block_nbytes": self.bundle_nbytes,
            "random_bytes_per_s": self._random,
            "large_block_nbytes": SEQUENTIAL_NBYTES,
            "large_bytes_per_s": self._sequential,
            "how": self._how,
        }


def compare(bench: Bench, disk: Disk, limit_nbytes: int) -> dict[str, Any]:
    """The whole benchmark: base, search, rounds, summary."""
    arguments = bench.arguments
    manifest = json.loads((arguments.store / "manifest.json").read_bytes())
    base_nbytes = take_libraries(bench, limit_nbytes, manifest["profile"]["dtype"])
    reserve_nbytes = parse_size(arguments.reserve)
    room_nbytes = {name: limit_nbytes - nbytes - reserve_nbytes for name, nbytes in base_nbytes.items()}
    if arguments.memory is None:
        if room_nbytes["sparseflow"] <= 0:
            raise UsageError(
                f"--limit {format_size(limit_nbytes)}: the libraries take {format_size(base_nbytes['sparseflow'])} and "
                f"{format_size(reserve_nbytes)} are reserved; raise --limit or lower --reserve"
            )
        arguments.memory = room_nbytes["sparseflow"]
    disk.measure()
    rivals, searched = list(arguments.rivals), []
    if Rival("partial_offload") in rivals:
        sizes = layer_nbytes(arguments.checkpoint)
        candidates = partial_candidates(arguments.partial_layers or (), sizes, room_nbytes["disk_offload"])
        searched, best = search_partial(bench, candidates, limit_nbytes)
        rivals[rivals.index(Rival("partial_offload"))] = best
    runs = []
    for n_round in range(arguments.rounds):
        disk.measure()
        first = n_round % len(rivals)
        for rival in (*rivals[first:], *rivals[:first]):
            runs.append(bench.run(rival, limit_nbytes) | {"round": n_round})
            say(runs[-1])
    note_agreement(runs)
    return {
        "limit_nbytes": limit_nbytes,
        "base_nbytes": base_nbytes,
        "reserve_nbytes": reserve_nbytes,
        "memory": arguments.memory,
        "cgroup_version": bench.parent.interface.version,
        "disk": disk.report(),
        "summary": summarise(runs, disk.random_bytes_per_s),
        "search": summarise(searched, disk.random_bytes_per_s),
        "runs": [_without_files(run) for run in runs],
        "search_runs": [_without_files(run) for run in searched],
    }


def _without_files(run: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in run.items() if name != "mapped_files"}


def print_result(result: dict[str, Any], arguments: argparse.Namespace) -> None:
    """What was measured, for people."""
    disk, base = result["disk"], result["base_nbytes"]
    memory = result["memory"]
    print(
        f"limit {format_size(result['limit_nbytes'])} with page cache (cgroup v{result['cgroup_version']}); libraries "
        f"take {format_size(base['disk_offload'])} with accelerate, {format_size(base['sparseflow'])} with SparseFlow; "
        f"{format_size(result['reserve_nbytes'])} reserved; --memory "
        f"{format_size(memory) if isinstance(memory, int) else memory}"
    )
    random_mb_per_s, large_mb_per_s = (
        [f"{rate / 1e6:.0f}" for rate in disk[name]] for name in ("random_bytes_per_s", "large_bytes_per_s")
    )
    print(
        f"disk past the cache, MB/s: {', '.join(random_mb_per_s)} at {format_size(disk['block_nbytes'])}, "
        f"{', '.join(large_mb_per_s)} at {format_size(disk['large_block_nbytes'])} ({disk['how']})"
    )
    runs = result["runs"] + result["search_runs"]
    loads = sorted(run["load_average_before"] for run in runs)
    print(f"load average before a run: {loads[0]:.1f} to {loads[-1]:.1f} on {os.cpu_count()} cores, our own included")
    weights, libraries = (max(run["cached_before_nbytes"][what] for run in runs) for what in ("weights", "libraries"))
    if weights or libraries:
        print(
            f"mapped by other processes, so not charged to some runs: {format_size(weights)} of weights, "
            f"{format_size(libraries)} of libraries"
        )
    if any(run["could_swap"] for run in runs):
        print("swap is on and cannot be limited here: runs may have used more than the limit; turn it off (swapoff -a)")
    if result["search"]:
        print(f"\npartial offload, {min(arguments.tokens, arguments.search_tokens)} tokens each:")
        print(format_table(result["search"]))
    print(
        f"\n{arguments.tokens} tokens after a prompt of {arguments.prompt_tokens}, median of {arguments.rounds} rounds:"
    )
    print(format_table(result["summary"]))


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="transformers folder with safetensors")
    parser.add_argument("--store", type=Path, required=True, help="the same model, converted")
    parser.add_argument("--limit", default="2.15GiB", help="memory of each run, page cache included")
    parser.add_argument("--memory", help="for SparseFlow's weights; default: limit less libraries and reserve")
    parser.add_argument("--reserve", default="64MiB", help="for KV cache, activations and the kernel's own")
    parser.add_argument("--tokens", type=int, default=12, help="decode steps of each run, 2 at least")
    parser.add_argument("--prompt-tokens", type=int, default=8)
    parser.add_argument(
        "--rivals",
        nargs="+",
        type=Rival.parse,
        default=[Rival(name) for name in RIVALS],
        help=f"of {', '.join(RIVALS)}; sparseflow with options too, as in sparseflow:io=map,lookahead=off",
    )
    parser.add_argument("--partial-layers", type=int, nargs="+", help="layers on the cpu to try; default: about as fit")
    parser.add_argument("--search-tokens", type=int, default=4, help="decode steps of each candidate")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each rival, in turn")
    parser.add_argument("--seed", type=int, default=1, help="of prompt and tokens")
    parser.add_argument("--deadline-s", type=float, default=900, help="of each run")
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    arguments = parser.parse_args()
    if min(arguments.tokens, arguments.search_tokens) < 2 or min(arguments.rounds, arguments.prompt_tokens) < 1:
        parser.error("--tokens and --search-tokens are 2 or more, --rounds and --prompt-tokens 1 or more")
    return arguments


def main() -> int:
    """0: every rival finished at least once. 1: one did not, or nothing could be measured."""
    arguments = parse_arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that groups are removed
    for folder, name in ((arguments.checkpoint, "config.json"), (arguments.store, "manifest.json")):
        if not (folder / name).is_file():
            raise UsageError(f"{folder}: has no {name}; give --checkpoint a transformers folder and --store a store")
    if not list(arguments.checkpoint.glob("*.safetensors")):
        raise UsageError(f"{arguments.checkpoint}: has no *.safetensors, which transformers offloads without a copy")
    cold_files = [
        path for folder in (arguments.checkpoint, arguments.store) for path in folder.rglob("*") if path.is_file()
    ]
    with tempfile.TemporaryDirectory(prefix="below-memory-") as scratch:
        bench = Bench(find_group_parent(), Path(scratch), arguments, cold_files, [])
        result = compare(bench, Disk(arguments.store), parse_size(arguments.limit))
    print_result(result, arguments)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1), encoding="utf-8")
    return int(any(row["n_finished"] == 0 for row in result["summary"].values()))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (UsageError, NoMemoryGroupError, NoColdReadError, SparseFlowError) as problem:
        sys.exit(f"below_memory: {problem}")
