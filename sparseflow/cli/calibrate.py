"""Fit predictors to text, for `calibrated` fidelity.

A calibration that was stopped goes on where it was when the same command is run again.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparseflow.cli.arguments import MODEL_HELP, add_dtype, add_memory, add_quiet, model_path, require_model_path
from sparseflow.utils.parsing import number
from sparseflow.utils.tokenizer import require_texts

if TYPE_CHECKING:
    from sparseflow.store.calibration import Calibration
    from sparseflow.store.profile import ModelProfile


LOADS = "sparseflow.calibration.calibrate"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """STORE --text, and how much is fitted."""
    parser.add_argument("store", type=model_path, metavar="STORE", help=MODEL_HELP)
    parser.add_argument(
        "--text", type=Path, nargs="+", required=True, metavar="FILE", help="files of text like that to be generated"
    )
    parser.add_argument(
        "--recall",
        type=number(float, 0, 1),
        default=0.99,
        metavar="SHARE",
        help="of the active neurons, that shall be found",
    )
    parser.add_argument(
        "--tokens",
        type=number(int, 1),
        metavar="N",
        help="at most so many of the text, in whole windows, of which it takes two; without, all",
    )
    parser.add_argument(
        "--window", type=number(int, 2), default=256, metavar="N", help="tokens that attend to each other"
    )
    parser.add_argument(
        "--epochs", type=number(int, 0), default=2, metavar="N", help="of training; 0: no trained predictors"
    )
    parser.add_argument(
        "--keep-all", action="store_true", help="store also predictors that are the cheapest at no recall"
    )
    parser.add_argument(
        "--codes-only", action="store_true", help="nothing of low rank: for models of billions, where that takes long"
    )
    add_memory(parser)
    add_dtype(parser)
    add_quiet(parser)


def check(arguments: argparse.Namespace) -> None:
    """Refuse paths that cannot be."""
    require_texts(arguments.text)
    require_model_path(arguments.store)


def run(arguments: argparse.Namespace) -> dict[str, object]:
    """Calibrate, and show what was chosen for each layer and why."""
    from sparseflow.calibration.calibrate import CalibrationSettings, calibrate
    from sparseflow.core.store_home import find_or_convert
    from sparseflow.store.manifest import Manifest

    settings = CalibrationSettings(
        *(arguments.recall, arguments.tokens, arguments.window, arguments.epochs, arguments.keep_all),
        codes_only=arguments.codes_only,
    )
    store = find_or_convert(arguments.store, dtype=arguments.dtype, quiet=arguments.quiet)
    calibration = calibrate(store, arguments.text, settings, memory=arguments.memory, quiet=arguments.quiet)
    profile = Manifest.load(store).profile
    rows = [layer_costs(calibration, layer, profile) for layer in range(profile.num_layers)]
    if not arguments.json:
        print(report(calibration, rows, profile))
    return {"store": str(store), "recall": calibration.recall, "tokens": calibration.tokens, "layers": rows}


def layer_costs(calibration: "Calibration", layer: int, profile: "ModelProfile") -> dict[str, Any]:
    """What is known of a layer, and what each of its predictors costs at the recall asked for."""
    record = calibration.layers[layer]
    costs = calibration.costs(layer, calibration.recall, profile)
    return {
        "layer": layer,
        "active_share": record.active_share,
        "overlap": record.overlap,
        "chosen": calibration.choose(layer, calibration.recall, profile),
        "bytes_per_token": costs,
        "ranks": {kind: found.rank for kind, found in record.predictors.items() if found.rank is not None},
        "lookahead_recall": [found.recall for found in record.lookahead],
        "lookahead_candidate_share": [found.candidate_share for found in record.lookahead],
    }


def report(calibration: "Calibration", rows: list[dict[str, Any]], profile: "ModelProfile") -> str:
    """A table: a line a layer, a column a predictor, the cheapest marked."""
    from sparseflow.store.calibration import KINDS

    dense = profile.ffn_dimension * profile.bundle_nbytes
    kinds = [kind for kind in KINDS if kind in rows[0]["bytes_per_token"]]
    lines = [
        f"{calibration.tokens} tokens, recall {calibration.recall:g}. Bytes a token as a share of the layer's MLP: "
        "the predictor's, and of neurons fetched in vain. * is the cheapest, which is chosen.",
        f"{'layer':>5} {'active':>7} {'overlap':>8} " + " ".join(f"{kind:>14}" for kind in kinds),
    ]
    for row in rows:
        cells = []
        for kind in kinds:
            rank = f" r{row['ranks'][kind]}" if kind in row["ranks"] else ""
            mark = "*" if kind == row["chosen"] else " "
            cells.append(f"{row['bytes_per_token'][kind] / dense:8.3f}{rank:>5}{mark}")
        lines.append(f"{row['layer']:5} {row['active_share']:7.1%} {row['overlap']:8.0%} " + " ".join(cells))
    chosen = sum(row["bytes_per_token"][row["chosen"]] for row in rows)
    totals = {kind: sum(row["bytes_per_token"][kind] for row in rows) for kind in kinds}
    best = min(totals, key=totals.__getitem__)
    lines.append(
        f"all layers: {chosen / dense / len(rows):.3f} as chosen, {totals[best] / dense / len(rows):.3f} with {best} "
        "everywhere"
    )
    return "\n".join(lines)
