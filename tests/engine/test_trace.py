"""Traces: what they hold, on disk and in memory, and what is refused."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from sparseflow.engine.trace import Step, Trace
from sparseflow.errors import BadRequest, DiskError

SIZES = (3, 40, 512)


def random_trace(rng: np.random.Generator, n_tokens: int = 7) -> tuple[Trace, list[Step]]:
    n_layers, ffn_dim, _ = SIZES
    steps = [
        Step(layer, np.flatnonzero(rng.random(ffn_dim) < rng.random()).astype(np.uint32))
        for _ in range(n_tokens)
        for layer in range(n_layers)
    ]
    return Trace.from_steps(SIZES, "fingerprint", steps), steps


def same_steps(trace: Any, steps: list[Step]) -> bool:
    return [(layer, ids.tolist()) for layer, ids in trace] == [(layer, ids.tolist()) for layer, ids in steps]


def test_trace_gives_its_steps_back(rng: np.random.Generator) -> None:
    trace, steps = random_trace(rng)
    assert same_steps(trace, steps)
    assert (trace.n_steps, trace.n_tokens) == (21, 7)


def test_trace_on_disk_is_the_same(rng: np.random.Generator, tmp_path: Path) -> None:
    trace, steps = random_trace(rng)
    trace.save(tmp_path / "trace")
    loaded = Trace.load(tmp_path / "trace")
    assert same_steps(loaded, steps)
    assert (loaded.n_layers, loaded.ffn_dim, loaded.bundle_nbytes, loaded.fingerprint) == (*SIZES, "fingerprint")


def test_part_and_layer_of_a_trace(rng: np.random.Generator) -> None:
    trace, steps = random_trace(rng)
    assert same_steps(trace.part(4, 11), steps[4:11])
    assert same_steps(trace.part(5, 5), [])
    assert [ids.tolist() for ids in trace.of_layer(1)] == [ids.tolist() for _, ids in steps[1::3]]


def test_trace_without_steps(tmp_path: Path) -> None:
    trace = Trace.from_steps(SIZES, "", [])
    trace.save(tmp_path / "trace")
    assert Trace.load(tmp_path / "trace").n_steps == 0


GOOD = Trace(
    *SIZES, "", np.array([0, 1], np.uint32), np.array([0, 2, 3], np.uint64), np.array([3, 9, 5], np.uint32)
)  # fmt: skip
WRONG = {
    "layer 3 of 3": {"layers": np.array([0, 3], np.uint32)},
    "neuron 40 of 40": {"ids": np.array([3, 40, 5], np.uint32)},
    "do not ascend": {"ids": np.array([9, 9, 5], np.uint32)},
    "do not divide 3 ids among 2 steps": {"offsets": np.array([0, 3], np.uint64)},
    "do not divide": {"offsets": np.array([0, 4, 3], np.uint64)},
    "not uint64": {"offsets": np.array([0, 2, 3])},
    "0 layers": {"n_layers": 0},
}


@pytest.mark.parametrize("problem", WRONG)
def test_impossible_trace_is_refused(problem: str) -> None:
    with pytest.raises(BadRequest, match=problem):
        replace(GOOD, **WRONG[problem])  # type: ignore[arg-type]


def test_impossible_trace_on_disk_is_refused_by_its_name(tmp_path: Path) -> None:
    GOOD.save(tmp_path / "trace")
    content = (tmp_path / "trace").read_bytes()
    (tmp_path / "trace").write_bytes(content.replace(np.uint32([3, 9]).tobytes(), np.uint32([9, 3]).tobytes()))
    with pytest.raises(BadRequest, match=r"trace: .*do not ascend.*record it again"):
        Trace.load(tmp_path / "trace")


@pytest.mark.parametrize("content", [b"", b"text that is none", b"\xff" * 64])
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "other").write_bytes(content)
    with pytest.raises(BadRequest, match="other: not a trace"):
        Trace.load(tmp_path / "other")


def test_other_safetensors_are_refused(tmp_path: Path) -> None:
    save_file({"layers": np.zeros(3, np.uint32)}, tmp_path / "other")
    with pytest.raises(BadRequest, match="other: not a trace"):
        Trace.load(tmp_path / "other")


def test_file_that_is_missing_or_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(DiskError, match="missing"):
        Trace.load(tmp_path / "missing")
    with pytest.raises(DiskError, match="nowhere"):
        GOOD.save(tmp_path / "nowhere" / "trace")
