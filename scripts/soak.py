"""A weight server and its clients for as long as you like, while processes are killed and stopped and reads go wrong.

    python scripts/soak.py --minutes 30 --clients 3 --seed 1 --out soak.json

Clients (`soak_client.py`) write text and hold leases; every text is compared with what transformers' dense model
writes, every bundle with the files of the store. Meanwhile, at random moments that follow from the seed, clients are
killed and replaced, or stopped for seconds; the server is killed, told to end, or stopped, and a successor started;
strangers send junk to its sockets; and of the server's reads from disk some fail, end early, or bring a wrong bit
(SPARSEFLOW_FAULT). The exit code is 0 only if no output was wrong, every failure had its name, and nothing was left at
the end: no process, descriptor, thread, piece of shared memory, lease or file.
"""

import argparse
import contextlib
import heapq
import itertools
import json
import os
import random
import secrets
import selectors
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from soak_processes import (
    DEADLINE_S,
    RUNTIME_DIR,
    Participant,
    SoakError,
    descriptors_of,
    named_shared_memory,
    ours,
    runtime_dir,
    start,
)

from sparseflow.errors import ServerError
from sparseflow.protocol.inquiry import ask_status
from sparseflow.protocol.run_directory import RunDirectory

SCRIPTS = Path(__file__).parent
DEMO_MODEL = SCRIPTS.parent / "sparseflow" / "assets" / "demo_model"
FAULT = "SPARSEFLOW_FAULT"
NAME = "soak"
POINTS = ("read-error", "read-short", "read-corrupt")
N_PROMPTS = 64
LEAST_MARGIN = 1e-3  # between the two best logits: nearer ones may change places with the order of a sum
POLL_S = 0.2
GONE_WITHIN_S = 2.0


# --- what must come out


def expected_texts(seed: int, path: Path) -> None:
    """Prompts of held-out text and what the dense model makes of them, where no rounding decides."""
    import torch
    from transformers import AutoTokenizer, OPTForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    text = (DEMO_MODEL / "heldout.txt").read_text(encoding="utf-8")
    dense = OPTForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32).eval()
    choice, found = random.Random(seed), []
    while len(found) < N_PROMPTS:
        begin, n_tokens = choice.randrange(len(text) - 1000), choice.randint(16, 64)
        prompt = torch.tensor([tokenizer(text[begin : begin + 400])["input_ids"][: choice.randint(4, 48)]])
        output = dense.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=n_tokens,
            min_new_tokens=n_tokens,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
        best = torch.stack(output.logits)[:, 0].topk(2).values
        if float((best[:, 0] - best[:, 1]).min()) > LEAST_MARGIN:
            found.append({"prompt": prompt[0].tolist(), "ids": output.sequences[0].tolist()})
    path.write_text(json.dumps(found), encoding="utf-8")


def make_store(folder: Path) -> Path:
    """The demo model in float32, in which sparse and dense text can be equal."""
    from sparseflow.core.checkpoint import Checkpoint
    from sparseflow.core.converter import convert

    return convert(Checkpoint(DEMO_MODEL), folder / "store", dtype="float32", quiet=True)


class Soak:
    """The whole of it: one thread, one loop."""

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        self.arguments, self.folder = arguments, folder
        self.choice = random.Random(arguments.seed)
        self.deeds: Counter[str] = Counter()
        self.done: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.slowest = {"status_s": 0.0, "session_gone_s": 0.0}
        self.server_private_nbytes = 0
        self.wrong: list[str] = []
        self.left: list[str] = []
        self._selector = selectors.DefaultSelector()
        self._clients: list[Participant] = []
        self._later: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count(1)
        self._reads_failed: Counter[str] = Counter()  # of this server
        self._before = named_shared_memory()
        self._store, self._expected = make_store(folder), folder / "expected.json"
        expected_texts(arguments.seed, self._expected)
        self._server = self._start_server()
        self._unused = self._settled()

    def run(self) -> None:
        """Begin, disturb, and end well."""
        for _ in range(self.arguments.clients):
            self._start_client()
        end = time.monotonic() + 60 * self.arguments.minutes
        next_s, next_status_s = time.monotonic() + self.arguments.every_s, 0.0
        while (now := time.monotonic()) < end:
            self._listen(min(POLL_S, end - now))
            while self._later and self._later[0][0] <= time.monotonic():
                heapq.heappop(self._later)[2]()
            if now >= next_status_s:
                next_status_s = now + 1
                self._look()
            if now >= next_s:
                next_s = now + self.choice.expovariate(1 / self.arguments.every_s)
                self._disturb()
        while self._later:
            heapq.heappop(self._later)[2]()
        self._end()

    def _disturb(self) -> None:
        deeds: dict[Callable[[], bool], float] = {
            self.kill_a_client: 35,
            self.stop_a_client: 30,
            self.send_junk: 20,
            self.kill_the_server: 6,
            self.end_the_server: 4,
            self.stop_the_server: 5,
        }
        deed = self.choice.choices(list(deeds), list(deeds.values()))[0]
        if deed():
            self.deeds[deed.__name__] += 1

    # --- what is done to them; false where there was nothing to do it to

    def kill_a_client(self) -> bool:
        """Its session must be gone soon."""
        victim = self._clients.pop(self.choice.randrange(len(self._clients)))
        self._selector.unregister(victim.process.stdout)
        victim.kill()
        begin = time.monotonic()
        while not self._server.is_stopped:
            if victim.pid not in {session["pid"] for session in self._status()["sessions"]}:
                self.slowest["session_gone_s"] = max(self.slowest["session_gone_s"], time.monotonic() - begin)
                break
            if time.monotonic() - begin > GONE_WITHIN_S:
                self.left.append(f"the session of a killed client for more than {GONE_WITHIN_S:g} s")
                break
            time.sleep(0.01)
        self._start_client()
        return True

    def stop_a_client(self) -> bool:
        """For some seconds; others go on."""
        return self._stop(self.choice.choice(self._clients), self.choice.uniform(0.5, 8))

    def stop_the_server(self) -> bool:
        """Clients wait for it."""
        return self._stop(self._server, self.choice.uniform(0.2, 3))

    def send_junk(self) -> bool:
        """Strangers that speak no word of the protocol, or hang up in the middle of it."""
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
            sock.settimeout(1)
            sock.connect(str(RunDirectory.of(NAME).attach_socket))
            for _ in range(self.choice.randint(0, 4)):
                sock.send(self.choice.randbytes(self.choice.choice((1, 20, 5000))))
            return True
        return False

    def kill_the_server(self) -> bool:
        """As nothing else does; the next one begins at once."""
        self._server.kill()
        return self._replace_server()

    def end_the_server(self) -> bool:
        """It is told to, and must end well though its clients go on asking."""
        self._server.end()
        return self._replace_server()

    def _replace_server(self) -> bool:
        self.faults += self._reads_failed
        self._reads_failed = Counter()
        self._server = self._start_server()
        return True

    def _stop(self, who: Participant, seconds: float) -> bool:
        if who.is_stopped:
            return False
        who.stop()
        heapq.heappush(self._later, (time.monotonic() + seconds, next(self._numbers), who.go_on))
        return True

    # --- what they do

    def _log(self) -> Path:
        return self.folder / "logs" / f"{next(self._numbers):05d}.log"

    def _start_server(self) -> Participant:
        rate = self.arguments.fault_rate
        os.environ[FAULT] = ",".join(f"{point}:{rate}:{self.choice.randrange(1 << 31)}" for point in POINTS)
        options = {
            "--name": NAME,
            "--cpu-cache-ratio": self.arguments.cpu_cache_ratio,
            "--max-sessions": self.arguments.clients + 1,  # one that was killed may be there for a moment
        }
        words = [str(word) for option in options.items() for word in option]
        words = ["-m", "sparseflow_daemon", str(self._store), *words]
        server = start(self._log(), words, stdin=subprocess.DEVNULL)
        deadline = time.monotonic() + DEADLINE_S
        while True:
            with contextlib.suppress(ServerError):
                status = ask_status(NAME)
                if status["pid"] == server.pid and status["state"] == "ready":
                    return server
            if server.process.poll() is not None or time.monotonic() > deadline:
                raise SoakError(f"the server is not ready\n{server.last_words()}")
            time.sleep(0.05)

    def _start_client(self) -> None:
        given = {"server": NAME, "store": str(self._store), "expected": str(self._expected)}
        given["seed"] = str(self.choice.randrange(1 << 32))
        words = [str(SCRIPTS / "soak_client.py"), json.dumps(given)]
        client = start(self._log(), words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._clients.append(client)
        self._selector.register(client.process.stdout, selectors.EVENT_READ, client)

    def _listen(self, timeout_s: float) -> None:
        for key, _ in self._selector.select(timeout_s):
            client: Participant = key.data
            said = os.read(key.fd, 1 << 16)
            if not said:
                code = client.process.wait(DEADLINE_S)
                raise SoakError(f"a client ended by itself with {code}\n{client.last_words()}")
            *lines, client.heard = (client.heard + said).split(b"\n")
            for line in lines:
                self._note(client, json.loads(line))

    def _note(self, client: Participant, told: dict[str, Any]) -> None:
        self.done[told["did"]] += 1
        for what in ("tokens", "bundles"):
            self.done[what] += told.get(what, 0)
        if told["did"] == "refused":
            self.done[told["error"]] += 1
        if told.get("wrong"):
            self.wrong.append(json.dumps(told))
        if "fds" in told:
            client.n_told += 1
            now = {what: told[what] for what in ("fds", "threads")}
            if client.n_told <= 20:
                client.first = {what: max(n, client.first.get(what, 0)) for what, n in now.items()}
            elif any(n > client.first[what] for what, n in now.items()):
                self.left.append(f"in a client: {now} after {client.n_told} tasks, {client.first} after 20")

    def _status(self) -> dict[str, Any]:
        begin = time.monotonic()
        status = ask_status(NAME)
        self.slowest["status_s"] = max(self.slowest["status_s"], time.monotonic() - begin)
        return status

    def _look(self) -> None:
        """At the server's status, where it is not stopped."""
        if self._server.is_stopped:
            return
        status = self._status()
        self._reads_failed = Counter(status["disk"]["faults"])
        self.server_private_nbytes = max(self.server_private_nbytes, status["memory"]["private"])
        unforeseen = [reason for reason in status["reasons"] if "failed at the disk" not in reason]
        if unforeseen:
            raise SoakError(f"the server is degraded: {unforeseen}\n{self._server.last_words()}")

    # --- the end

    def _settled(self) -> dict[str, int]:
        """What the server has open once that stays."""
        deadline = time.monotonic() + DEADLINE_S
        while time.monotonic() < deadline:
            before = descriptors_of(self._server.pid)
            time.sleep(0.5)
            if descriptors_of(self._server.pid) == before:
                return before
        raise SoakError("what the server has open does not settle")

    def _end(self) -> None:
        """Let all end well, and look for what is left."""
        for client in self._clients:
            client.process.stdin.close()  # type: ignore[union-attr]
        deadline = time.monotonic() + DEADLINE_S
        while self._clients:
            for client in [client for client in self._clients if client.process.poll() is not None]:
                if client.process.returncode:
                    raise SoakError(f"a client ended with {client.process.returncode}\n{client.last_words()}")
                self._hear_out(client)
            if time.monotonic() > deadline:
                raise SoakError("clients do not end")
            time.sleep(POLL_S)
        self._look()
        status = self._status()
        if status["sessions"] or status["arena"]["leased"]:
            self.left.append(f"{len(status['sessions'])} sessions, {status['arena']['leased']} bytes leased")
        if (now := self._settled()) != self._unused:
            self.left.append(f"in the server: {now}, {self._unused} before anybody came")
        self._server.end()
        self.faults += self._reads_failed
        self.left += [f"in the runtime directory: {path.name}" for path in runtime_dir().iterdir()]
        self.left += [str(path) for path in named_shared_memory() - self._before]
        self.left += [f"process {process.pid}" for process in ours()]

    def _hear_out(self, client: Participant) -> None:
        """The last that a client has said before it ended."""
        self._clients.remove(client)
        self._selector.unregister(client.process.stdout)
        rest = client.heard + client.process.stdout.read()
        for line in rest.splitlines():
            self._note(client, json.loads(line))
        client.close_pipes()

    def report(self) -> dict[str, Any]:
        """All figures."""
        return {
            "minutes": self.arguments.minutes,
            "clients": self.arguments.clients,
            "seed": self.arguments.seed,
            "requests": sum(self.done[name] for name in ("generated", "held", "looked through", "refused")),
            **{
                name: self.done[name]
                for name in ("generated", "tokens", "held", "looked through", "bundles", "refused")
            },
            "refused_by": {name: n for name, n in self.done.items() if name[0].isupper()},
            "turned_away": self.done["turned away"],
            "disturbances": dict(self.deeds),
            "reads_gone_wrong": dict(self.faults),
            "faults_survived": sum(self.deeds.values()) + sum(self.faults.values()),
            "slowest": self.slowest,
            "server_private_nbytes": self.server_private_nbytes,
            "wrong": len(self.wrong),
            "leaked": len(self.left),
            "what": [*self.wrong[:10], *self.left[:10]],
        }


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=1.0, help="default: %(default)s")
    parser.add_argument("--clients", type=int, default=3, help="at a time; default: %(default)s")
    parser.add_argument("--seed", type=int, default=secrets.randbits(31), help="default: another one each time")
    parser.add_argument("--every-s", type=float, default=4.0, help="seconds between disturbances; default: %(default)s")
    parser.add_argument("--fault-rate", type=float, default=1e-5, help="reads that go wrong; default: %(default)s")
    parser.add_argument("--cpu-cache-ratio", type=float, default=0.1, help="of the server; default: %(default)s")
    parser.add_argument("--out", type=Path, help="a JSON file for the figures")
    arguments = parser.parse_args()
    if arguments.clients < 1 or arguments.minutes <= 0 or arguments.every_s <= 0:
        parser.error("--clients, --minutes and --every-s are above 0")
    return arguments


def main() -> int:
    """0 if all was well."""
    arguments = parse()
    folder = Path(tempfile.mkdtemp(prefix="sparseflow-soak-"))
    (folder / "logs").mkdir()
    os.environ[RUNTIME_DIR] = tempfile.mkdtemp(prefix="sf-")  # short enough for sockets
    os.environ["HF_HUB_OFFLINE"] = "1"
    print(f"seed {arguments.seed}, logs in {folder / 'logs'}", file=sys.stderr)
    soak, failure = None, None
    try:
        soak = Soak(arguments, folder)
        soak.run()
    except Exception as error:  # what was counted until then is told all the same
        failure = f"{type(error).__name__}: {error}"
    finally:
        for process in ours():
            with contextlib.suppress(psutil.Error):
                process.kill()
        shutil.rmtree(runtime_dir(), ignore_errors=True)
    report = ({} if soak is None else soak.report()) | {"failure": failure}
    print(json.dumps(report, indent=1))
    if arguments.out:
        arguments.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    is_clean = not failure and not report["wrong"] and not report["leaked"]
    if is_clean:
        shutil.rmtree(folder)
    return 0 if is_clean else 1


if __name__ == "__main__":
    sys.exit(main())
