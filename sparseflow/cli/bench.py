"""Decode speed beside other programs and the machine's limits: each case in a process of its own, in turn.

All cases read the same prompt and decode the same random tokens. With --limit each has so much memory, page cache
included, and reads cold. The first case is what the others are compared with.
"""

import argparse
import logging
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from sparseflow.bench.cases import PARTIAL, Case
from sparseflow.bench.child import PEERS
from sparseflow.bench.memory_cgroup import GroupParent, NoMemoryGroupError, find_group_parent
from sparseflow.bench.runs import DEMO_MODEL, Bench, Conditions
from sparseflow.cli.arguments import add_quiet, model_path, require_model_path, require_place, size_or_auto
from sparseflow.core.checkpoint import locate, model_name
from sparseflow.errors import BadRequest
from sparseflow.store.manifest import is_store
from sparseflow.store.profile import DTYPE_NBYTES
from sparseflow.utils.parsing import number, size
from sparseflow.utils.progress import waiting
from sparseflow.utils.sizes import SIZE_FORMS, parse_size

EXAMPLES = """\
examples:
  sparseflow bench --quick
  sparseflow bench facebook/opt-1.3b
  sparseflow bench CHECKPOINT --store STORE --tokens 64 --rounds 5 --csv result.csv
  sparseflow bench CHECKPOINT --store STORE --limit 2.15GiB --cases device_map sparseflow:fidelity=certified,io=map
"""

_log = logging.getLogger(__name__)
_UNLIMITED = ["transformers", "sparseflow:fidelity=dense", "sparseflow"]
_LIMITED = ["device_map", PARTIAL, "sparseflow:fidelity=dense", "sparseflow"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """MODEL, the cases, and under which conditions they run."""
    parser.add_argument(
        "model",
        nargs="?",
        type=model_path,
        default=str(DEMO_MODEL),
        metavar="MODEL",
        help="a transformers checkpoint folder, or a hub id; without, the demo model",
    )
    parser.add_argument(
        "--store", type=Path, metavar="STORE", help="the same model, converted; without, it is converted for the while"
    )
    parser.add_argument(
        "--cases",
        nargs="+",
        type=_case,
        metavar="CASE",
        help=f"of {', '.join((*PEERS, PARTIAL))}, with options as in sparseflow:fidelity=certified,io=map; default: "
        f"{' '.join(_UNLIMITED)}; with --limit: {' '.join(_LIMITED)}",
    )
    _add_conditions(parser)
    parser.add_argument(
        "--python", type=_pair, nargs="+", default=[], metavar="PEER=PATH", help="interpreter of a peer"
    )
    parser.add_argument(
        "--converted", type=_pair, nargs="+", default=[], metavar="PEER=DIR", help="a peer's own model; made if missing"
    )
    parser.add_argument("--quick", action="store_true", help="few tokens, one round: to see that it works")
    parser.add_argument("--csv", type=Path, metavar="PATH", help="write the table there too")
    parser.add_argument("--plot", type=Path, metavar="PATH", help="draw PATH.png and PATH.svg")
    add_quiet(parser, "no word of each run, and not how long it takes")


def _add_conditions(parser: argparse.ArgumentParser) -> None:
    """What is the same for all runs."""
    group = parser.add_argument_group("memory")
    group.add_argument("--limit", type=size, metavar="SIZE", help=f"of each run, with page cache: {SIZE_FORMS}")
    group.add_argument(
        "--memory",
        type=size_or_auto,
        metavar="SIZE",
        help="for SparseFlow's weights, or auto; without, what --limit and --reserve leave, or auto",
    )
    group.add_argument(
        "--reserve", type=size, default="64MiB", metavar="SIZE", help="for caches of keys and the kernel's own"
    )
    group.add_argument("--cold", action="store_true", help="drop files from the page cache before each run")
    group = parser.add_argument_group("runs")
    group.add_argument("--tokens", type=number(int, 2), default=32, metavar="N", help="to decode in each run")
    group.add_argument("--prompt-tokens", type=number(int, 1), default=8, metavar="N", help="before them")
    group.add_argument("--rounds", type=number(int, 1), default=3, metavar="N", help="runs of each case")
    group.add_argument(
        "--threads", type=number(int, 1), default=len(os.sched_getaffinity(0)), metavar="N", help="of each run"
    )
    group.add_argument(
        "--dtype",
        choices=tuple(DTYPE_NBYTES),
        metavar="DTYPE",
        help=f"of peers that can choose: {', '.join(DTYPE_NBYTES)}; without, as in the checkpoint",
    )
    group.add_argument("--seed", type=number(int, 0, 2**63 - 1), default=1, metavar="N", help="of prompt and tokens")
    group.add_argument("--deadline-s", type=number(float, 1), default=900, metavar="SECONDS", help="of each run")
    group.add_argument(
        "--partial-layers",
        type=number(int, 1),
        nargs="+",
        default=[],
        metavar="N",
        help="that partial offloads to try keep in memory; without, as many as fit",
    )


def check(arguments: argparse.Namespace) -> None:
    """Refuse paths that cannot be, and a figure where none can be drawn."""
    from sparseflow.evaluation.plot import require_plotting

    require_model_path(arguments.model)
    for path in filter(None, (arguments.csv, arguments.plot)):
        require_place(path)
    if arguments.plot is not None:
        require_plotting()


def run(arguments: argparse.Namespace) -> dict[str, object]:
    """Print a table, or with --json one object."""
    from sparseflow.bench.benchmark import run_benchmark
    from sparseflow.bench.report import format_conditions, format_table, write_files

    cases = arguments.cases or [Case.parse(text) for text in (_LIMITED if arguments.limit else _UNLIMITED)]
    checkpoint = _checkpoint(arguments.model, cases)
    with tempfile.TemporaryDirectory(prefix="sparseflow-bench-") as scratch:
        conditions = _conditions(arguments, checkpoint, Path(scratch))
        say = _ignore if arguments.quiet else _say
        bench = Bench(conditions, _group_parent(arguments.limit), Path(scratch), say, quiet=arguments.quiet)
        result = run_benchmark(bench, cases, 1 if arguments.quick else arguments.rounds, arguments.partial_layers)
    if not arguments.json:
        print(format_conditions(result))
        if result["search"]:
            print("\npartial offloads that were tried:\n" + format_table(result["search"]))
        print("\n" + format_table(result["summary"]))
    for path in write_files(result, arguments.csv, arguments.plot):
        print(path, file=sys.stderr)
    return result


def _conditions(arguments: argparse.Namespace, checkpoint: Path, scratch: Path) -> Conditions:
    return Conditions(
        checkpoint=checkpoint,
        model=model_name(arguments.model),
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
        _log.warning(error)
        return None


def _converted(arguments: argparse.Namespace, scratch: Path) -> Path:
    """A store of the checkpoint, made by a process of its own, so that this one stays small."""
    import subprocess

    store = scratch / "store"
    dtype = ["--dtype", arguments.dtype] if arguments.dtype else []
    command = [sys.executable, "-m", "sparseflow", "convert", str(arguments.model), str(store), *dtype]
    with waiting(f"converting {arguments.model}", quiet=arguments.quiet):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BadRequest(f"{arguments.model} cannot be converted: {_reason(done.stderr)}")
    return store


def _reason(said: str) -> str:
    """What a command's error line says, without who says it."""
    return (said.strip().splitlines() or ["it says nothing"])[-1].removeprefix("sparseflow: error: ")


def _checkpoint(name: str, cases: Sequence[Case]) -> Path:
    """Its folder; one of the hub is downloaded, if it has to be."""
    folder = locate(name)
    if is_store(folder):
        raise BadRequest(f"{folder}: is a store; give the checkpoint that it was made from, and this as --store")
    kinds = ["safetensors"] if any(case.peer == PARTIAL for case in cases) else ["safetensors", "bin"]
    if not (folder / "config.json").is_file() or not any(list(folder.glob(f"*.{kind}")) for kind in kinds):
        wanted = " or ".join(f"*.{kind}" for kind in kinds)
        raise BadRequest(f"{folder}: has no config.json and {wanted}; give a transformers checkpoint folder")
    return folder


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


def _ignore(text: str) -> None:
    pass
