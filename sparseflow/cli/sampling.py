"""How the next token is chosen, and where a text ends: what `generate` and `chat` are told alike."""

import argparse
from typing import Any

from sparseflow.utils.parsing import number


def add_sampling(parser: argparse.ArgumentParser, max_new_tokens: int) -> None:
    """--max-new-tokens, --stop, and those of sampling. max_new_tokens: the default."""
    group = parser.add_argument_group("sampling")
    group.add_argument(
        "--max-new-tokens", type=number(int, 1), default=max_new_tokens, metavar="N", help="tokens, at most"
    )
    group.add_argument(
        "--stop",
        action="append",
        type=_stop,
        default=[],
        metavar="TEXT",
        help="end before this text; may be given several times. A line break is $'\\n' in bash",
    )
    group.add_argument(
        "--temperature", type=number(float, 0), default=0.0, metavar="FACTOR", help="0: always the likeliest token"
    )
    group.add_argument(
        "--top-p",
        type=number(float, 0, 1),
        default=1.0,
        metavar="SHARE",
        help="sample from the likeliest tokens that have this probability together; 1: all",
    )
    group.add_argument(
        "--top-k",
        type=number(int, 0),
        default=50,
        metavar="N",
        help="sample from so many of the likeliest tokens; 0: all",
    )
    group.add_argument(
        "--repetition-penalty",
        type=number(float, 0.01),
        default=1.0,
        metavar="FACTOR",
        help="makes tokens less likely that were there before; 1: none. Also without sampling",
    )
    group.add_argument(
        "--seed",
        type=number(int, 0, 2**63 - 1),
        metavar="N",
        help="of the sampling: the same seed gives the same text; without, another one each time",
    )


def sampling_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """What `model.generate` is told, with the seed set."""
    if arguments.seed is not None:
        import torch

        torch.manual_seed(arguments.seed)
    told: dict[str, Any] = {"do_sample": False}
    if arguments.temperature > 0:
        told = {
            "do_sample": True,
            "temperature": arguments.temperature,
            "top_p": arguments.top_p,
            "top_k": arguments.top_k,
        }
    if arguments.repetition_penalty != 1:
        told["repetition_penalty"] = arguments.repetition_penalty
    return told


def _stop(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("an empty text ends nothing; give one or more characters")
    return text
