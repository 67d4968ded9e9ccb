"""An evaluation tells the truth about decoding: each token by its own neurons, and every miss is seen."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import opt_family
import pytest
import torch
from forgetful import NBYTES_READ, Forgetful
from torch import Tensor
from transformers import DynamicCache, OPTForCausalLM

from sparseflow import DiskWeightStore, OffloadStrategy, SparseFlowConfig, SparseOPTForCausalLM
from sparseflow.evaluation.evaluate import Evaluation
from sparseflow.evaluation.fidelity_run import FidelityRun
from sparseflow.orchestration.density import FixedCrossover
from sparseflow.orchestration.neuron_predictor import OraclePredictor

WINDOW = 24
TOLERANCE = 1e-4
MEMBERS = ["base", "post_norm", "projected", "no_bias", "odd_sizes"]

Open = Callable[..., SparseOPTForCausalLM]


@pytest.fixture
def opened(family_store: Callable[..., Path]) -> Iterator[Open]:
    """(member, strategy) -> its model, which never goes dense by the clock."""
    models = []

    def open_model(member: str = "base", strategy: OffloadStrategy | None = None) -> SparseOPTForCausalLM:
        store = DiskWeightStore(family_store(member)).initialize_from_pretrained(strategy=strategy)
        config = SparseFlowConfig(store.profile, strategy or OffloadStrategy())
        models.append(SparseOPTForCausalLM(config, store, crossover=FixedCrossover(1.0)))
        return models[-1]

    yield open_model
    for model in models:
        model.close()


def random_windows(model: SparseOPTForCausalLM, n: int) -> Tensor:
    """The same in each run: in one of a thousand, a neuron lies so near its cut that rounding decides."""
    return opt_family.random_ids(model.config, n, WINDOW, seed=5)


def decoded_logits(model: SparseOPTForCausalLM, tokens: Tensor) -> Tensor:
    """Token by token through the sparse path, given the text. (window, vocabulary)."""
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        steps = [model(token.view(1, 1), past_key_values=cache, use_cache=True).logits[0] for token in tokens]
    return torch.cat(steps)


@pytest.mark.parametrize("member", MEMBERS)
def test_logits_are_those_of_decoding_with_the_same_predictor(opened: Open, member: str) -> None:
    model = opened(member)
    model.coordinator.predictor = predictor = Forgetful(model.source, least=0.1)
    tokens = random_windows(model, 1)[0]
    with torch.inference_mode():
        dense, sparse = FidelityRun(model, [predictor]).logits(tokens)
        prompt = model(tokens[None]).logits[0]
    decoded = decoded_logits(model, tokens)
    torch.testing.assert_close(sparse, decoded, rtol=TOLERANCE, atol=TOLERANCE)
    for other in (dense, prompt):  # the union of a prompt hides misses, which are many here
        assert (other - decoded).abs().max() > 20 * TOLERANCE


def test_the_dense_contestant_is_the_dense_model(opened: Open, family_checkpoint: Callable[..., Path]) -> None:
    model = opened()
    reference = OPTForCausalLM.from_pretrained(family_checkpoint("base")).eval()
    tokens = random_windows(model, 1)
    with torch.inference_mode():
        (dense,) = FidelityRun(model, []).logits(tokens[0])
        expected = reference(tokens, labels=tokens)
    torch.testing.assert_close(dense, expected.logits[0], rtol=TOLERANCE, atol=TOLERANCE)
    (seen,) = FidelityRun(model, []).run(tokens)
    assert seen.dense_surprise == pytest.approx(float(expected.loss), rel=1e-5)
    active = seen.counts.active[0] / (WINDOW * model.config.ffn_dim)
    assert active == pytest.approx(opt_family.active_shares(reference, tokens), rel=1e-3)


def test_pairs_are_counted_token_by_token(opened: Open) -> None:
    model = opened()
    predictor, oracle = Forgetful(model.source, least=0.2), OraclePredictor(model.source)
    windows = random_windows(model, 2)
    observed = FidelityRun(model, [predictor]).run(windows)
    expected = np.zeros((2, 2, 3), int)  # window, layer, (active, chosen, found)
    for n, (layer, x) in enumerate(list(predictor.asked)):
        for token in x.split(1):
            active, chosen = oracle.select(layer, token), predictor.select(layer, token)
            expected[n // 2, layer] += len(active), len(chosen), len(np.intersect1d(active, chosen))
    for window, seen in enumerate(observed):
        counts = np.stack([seen.counts.active[1], seen.counts.chosen[1], seen.counts.found[1]], 1)
        assert counts.tolist() == expected[window].tolist()
        assert (counts[:, 2] < counts[:, 0]).all()


def test_result_fields_follow_from_the_counts(opened: Open) -> None:
    model = opened()
    profile = model.source.profile
    predictor, windows = Forgetful(model.source, least=0.2), random_windows(model, 3)
    observed = FidelityRun(model, [predictor]).run(windows)
    result = Evaluation(profile, windows, observed).as_fields(["forgetful"], [predictor])
    (fields,) = result["fidelities"]
    active, chosen, found = (
        sum(getattr(seen.counts, name)[1].sum() for seen in observed) for name in ("active", "chosen", "found")
    )
    assert result["tokens"] == windows.numel()
    assert fields["recall"] == found / active < 1
    assert fields["precision"] == found / chosen < 1
    assert fields["recall_error"] > 0
    assert fields["perplexity_ratio_error"] > 0
    assert fields["kl_divergence"] > 0
    nbytes = fields["bytes_per_token"]
    assert nbytes["predictor"] == NBYTES_READ * profile.num_layers
    assert nbytes["memory"] == pytest.approx((chosen + found) * profile.part_nbytes / windows.numel())
    dense_nbytes = result["dense"]["mlp_bytes_per_token"]
    assert fields["share_of_dense_mlp_bytes"] == pytest.approx((nbytes["predictor"] + nbytes["memory"]) / dense_nbytes)
    by_layer = [layer["bytes_per_token"]["memory"] for layer in fields["layers"]]
    assert sum(by_layer) == pytest.approx(nbytes["memory"])
    assert fields["perplexity_ratio"] == pytest.approx(fields["perplexity_sparse"] / fields["perplexity_dense"])


def test_a_predictor_that_misses_nothing_costs_no_quality(opened: Open) -> None:
    model = opened()
    windows = random_windows(model, 2)
    for seen in FidelityRun(model, [OraclePredictor(model.source), None]).run(windows):
        for distance in seen.distances:
            assert distance.log_ratio == pytest.approx(0, abs=1e-6)
            assert distance.divergence == pytest.approx(0, abs=1e-6)
            assert distance.agreement == 1
        assert (seen.counts.found[1:] == seen.counts.active[1:]).all()


def test_windows_do_not_see_each_other(opened: Open) -> None:
    model = opened()
    windows = random_windows(model, 2)
    run = FidelityRun(model, [Forgetful(model.source, least=0.2)])
    together = run.run(windows)
    alone = [run.run(window[None])[0] for window in windows]
    for one, other in zip(together, alone, strict=True):
        assert one.distances == other.distances
        assert (one.counts.found == other.counts.found).all()


def test_a_model_below_memory_is_evaluated_alike(opened: Open) -> None:
    models = [opened(), opened(strategy=OffloadStrategy(cpu_cache_ratio=0.1))]
    windows = random_windows(models[0], 1)
    assert models[1].source.fetch_limit < models[1].config.ffn_dim
    seen = [FidelityRun(model, [Forgetful(model.source, least=0.2)]).run(windows)[0] for model in models]
    assert seen[0].distances == seen[1].distances
    assert models[1].source.status().n_resident < models[0].source.status().n_resident


def test_the_model_generates_as_before_afterwards(opened: Open) -> None:
    model = opened()
    prompt = random_windows(model, 1)[:, :5]
    before = model.generate(prompt, max_new_tokens=8, do_sample=False)
    FidelityRun(model, [Forgetful(model.source, least=0.2)]).run(random_windows(model, 1))
    model.reset_stats()
    assert torch.equal(before, model.generate(prompt, max_new_tokens=8, do_sample=False))
    assert model.stats.decode.layer_steps > 0
