"""The `sparseflow` command: reads the command line, runs one subcommand, turns errors into exit codes."""

import argparse
import errno
import importlib
import json
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import sparseflow
from sparseflow.cli import (
    bench,
    calibrate,
    chat,
    completion,
    convert,
    demo,
    doctor,
    evaluate,
    generate,
    info,
    serve,
    status,
    trace,
    verify,
    version,
)
from sparseflow.cli.arguments import add_common
from sparseflow.cli.knobs import given_options, warn_of_idle_knobs
from sparseflow.cli.voice import Voice
from sparseflow.errors import BadRequest, DiskError, NoAnswer, ServerNotRunning, SparseFlowError, UnsupportedModel
from sparseflow.utils.logs import start_logging
from sparseflow.utils.parsing import EXIT_USAGE, Parser, one_line, tell_error
from sparseflow.utils.progress import waiting

EXIT_OK, EXIT_FAILED, EXIT_NOT_RUNNING, EXIT_NO_ANSWER, EXIT_INTERRUPTED = 0, 1, 3, 4, 130

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_COMMANDS = {
    "convert": convert,
    "generate": generate,
    "chat": chat,
    "serve": serve,
    "demo": demo,
    "calibrate": calibrate,
    "eval": evaluate,
    "verify": verify,
    "info": info,
    "status": status,
    "doctor": doctor,
    "trace": trace,
    "bench": bench,
    "completion": completion,
    "version": version,
}
_DESCRIPTION = (sparseflow.__doc__ or "").partition("\n\n")[0]
_EPILOG = """\
examples:
  sparseflow demo
  sparseflow convert facebook/opt-1.3b STORE
  sparseflow generate STORE --prompt "In the beginning"

Exit codes: 0 ok, 1 failed or degraded, 2 wrong usage, 3 no server runs, 4 it does not answer, 130 stopped by Ctrl-C.
`sparseflow COMMAND --help` lists the options of a command.
"""


def build_parser() -> argparse.ArgumentParser:
    """Each subcommand's module adds its own arguments; its docstring is its help.

    What else a module may have: `EXAMPLES`, below the help; `LOG_LEVEL`, from which on things are logged; `check`,
    which refuses what cannot be before anything slow begins; `LOADS`, the module whose import takes seconds.
    """
    parser = Parser(prog="sparseflow", description=_DESCRIPTION, epilog=_EPILOG)
    parser.add_argument("--version", action="version", version=f"sparseflow {sparseflow.__version__}", help="print it")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, module in _COMMANDS.items():
        text = module.__doc__ or ""
        examples = getattr(module, "EXAMPLES", None)
        command = commands.add_parser(name, help=text.split("\n", 1)[0], description=text, epilog=examples)
        module.add_arguments(command)
        log_level = getattr(module, "LOG_LEVEL", "WARNING")
        add_common(command, log_level=log_level)
        check, loads = getattr(module, "check", _accept), getattr(module, "LOADS", None)
        command.set_defaults(**({"loads": loads} | command._defaults), run=module.run, check=check, log_level=log_level)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; results on stdout, all else on stderr.

    Returns 0 ok, 1 failed or degraded, 2 wrong usage, 3 server not running, 4 no answer from it, 130 stopped.
    """
    parser = build_parser()
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        where = f"{parser.prog} {arguments.command}" if arguments.command else parser.prog
        tell_error(f"unknown arguments: {' '.join(unknown)}; `{where} --help` lists those that there are")
        raise SystemExit(EXIT_USAGE)
    if arguments.command is None:
        parser.print_help()
        return EXIT_OK
    arguments.parser = parser
    arguments.given = given_options(build_parser(), argv)
    try:
        with _logging(arguments.log_level, arguments.log_format):
            result = _run(arguments)
        if arguments.json and not getattr(arguments, "prints_json_itself", False):
            print(json.dumps(result))
        sys.stdout.flush()
    except KeyboardInterrupt:
        if sys.stderr.isatty():
            print(file=sys.stderr)  # the shell's prompt begins a line
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # whoever read our output has seen enough
        _leave_stdout()
        return EXIT_FAILED
    except Exception as error:
        return _failed(_error_of_stdout(error) or error, arguments.debug)
    return EXIT_OK if result.get("ok", True) else EXIT_FAILED


def _run(arguments: argparse.Namespace) -> dict[str, object]:
    """What can be told at once is told before the imports take their seconds."""
    arguments.check(arguments)
    warn_of_idle_knobs(arguments)
    if arguments.loads is not None:
        with waiting("loading torch", quiet=getattr(arguments, "quiet", False)):
            importlib.import_module(arguments.loads)
    result: dict[str, object] = arguments.run(arguments)
    return result


def _accept(arguments: argparse.Namespace) -> None:
    pass


def _error_of_stdout(error: Exception) -> SparseFlowError | None:
    """What is wrong if standard output takes nothing more; None if it does. error: what ended the command."""
    failure = None
    if isinstance(error, OSError) and error.errno in _FULL and getattr(sys.stdout, "write_through", False):
        failure = error  # without a buffer nothing is kept that would fail again below
    try:
        sys.stdout.flush()
    except OSError as again:
        failure = again
    if failure is None:
        return None
    _leave_stdout()
    return DiskError(f"standard output cannot be written ({failure.strerror})")


def _leave_stdout() -> None:
    """What is left in its buffer goes nowhere, or Python would fail at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _failed(error: Exception, debug: bool) -> int:
    """Tell of an error in one line, with its traceback where asked for; the exit code."""
    if debug:
        traceback.print_exception(error)
    if isinstance(error, SparseFlowError):
        tell_error(error)
        return _exit_code(error)
    remedy = "report it, with the traceback" if debug else "run again with --debug for the traceback, and report it"
    tell_error(f"unexpected: {type(error).__name__}: {one_line(error)} ({remedy})")
    return EXIT_FAILED


def _exit_code(error: SparseFlowError) -> int:
    match error:
        case UnsupportedModel():
            return EXIT_FAILED
        case BadRequest():
            return EXIT_USAGE
        case ServerNotRunning():
            return EXIT_NOT_RUNNING
        case NoAnswer():
            return EXIT_NO_ANSWER
    return EXIT_FAILED


@contextmanager
def _logging(level: str, log_format: str) -> Iterator[None]:
    """Log to stderr while a command runs; who calls `main` in his own process finds his logging as it was."""
    root = logging.getLogger()
    before = root.handlers[:], root.level, warnings.formatwarning
    warnings.formatwarning = lambda message, *where: str(message)
    try:
        root.handlers = []  # or they would be closed
        start_logging(level, log_format)
        if log_format == "text" and level == "WARNING":
            root.handlers[0].setFormatter(Voice())
        yield
    finally:
        root.handlers, warnings.formatwarning = before[0], before[2]
        root.setLevel(before[1])
        logging.captureWarnings(False)


if __name__ == "__main__":
    sys.exit(main())
