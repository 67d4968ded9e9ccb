"""Talk with a model. Lines of standard input are what it is told.

With a chat template in the model's tokenizer, turn by turn; without one, each line is put behind the text and the model
goes on from there. /help lists what else can be said. It is loaded once, and computes new tokens only.
"""

import argparse
import json
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from sparseflow.cli.arguments import add_quiet
from sparseflow.cli.opening import add_opening, open_model, require_opening
from sparseflow.cli.sampling import add_sampling, sampling_of
from sparseflow.errors import BadRequest

if TYPE_CHECKING:
    from sparseflow.cli.conversation import Conversation
    from sparseflow.cli.running import Run

LOADS = "sparseflow.cli.conversation"
EXAMPLES = """\
examples:
  sparseflow chat STORE --temperature 0.7
  sparseflow chat --server NAME --system "Answer in one sentence." --seed 1 --temperature 0.7
  printf 'To be, or\\nThat is\\n' | sparseflow chat STORE --max-new-tokens 20 --json
"""
_PROMPT = "> "
_COMMANDS = {"/reset": "begin a new conversation", "/help": "this list", "/exit": "end; so does Ctrl-D"}
_KEYS = {"Ctrl-C": "stop the answer; what was said stays"}
_NO_TEMPLATE = "no chat template in the tokenizer: each line is put behind the text, and the model goes on from there"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """STORE or --server, --system and how to sample."""
    parser.usage = "%(prog)s STORE | --server NAME [OPTION ...]"
    parser.add_argument(
        "--system", metavar="TEXT", help="what the model is told first; only where the tokenizer has a chat template"
    )
    add_quiet(parser, "no progress bars, and nothing on stderr at the start but warnings")
    add_sampling(parser, max_new_tokens=256)
    add_opening(parser)
    parser.set_defaults(prints_json_itself=True)


check = require_opening


def run(arguments: argparse.Namespace) -> dict[str, object]:
    """Answer line after line; with --json one object for each. Not ok where one could not be answered."""
    from sparseflow.cli.conversation import Conversation
    from sparseflow.cli.knobs import warn_of_idle_knobs
    from sparseflow.cli.placement import placement_of, show_placement
    from sparseflow.utils.tokenizer import tokenizer_of

    model, load_s = open_model(arguments)
    try:
        conversation = Conversation(model, tokenizer_of(model.source.model_files), arguments.system)
        placement = placement_of(model, arguments)
        if not (arguments.json or arguments.quiet):
            show_placement(placement, arguments.log_format)
        warn_of_idle_knobs(arguments, placement)
        if not (conversation.has_template or arguments.quiet):
            _say(_NO_TEMPLATE)
        start = {"fidelity": model.fidelity, "load_s": load_s, "placement": placement.fields()}
        return {"ok": _Chat(conversation, arguments, start).run()}
    finally:
        model.close()


class _Chat:
    """Lines in, answers out."""

    def __init__(self, conversation: "Conversation", arguments: argparse.Namespace, start: dict[str, Any]) -> None:
        """start: what the first object of --json says beside its turn."""
        self._conversation, self._arguments, self._start = conversation, arguments, start
        self._sampling = sampling_of(arguments)
        self._is_interactive = sys.stdin.isatty()
        self._is_stopped = False

    def run(self) -> bool:
        """Until the lines end. Whether each could be answered."""
        is_ok = True
        for line in self._lines():
            if not line.startswith("/"):
                is_ok &= self._turn(line)
            elif line == "/exit":
                break
            elif line == "/reset":
                self._conversation.reset()
            elif line == "/help":
                _say("\n".join(f"  {name:8} {what}" for name, what in (_COMMANDS | _KEYS).items()))
            else:
                _say(f"no command {line.split()[0]}; there are {', '.join(_COMMANDS)}")
        return is_ok

    def _turn(self, line: str) -> bool:
        try:
            with self._stopped_by_ctrl_c():
                run = self._conversation.answer(
                    line,
                    max_new_tokens=self._arguments.max_new_tokens,
                    show=self._show,
                    stops=self._arguments.stop,
                    is_interrupted=lambda: self._is_stopped,
                    quiet=self._arguments.quiet,
                    **self._sampling,
                )
        except BadRequest as error:
            self._tell({"error": str(error)})
            _say(f"sparseflow: error: {error}")
            return False
        except KeyboardInterrupt:  # the second one: it did not wait for the token
            if not self._is_interactive:
                raise
            print()
            return True
        self._finish(run)
        return True

    def _finish(self, run: "Run") -> None:
        if not self._arguments.json:
            print(flush=True)
        self._tell(
            {
                "text": run.text,
                "token_ids": run.token_ids,
                "prompt_tokens": run.prompt_tokens,
                "finish_reason": run.finish_reason,
                "decode_tokens_per_s": run.decode_tokens_per_s,
                "time_to_first_token_s": run.time_to_first_token_s,
                "positions_used": self._conversation.n_tokens,
                "positions": self._conversation.n_positions,
            }
        )
        if self._conversation.n_tokens >= self._conversation.n_positions:
            _say(f"all {self._conversation.n_positions} positions of the model are taken; /reset begins a new one")

    def _tell(self, turn: dict[str, Any]) -> None:
        if self._arguments.json:
            print(json.dumps(turn | self._start), flush=True)
            self._start = {}

    def _show(self, text: str) -> None:
        if not self._arguments.json:
            print(text, end="", flush=True)

    @contextmanager
    def _stopped_by_ctrl_c(self) -> Iterator[None]:
        """The first one ends the answer at its next token, the second one at once."""
        self._is_stopped = False
        if not self._is_interactive or threading.current_thread() is not threading.main_thread():
            yield
            return

        def stop(number: int, frame: object) -> None:
            if self._is_stopped:
                raise KeyboardInterrupt
            self._is_stopped = True

        before = signal.signal(signal.SIGINT, stop)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def _lines(self) -> Iterator[str]:
        """What is said, without the spaces around it; nothing of empty lines."""
        lines = _typed_lines() if self._is_interactive else sys.stdin
        try:
            yield from filter(None, map(str.strip, lines))
        except UnicodeDecodeError as error:
            raise BadRequest(f"standard input is no text ({error}); give it in UTF-8") from error


def _typed_lines() -> Iterator[str]:
    """From a terminal, with the lines before it by the arrow keys."""
    with_history = sys.stdout.isatty()
    if with_history:
        import readline  # noqa: F401  input() uses it from now on
    while True:
        try:
            yield input(_PROMPT if with_history else "")
        except EOFError:
            print(file=sys.stderr)
            return
        except KeyboardInterrupt:
            print(file=sys.stderr)
            _say("Ctrl-D or /exit ends; Ctrl-C stops an answer")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
