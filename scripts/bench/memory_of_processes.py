"""Memory that several processes with one model on one host take together, rival by rival.

    python scripts/bench/memory_of_processes.py --store DIR --checkpoint DIR --rivals sparseflow transformers

    sparseflow      one weight server, which is counted, and its clients
    transformers    the dense OPT of the checkpoint; transformers:float32 for another precision than float16
    ctranslate2     CTranslate2 on the CPU; ctranslate2:float16 for another compute type than int8

All processes of a rival start at once, read the same prompt and decode the same tokens, and hold still three times:
after their imports, after loading and after decoding. Then the kernel's Pss of every process is read and summed: a page
that n processes map counts as an nth in each, so the sum counts every page once.

    runtime    Pss after the imports; of the server: what one of a small model takes besides shared memory
    weights    private memory that loading added, shared memory, and what is mapped of the model's files at the end
    rest       the others: KV cache, buffers, code and libraries that were touched later

Page cache that no process maps is not counted: the kernel can take it back. Processes outside that map the same files
lower the Pss, so their number is given. CTranslate2 needs an environment and a model of its own:

    python -m venv CT2 && CT2/bin/pip install torch==2.13.0 && CT2/bin/pip install ctranslate2 transformers
    CT2/bin/python scripts/bench/memory_child.py convert --checkpoint DIR --out CT2_MODEL --quantization int8
    python scripts/bench/memory_of_processes.py --store DIR --rivals ctranslate2 ctranslate2:float32 \
      --ctranslate2-python CT2/bin/python --ctranslate2-model CT2_MODEL
"""

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import psutil
from memory_child import ENDING_DEADLINE_S, BenchError, Child, last_line

from sparseflow.errors import SparseFlowError
from sparseflow.store.manifest import Manifest
from sparseflow.utils.sizes import format_size

DEFAULT_PRECISION = {"sparseflow": "", "transformers": "float16", "ctranslate2": "int8"}
SCRIPTS = Path(__file__).parents[1]
DEMO_MODEL = SCRIPTS.parent / "sparseflow" / "assets" / "demo_model"
RUNTIME_DIR_VARIABLE = "SPARSEFLOW_RUNTIME_DIR"
LARGE_FILE_NBYTES = 8 << 20
ROUNDING_NBYTES = 1 << 20  # Pss is given in KiB a process, rounded down


@dataclass(frozen=True, slots=True)
class Rival:
    """Who loads the model, and in which precision it is asked to."""

    name: str
    precision: str

    @classmethod
    def parse(cls, text: str) -> "Rival":
        """`transformers`, or with a precision: `transformers:float32`."""
        name, _, precision = text.partition(":")
        if name not in DEFAULT_PRECISION or (precision and name == "sparseflow"):
            raise argparse.ArgumentTypeError(
                f"{text!r}: give one of {', '.join(DEFAULT_PRECISION)}, the last two perhaps with :PRECISION"
            )
        return cls(name, precision or DEFAULT_PRECISION[name])

    @property
    def label(self) -> str:
        """For people."""
        return f"{self.name} {self.precision}".strip()


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of a process, or of several together. All are Pss but `private`, which no other process maps."""

    total: int = 0
    anon: int = 0
    file: int = 0
    shmem: int = 0
    private: int = 0
    model_files: int = 0  # of `file`: what lies in the model's folder

    @classmethod
    def parse(cls, rollup: str, model_files: int = 0) -> "Memory":
        """From the text of smaps_rollup."""
        lines = (line.split() for line in rollup.splitlines())
        nbytes = {words[0]: int(words[1]) * 1024 for words in lines if words[-1] == "kB"}
        pss = (nbytes[name] for name in ("Pss:", "Pss_Anon:", "Pss_File:", "Pss_Shmem:"))
        return cls(*pss, nbytes["Private_Clean:"] + nbytes["Private_Dirty:"], model_files)

    @classmethod
    def sum(cls, parts: Iterable["Memory"]) -> "Memory":
        """Of several processes."""
        rows = list(parts)
        return cls(*(sum(getattr(row, each.name) for row in rows) for each in fields(cls)))


@dataclass(frozen=True, slots=True)
class Moment:
    """What was read while all processes held still. The server is for SparseFlow only."""

    clients: list[Memory]
    server: list[Memory]
    shared_memory_held: int  # by open descriptors, whether or not somebody maps it
    n_outsiders: int  # processes not counted that map one of the large files

    @classmethod
    def read(cls, clients: Iterable[int], server: Iterable[int], folder: Path) -> "Moment":
        """Of these processes now. folder: of the model."""
        memories, large_files, held = {}, set(), {}
        for pid in (*clients, *server):
            mapped = 0
            for mapping in psutil.Process(pid).memory_maps():
                if Path(mapping.path).is_relative_to(folder):
                    mapped += mapping.pss - mapping.anonymous  # pages that were written to are private memory
                if mapping.rss >= LARGE_FILE_NBYTES and Path(mapping.path).is_file():
                    large_files.add(mapping.path)
            memories[pid] = Memory.parse(Path(f"/proc/{pid}/smaps_rollup").read_text(), mapped)
            for link in Path(f"/proc/{pid}/fd").iterdir():
                with contextlib.suppress(OSError):  # it was closed
                    if os.readlink(link).startswith(("/memfd:", "/dev/shm/")):
                        status = link.stat()
                        held[status.st_dev, status.st_ino] = status.st_blocks * 512
        return cls(
            [memories[pid] for pid in clients],
            [memories[pid] for pid in server],
            sum(held.values()),
            sum(maps_any(pid, large_files) for pid in psutil.pids() if pid not in memories),
        )

    @property
    def all(self) -> Memory:
        """Of clients and server together."""
        return Memory.sum((*self.clients, *self.server))


def maps_any(pid: int, paths: Iterable[str]) -> bool:
    """Whether a process maps one of these files."""
    try:
        maps = Path(f"/proc/{pid}/maps").read_text()
    except OSError:  # it ended, or is another user's
        return False
    return any(path in maps for path in paths)


def account(bare: Moment, loaded: Moment, decoded: Moment) -> dict[str, Any]:
    """What the memory after decoding is for, in bytes."""
    total, small_server = decoded.all, Memory.sum(bare.server)
    runtime = Memory.sum(bare.clients).total + small_server.total - small_server.shmem
    weights = loaded.all.anon - bare.all.anon + total.shmem + total.model_files
    return {
        "n_clients": len(decoded.clients),
        "n_server_processes": len(decoded.server),
        "pss": asdict(total),
        "server_pss": asdict(Memory.sum(decoded.server)),
        "private_per_client": statistics.mean(client.private for client in decoded.clients),
        "shared_memory_held": decoded.shared_memory_held,
        "n_outsiders": max(moment.n_outsiders for moment in (bare, loaded, decoded)),
        "runtime": runtime,
        "weights": weights,
        "rest": total.total - runtime - weights,
        "without_runtime": total.total - runtime,
    }


@dataclass(frozen=True)
class Bench:
    """What all rivals share."""

    arguments: argparse.Namespace
    scratch: Path
    vocab_size: int

    @property
    def _environment(self) -> dict[str, str]:
        """Of every process. The folder of the servers' sockets is this benchmark's alone, so it marks them too."""
        own = {RUNTIME_DIR_VARIABLE: str(self.scratch), "SPARSEFLOW_HOME": str(self.scratch / "home")}
        return os.environ | own | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(self.arguments.threads)}

    def _run(self, *words: object) -> None:
        """A program for this Python. It writes to a file: a pipe might be held open by a server that it leaves."""
        command, deadline_s = [sys.executable, *map(str, words)], self.arguments.deadline_s
        log = self.scratch / "tool.log"
        with log.open("wb") as out:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=self._environment)
            try:
                code = process.wait(deadline_s)
            except subprocess.TimeoutExpired as error:
                raise BenchError(f"{' '.join(command)}: not done in {deadline_s:g} s; raise --deadline-s") from error
            finally:
                process.kill()
                process.wait(ENDING_DEADLINE_S)
        if code:
            raise BenchError(f"{' '.join(command)}: exit status {code}: {last_line(log)}")

    def _marked(self) -> set[psutil.Process]:
        """Processes that were started with the environment above."""
        marked = set()
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if process.environ().get(RUNTIME_DIR_VARIABLE) == str(self.scratch):
                    marked.add(process)
        return marked

    @contextlib.contextmanager
    def _server(self, store: Path, name: str) -> Iterator[list[int]]:
        """A weight server and the ids of its processes. All are ended on leaving."""
        before = self._marked()
        try:
            self._run(SCRIPTS / "launch_daemon.py", store, "--name", name, "--memory", self.arguments.memory)
            yield sorted(process.pid for process in self._marked() - before)
        finally:
            left = list(self._marked() - before)
            for way in (psutil.Process.terminate, psutil.Process.kill):
                for process in left:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        way(process)
                _, left = psutil.wait_procs(left, ENDING_DEADLINE_S)

    @contextlib.contextmanager
    def _small_server(self) -> Iterator[list[int]]:
        """A server of the demo model."""
        store = self.scratch / "small-store"
        if not store.exists():
            self._run("-m", "sparseflow", "convert", DEMO_MODEL, store, "--quiet")
        with self._server(store, "small") as pids:
            yield pids

    def _child(self, rival: Rival, model: Path | str, n: int) -> Child:
        options = {"rival": rival.name, "precision": rival.precision, "model": model, "vocab_size": self.vocab_size}
        for name in ("tokens", "prompt_tokens", "seed", "threads"):
            options[name] = getattr(self.arguments, name)
        options["deadline_s"] = 10 * self.arguments.deadline_s  # it waits while servers start, one wait after the other
        python = self.arguments.ctranslate2_python if rival.name == "ctranslate2" else sys.executable
        command = [str(python), str(Path(__file__).with_name("memory_child.py")), "run"]
        command += [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
        return Child(command, self._environment, self.scratch / f"child-{n}.log")

    def measure(self, rival: Rival) -> dict[str, Any]:
        """All processes of a rival, through the three phases.

        Raises:
            BenchError: one of them ended or did not answer in time.
        """
        given = {"sparseflow": "store", "transformers": "checkpoint", "ctranslate2": "ctranslate2_model"}
        folder, is_served = getattr(self.arguments, given[rival.name]).resolve(), rival.name == "sparseflow"
        with contextlib.ExitStack() as stack:
            children: list[Child] = []
            for n in range(self.arguments.processes):
                children.append(stack.enter_context(self._child(rival, "model" if is_served else folder, n)))
            clients, server = [child.pid for child in children], []

            def next_phase() -> list[dict[str, Any]]:
                deadline = time.monotonic() + self.arguments.deadline_s
                return [child.next_phase(deadline) for child in children]

            def go_on() -> None:
                for child in children:
                    child.go_on()

            next_phase()
            with self._small_server() if is_served else contextlib.nullcontext(server) as small_server:
                bare = Moment.read(clients, small_server, folder)
            if is_served:
                server = stack.enter_context(self._server(folder, "model"))
            go_on()
            precisions = {phase["precision"] for phase in next_phase()}
            loaded = Moment.read(clients, server, folder)
            go_on()
            ids = [phase["ids"] for phase in next_phase()]
            decoded = Moment.read(clients, server, folder)
        same_ids = all(each == ids[0] for each in ids)
        result = {"rival": rival.label, "used": "/".join(sorted(precisions)), "ids": ids[0], "same_ids": same_ids}
        moments = {"bare": asdict(bare), "loaded": asdict(loaded), "decoded": asdict(decoded)}
        return result | account(bare, loaded, decoded) | moments


def format_table(results: Iterable[dict[str, Any]]) -> str:
    """For people: a line a rival in MiB, and one for a server."""
    kinds, parts = ("total", "anon", "file", "shmem"), ("runtime", "weights", "rest", "without_runtime")
    ratios = ("times_weights", "times_store")
    lines = [["MiB", "used", "sum of Pss", *kinds[1:], *parts[:3], "less runtime", "times weights", "times store",
              "private a client"]]  # fmt: skip
    for result in results:
        nbytes = [result["pss"][kind] for kind in kinds] + [result[part] for part in parts]
        cells = [f"{value / 2**20:.0f}" for value in nbytes] + [f"{result[ratio]:.2f}" for ratio in ratios]
        label, private = f"{result['n_clients']} {result['rival']}", f"{result['private_per_client'] / 2**20:.0f}"
        lines.append([label, result["used"], *cells, private])
        if result["n_server_processes"]:
            cells = [f"{result['server_pss'][kind] / 2**20:.0f}" for kind in kinds]
            lines.append(["  of that the server", "", *cells, *[""] * (len(lines[0]) - 6)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines)


def remarks(results: Iterable[dict[str, Any]]) -> Iterator[str]:
    """What a reader of the table must know."""
    for result in results:
        if result["n_outsiders"]:
            yield f"{result['rival']}: processes outside map the same files ({result['n_outsiders']}), so Pss is lower"
        if (unmapped := result["shared_memory_held"] - result["pss"]["shmem"]) > ROUNDING_NBYTES:
            yield f"{result['rival']}: {format_size(unmapped)} of shared memory is mapped by nobody, so not in the Pss"
        if not result["same_ids"]:
            yield f"{result['rival']}: its processes decoded different tokens"


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, required=True, help="the model, converted; its sizes are everybody's")
    parser.add_argument("--checkpoint", type=Path, help="the same model as a transformers folder")
    parser.add_argument("--rivals", nargs="+", type=Rival.parse, default=[Rival.parse("sparseflow")])
    parser.add_argument("--processes", type=int, default=4, help="that load the model; a weight server comes on top")
    parser.add_argument("--memory", default="6GiB", help="of SparseFlow's weight server")
    parser.add_argument("--tokens", type=int, default=8, help="that each process decodes")
    parser.add_argument("--prompt-tokens", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--seed", type=int, default=1, help="of the prompt")
    parser.add_argument("--ctranslate2-python", type=Path, help="interpreter that has ctranslate2")
    parser.add_argument("--ctranslate2-model", type=Path, help="made by memory_child.py convert")
    parser.add_argument("--deadline-s", type=float, default=600, help="of each phase")
    parser.add_argument("--json", action="store_true", help="print everything measured as one JSON object")
    arguments = parser.parse_args()
    needed = {"transformers": ("checkpoint",), "ctranslate2": ("ctranslate2_python", "ctranslate2_model")}
    for rival in arguments.rivals:
        for name in needed.get(rival.name, ()):
            if getattr(arguments, name) is None:
                parser.error(f"{rival.name} needs --{name.replace('_', '-')}")
    if min(arguments.processes, arguments.tokens, arguments.prompt_tokens, arguments.threads) < 1:
        parser.error("--processes, --tokens, --prompt-tokens and --threads are 1 or more")
    return arguments


def main() -> int:
    """0: measured."""
    arguments = parse_arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that processes are ended
    manifest, results = Manifest.load(arguments.store), []
    dense, neurons, codes = map(manifest.nbytes_under, ("dense.", "neurons/", "predictors/"))
    with tempfile.TemporaryDirectory(prefix="sf-") as scratch:  # a short path: sockets are made in it
        bench = Bench(arguments, Path(scratch), manifest.profile.vocab_size)
        for rival in arguments.rivals:
            result = bench.measure(rival)
            result["times_weights"] = result["without_runtime"] / (dense + neurons)
            result["times_store"] = result["without_runtime"] / (dense + neurons + codes)
            results.append(result)
            print(f"{rival.label}: {format_size(result['pss']['total'])}", file=sys.stderr, flush=True)
    if arguments.json:
        print(json.dumps({"model": {"dense": dense, "neurons": neurons, "predictors": codes}, "results": results}))
        return 0
    sizes = f"{format_size(dense)} dense + {format_size(neurons)} neurons + {format_size(codes)} codes of fc1"
    print(f"store: {sizes} = {format_size(dense + neurons + codes)}", format_table(results), sep="\n")
    for remark in remarks(results):
        print(remark)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (BenchError, SparseFlowError) as problem:
        sys.exit(f"memory_of_processes: {problem}")
