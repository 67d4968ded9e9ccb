"""A dense model and its sparse twin, from one checkpoint, with every layer step audited."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import OPTForCausalLM

from sparseflow import DiskWeightStore, SparseFlowConfig, SparseOPTForCausalLM
from sparseflow.orchestration.density import FixedCrossover


class Pair(NamedTuple):
    """Both in evaluation mode, same dtype."""

    dense: Any
    sparse: SparseOPTForCausalLM


def make_pair(checkpoint: Path, dtype: torch.dtype, fidelity: str) -> Pair:
    """The sparse one never goes dense by the clock: what is tested must not depend on timing."""
    dense = OPTForCausalLM.from_pretrained(checkpoint, dtype=dtype).eval()
    store = DiskWeightStore(checkpoint, dtype=str(dtype).removeprefix("torch.")).initialize_from_pretrained()
    sparse = SparseOPTForCausalLM(
        SparseFlowConfig(store.profile), store, fidelity=fidelity, crossover=FixedCrossover(1.0)
    )
    sparse.coordinator.audit_every = 1
    return Pair(dense, sparse)


def check_sparse(sparse: SparseOPTForCausalLM) -> None:
    """Decoding happened, was sparse throughout, and missed no active neuron."""
    for counts in (sparse.stats.prefill, sparse.stats.decode):
        assert counts.missed == 0
    decode = sparse.stats.decode
    assert decode.layer_steps > 0
    assert decode.audited > 0
    assert decode.dense_layer_share == 0
    assert decode.candidate_share is not None
    assert decode.candidate_share < 0.95
