"""Runs the GPU benchmark's cases in turn, in processes of their own, each with a deadline and all within one.

The next process is started while a case runs: it imports meanwhile, on other cores. What a killed case had told stays.
"""

import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sparseflow.bench.gpu.cases import GPUCase
from sparseflow.bench.gpu.device import Device, Sampler, wait_until_free
from sparseflow.errors import BadRequest, ServerError
from sparseflow.protocol.inquiry import ask_status

Run = dict[str, Any]

TEXTS = ("random", "greedy")

LEAST_S = 8.0  # with less left, no case is begun
END_S = 5.0  # that a process which fails may take to end
CLOSING_S = 15.0  # and one that lets go of all that it page-locked
SPARE_NBYTES = 64 << 20  # that a process which is gone may leave on the device for a moment
SERVER = "gpu-bench"
RUNTIME_DIR = "SPARSEFLOW_RUNTIME_DIR"
_ROOT = Path(__file__).parents[3]
_SEARCHED = (_ROOT, _ROOT / "daemon")
_REAP_S = 10.0  # after a kill


@dataclass(frozen=True, slots=True)
class GPUConditions:
    """What all cases share.

    text: `random`: all decode the same random tokens, and what each finds likeliest at every position is compared.
    `greedy`: each decodes what it chooses; that of random weights soon repeats itself, and neurons of a token that was
    there before are found in slots.
    measure_s: about what warming up and measuring a case may take. deadline_s: of a case, loading included.
    """

    text: str = TEXTS[0]

    prompt_tokens: int = 32
    new_tokens: int = 96
    warm_up_tokens: int = 16
    generations: int = 3
    seed: int = 1
    measure_s: float = 12.0
    deadline_s: float = 60.0
    device: str = "cuda"

    def __post_init__(self) -> None:
        if self.text not in TEXTS:
            raise BadRequest(f"text {self.text!r}: one of {', '.join(TEXTS)}")


def environment(runtime_dir: Path) -> dict[str, str]:
    """Of the processes: this package, servers of their own, and nothing from a hub."""
    path = os.pathsep.join([*map(str, _SEARCHED), *filter(None, [os.environ.get("PYTHONPATH")])])
    own = {"PYTHONPATH": path, RUNTIME_DIR: str(runtime_dir)}
    return os.environ | own | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}


class Child:
    """One process, by lines of JSON. It and all that it starts end with `end`."""

    def __init__(self, command: Sequence[str], errors: Path, variables: dict[str, str]) -> None:
        self._errors = errors
        with errors.open("wb") as stderr:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, env=variables,
                start_new_session=True,
            )  # fmt: skip
        self._heard = b""

    def say(self, what: Any) -> None:
        """A line. One that is gone hears nothing."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(what).encode() + b"\n")
            self._process.stdin.flush()

    def hear(self, deadline: float) -> dict[str, Any] | None:
        """The next line; None at its end.

        Raises:
            TimeoutError: none came before the deadline, by `time.monotonic`.
        """
        assert self._process.stdout is not None
        while b"\n" not in self._heard:
            ready, _, _ = select.select([self._process.stdout], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError
            told = os.read(self._process.stdout.fileno(), 1 << 20)
            if not told:
                return None
            self._heard += told
        line, _, self._heard = self._heard.partition(b"\n")
        told_now: dict[str, Any] = json.loads(line)
        return told_now

    def end(self, grace_s: float = 0.0) -> str:
        """Give it time to end by itself, then kill it with all that it started. May be called twice.

        Returns:
            `ok`, or how it ended and its last words.
        """
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(grace_s)
        code = self._process.poll()
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_REAP_S)
        for pipe in filter(None, (self._process.stdin, self._process.stdout)):
            with suppress(BrokenPipeError):
                pipe.close()
        if code == 0:
            return "ok"
        if code is None:
            return f"killed: {self.last_words()}"
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
        return f"{how}: {self.last_words()}"

    def last_words(self) -> str:
        """The last line of its stderr, without this machine's paths."""
        lines = self._errors.read_text("utf-8", errors="replace").strip().splitlines()
        return without_paths((lines or ["no message"])[-1])


def without_paths(text: str) -> str:
    """Of each absolute path its last part only."""
    return re.sub(r"(?<![\w.])/(?:[^\s/'\":]+/)+", "", text)


class GPUBench:
    """Runs cases. A context manager: on leaving, none of its processes is left."""

    def __init__(
        self,
        conditions: GPUConditions,
        device: Device | None,
        scratch: Path,
        end: float,
        say: Callable[[str], None],
        command: Sequence[str] = (sys.executable, "-m", "sparseflow.bench.gpu.child"),
    ) -> None:
        """
        Args:
            device: looked at from outside; None: nobody knows how full it gets.
            scratch: a folder of its own; its path is short, for it has sockets in it.
            end: when all must be over, by `time.monotonic`.
            say: told of each finished case.
            command: of a child.
        """
        self.conditions, self._device, self._end, self._say, self._command = conditions, device, end, say, command
        self._scratch, self._variables = scratch, environment(scratch / "run")
        self._n_started = 0
        self._waiting: list[Child] = []
        self._server: Server | None = None
        self._used_before = 0 if device is None else device.used_nbytes()

    @property
    def left_s(self) -> float:
        """Until all must be over."""
        return self._end - time.monotonic()

    def prepare(self, n: int) -> None:
        """Have so many processes waiting, which import meanwhile."""
        while len(self._waiting) < n:
            self._n_started += 1
            errors = self._scratch / f"errors-{self._n_started}"
            self._waiting.append(Child(self._command, errors, self._variables))

    def machine(self) -> Run:
        """Its kind and its limits, measured."""
        return self._finished([{"program": "machine"}], 60.0, None, lambda: None)

    def run(self, case: GPUCase, store: Path, n_next: int = 1) -> Run:
        """A case, however it ends. n_next: how many processes the case after it takes."""
        start, report = time.perf_counter(), asdict(case) | {"label": case.label}
        if self.left_s < LEAST_S:
            return report | {"status": f"not begun: {max(0.0, self.left_s):.0f} s were left"}
        server = None
        try:
            if case.n_served:
                server = self._served(store)
            else:
                self.end_server()
        except ServerError as error:
            return report | {"status": f"no server: {without_paths(str(error))}"}
        names = ("text", "prompt_tokens", "new_tokens", "warm_up_tokens", "generations", "seed", "measure_s", "device")
        settings = {name: getattr(self.conditions, name) for name in names} | {
            "program": case.program,
            "store": str(store),
            "fidelity": case.fidelity,
            "hints": case.hints,
            "cap_nbytes": case.cap_nbytes,
            "server": server,
        }
        wait_until_free(self._device, self._used_before + SPARE_NBYTES)
        with Sampler(self._device) as sampler:
            found = self._finished(
                [settings] * case.n_processes, self.conditions.deadline_s, sampler, lambda: self.prepare(n_next)
            )
        use = sampler.use()
        report |= found | {"device_peak_nbytes": use.peak_nbytes, "busy_share": use.busy_share}
        report["wall_s"] = time.perf_counter() - start
        self._say(f"{case.label}: {found['status']}, {report['wall_s']:.0f} s")
        return report

    def _finished(
        self, settings: Sequence[Run], deadline_s: float, sampler: Sampler | None, once_begun: Callable[[], None]
    ) -> Run:
        """How processes that run at once ended, and what they told."""
        begun = time.monotonic()
        self.prepare(len(settings))
        children = [self._waiting.pop(0) for _ in settings]
        told: list[Run] = [{"state": "loading"} for _ in settings]
        for child, own in zip(children, settings, strict=True):
            child.say(own)
        once_begun()
        try:
            status = _listen(children, told, begun + min(deadline_s, self._end - begun), sampler)
        except TimeoutError:
            late = next(report for report in told if report["state"] != "done")
            status = f"killed after {time.monotonic() - begun:.0f} s, while {_doing(late)}"
        finally:
            graces = [CLOSING_S if report["state"] == "done" else 0.0 for report in told]
            endings = [child.end(grace_s) for child, grace_s in zip(children, graces, strict=True)]
        failed = [ending for ending in endings if ending != "ok"]
        if status == "ok" and failed:
            status = f"while closing: {failed[0]}"
        return {"status": status, "processes": told}

    def _served(self, store: Path) -> str:
        if self._server is None or self._server.store != store:
            self.end_server()
            self._server = Server(store, self._scratch, self._variables, self._end)
        return SERVER

    def end_server(self) -> None:
        """If there is one."""
        if self._server is not None:
            self._server.end()
            self._server = None

    def __enter__(self) -> "GPUBench":
        (self._scratch / "run").mkdir(mode=0o700, exist_ok=True)
        self._asked_before = os.environ.get(RUNTIME_DIR)
        os.environ[RUNTIME_DIR] = self._variables[RUNTIME_DIR]  # where a server is asked how it is
        return self

    def __exit__(self, *_: object) -> None:
        self.end_server()
        for child in self._waiting:
            child.end()
        self._waiting.clear()
        os.environ.pop(RUNTIME_DIR)
        if self._asked_before is not None:
            os.environ[RUNTIME_DIR] = self._asked_before


def _listen(children: Sequence[Child], told: Sequence[Run], deadline: float, sampler: Sampler | None) -> str:
    """Add what children tell to their reports, and let them all measure once they are ready. Returns how that ended.

    Raises:
        TimeoutError: one has not told all before the deadline.
    """
    for until in ("ready", "done"):
        if sampler is not None:
            sampler.measure(until == "done")
        for child, report in zip(children, told, strict=True):
            while report["state"] not in (until, "done"):
                heard = child.hear(deadline)
                if heard is None:
                    return f"while {_doing(report)}: {child.end(END_S)}"
                report.update(heard)
        for child in children:
            child.say("go")
    return "ok"


def _doing(report: Run) -> str:
    return {"loading": "loading", "loaded": "warming up", "ready": "measuring"}.get(report["state"], "closing")


@dataclass
class Server:
    """A weight server that is ready. options: of its command line; without them it has all bundles in memory.

    Raises:
        ServerError: it is not ready in time.
    """

    store: Path
    scratch: Path
    variables: dict[str, str]
    end_at: float
    options: Sequence[str] = ()
    timeout_s: float = 90.0
    _process: "subprocess.Popen[bytes]" = field(init=False)

    def __post_init__(self) -> None:
        command = [sys.executable, "-m", "sparseflow_daemon", str(self.store), "--name", SERVER, *self.options]
        self._log = self.scratch / "server.log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self.variables, start_new_session=True
            )
        try:
            self._wait_until_ready()
        except BaseException:
            self.end()
            raise

    def _wait_until_ready(self) -> None:
        deadline = min(time.monotonic() + self.timeout_s, self.end_at)
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                words = self._log.read_text("utf-8", errors="replace").strip().splitlines() or ["no message"]
                raise ServerError(f"exit status {self._process.returncode}: {words[-1]}")
            with suppress(ServerError):
                status = ask_status(SERVER)
                if status["state"] == "ready":
                    return self._require_resident(status)
            time.sleep(0.1)
        raise ServerError("the server was not ready in time; give more, with --deadline-s and --total-s")

    def _require_resident(self, status: dict[str, Any]) -> None:
        if not self.options and not all(model["is_resident"] for model in status["models"]):
            raise ServerError("the memory does not hold all bundles; free some, or use a smaller model")

    def end(self) -> None:
        """Tell it to end, and see that it does."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(END_S)
                return
