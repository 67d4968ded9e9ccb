"""Continue a prompt.

The text goes to stdout as it comes; where the weights lie, and what of the options has no effect, to stderr.
"""

import argparse
import sys
from pathlib import Path

from sparseflow.cli.arguments import add_quiet
from sparseflow.cli.opening import add_opening, open_model, require_opening
from sparseflow.cli.sampling import add_sampling, sampling_of
from sparseflow.errors import BadRequest, DiskError
from sparseflow.utils.parsing import number

LOADS = "sparseflow.cli.running"
EXAMPLES = """\
examples:
  sparseflow generate STORE --prompt "In the beginning" --max-new-tokens 40
  sparseflow generate facebook/opt-1.3b --prompt-file prompt.txt --temperature 0.8 --top-p 0.95 --seed 1
  sparseflow generate STORE --prompt "Q: Why?\\nA:" --stop $'\\n' --memory 6GiB
  echo "To be, or" | sparseflow generate --server NAME --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """STORE or --server, --prompt and how to sample."""
    parser.usage = "%(prog)s STORE | --server NAME [--prompt TEXT] [OPTION ...]"
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", metavar="TEXT", help="the text to continue; - or nothing: standard input")
    prompt.add_argument(
        "--prompt-file", type=Path, metavar="FILE", help="the text to continue, UTF-8, without its last line break"
    )
    parser.add_argument(
        "--audit",
        type=number(int, 0),
        default=0,
        metavar="N",
        help="measure recall of all neurons in every Nth layer step; 0: of a few now and then",
    )
    add_quiet(parser, "no progress bars, and not where the weights lie")
    add_sampling(parser, max_new_tokens=100)
    add_opening(parser)


def check(arguments: argparse.Namespace) -> None:
    """Refuse what cannot be; a file is read once, here, because it may be a pipe."""
    require_opening(arguments)
    arguments.prompt_text = None if arguments.prompt_file is None else _content(arguments.prompt_file)


def run(arguments: argparse.Namespace) -> dict[str, object]:
    """Stream the text to stdout, or collect it for --json."""
    from sparseflow.cli import running
    from sparseflow.cli.knobs import warn_of_idle_knobs
    from sparseflow.cli.placement import placement_of, show_placement
    from sparseflow.utils.tokenizer import tokenizer_of

    model, load_s = open_model(arguments)
    try:
        tokenizer = tokenizer_of(model.source.model_files)
        model.coordinator.audit_every = arguments.audit
        placement = placement_of(model, arguments)
        if not (arguments.json or arguments.quiet):
            show_placement(placement, arguments.log_format)
        warn_of_idle_knobs(arguments, placement)
        finished = running.generate(
            model,
            tokenizer,
            _prompt(arguments.prompt) if arguments.prompt_text is None else arguments.prompt_text,
            stream=not arguments.json,
            stops=arguments.stop,
            quiet=arguments.quiet,
            max_new_tokens=arguments.max_new_tokens,
            **sampling_of(arguments),
        )
        if not arguments.json:
            return {}
        return running.result_fields(model, finished, load_s) | {"placement": placement.fields()}
    finally:
        model.close()


def _prompt(given: str | None) -> str:
    """The text itself, or what standard input holds."""
    if given not in (None, "-"):
        return str(given)
    if sys.stdin.isatty():
        print("the prompt is read from here; end it with Ctrl-D on a line of its own", file=sys.stderr)
    try:
        return sys.stdin.read().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise BadRequest(f"standard input is no text ({error}); give it in UTF-8") from error


def _content(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").removesuffix("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DiskError(f"{path}: cannot be read as text ({error}); give a file in UTF-8") from error
