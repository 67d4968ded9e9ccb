"""The figure and the table show every fidelity."""

from pathlib import Path
from typing import Any

import pytest

from sparseflow.errors import BadRequest, DiskError
from sparseflow.evaluation import plot
from sparseflow.evaluation.report import report


def fidelity(name: str, divergence: float, share: float) -> dict[str, Any]:
    pairs = {
        "recall": 0.99123,
        "recall_error": 0.0012,
        "precision": None,
        "active_share": 0.04,
        "candidate_share": 0.05,
        "bytes_per_token": {"predictor": 4096.0, "memory": 8192.0, "disk": None},
        "share_of_dense_mlp_bytes": share,
    }
    quality = {
        "perplexity_ratio": 1.0021,
        "perplexity_ratio_error": None,
        "top1_agreement": 0.99,
        "kl_divergence": divergence,
    }
    return {"fidelity": name, **quality, **pairs, "layers": [{"layer": 0, "kind": None, **pairs}]}


@pytest.fixture
def result() -> dict[str, Any]:
    dense = {"perplexity": 33.6, "active_share": 0.04, "mlp_bytes_per_token": 2**24}
    fidelities = [fidelity("exact", 0.0, 0.2), fidelity("calibrated:0.9", 3e-3, 0.1), fidelity("rounded", -1e-12, 0.3)]
    return {"tokens": 512, "window": 256, "dense": dense, "fidelities": fidelities}


def test_every_fidelity_has_its_point_inside_the_figure(result: dict[str, Any]) -> None:
    (axes,) = plot.draw(result).axes
    points = {str(line.get_label()).split(",")[0]: line for line in axes.lines}
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    for found in result["fidelities"]:
        line = points[found["fidelity"]]
        assert (line.get_xdata(), line.get_ydata()) == (
            [100 * found["share_of_dense_mlp_bytes"]],
            [found["kl_divergence"]],
        )
        assert left <= 100 * found["share_of_dense_mlp_bytes"] <= right
        assert bottom - 1e-9 <= found["kl_divergence"] <= top


def test_a_figure_is_written_as_png_and_svg(result: dict[str, Any], tmp_path: Path) -> None:
    png, svg = plot.plot(result, tmp_path / "quality.of.demo")
    assert png == tmp_path / "quality.of.demo.png"
    assert png.read_bytes().startswith(b"\x89PNG")
    assert "</svg>" in svg.read_text()
    with pytest.raises(DiskError, match="cannot be written"):
        plot.plot(result, tmp_path / "missing" / "figure")


def test_without_matplotlib_the_remedy_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    plot.require_plotting()
    monkeypatch.setattr(plot, "find_spec", lambda name: None)
    with pytest.raises(BadRequest, match=r"pip install 'sparseflow\[eval\]'"):
        plot.require_plotting()


def test_the_table_has_a_line_for_each_fidelity_and_layer(result: dict[str, Any]) -> None:
    lines = report(result).splitlines()
    assert len(lines) == 3 + 3
    assert lines[4].split()[:2] == ["calibrated:0.9", "1.00210"]
    assert "0.99123 ± 0.00120" in lines[4]
    assert len(report(result, by_layer=True).splitlines()) == 3 + 3 + 3 * 4
