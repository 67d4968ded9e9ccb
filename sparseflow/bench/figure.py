"""A benchmark's result as a figure: bars of tokens/s with their spread, and what would be if only reading took time."""

import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sparseflow.bench.gpu.cases import GB, SPARSEFLOW
from sparseflow.utils.sizes import format_size

# In Markdown.
NAMES = {
    "transformers": "transformers, dense",
    "device_map": "accelerate, all layers on disk",
    "disk_offload": "accelerate `disk_offload`",
    "airllm:gc=stubbed": "AirLLM, its garbage collection stubbed",
    "airllm:gc=stock": "AirLLM",
    "ctranslate2:compute=float32": "CTranslate2 float32",
    "ctranslate2:compute=int8": "CTranslate2 int8 (not exact)",
    "onnxruntime": "ONNX Runtime float32",
    "sparseflow:fidelity=dense": "SparseFlow `dense`: sparsity off",
    "sparseflow": "**SparseFlow `exact`**",
    "sparseflow:fidelity=certified": "**SparseFlow `certified`**",
    "sparseflow:fidelity=calibrated": "**SparseFlow `calibrated`**",
}
_OURS, _OTHERS, _LIMIT = "#1f77b4", "#b0b7c0", "#d62728"


def name_of(label: str) -> str:
    """Of a case, for people, in Markdown."""
    match = re.fullmatch(r"device_map:layers=(\d+),copied=(yes|no)", label)
    if match is None:
        return NAMES.get(label, label)
    where = "copied to private memory" if match[2] == "yes" else "mapped"
    return f"accelerate, {match[1]} layers {where}, the best partial offload"


@dataclass(frozen=True, slots=True)
class Bar:
    """A case: tokens/s, all of them. limit: None where there is none to name."""

    name: str
    rate: float
    lowest: float
    highest: float
    limit: float | None

    @property
    def is_ours(self) -> bool:
        """Whether it is sparse."""
        return self.name.startswith("**")


def draw(result: dict[str, Any]) -> Any:
    """The figure of a result of `sparseflow bench`."""
    asked = result["conditions"]
    limit = f"in {format_size(asked['limit_nbytes'])} of memory, cold" if asked["limit_nbytes"] else "all in memory"
    bars = []
    for label, row in result["summary"].items():
        if row["n_finished"]:
            bars.append(_bar(name_of(label), row, _limit(row, result["machine"])))
    cpu = f"{asked['threads']} threads of {result['environment']['cpu']}"
    return draw_bars(bars, f"{asked['checkpoint']}'s shape, {limit}; {cpu}")


def _bar(name: str, row: dict[str, Any], limit: float | None) -> Bar:
    rate, lowest, highest = (row[f"{what}_tokens_per_s"] for what in ("decode", "lowest", "highest"))
    return Bar(name, rate, lowest, highest, limit)


def _limit(row: dict[str, Any], machine: dict[str, Any]) -> float:
    """Of memory or the disk, whichever is lower. Who reads whole layers in a row has the disk's best rate."""
    limits = [row["memory_limit_tokens_per_s"]]
    is_dense = row.get("candidate_share", 1) == 1
    if is_dense and row["bytes_from_disk_per_token"] and machine["large_bytes_per_s"]:
        limits.append(max(machine["large_bytes_per_s"]) / row["bytes_from_disk_per_token"])
    elif not is_dense and row.get("disk_limit_tokens_per_s") is not None:
        limits.append(row["disk_limit_tokens_per_s"])
    return float(min(limits))


def draw_gpu(result: dict[str, Any], model: str, cap_nbytes: int) -> Any:
    """The figure of a result of `scripts/bench/gpu.py`: of one model, what keeps to a limit of the GPU's memory."""
    bars = []
    for row in result["rows"]:
        keeps = row["cap_nbytes"] == cap_nbytes and not row["n_served"]
        if row["model"] == model and keeps and row.get("decode_tokens_per_s"):
            name = f"accelerate {row['program']}"
            if row["program"] == SPARSEFLOW and row["fidelity"] == "dense":
                name = "SparseFlow dense: sparsity off"
            elif row["program"] == SPARSEFLOW:
                name = f"**SparseFlow {row['fidelity']}**"
            limits = row.get("limits")
            bars.append(_bar(name, row, limits["overlapped_tokens_per_s"] if limits else None))
    return draw_bars(
        bars, f"{model}'s shape in {cap_nbytes / GB:.1f} GB of GPU memory; {result['machine']['device']['name']}"
    )


def draw_bars(bars: Sequence[Bar], title: str) -> Any:
    """A matplotlib figure, a bar a case, from the top."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.hashsalt"] = "sparseflow"  # the same result, the same file
    figure = Figure(figsize=(9, 1.4 + 0.4 * len(bars)), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    rates = [bar.rate for bar in bars]
    spread = [[bar.rate - bar.lowest for bar in bars], [bar.highest - bar.rate for bar in bars]]
    places = range(len(bars))
    axes.barh(places, rates, xerr=spread, color=[_OURS if bar.is_ours else _OTHERS for bar in bars], ecolor="0.35")
    for place, bar in enumerate(bars):
        weight = "bold" if bar.is_ours else "normal"
        axes.annotate(
            f"{bar.rate:.3g}", (max(bar.rate, bar.highest), place), (6, 0), textcoords="offset points",
            va="center", weight=weight,
        )  # fmt: skip
    limits = [(bar.limit, place) for place, bar in enumerate(bars) if bar.limit is not None]
    if limits:
        axes.plot(*zip(*limits, strict=True), "|", color=_LIMIT, markersize=16, label="if only reading took time")
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    axes.set_yticks(places, labels=[_plain(bar.name) for bar in bars])
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlim(left=0)
    axes.set_xlabel("decoded tokens per second")
    axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title)
    return figure


def _plain(name: str) -> str:
    """Without Markdown, in short lines."""
    return textwrap.fill(name.replace("*", "").replace("`", ""), 44)
