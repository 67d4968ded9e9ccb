"""Measure on text what fidelities cost in quality and spare in bytes, against the dense model.

Each token computes with its own neurons only, as while decoding.
"""

import argparse
import sys
from pathlib import Path

from sparseflow.cli.arguments import (
    MODEL_HELP,
    add_dtype,
    add_memory,
    add_quiet,
    add_threads,
    fidelity,
    model_path,
    require_model_path,
    require_place,
)
from sparseflow.core.config import OffloadStrategy
from sparseflow.utils.parsing import number
from sparseflow.utils.progress import waiting
from sparseflow.utils.tokenizer import require_texts

LOADS = "sparseflow.evaluation.evaluate"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """STORE --text, what to compare, and how to show it."""
    parser.add_argument("store", type=model_path, metavar="STORE", help=MODEL_HELP)
    parser.add_argument("--text", type=Path, nargs="+", required=True, metavar="FILE", help="files of text")
    parser.add_argument(
        "--fidelity",
        type=fidelity,
        nargs="+",
        default=["exact", "certified"],
        metavar="FIDELITY",
        help="exact, certified, calibrated, calibrated:RECALL or calibrated:RECALL:PREDICTOR; several at once",
    )
    parser.add_argument(
        "--tokens",
        type=number(int, 1),
        metavar="N",
        help="at most so many of the text, in whole windows; without, all",
    )
    parser.add_argument(
        "--window",
        type=number(int, 2),
        metavar="N",
        help="tokens that attend to each other; without, 256 or the model's positions, whichever is less",
    )
    parser.add_argument("--layers", action="store_true", help="show each layer too")
    parser.add_argument("--plot", type=Path, metavar="PATH", help="draw PATH.png and PATH.svg")
    parser.add_argument(
        "--activation-threshold",
        type=number(float, 0),
        default=OffloadStrategy().activation_threshold,
        metavar="FACTOR",
        help="scales the predictors' margins",
    )
    parser.add_argument(
        "--cpu-cache-ratio",
        type=number(float, 0, 1),
        nargs="+",
        default=[],
        metavar="SHARE",
        help="tell what would be read from disk with this share of all neurons in host memory; several at once",
    )
    add_memory(parser)
    add_threads(parser)
    add_dtype(parser)
    add_quiet(parser)


def check(arguments: argparse.Namespace) -> None:
    """Refuse paths that cannot be, and a figure where none can be drawn."""
    require_texts(arguments.text)
    require_model_path(arguments.store)
    if arguments.plot is not None:
        from sparseflow.evaluation.plot import require_plotting

        require_place(arguments.plot)
        require_plotting()


def run(arguments: argparse.Namespace) -> dict[str, object]:
    """Print a table, or with --json one object."""
    strategy = OffloadStrategy(activation_threshold=arguments.activation_threshold)
    import torch

    from sparseflow.evaluation.evaluate import evaluate
    from sparseflow.evaluation.plot import plot
    from sparseflow.evaluation.report import report
    from sparseflow.models.opt_sparse import SparseOPTForCausalLM

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    with waiting(f"opening {arguments.store}", quiet=arguments.quiet):
        model = SparseOPTForCausalLM.from_pretrained(
            arguments.store, memory=arguments.memory, fidelity="dense", dtype=arguments.dtype, quiet=arguments.quiet
        )
    try:
        result = evaluate(
            model,
            arguments.text,
            arguments.fidelity,
            n_tokens=arguments.tokens,
            window=arguments.window,
            activation_threshold=strategy.activation_threshold,
            cache_ratios=arguments.cpu_cache_ratio,
            quiet=arguments.quiet,
        )
    finally:
        model.close()
    if not arguments.json:
        print(report(result, by_layer=arguments.layers))
    if arguments.plot is not None:
        for path in plot(result, arguments.plot):
            print(path, file=sys.stderr)
    return result
