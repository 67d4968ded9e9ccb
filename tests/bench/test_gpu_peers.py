"""The dense model made from a store is the checkpoint's, and what offloads move is counted module by module."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from opt_family import random_ids
from transformers import OPTForCausalLM

from sparseflow.bench.gpu.peers import dense_model, moved_nbytes, offloaded
from sparseflow.models.opt_sparse import SparseOPTForCausalLM

SCRIPT = Path(__file__).parents[2] / "scripts" / "make_synthetic_opt.py"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint and a store of the same random weights. To be read only."""
    spec = importlib.util.spec_from_file_location("make_synthetic_opt", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    script = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    folder = tmp_path_factory.mktemp("synthetic")
    checkpoint, store = folder / "checkpoint", folder / "store"
    for out, *flags in ((checkpoint,), (store, "--store")):
        assert script.main(["--preset", "tiny", "--dtype", "float32", "--out", str(out), *flags]) == 0
    del sys.modules[spec.name]
    return checkpoint, store


def greedy(model: OPTForCausalLM, ids: torch.Tensor) -> list[int]:
    model.generation_config.eos_token_id = None
    return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False)[0].tolist()


def test_ids_are_those_of_the_checkpoint_and_of_the_sparse_model(synthetic: tuple[Path, Path]) -> None:
    checkpoint, store = synthetic
    made, dense = dense_model(store), OPTForCausalLM.from_pretrained(checkpoint)
    ids = random_ids(made.config, 1, 9)
    sparse = SparseOPTForCausalLM.from_pretrained(store)
    try:
        assert greedy(made, ids) == greedy(dense, ids) == greedy(sparse, ids)
    finally:
        sparse.close()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("member", ["base", "post_norm", "projected", "untied", "no_bias", "no_affine", "odd_sizes"])
def test_weights_are_the_checkpoints_bit_by_bit(member: str, dtype: str, family_checkpoint, family_store) -> None:
    made = dense_model(family_store(member, dtype))
    dense = OPTForCausalLM.from_pretrained(family_checkpoint(member, dtype), dtype="auto")
    expected = dict(dense.named_parameters())
    found = dict(made.named_parameters())
    assert found.keys() == expected.keys()
    assert all(torch.equal(weight, expected[name]) and weight.dtype == dense.dtype for name, weight in found.items())


def test_cpu_offload_computes_the_same_and_moves_every_modules_weights(synthetic: tuple[Path, Path]) -> None:
    _, store = synthetic
    model = dense_model(store)
    ids = random_ids(model.config, 1, 5)
    expected = greedy(model, ids)
    head = model.lm_head.weight.nbytes
    whole = sum(parameter.nbytes for parameter in model.parameters()) + head  # tied: moved once for each use
    assert offloaded(model, CPU) == whole
    assert greedy(model, ids) == expected


def test_moved_bytes_are_those_of_modules_that_the_map_has_on_the_cpu(synthetic: tuple[Path, Path]) -> None:
    model = dense_model(synthetic[1])
    layers = model.model.decoder.layers
    of_layer = [sum(parameter.nbytes for parameter in layer.parameters()) for layer in layers]
    device_map = {"model.decoder.embed_tokens": 0, "lm_head": 0, "model.decoder.layers.0": 0}
    assert moved_nbytes(model, device_map) == 0
    assert moved_nbytes(model, device_map | {"model.decoder.layers.1": "cpu"}) == of_layer[1]
    assert moved_nbytes(model, device_map | {"model.decoder.layers": "cpu"}) == sum(of_layer)
    assert moved_nbytes(model, {"lm_head": "cpu"}) == model.lm_head.weight.nbytes
