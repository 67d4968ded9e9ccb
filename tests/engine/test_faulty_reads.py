"""Reads that go wrong on purpose: as many as asked for, and never a wrong byte delivered."""

import re
from pathlib import Path

import numpy as np
import pytest
from shards import BUNDLE_SIZES, Shards, neurons

from sparseflow.engine.engine import Engine
from sparseflow.engine.faulty_reads import VARIABLE
from sparseflow.errors import BadRequest, DiskError, ShardCorrupt

N_SLOTS = 20
POINTS = {"read-error": DiskError, "read-short": DiskError, "read-corrupt": ShardCorrupt}


@pytest.fixture(params=["512", "96"], ids=["aligned", "misaligned"])
def shards(request: pytest.FixtureRequest, tmp_path: Path) -> Shards:
    return Shards(tmp_path / "store", bundle_nbytes=BUNDLE_SIZES[request.param])


def fetch_all(engine: Engine, shards: Shards) -> tuple[int, list[DiskError]]:
    """Fetch one bundle after the other. Returns how many came as they are on disk, and the errors of the others."""
    n_right, errors = 0, []
    for layer in range(shards.n_layers):
        for id_ in range(shards.ffn_dim):
            fetch = engine.fetch(layer, neurons(id_), keep=False)
            try:
                slots = engine.wait(fetch, 20)
                assert np.array_equal(engine.slots[slots], shards.content(layer, neurons(id_)))
                n_right += 1
            except DiskError as error:
                errors.append(error)
            engine.release(fetch)
    return n_right, errors


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("io", ["auto", "buffered", "map"])
def test_each_point_is_the_error_of_its_bundle_and_no_other(
    shards: Shards, monkeypatch: pytest.MonkeyPatch, point: str, io: str
) -> None:
    monkeypatch.setenv(VARIABLE, f"{point}:0.3:7")
    engine = Engine(shards.folder, shards.manifest, N_SLOTS, io=io)
    n_right, errors = fetch_all(engine, shards)
    assert len(errors) <= engine.faults[point], "a wrong bit may lie beside the bundle, in what is read along"
    assert 0.1 < engine.faults[point] / shards.n_bundles < 0.5
    assert n_right + len(errors) == shards.n_bundles
    assert errors
    assert {type(error) for error in errors} == {POINTS[point]}
    assert all(re.search(r"layer-00\d.safetensors: layer \d, neuron \d+ ", str(error)) for error in errors)
    assert f"{VARIABLE}={point}:0.3:7" in engine.reasons[-1]
    engine.close()


def test_the_same_seed_hits_the_same_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = Shards(tmp_path / "store")
    told = []
    for seed in (1, 1, 2):
        monkeypatch.setenv(VARIABLE, f"read-error:0.2:{seed}")
        engine = Engine(shards.folder, shards.manifest, N_SLOTS)
        told.append([str(error) for error in fetch_all(engine, shards)[1]])
        engine.close()
    assert told[0] == told[1] != told[2]


def test_several_points_go_wrong_beside_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = Shards(tmp_path / "store")
    monkeypatch.setenv(VARIABLE, "read-error:0.2:1,read-corrupt:0.2:2")
    engine = Engine(shards.folder, shards.manifest, N_SLOTS)
    _, errors = fetch_all(engine, shards)
    assert {type(error) for error in errors} == {DiskError, ShardCorrupt}
    engine.close()


def test_without_the_variable_reads_go_their_usual_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    shards = Shards(tmp_path / "store")
    engine = Engine(shards.folder, shards.manifest, N_SLOTS)
    assert engine.faults == {}
    assert fetch_all(engine, shards) == (shards.n_bundles, [])
    engine.close()


@pytest.mark.parametrize("value", ["read-corrupt", "read-corrupt:2:1", "read-corrupt:nan:1", "elsewhere:0.1:1"])
def test_a_value_that_names_no_fault_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    shards = Shards(tmp_path / "store")
    monkeypatch.setenv(VARIABLE, value)
    with pytest.raises(BadRequest, match="POINT:RATE:SEED") as caught:
        Engine(shards.folder, shards.manifest, N_SLOTS)
    assert repr(value) in str(caught.value)
