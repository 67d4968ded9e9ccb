"""How the commands' parsers read and speak: values, help with units, defaults and examples, wrong usage in one line."""

import argparse
import math
import sys
import textwrap
from collections.abc import Callable, Iterator
from typing import NoReturn

from sparseflow.errors import BadRequest
from sparseflow.utils.sizes import parse_size

EXIT_USAGE = 2
_NO_DEFAULTS = (None, False, argparse.SUPPRESS)


def number(convert: Callable[[str], float], least: float, most: float = math.inf) -> Callable[[str], float]:
    """What argparse shall make of a text: a number from `least` to `most`; anything else is wrong usage."""

    def parse(text: str) -> float:
        try:
            value = convert(text)
        except ValueError as error:
            kind = "a whole number" if convert is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} is no number: give {kind}") from error
        if not least <= value <= most:
            limits = f"at least {least}" if most == math.inf else f"between {least} and {most}"
            raise argparse.ArgumentTypeError(f"{text} is out of range: give a number {limits}")
        return value

    parse.__name__ = convert.__name__  # argparse names it where the text is no number at all
    return parse


def size(text: str) -> int:
    """What argparse shall make of a size, in bytes."""
    try:
        return parse_size(text)
    except BadRequest as error:
        raise argparse.ArgumentTypeError(str(error)) from error


class HelpFormatter(argparse.HelpFormatter):
    """Defaults behind each option that has one; paragraphs stay, and lines that are indented."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30)

    def add_argument(self, action: argparse.Action) -> None:
        """Commands stand further right, which the column of their help must know."""
        super().add_argument(action)
        if isinstance(action, argparse._SubParsersAction):
            self._action_max_length += self._indent_increment

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = action.help or ""
        has_none = any(action.default is nothing for nothing in _NO_DEFAULTS) or action.default == []
        if has_none or not action.option_strings or "%(default)" in text:
            return text
        if isinstance(action.default, list | tuple):
            return f"{text} (default: {' '.join(map(str, action.default))})"
        return f"{text} (default: %(default)s)"

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs = textwrap.dedent(text).strip().split("\n\n")
        return "\n\n".join(
            paragraph if "\n  " in paragraph else textwrap.fill(paragraph, width, initial_indent=indent)
            for paragraph in paragraphs
        )


class Parser(argparse.ArgumentParser):
    """Tells of wrong usage in one line, with where to read more."""

    def __init__(self, **how: object) -> None:
        super().__init__(**({"formatter_class": HelpFormatter} | how))  # type: ignore[arg-type]

    def error(self, message: str) -> NoReturn:
        """End the process, with the exit code of wrong usage."""
        program, _, command = self.prog.partition(" ")
        where = f"{command}: " if command else ""
        self.exit(EXIT_USAGE, f"{program}: error: {where}{one_line(message)}; `{self.prog} --help` tells more\n")


def one_line(text: object) -> str:
    """A message without line breaks."""
    return " ".join(map(str.strip, str(text).splitlines()))


def tell_error(text: object, program: str = "sparseflow") -> None:
    """The one line of an error, on stderr."""
    print(f"{program}: error: {one_line(text)}", file=sys.stderr)


def actions_of(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """All arguments of a parser and of those below it."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                yield from actions_of(below)
