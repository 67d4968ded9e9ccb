"""The result of an evaluation as a figure: how far from dense, against bytes read."""

import math
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparseflow.errors import BadRequest, DiskError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_ROUNDING = 1e-8  # nats: divergences below come from float32
_MARKERS = "osD^vP*X<>"


def require_plotting() -> None:
    """
    Raises:
        BadRequest: matplotlib is missing.
    """
    if find_spec("matplotlib") is None:
        raise BadRequest("--plot draws with matplotlib, which is not installed: pip install 'sparseflow[eval]'")


def plot(result: dict[str, Any], path: Path) -> list[Path]:
    """Write PATH.png and PATH.svg. result: as `evaluate` returns it.

    Raises:
        DiskError: they cannot be written.
    """
    figure = draw(result)
    files = [path.with_name(f"{path.name}.{ending}") for ending in ("png", "svg")]
    for file in files:
        try:
            figure.savefig(file, dpi=150)
        except OSError as error:
            raise DiskError(
                f"{file}: cannot be written ({error}); give --plot a path in a folder that is there"
            ) from error
    return files


def draw(result: dict[str, Any]) -> "Figure":
    """One point a fidelity."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    fidelities = result["fidelities"]
    for n, found in enumerate(fidelities):
        x, y = 100 * found["share_of_dense_mlp_bytes"], found["kl_divergence"]
        marker = _MARKERS[n % len(_MARKERS)]
        axes.plot(x, y, marker, color=f"C{n}", markersize=8, label=_text(found), clip_on=False, zorder=3)
    active = 100 * result["dense"]["active_share"]
    axes.axvline(active, color="0.5", linestyle=":", label=f"only neurons that fire: {active:.1f} %", zorder=1)
    _set_axes(axes, [found["kl_divergence"] for found in fidelities])
    axes.set_title(
        f"Distance from dense against weights read\n{result['tokens']} tokens in windows of {result['window']}, "
        f"dense perplexity {result['dense']['perplexity']:.2f}",
        fontsize=11,
    )
    figure.legend(loc="outside right upper", title="fidelity, change of perplexity", fontsize=9, frameon=False)
    return figure


def _set_axes(axes: "Axes", divergences: list[float]) -> None:
    """Logarithmic upwards, and linear below the least divergence, so that none at all has its place too."""
    least = min((y for y in divergences if y > _ROUNDING), default=_ROUNDING)
    threshold = 10.0 ** math.floor(math.log10(least))
    axes.set_yscale("symlog", linthresh=threshold)
    axes.set_ylim(0, 3 * max(*divergences, threshold))
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("weights of MLPs and predictors read per token, % of the dense MLPs' bytes")
    axes.set_ylabel("KL divergence from dense, nats per token")


def _text(found: dict[str, Any]) -> str:
    return f"{found['fidelity']}, {found['perplexity_ratio'] - 1:+.3%}"
