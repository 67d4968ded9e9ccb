"""Recall, measured while a model decodes: right, and without a trace in what it computes and reads."""

import itertools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from sparseflow import DiskWeightStore, OffloadStrategy, SparseFlowConfig, SparseOPTForCausalLM
from sparseflow.core.checkpoint import Checkpoint
from sparseflow.core.converter import convert
from sparseflow.errors import ShardCorrupt
from sparseflow.orchestration.density import FixedCrossover

PROMPT = torch.tensor([[5, 60, 700, 33, 120]])
N_TOKENS = 40


class Forgetful:
    """Chooses as another predictor does, but for every eighth neuron; knows how near neurons were, or says anything."""

    fidelity = "forgetful"
    nbytes_read = 0

    def __init__(self, careful: Any, *, knows_how_near: bool) -> None:
        self._careful, self._knows_how_near = careful, knows_how_near
        self._rng = np.random.default_rng(0)

    def scorer(self, layer: int) -> None:
        """It asks another predictor, and leaves some out."""

    def select(self, layer: int, x: torch.Tensor) -> NDArray[np.uint32]:
        ids: NDArray[np.uint32] = self._careful.select(layer, x)
        return ids[ids % 8 != layer % 8]

    def bounds(self, layer: int, x: torch.Tensor) -> torch.Tensor:
        nearness: torch.Tensor = self._careful.bounds(layer, x)
        return nearness if self._knows_how_near else nearness.new_tensor(self._rng.random(nearness.shape))


@pytest.fixture(scope="module")
def demo(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of the demo model."""
    return convert(Checkpoint(demo_model), tmp_path_factory.mktemp("demo") / "store", dtype="float32", quiet=True)


@contextmanager
def opened(
    name: Path,
    *,
    ratio: float = 1.0,
    threshold: float = 1.0,
    fidelity: str = "exact",
    profiling: bool = True,
    device_cache: str = "auto",
) -> Iterator[SparseOPTForCausalLM]:
    """A sparse model that never goes dense."""
    strategy = OffloadStrategy(cpu_cache_ratio=ratio, activation_threshold=threshold, device_cache=device_cache)
    with DiskWeightStore(name) as store:
        store.initialize_from_pretrained(strategy=strategy)
        config = SparseFlowConfig(store.profile, strategy, enable_profiling=profiling)
        yield SparseOPTForCausalLM(config, store, fidelity=fidelity, crossover=FixedCrossover(1.0))


def decoded(model: SparseOPTForCausalLM, n_tokens: int = N_TOKENS) -> Any:
    """Ids and logits of each step."""
    settings = {"max_new_tokens": n_tokens, "min_new_tokens": n_tokens, "do_sample": False}
    return model.generate(PROMPT, **settings, output_logits=True, return_dict_in_generate=True)


@pytest.mark.parametrize("ratio", [1.0, 0.3])
@pytest.mark.parametrize("how", ["no margin", "forgetful", "forgetful, and does not know how near"])
def test_estimate_agrees_with_the_true_recall_of_the_same_run(demo: Path, how: str, ratio: float) -> None:
    stats = []
    for audits in (True, False):
        with opened(demo, threshold=0.0 if how == "no margin" else 1.0, ratio=ratio) as model:
            coordinator = model.coordinator
            if how != "no margin":
                coordinator.predictor = Forgetful(coordinator.predictor, knows_how_near=how == "forgetful")
            coordinator.audit_every = int(audits)
            coordinator.live_recall.every_step = True
            decoded(model)
            stats.append(model.stats)
    audited, sampled = stats
    # what is there early is added first, so sums may differ in their last place, and a sign that hangs on it
    assert sampled.decode.active_pairs == pytest.approx(audited.decode.active_pairs, rel=1e-3), "the same run"
    truth = 1 - audited.decode.missed / audited.decode.audited
    assert truth < (0.9999 if how == "no margin" else 0.95)
    assert sampled.recall is not None
    assert sampled.recall_error is not None
    assert abs(sampled.recall - truth) <= 4 * sampled.recall_error
    assert sampled.recall_error < 0.02
    sums = sampled.decode.sampled
    assert sums.steps == sums.sampled_steps == sampled.decode.layer_steps
    assert sampled.recall_samples == sums.samples > 0


@pytest.mark.parametrize("ratio", [1.0, 0.3])
def test_a_model_with_device_slots_finds_the_same(demo: Path, ratio: float) -> None:
    with opened(demo, threshold=0.0) as model:
        model.coordinator.audit_every = 1
        decoded(model)
        audited = model.stats.decode
    with opened(demo, threshold=0.0, ratio=ratio, device_cache="copy") as model:
        model.coordinator.live_recall.every_step = True
        decoded(model)
        recall, error, sampled = model.stats.recall, model.stats.recall_error, model.stats.decode
    assert sampled.active_pairs == pytest.approx(audited.active_pairs, rel=1e-3), "the same run"
    assert recall is not None
    assert error is not None
    assert abs(recall - (1 - audited.missed / audited.audited)) <= 4 * error < 0.08
    assert sampled.sampled.steps == sampled.sampled.sampled_steps == sampled.layer_steps
    assert sampled.sampled.found == sampled.active_pairs


def test_a_model_with_device_slots_samples_a_layer_of_a_token_now_and_then(demo: Path) -> None:
    outputs = []
    for n in (3, N_TOKENS + 1):
        with opened(demo, threshold=0.0, ratio=0.3, device_cache="copy") as model:
            model.coordinator.live_recall.pace = EveryNth(n)  # type: ignore[assignment]
            outputs.append(decoded(model).sequences)
            sums, fetches = model.stats.decode.sampled, model.stats.decode.fetches
            assert sums.steps == model.stats.decode.layer_steps
            assert sums.sampled_steps == (N_TOKENS - 1) // n
            assert fetches is not None
            assert fetches.hits + fetches.misses == sum(model.stats.decode.device.misses)
    assert torch.equal(*outputs)


@pytest.mark.parametrize("fidelity", ["exact", "certified"])
def test_fidelity_that_misses_nothing_has_recall_1_with_a_bar_that_shrinks(demo: Path, fidelity: str) -> None:
    errors = []
    with opened(demo, fidelity=fidelity) as model:
        model.coordinator.live_recall.every_step = True
        for n_tokens in (4, N_TOKENS):
            model.reset_stats()
            decoded(model, n_tokens)
            assert model.stats.recall == 1
            errors.append(model.stats.recall_error)
    assert 0 < errors[1] < errors[0] / 4


@pytest.mark.parametrize("ratio", [1.0, 0.3])
def test_ids_and_logits_are_the_same_with_and_without(demo: Path, ratio: float) -> None:
    outputs = []
    for every_step in (True, False):
        with opened(demo, threshold=0.0, ratio=ratio) as model:
            model.coordinator.live_recall.every_step = every_step
            model.coordinator.profiling = every_step
            outputs.append(decoded(model))
    assert torch.equal(outputs[0].sequences, outputs[1].sequences)
    for one, other in zip(outputs[0].logits, outputs[1].logits, strict=True):
        if ratio == 1:
            assert torch.equal(one, other)
        else:  # bundles are summed in the order in which they come
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_where_the_arena_has_room_hits_and_what_is_resident_are_the_same_with_and_without(demo: Path) -> None:
    seen = []
    for every_step in (True, False):
        with opened(demo, ratio=0.9) as model:
            model.coordinator.lookahead.mode = "off"
            model.coordinator.live_recall.every_step = every_step
            decoded(model, 8)
            fetches = model.stats.fetches
            assert fetches is not None
            assert fetches.evictions == 0
            assert (model.stats.recall_samples > 0) >= every_step
            seen.append((fetches.hits, fetches.misses, model.source.status().n_resident))
    assert seen[0] == seen[1]
    assert seen[0][1] > 0


class EveryNth:
    """Stands in for the pace, which goes by the clock."""

    def __init__(self, n: int) -> None:
        self._steps, self._n = itertools.count(1), n

    def is_due(self, layer: int) -> bool:
        return next(self._steps) % self._n == 0

    def sampled(self) -> None:
        pass


@pytest.mark.parametrize(("n", "most"), [(1, 0.1), (25, 0.01)])
def test_where_the_arena_is_full_the_hit_rate_hardly_changes(demo: Path, n: int, most: float) -> None:
    """A sample displaces an eighth of this small arena, and what it displaced might have been asked for once more."""
    rates = []
    for is_on in (True, False):
        with opened(demo, ratio=0.1) as model:
            model.coordinator.lookahead.mode = "off"
            model.coordinator.live_recall.is_on = is_on
            model.coordinator.live_recall.pace = EveryNth(n)  # type: ignore[assignment]
            decoded(model)
            fetches = model.stats.decode.fetches
            assert fetches is not None
            assert fetches.evictions > 0
            assert (model.stats.recall_samples > 0) == is_on
            rates.append(fetches.hit_rate)
    assert rates[0] == pytest.approx(rates[1], abs=most)


def test_sampling_goes_on_by_itself_at_a_pace_of_its_own(demo: Path) -> None:
    with opened(demo) as model:
        decoded(model, 200)
        sums = model.stats.decode.sampled
        assert 0 < sums.sampled_steps < 0.2 * sums.steps
        assert model.stats.recall == 1


def test_prompts_and_dense_steps_are_not_sampled(demo: Path) -> None:
    with opened(demo) as model:
        model.coordinator.live_recall.every_step = True
        with torch.inference_mode():
            model(PROMPT)
        assert model.stats.prefill.sampled.steps == 0
        model.coordinator.crossover = FixedCrossover(0.0)
        decoded(model, 4)
        assert model.stats.decode.dense_layer_share == 1
        assert model.stats.decode.sampled.steps == 0
    assert (model.stats.recall, model.stats.recall_error, model.stats.recall_samples) == (None, None, 0)


@pytest.mark.parametrize("how", [{"fidelity": "dense"}, {"fidelity": "oracle"}, {"profiling": False}])
def test_nothing_is_sampled_where_nothing_is_missed_or_counted(demo: Path, how: dict[str, Any]) -> None:
    with opened(demo, **how) as model:
        model.coordinator.live_recall.every_step = True
        decoded(model, 4)
        assert (model.stats.recall, model.stats.recall_error, model.stats.recall_samples) == (None, None, 0)


def test_an_audit_takes_the_place_of_sampling(demo: Path) -> None:
    with opened(demo) as model:
        model.coordinator.predictor = Forgetful(model.coordinator.predictor, knows_how_near=True)
        model.coordinator.audit_every = 1
        model.coordinator.live_recall.every_step = True
        decoded(model, 8)
        counts = (model.stats.prefill, model.stats.decode)
        assert model.stats.recall_samples == sum(count.audited for count in counts)
        assert model.stats.recall == 1 - sum(count.missed for count in counts) / model.stats.recall_samples
        assert model.stats.recall_error is None


def test_neuron_that_cannot_be_read_stops_no_text(
    demo: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    with opened(demo) as model:
        expected = decoded(model, 8).sequences
    with opened(demo) as model:
        fetch = model.source.fetch

        def failing(layer: int, ids: Any, keep: bool = True) -> Any:
            if not keep:
                raise ShardCorrupt("a test's own")
            return fetch(layer, ids)

        monkeypatch.setattr(model.source, "fetch", failing)
        model.coordinator.live_recall.every_step = True
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            assert torch.equal(decoded(model, 8).sequences, expected)
        assert "recall was not measured in a step of layer 0: a test's own" in {str(each.message) for each in recwarn}
        assert model.stats.recall is None


def test_draws_are_the_samplings_own(demo: Path) -> None:
    """Sampled text rests on torch's generator and numpy's global one, which sampling of neurons leaves alone."""
    texts = []
    for every_step in (True, False):
        with opened(demo) as model:
            model.coordinator.live_recall.every_step = every_step
            torch.manual_seed(11)
            np.random.seed(11)
            texts.append(model.generate(PROMPT, max_new_tokens=30, do_sample=True))
            texts.append(torch.tensor([np.random.random()]))
    assert torch.equal(texts[0], texts[2])
    assert torch.equal(texts[1], texts[3])


def test_several_tokens_a_step_are_counted_as_pairs(demo: Path) -> None:
    with opened(demo) as model:
        model.coordinator.predictor = Forgetful(model.coordinator.predictor, knows_how_near=True)
        model.coordinator.live_recall.every_step = True
        model.generate(torch.cat([PROMPT, PROMPT + 7]), max_new_tokens=20, min_new_tokens=20, num_beams=2)
        sums = model.stats.decode.sampled
        assert sums.found == model.stats.decode.active_pairs
        assert model.stats.recall is not None
        assert 0.5 < model.stats.recall < 1
