"""One process of `memory_of_processes.py`: import, load, decode, and hold still after each until told to go on.

    CT2_PYTHON scripts/bench/memory_child.py convert --checkpoint /tmp/opt-1.3b --out /tmp/ct2-1.3b

makes a CTranslate2 model, in an environment that has ctranslate2, torch and transformers. The tokens get made-up names,
as a synthetic checkpoint has no tokenizer. Only the standard library is imported before a rival is known, so that a
rival's environment need not have SparseFlow. Here is also the other end of the pipes, for the parent.
"""

import argparse
import contextlib
import ctypes
import json
import os
import random
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PR_SET_PDEATHSIG = 1
FIRST_ORDINARY_ID = 4  # <s>, <pad>, </s> and <unk> come first
ENDING_DEADLINE_S = 60
Phase = dict[str, Any]


class BenchError(Exception):
    """Arguments, or a process, with which nothing can be measured."""


def prompt_ids(vocab_size: int, n_prompt: int, seed: int) -> list[int]:
    """The same for every rival and process. Drawn without numpy or torch."""
    draw = random.Random(seed)
    return [draw.randrange(FIRST_ORDINARY_ID, vocab_size) for _ in range(n_prompt)]


def run_torch(arguments: argparse.Namespace, prompt: list[int]) -> Iterator[Phase]:
    """transformers' dense OPT, or SparseFlow's of a weight server."""
    import torch
    import transformers
    from transformers import OPTForCausalLM

    if arguments.rival == "sparseflow":
        from sparseflow import SparseOPTForCausalLM
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(arguments.threads)
    yield {}
    if arguments.rival == "sparseflow":
        model = SparseOPTForCausalLM.from_server(arguments.model)
    else:
        model = OPTForCausalLM.from_pretrained(arguments.model, dtype=getattr(torch, arguments.precision)).eval()
    yield {"precision": str(model.dtype).removeprefix("torch.")}
    n = arguments.tokens
    result = model.generate(
        torch.tensor([prompt]), max_new_tokens=n, min_new_tokens=n, do_sample=False, return_dict_in_generate=True
    )  # the result holds the KV cache, so that it is counted
    yield {"ids": result.sequences[0, len(prompt) :].tolist()}


def run_ctranslate2(arguments: argparse.Namespace, prompt: list[int]) -> Iterator[Phase]:
    """CTranslate2's generator on the CPU. What it makes of a precision depends on the CPU."""
    import ctranslate2

    yield {}
    names = json.loads((Path(arguments.model) / "vocabulary.json").read_bytes())
    model = ctranslate2.Generator(
        arguments.model, device="cpu", compute_type=arguments.precision, intra_threads=arguments.threads
    )
    yield {"precision": model.compute_type}
    [result] = model.generate_batch(
        [[names[i] for i in prompt]],
        max_length=arguments.tokens,
        min_length=arguments.tokens,
        sampling_topk=1,
        include_prompt_in_result=False,
    )
    yield {"ids": result.sequences_ids[0]}


def hold_still(deadline_s: float) -> None:
    """Wait for the parent's sign."""
    if not select.select([0], [], [], deadline_s)[0] or not os.read(0, 1):
        sys.exit("the parent said nothing more")


def run(arguments: argparse.Namespace) -> None:
    """Tell the parent of each phase in a line of JSON, then hold still. Whatever libraries print goes to stderr."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # do not outlive a parent that was killed
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as parent:
        os.dup2(2, 1)
        rival = run_ctranslate2 if arguments.rival == "ctranslate2" else run_torch
        prompt = prompt_ids(arguments.vocab_size, arguments.prompt_tokens, arguments.seed)
        for phase in rival(arguments, prompt):
            print(json.dumps(phase), file=parent, flush=True)
            hold_still(arguments.deadline_s)


def last_line(log: Path) -> str:
    """Of what a process wrote to stderr."""
    return (log.read_text("utf-8", errors="replace").strip().splitlines() or ["no message"])[-1]


class Child:
    """A process of a rival, `memory_child.py`. Killed on leaving."""

    def __init__(self, command: list[str], environment: dict[str, str], log: Path) -> None:
        self._log = log
        with log.open("w", encoding="utf-8") as errors:
            self._process = subprocess.Popen(
                command, bufsize=0, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, env=environment
            )
        self.pid = self._process.pid

    def __enter__(self) -> "Child":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate(timeout=ENDING_DEADLINE_S)

    def next_phase(self, deadline: float) -> Phase:
        """What it says when it next holds still. deadline: of time.monotonic()."""
        stdout = self._process.stdout
        assert stdout is not None
        if not select.select([stdout], [], [], max(0, deadline - time.monotonic()))[0]:
            raise BenchError(f"process {self.pid}: no answer in time; raise --deadline-s. Said: {last_line(self._log)}")
        line = stdout.readline()  # a phase is one line, written at once
        if not line:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(ENDING_DEADLINE_S)  # its last words come after its output is closed
            raise BenchError(f"process {self.pid} ended: {last_line(self._log)}")
        phase: Phase = json.loads(line)
        return phase

    def go_on(self) -> None:
        """Let it work again."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # next_phase says why it ended
            self._process.stdin.write(b"\n")


def main() -> None:
    """The parent's arguments for one process, or the conversion."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    conversion = commands.add_parser("convert", help="make a CTranslate2 model of an OPT checkpoint")
    conversion.add_argument("--checkpoint", type=Path, required=True, help="transformers folder")
    conversion.add_argument("--out", type=Path, required=True, help="the folder to make")
    conversion.add_argument("--quantization", default="float16", help="how the weights are stored")
    process = commands.add_parser("run", help="what memory_of_processes.py starts")
    process.add_argument("--rival", required=True)
    process.add_argument("--model", required=True, help="a folder, or the name of a server")
    process.add_argument("--precision", required=True)
    for name in ("--tokens", "--prompt-tokens", "--vocab-size", "--seed", "--threads"):
        process.add_argument(name, type=int, required=True)
    process.add_argument("--deadline-s", type=float, required=True)
    arguments = parser.parse_args()
    if arguments.command == "convert":
        sys.path.append(str(Path(__file__).parents[2] / "sparseflow" / "bench"))
        from child import convert_to_ctranslate2

        convert_to_ctranslate2(arguments.checkpoint, arguments.out, arguments.quantization)
    else:
        run(arguments)


if __name__ == "__main__":
    main()
