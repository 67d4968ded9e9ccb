"""A calibrated store: what it says is true of its text, and it stays a store whatever happens meanwhile."""

import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from child_process import start_forked
from opt_family import same_bits, tensors_in

from sparseflow import SparseFlowConfig
from sparseflow.calibration import calibrate as module
from sparseflow.calibration.calibrate import CalibrationSettings, calibrate
from sparseflow.errors import BadRequest, DiskError, ShardCorrupt
from sparseflow.evaluation.evaluate import evaluate
from sparseflow.models.opt_sparse import SparseOPTForCausalLM
from sparseflow.orchestration.calibrated_predictor import lookahead_predictors
from sparseflow.orchestration.low_rank import normalised
from sparseflow.store.calibration import KINDS, PROFILE_NAME, Calibration, calibrated_name
from sparseflow.store.manifest import Manifest, check_content
from sparseflow.utils.tokenizer import token_windows, tokenizer_of

QUICK = CalibrationSettings(tokens=1024, epochs=1)


@pytest.fixture
def store(calibrated_demo_store: Path, tmp_path: Path) -> Path:
    """A copy that may be changed."""
    return Path(shutil.copytree(calibrated_demo_store, tmp_path / "store"))


@pytest.fixture
def uncalibrated(store: Path) -> Path:
    """The same without what calibration has added."""
    return without_calibration(store)


def without_calibration(store: Path) -> Path:
    manifest = Manifest.load(store)
    files = {name: e for name, e in manifest.files.items() if "calibrated" not in name and name != PROFILE_NAME}
    for name in manifest.files.keys() - files.keys():
        (store / name).unlink()
    module.replace(manifest, files=files).save(store)
    return store


class Calibrated(NamedTuple):
    """A store, and what calibrating it has given."""

    store: Path
    calibration: Calibration


@pytest.fixture(scope="module")
def quickly(calibrated_demo_store: Path, demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Calibrated:
    """A store calibrated with the quick settings. To be read only."""
    store = without_calibration(
        Path(shutil.copytree(calibrated_demo_store, tmp_path_factory.mktemp("quick") / "store"))
    )
    return Calibrated(store, calibrate(store, [demo_model / "calibration.txt"], QUICK))


def heldout(model: SparseOPTForCausalLM, demo_model: Path, n_tokens: int) -> torch.Tensor:
    """(n_windows, 128) of text that calibration has not seen."""
    return token_windows(tokenizer_of(model.source.model_files), [demo_model / "heldout.txt"], 128, n_tokens)


def test_every_layer_has_every_predictor_and_what_text_showed_of_it(calibration: Calibration) -> None:
    assert calibration.tokens == 4096
    for layer, record in enumerate(calibration.layers):
        assert set(record.predictors) == set(KINDS)
        assert sum(record.active_counts) == pytest.approx(record.active_share * 4096 * 1024)
        assert 0 < record.overlap < 1
        assert len(record.lookahead) == min(layer + 1, 3)
    assert calibration.layers[0].active_share > 0.15  # as the model's recipe says
    assert calibration.layers[3].active_share < 0.04


def test_calibration_changes_the_fingerprint_of_predictors_and_not_that_of_weights(
    store: Path, uncalibrated: Path, calibrated_demo_store: Path
) -> None:
    before, after = Manifest.load(uncalibrated), Manifest.load(calibrated_demo_store)
    assert before.weights_fingerprint == after.weights_fingerprint
    assert before.predictors_fingerprint != after.predictors_fingerprint
    for name, entry in after.files.items():
        check_content(calibrated_demo_store, name, entry)


def test_the_recall_asked_for_is_found_on_text_that_was_not_seen(calibrated_demo_store: Path, demo_model: Path) -> None:
    kinds = ["", *(f":{kind}" for kind in KINDS)]
    with SparseOPTForCausalLM.from_pretrained(calibrated_demo_store, fidelity="dense").source as source:
        config = SparseFlowConfig(source.profile)
        model = SparseOPTForCausalLM(config, source, fidelity="dense")
        fidelities = [f"calibrated:0.95{kind}" for kind in kinds]
        result = evaluate(model, [demo_model / "heldout.txt"], fidelities, n_tokens=512)
    by_kind = dict(zip(("auto", *KINDS), result["fidelities"], strict=True))
    for kind, found in by_kind.items():
        assert 0.92 < found["recall"] < 0.975, kind  # fitted to 4096 tokens of other chapters
        assert found["candidate_share"] < 0.2, kind
    assert by_kind["coarse"]["recall"] == pytest.approx(0.95, abs=0.01)  # rounding errors know of no text


@pytest.mark.parametrize("recall", [0.85, 0.9, 0.97, 0.99, 0.999])
def test_auto_is_never_dearer_than_the_best_single_predictor(
    calibration: Calibration, calibrated_demo_store: Path, recall: float
) -> None:
    profile = Manifest.load(calibrated_demo_store).profile
    costs = [calibration.costs(layer, recall, profile) for layer in range(profile.num_layers)]
    chosen = sum(cost[calibration.choose(n, recall, profile)] for n, cost in enumerate(costs))
    for kind in KINDS:
        assert chosen <= sum(cost[kind] for cost in costs)


def test_a_higher_recall_asks_for_more_neurons(calibration: Calibration) -> None:
    for record in calibration.layers:
        for predictor in record.predictors.values():
            assert list(predictor.cuts) == sorted(predictor.cuts)
            assert list(predictor.candidate_shares) == sorted(predictor.candidate_shares)


def test_lookahead_finds_far_more_than_chance_and_the_nearest_view_finds_most(
    calibration: Calibration, calibrated_demo_store: Path, demo_model: Path
) -> None:
    for record in calibration.layers:
        for found in record.lookahead:
            assert found.candidate_share < 0.6 * found.recall  # chance names as many as it finds
    shares = [[found.candidate_share for found in record.lookahead] for record in calibration.layers[2:]]
    nearest, middle, farthest = np.mean(shares, axis=0)
    assert nearest < middle < farthest
    with SparseOPTForCausalLM.from_pretrained(calibrated_demo_store).source as source:
        for distance in range(3):
            predictors = lookahead_predictors(source, distance)
            assert set(predictors) == set(range(8))
            scores = predictors[5].scores(normalised(torch.randn(3, 256)))
            assert scores.shape == (3, 1024)


def test_a_store_that_is_not_calibrated_says_so_and_runs_exact(uncalibrated: Path) -> None:
    with pytest.warns(UserWarning, match="not calibrated, so it runs exact"):
        model = SparseOPTForCausalLM.from_pretrained(uncalibrated, fidelity="calibrated")
    assert model.fidelity == "exact"
    model.close()


def test_what_is_cheapest_nowhere_is_not_stored_and_asking_for_it_says_so(quickly: Calibrated) -> None:
    store, calibration = quickly
    dropped = {
        (layer, kind)
        for layer, record in enumerate(calibration.layers)
        for kind, predictor in record.predictors.items()
        if not predictor.is_kept
    }
    assert dropped
    stored = set(tensors_in(store / calibrated_name(min(dropped)[0])))
    assert not any(name.startswith(min(dropped)[1]) for name in stored)
    with pytest.raises(BadRequest, match="--keep-all"):
        SparseOPTForCausalLM.from_pretrained(store, fidelity=f"calibrated:0.99:{min(dropped)[1]}")
    precisions: dict[bool, list[float]] = {True: [], False: []}
    for layer, record in enumerate(calibration.layers):
        used = record.lookahead[min(1, layer)]
        precisions[used.is_kept].append(record.active_share * used.recall / used.candidate_share)
        stored = {name.split(".")[0] for name in tensors_in(store / calibrated_name(layer))}
        kept = [f"lookahead{distance}" in stored for distance in range(3)]
        assert kept == [used.is_kept and distance == min(1, layer) for distance in range(3)]
    assert min(precisions[True]) > 0.4  # half, on other tokens
    assert max(precisions[False]) < 0.6


def test_codes_alone_are_cut_for_the_recall_and_nothing_is_stored_for_them(
    uncalibrated: Path, demo_model: Path
) -> None:
    settings = module.replace(QUICK, codes_only=True)
    calibration = calibrate(uncalibrated, [demo_model / "calibration.txt"], settings)
    for layer, record in enumerate(calibration.layers):
        assert set(record.predictors) == {"coarse", "codes"}
        assert not record.lookahead
        assert not tensors_in(uncalibrated / calibrated_name(layer))
    model = SparseOPTForCausalLM.from_pretrained(uncalibrated, fidelity="dense")
    result = evaluate(model, [demo_model / "heldout.txt"], ["calibrated:0.95"], n_tokens=512)
    assert 0.92 < result["fidelities"][0]["recall"] < 0.975
    assert not lookahead_predictors(model.source, 1)
    model.close()


def test_a_killed_calibration_leaves_the_store_as_it_was_and_goes_on(
    fork_server: None, quickly: Calibrated, uncalibrated: Path, demo_model: Path, tmp_path: Path
) -> None:
    text = demo_model / "calibration.txt"
    script = (
        "from pathlib import Path; from sparseflow.calibration.calibrate import *; import sys\n"
        "settings = CalibrationSettings(tokens=1024, epochs=1)\n"
        "calibrate(Path(sys.argv[1]), [Path(sys.argv[2])], settings)"
    )
    work = uncalibrated.with_name(uncalibrated.name + ".calibration")
    with start_forked(script, uncalibrated, text, log=tmp_path / "log") as process:
        deadline = time.monotonic() + 120
        while not (work / "layer-002.json").exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        assert process.wait(30) == -signal.SIGKILL, (tmp_path / "log").read_text()
    assert PROFILE_NAME not in Manifest.load(uncalibrated).files
    assert calibrate(uncalibrated, [text], QUICK) == quickly.calibration
    assert not work.exists()
    for layer in range(8):
        one, other = (tensors_in(path / calibrated_name(layer)) for path in (quickly.store, uncalibrated))
        assert one.keys() == other.keys()
        assert all(same_bits(one[name], other[name]) for name in one)


def test_a_rerun_does_not_fit_finished_layers_again(
    uncalibrated: Path, demo_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit = module._Run._fit
    fitted: list[int] = []

    def stop_at_layer_3(self: module._Run, layer: int, codes: object) -> None:
        if layer == 3 and len(fitted) == 3:
            raise KeyboardInterrupt
        fitted.append(layer)
        fit(self, layer, codes)

    monkeypatch.setattr(module._Run, "_fit", stop_at_layer_3)
    text, settings = [demo_model / "calibration.txt"], CalibrationSettings(tokens=512, codes_only=True)
    with pytest.raises(KeyboardInterrupt):
        calibrate(uncalibrated, text, settings)
    fitted.append(-1)
    calibrate(uncalibrated, text, settings)
    assert fitted == [0, 1, 2, -1, *range(3, 8)]


@pytest.mark.parametrize("n_moved", [0, 1, 5, 9])
def test_a_kill_while_files_are_put_in_place_leaves_a_store_that_opens(
    store: Path, demo_model: Path, monkeypatch: pytest.MonkeyPatch, n_moved: int
) -> None:
    moved: list[object] = []

    def move(source: Path, target: Path) -> None:
        if str(source).endswith(".tmp"):  # the manifest's own
            os.rename(source, target)
            return
        if len(moved) == n_moved:
            raise KeyboardInterrupt
        moved.append(target)
        os.rename(source, target)

    calibration = Calibration.from_json((store / PROFILE_NAME).read_bytes(), Manifest.load(store).profile)
    folder = Path(shutil.copytree(store, store.with_name("work")))
    monkeypatch.setattr(os, "replace", move)
    if n_moved < 9:
        with pytest.raises(KeyboardInterrupt):
            module.install(store, folder, calibration)
        with pytest.warns(UserWarning, match="not calibrated"):
            model = SparseOPTForCausalLM.from_pretrained(store, fidelity="calibrated")
    else:
        module.install(store, folder, calibration)
        model = SparseOPTForCausalLM.from_pretrained(store, fidelity="calibrated")
        assert model.fidelity == "calibrated:0.99"
    model.close()


def test_two_calibrations_of_one_store_at_once_are_refused(uncalibrated: Path, demo_model: Path) -> None:
    folder = uncalibrated.with_name(uncalibrated.name + ".calibration")
    with module.exclusive(folder, "calibrating"), pytest.raises(DiskError, match="another process is calibrating"):
        calibrate(uncalibrated, [demo_model / "calibration.txt"], QUICK)


def test_a_calibrated_store_works_below_memory(calibrated_demo_store: Path, demo_model: Path) -> None:
    from sparseflow import OffloadStrategy

    texts = []
    for ratio in (1.0, 0.2):
        strategy = OffloadStrategy(cpu_cache_ratio=ratio)
        model = SparseOPTForCausalLM.from_pretrained(calibrated_demo_store, strategy=strategy, fidelity="calibrated")
        if ratio < 1:
            model.coordinator.lookahead.mode = "trained"
        ids = heldout(model, demo_model, 128)[:, :20]
        texts.append(model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False))
        if ratio < 1:
            fetches = model.stats.decode.fetches
            assert fetches is not None
            assert fetches.hints_useful + fetches.hints_late > 0
        model.close()
    assert torch.equal(*texts)


@pytest.mark.parametrize(
    ("changes", "wrong"),
    [
        ({"recall": 0.2}, "recall"),
        ({"recall": 1.0}, "recall"),
        ({"window": 1}, "window"),
        ({"epochs": -1}, "epochs"),
        ({"tokens": 0}, "tokens"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes: dict[str, float], wrong: str) -> None:
    with pytest.raises(BadRequest, match=wrong):
        CalibrationSettings(**changes)  # type: ignore[arg-type]


def test_too_little_text_is_refused(uncalibrated: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("In the beginning", encoding="utf-8")
    with pytest.raises(BadRequest, match="give more text"):
        calibrate(uncalibrated, [tmp_path / "short.txt"], QUICK)


def test_a_profile_that_is_not_one_is_named(store: Path) -> None:
    profile = Manifest.load(store).profile
    content = json.loads((store / PROFILE_NAME).read_bytes())
    for damage in ({"version": 99}, {"layers": content["layers"][:3]}, {"recalls": [0.9]}, {"recalls": [0.99, 0.9]}):
        with pytest.raises(ShardCorrupt, match="calibrate the store again"):
            Calibration.from_json(json.dumps(content | damage).encode(), profile)
    content["layers"][0]["predictors"]["svd"]["cuts"][0] = float("nan")
    with pytest.raises(ShardCorrupt, match="one of cuts is nan"):
        Calibration.from_json(json.dumps(content).encode(), profile)
    with pytest.raises(ShardCorrupt):
        Calibration.from_json(b"\xff", profile)
