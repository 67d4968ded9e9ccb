"""Text stays the dense model's when most bundles are on disk, and they are read as they are needed."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import opt_family
import pytest
import torch
from transformers import AutoTokenizer, OPTForCausalLM
from transformers.generation.streamers import BaseStreamer

from sparseflow import DiskWeightStore, OffloadStrategy, SparseFlowConfig, SparseOPTForCausalLM
from sparseflow.errors import BadRequest
from sparseflow.orchestration.density import Crossover, FixedCrossover

RATIOS = [0.5, 0.2, 0.05]
SPARSE, DENSE = FixedCrossover(1.0), FixedCrossover(0.0)


class PromptsDense:
    """Steps of several tokens stream the whole layer, steps of one are sparse."""

    def density(self, n_tokens: int) -> float:
        return 1.0 if n_tokens == 1 else 0.0


@contextmanager
def opened(
    name: Path, strategy: OffloadStrategy, crossover: Crossover = SPARSE, **settings: Any
) -> Iterator[SparseOPTForCausalLM]:
    with DiskWeightStore(name, dtype="float32") as store:
        store.initialize_from_pretrained(strategy=strategy, **settings)
        yield SparseOPTForCausalLM(SparseFlowConfig(store.profile, strategy), store, crossover=crossover)


class ReadsPerToken(BaseStreamer):
    """Bytes read from disk up to each token."""

    def __init__(self, model: SparseOPTForCausalLM) -> None:
        self._model = model
        self.bytes_read: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        counts = self._model.source.status().counts
        assert counts is not None
        self.bytes_read.append(counts.bytes_from_disk)

    def end(self) -> None:
        pass

    def per_step(self) -> list[int]:
        """Of each forward pass, the prompt's first."""
        return [after - before for before, after in zip(self.bytes_read, self.bytes_read[1:], strict=False)]


def check_reading(model: SparseOPTForCausalLM, reads: ReadsPerToken, ratio: float) -> None:
    """Every step read something; with half of all bundles in memory, some steps find all they need there."""
    fetches, per_step = model.stats.fetches, reads.per_step()
    assert fetches is not None
    assert fetches.evictions > 0
    assert sum(n > 0 for n in per_step) >= (0.5 if ratio == 0.5 else 1) * len(per_step)
    assert model.stats.decode.dense_layer_share == 0


@pytest.mark.parametrize("ratio", RATIOS)
def test_demo_model_equals_dense(demo_model: Path, ratio: float) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    inputs = tokenizer("HAMLET.\nTo be, or not to be,", return_tensors="pt")
    settings = {"max_new_tokens": 120, "min_new_tokens": 120, "do_sample": False}
    dense = OPTForCausalLM.from_pretrained(demo_model, dtype=torch.float32).eval().generate(**inputs, **settings)
    with opened(demo_model, OffloadStrategy(cpu_cache_ratio=ratio), PromptsDense()) as model:
        reads = ReadsPerToken(model)
        assert torch.equal(model.generate(**inputs, **settings, streamer=reads), dense)
        check_reading(model, reads, ratio)


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("name", opt_family.FAMILY)
def test_whole_family_equals_dense(name: str, ratio: float, family_checkpoint: Callable[..., Path]) -> None:
    checkpoint = family_checkpoint(name)
    reference = OPTForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    ids = opt_family.random_ids(reference.config, 1, 8)
    settings = {"max_new_tokens": 40, "min_new_tokens": 40, "do_sample": True}
    outputs = []
    with opened(checkpoint, OffloadStrategy(cpu_cache_ratio=ratio), PromptsDense()) as model:
        reads = ReadsPerToken(model)
        for candidate, streamer in ((reference, None), (model, reads)):
            torch.manual_seed(5)
            outputs.append(candidate.generate(ids, attention_mask=torch.ones_like(ids), streamer=streamer, **settings))
        assert torch.equal(*outputs)
        check_reading(model, reads, ratio)


STRATEGIES = {
    "one layer's slots for all layers": OffloadStrategy(aggressive_offload=True),
    "least recently used": OffloadStrategy(cpu_cache_ratio=0.1, eviction="lru"),
    "first in first out": OffloadStrategy(cpu_cache_ratio=0.1, use_lru_eviction=False),
    "synchronous": OffloadStrategy(cpu_cache_ratio=0.1, async_transfer=False),
}


@pytest.mark.parametrize("crossover", [SPARSE, DENSE], ids=["sparse", "dense"])
@pytest.mark.parametrize("how", STRATEGIES)
def test_every_strategy_equals_dense(
    how: str, crossover: FixedCrossover, family_checkpoint: Callable[..., Path]
) -> None:
    checkpoint = family_checkpoint("post_norm")
    reference = OPTForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    ids = opt_family.random_ids(reference.config, 3, 9)
    with opened(checkpoint, STRATEGIES[how], crossover) as model:
        assert_same_text(reference, model, ids)
        assert model.stats.fetches is not None
        assert model.stats.fetches.evictions > 0


@pytest.mark.parametrize("lookahead", ["off", "input", "before"])
@pytest.mark.parametrize("io", ["direct", "buffered", "map"])
def test_every_way_of_reading_equals_dense(io: str, lookahead: Any, family_checkpoint: Callable[..., Path]) -> None:
    checkpoint = family_checkpoint("odd_sizes")  # strides that no alignment divides
    reference = OPTForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    with opened(checkpoint, OffloadStrategy(cpu_cache_ratio=0.1), io=io) as model:
        model.coordinator.lookahead.mode = lookahead
        assert model.source.status().io == io
        assert_same_text(reference, model, opt_family.random_ids(reference.config, 1, 5))


def assert_same_text(dense: Any, sparse: SparseOPTForCausalLM, ids: torch.Tensor) -> None:
    settings = {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False}
    outputs = [model.generate(ids, attention_mask=torch.ones_like(ids), **settings) for model in (dense, sparse)]
    assert torch.equal(*outputs)


def test_no_active_neuron_is_missed(demo_model: Path) -> None:
    with opened(demo_model, OffloadStrategy(cpu_cache_ratio=0.1)) as model:
        model.coordinator.audit_every = 1
        model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=16, do_sample=False)
        assert model.stats.recall == 1
        assert model.stats.recall_samples > 0


def test_model_settles_the_strategy_of_a_store_that_was_opened_without_one(family_store: Callable[..., Path]) -> None:
    with DiskWeightStore(family_store("base")) as store:
        store.initialize_from_pretrained()
        assert store.status().counts is None
        SparseOPTForCausalLM(SparseFlowConfig(store.profile, OffloadStrategy(cpu_cache_ratio=0.2)), store)
        assert store.status().counts is not None
        assert store.fetch_limit < 256


def test_other_strategy_than_the_stores_is_refused(family_store: Callable[..., Path]) -> None:
    with DiskWeightStore(family_store("base")) as store:
        store.initialize_from_pretrained(strategy=OffloadStrategy(cpu_cache_ratio=0.5))
        with pytest.raises(BadRequest, match="other cpu_cache_ratio; give both the same strategy"):
            SparseOPTForCausalLM(SparseFlowConfig(store.profile, OffloadStrategy(cpu_cache_ratio=0.2)), store)


def test_audits_are_not_counted_as_reading(demo_model: Path) -> None:
    rates = []
    for audit_every in (0, 1):
        with opened(demo_model, OffloadStrategy(cpu_cache_ratio=0.5)) as model:
            model.coordinator.audit_every = audit_every
            model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=12, do_sample=False)
            assert model.stats.fetches is not None
            rates.append(model.stats.fetches.hits + model.stats.fetches.misses)
    assert rates[0] == rates[1]
