"""The `sparseflow` command: reads the command line, runs one subcommand, turns errors into exit codes."""

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence

import sparseflow
from sparseflow.cli import (
    bench,
    calibrate,
    convert,
    demo,
    doctor,
    evaluate,
    generate,
    info,
    status,
    trace,
    verify,
    version,
)
from sparseflow.errors import BadRequest, NoAnswer, ServerNotRunning, SparseFlowError, UnsupportedModel

EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_NOT_RUNNING, EXIT_NO_ANSWER, EXIT_INTERRUPTED = 0, 1, 2, 3, 4, 130

_COMMANDS = {
    "convert": convert,
    "calibrate": calibrate,
    "eval": evaluate,
    "generate": generate,
    "demo": demo,
    "verify": verify,
    "info": info,
    "status": status,
    "trace": trace,
    "bench": bench,
    "doctor": doctor,
    "version": version,
}


def build_parser() -> argparse.ArgumentParser:
    """Each subcommand's module adds its own arguments; its docstring is its help."""
    parser = argparse.ArgumentParser(prog="sparseflow", description=sparseflow.__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in _COMMANDS.items():
        text = module.__doc__ or ""
        command = commands.add_parser(
            name,
            help=text.split("\n", 1)[0],
            description=text,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        command.add_argument("--json", action="store_true", help="print the result as one JSON object on stdout")
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; results on stdout, all else on stderr.

    Returns 0 ok, 1 failed or degraded, 2 wrong usage, 3 server not running, 4 no answer from it, 130 stopped.
    """
    arguments = build_parser().parse_args(argv)
    try:
        _start_logging()
        result: dict[str, object] = arguments.run(arguments)
    except SparseFlowError as error:
        print(f"sparseflow: error: {error}", file=sys.stderr)
        return _exit_code(error)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    if arguments.json:
        print(json.dumps(result))
    return EXIT_OK if result.get("ok", True) else EXIT_FAILED


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


def _start_logging() -> None:
    level = os.environ.get("SPARSEFLOW_LOG", "WARNING").upper()
    if level not in logging.getLevelNamesMapping():
        raise BadRequest(f"SPARSEFLOW_LOG={level}: give one of DEBUG, INFO, WARNING, ERROR")
    logging.basicConfig(level=level, stream=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
