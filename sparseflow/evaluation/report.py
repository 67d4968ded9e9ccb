"""The result of an evaluation as text: a line a fidelity, and a line a layer."""

from typing import Any

from sparseflow.utils.sizes import format_size


def report(result: dict[str, Any], *, by_layer: bool = False) -> str:
    """A table of all fidelities; with `by_layer` one more for each, of its layers. result: as `evaluate` returns it."""
    dense, fidelities = result["dense"], result["fidelities"]
    width = max(len("fidelity"), *(len(found["fidelity"]) for found in fidelities))
    lines = [
        f"{result['tokens']} tokens in windows of {result['window']}. Dense: perplexity {dense['perplexity']:.4f}, "
        f"{dense['active_share']:.1%} of the neurons active, {format_size(dense['mlp_bytes_per_token'])}"
        " of MLP weights.",
        _LEGEND,
        f"{'fidelity':{width}} {'perplexity, times dense':>23} {'top-1':>7} {'KL, nats':>9} {_PAIRS_TITLE}",
    ]
    for found in fidelities:
        quality = _with_error(found["perplexity_ratio"], found["perplexity_ratio_error"], 5)
        distances = f"{found['top1_agreement']:7.2%} {found['kl_divergence']:9.1e}"
        lines.append(f"{found['fidelity']:{width}} {quality:>23} {distances} {_pairs(found)}")
    for found in fidelities:
        for ratio, nbytes in (found["bytes_per_token"]["disk"] or {}).items():
            share = f"{float(ratio):.0%} of the neurons in memory"
            lines.append(f"{found['fidelity']:{width}} {format_size(round(nbytes))} from disk a token with {share}")
    if by_layer:
        for found in fidelities:
            lines += _layers(found)
    return "\n".join(lines)


_LEGEND = (
    "Recall: share of the active neurons that was chosen; precision: of the chosen that was active; active, chosen: of "
    "all. Bytes a token reads for the predictor and of neurons; of dense: both, as a share of the dense MLP's weights."
)
_PAIRS_TITLE = (
    f"{'recall':>19} {'precision':>9} {'active':>7} {'chosen':>7} {'predictor':>11} {'neurons':>11} {'of dense':>8}"
)


def _pairs(found: dict[str, Any]) -> str:
    """What is known of a fidelity and of a layer alike."""
    nbytes = found["bytes_per_token"]
    return (
        f"{_with_error(found['recall'], found['recall_error'], 5):>19} {_share(found['precision']):>9} "
        f"{found['active_share']:7.2%} {found['candidate_share']:7.2%} {format_size(round(nbytes['predictor'])):>11} "
        f"{format_size(round(nbytes['memory'])):>11} {found['share_of_dense_mlp_bytes']:8.2%}"
    )


def _layers(found: dict[str, Any]) -> list[str]:
    rows = [f"{row['layer']:5} {row['kind'] or '-':>9} {_pairs(row)}" for row in found["layers"]]
    return ["", found["fidelity"], f"{'layer':>5} {'predictor':>9} {_PAIRS_TITLE}", *rows]


def _with_error(value: float | None, error: float | None, digits: int) -> str:
    if value is None:
        return "-"
    return f"{value:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"
