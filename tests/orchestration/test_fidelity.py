"""What people ask for is understood, or refused before anything happens."""

from pathlib import Path
from typing import Any

import pytest
import torch
from opt_family import FAMILY, random_ids

from sparseflow import DiskWeightStore, OffloadStrategy, SparseFlowConfig, SparseOPTForCausalLM
from sparseflow.core.fidelity_name import Fidelity
from sparseflow.errors import BadRequest, DiskError


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("exact", Fidelity("exact")),
        ("certified", Fidelity("certified")),
        ("dense", Fidelity("dense")),
        ("calibrated", Fidelity("calibrated")),
        ("calibrated:0.98", Fidelity("calibrated", 0.98)),
        ("calibrated:0.9:svd", Fidelity("calibrated", 0.9, "svd")),
    ],
)
def test_a_fidelity_is_parsed(text: str, meant: Fidelity) -> None:
    assert Fidelity.parse(text) == meant


@pytest.mark.parametrize(
    "text",
    ["", "approximate", "exact:0.9", "calibrated:", "calibrated:high", "calibrated:1", "calibrated:0", "calibrated:nan",
     "calibrated:0.9:magic", "calibrated:0.9:svd:more"],
)  # fmt: skip
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(BadRequest, match="fidelity"):
        Fidelity.parse(text)


def test_what_only_tests_ask_for_is_not_offered() -> None:
    with pytest.raises(BadRequest) as refused:
        Fidelity.parse("approximate")
    assert "oracle" not in str(refused.value)
    assert Fidelity.parse("oracle") == Fidelity("oracle")


def test_a_recall_beyond_what_was_calibrated_is_refused(calibrated_demo_store: Path) -> None:
    with pytest.raises(BadRequest, match=r"calibrated from 0\.8 to 0\.999"):
        SparseOPTForCausalLM.from_pretrained(calibrated_demo_store, fidelity="calibrated:0.9999")


def test_a_threshold_on_a_calibrated_predictor_is_reported_as_one(calibrated_demo_store: Path) -> None:
    strategy = OffloadStrategy(activation_threshold=0.5)
    model = SparseOPTForCausalLM.from_pretrained(calibrated_demo_store, strategy=strategy, fidelity="calibrated")
    assert model.fidelity == "threshold:0.5"
    model.close()


# --- predictors made elsewhere

HIDDEN, FFN, N_LAYERS = FAMILY["base"]["hidden_size"], FAMILY["base"]["ffn_dim"], FAMILY["base"]["num_hidden_layers"]


def save_predictors(folder: Path, fc1: torch.Tensor, fc2: torch.Tensor) -> None:
    for layer in range(N_LAYERS):
        torch.save(fc1, folder / f"layer_{layer}_predictor_fc1.pt")
        torch.save(fc2, folder / f"layer_{layer}_predictor_fc2.pt")


def opened(checkpoint: Path, folder: Path, **how: Any) -> SparseOPTForCausalLM:
    store = DiskWeightStore(checkpoint).initialize_from_pretrained()
    return SparseOPTForCausalLM(SparseFlowConfig(store.profile, predictor_weights_path=str(folder)), store, **how)


def test_given_predictors_choose_where_their_output_is_above_0(family_checkpoint: Any, tmp_path: Path) -> None:
    fc1, fc2 = torch.randn(16, HIDDEN), torch.randn(FFN, 16)
    save_predictors(tmp_path, fc1, fc2)
    model = opened(family_checkpoint("base"), tmp_path)
    assert model.fidelity == "given"
    assert model.coordinator.predictor is not None
    x = torch.randn(3, HIDDEN)
    expected = (torch.relu(x @ fc1.T) @ fc2.T > 0).any(0).nonzero().flatten()
    assert torch.equal(torch.from_numpy(model.coordinator.predictor.select(1, x).astype("int64")), expected)
    model.generate(random_ids(model.config, 1, 6), max_new_tokens=4)
    assert model.stats.decode.candidate_share is not None


def test_given_predictors_are_loaded_without_running_what_a_file_says(family_checkpoint: Any, tmp_path: Path) -> None:
    save_predictors(tmp_path, torch.randn(4, HIDDEN), torch.randn(FFN, 4))
    torch.save({"code": Path}, tmp_path / "layer_1_predictor_fc2.pt")
    with pytest.raises(DiskError, match=r"layer_1_predictor_fc2\.pt"):
        opened(family_checkpoint("base"), tmp_path)


@pytest.mark.parametrize(("fc1", "fc2"), [((4, HIDDEN + 1), (FFN, 4)), ((4, HIDDEN), (FFN, 5)), ((4,), (FFN, 4))])
def test_given_predictors_of_another_size_are_refused(
    family_checkpoint: Any, tmp_path: Path, fc1: tuple[int, ...], fc2: tuple[int, ...]
) -> None:
    save_predictors(tmp_path, torch.randn(fc1), torch.randn(fc2))
    with pytest.raises(DiskError, match="this model needs"):
        opened(family_checkpoint("base"), tmp_path)


def test_missing_given_predictors_are_named(family_checkpoint: Any, tmp_path: Path) -> None:
    with pytest.raises(DiskError, match="file is missing"):
        opened(family_checkpoint("base"), tmp_path)


def test_given_predictors_and_a_fidelity_exclude_each_other(family_checkpoint: Any, tmp_path: Path) -> None:
    save_predictors(tmp_path, torch.randn(4, HIDDEN), torch.randn(FFN, 4))
    with pytest.raises(BadRequest, match="give one of them"):
        opened(family_checkpoint("base"), tmp_path, fidelity="exact")
