"""Decode speed beside other programs and the machine's limits: each case in a process of its own, in turn.

All cases read the same prompt and decode the same random tokens. With --limit each has so much memory, page cache
included, and reads cold. The first case is what the others are compared with.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

from sparseflow.bench.cases import PARTIAL, Case
from sparseflow.bench.child import PEERS
from sparseflow.bench.memory_cgroup import GroupParent, NoMemoryGroupError, find_group_parent
from sparseflow.bench.runs import DEMO_MODEL, Bench, Conditions
from sparseflow.cli.arguments import number
from sparseflow.errors import BadRequest
from sparseflow.utils.sizes import parse_size

_UNLIMITED = ["transformers", "sparseflow:fidelity=dense", "sparseflow"]
_LIMITED = ["device_map", PARTIAL, "sparseflow:fidelity=dense", "sparseflow"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """MODEL, the cases, and under which conditions they run."""
    parser.add_argument(
        "model", nargs="?", type=Path, default=DEMO_MODEL, help="a transformers checkpoint folder with safetensors"
    )
    parser.add_argument("--store", type=Path, help="the same model, converted; else it is converted for the benchmark")
    parser.add_argument(
        "--cases",
        nargs="+",
        type=_case,
        metavar="CASE",
        help=f"of {', '.join((*PEERS, PARTIAL))}, with options as in sparseflow:fidelity=certified,io=map; default: "
        f"{' '.join(_UNLIMITED)}; with --limit: {' '.join(_LIMITED)}",
    )
    parser.add_argument("--limit", type=parse_size, metavar="SIZE", help="memory of each run, such as 2.15GiB")
    parser.add_argument("--memory", help="for SparseFlow's weights; under a limit, else what it and --reserve leave")
    parser.add_argument(
        "--reserve", type=parse_size, default=parse_size("64MiB"), help="for caches of keys and the kernel's own; bytes"
    )
    parser.add_argument("--cold", action="store_true", help="drop files from the page cache before each run")
    parser.add_argument("--tokens", type=number(int, 2), default=32, help="to decode in each run")
    parser.add_argument("--prompt-tokens", type=number(int, 1), default=8, help="before them")
    parser.add_argument("--rounds", type=number(int, 1), default=3, help="runs of each case")
    parser.add_argument("--threads", type=number(int, 1), default=len(os.sched_getaffinity(0)), help="of each run")
    parser.add_argument("--dtype", help="of peers that can choose; else as in the checkpoint")
    parser.add_argument("--seed", type=int, default=1, help="of prompt and tokens")
    parser.add_argument("--deadline-s", type=float, default=900, help="of each run")
    parser.add_argument(
        "--partial-layers", type=number(int, 1), nargs="+", default=[], help="of partial offloads to try; else as fit"
    )
    parser.add_argument(
        "--python", type=_pair, nargs="+", default=[], metavar="PEER=PATH", help="interpreter of a peer"
    )
    parser.add_argument(
        "--converted", type=_pair, nargs="+", default=[], metavar="PEER=DIR", help="a peer's own model; made if missing"
    )
    parser.add_argument("--quick", action="store_true", help="few tokens, one round: to see that it works")
    parser.add_argument("--csv", type=Path, metavar="PATH", help="write the table there too")
    parser.add_argument("--plot", type=Path, metavar="PATH", help="draw PATH.png and PATH.svg")


def run(arguments: argparse.Namespace) -> dict[str, object]:
    """Print a table, or with --json one object."""
    from sparseflow.bench.benchmark import run_benchmark
    from sparseflow.bench.report import format_conditions, format_table, write_files
    from sparseflow.evaluation.plot import require_plotting

    if arguments.plot is not None:
        require_plotting()
    _require_checkpoint(arguments.model)
    with tempfile.TemporaryDirectory(prefix="sparseflow-bench-") as scratch:
        bench = Bench(_conditions(arguments, Path(scratch)), _group_parent(arguments.limit), Path(scratch), _say)
        cases = arguments.cases or [Case.parse(text) for text in (_LIMITED if arguments.limit else _UNLIMITED)]
        result = run_benchmark(bench, cases, 1 if arguments.quick else arguments.rounds, arguments.partial_layers)
    if not arguments.json:
        print(format_conditions(result))
        if result["search"]:
            print("\npartial offloads that were tried:\n" + format_table(result["search"]))
        print("\n" + format_table(result["summary"]))
    for path in write_files(result, arguments.csv, arguments.plot):
        print(path, file=sys.stderr)
    return result


def _conditions(arguments: argparse.Namespace, scratch: Path) -> Conditions:
    return Conditions(
        checkpoint=arguments.model.resolve(),
        store=(arguments.store or _converted(arguments, scratch)).resolve(),
        limit_nbytes=arguments.limit,
        memory=parse_size(arguments.memory) if arguments.memory not in (None, "auto") else arguments.memory,
        reserve_nbytes=arguments.reserve,
        tokens=4 if arguments.quick else arguments.tokens,
        prompt_tokens=arguments.prompt_tokens,
        threads=arguments.threads,
        dtype=arguments.dtype,
        seed=arguments.seed,
        is_cold=arguments.cold,
        deadline_s=arguments.deadline_s,
        pythons=dict(arguments.python),
        converted={peer: str(Path(folder).resolve()) for peer, folder in arguments.converted},
    )


def _group_parent(limit: int | None) -> GroupParent | None:
    if limit is None:
        return None
    try:
        return find_group_parent()
    except NoMemoryGroupError as error:
        print(f"bench: {error}", file=sys.stderr)
        return None


def _converted(arguments: argparse.Namespace, scratch: Path) -> Path:
    """A store of the checkpoint, made by a process of its own, so that this one stays small."""
    import subprocess

    store = scratch / "store"
    dtype = ["--dtype", arguments.dtype] if arguments.dtype else []
    command = [sys.executable, "-m", "sparseflow", "convert", str(arguments.model), str(store), *dtype]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BadRequest(f"{arguments.model} cannot be converted: {done.stderr.strip()}")
    return store


def _require_checkpoint(folder: Path) -> None:
    if not (folder / "config.json").is_file() or not list(folder.glob("*.safetensors")):
        raise BadRequest(f"{folder}: has no config.json and *.safetensors; give a transformers checkpoint folder")


def _case(text: str) -> Case:
    try:
        return Case.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _pair(text: str) -> tuple[str, str]:
    peer, _, path = text.partition("=")
    if peer not in PEERS or not path:
        raise argparse.ArgumentTypeError(f"{text!r}: give PEER=PATH, PEER one of {', '.join(PEERS)}")
    return peer, path


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
