"""A layer's codes as a predictor: what it chooses, and how many bytes it says it read for that."""

from pathlib import Path

import numpy as np
import pytest
import torch

from sparseflow.core.checkpoint import Checkpoint
from sparseflow.core.converter import convert
from sparseflow.core.weight_manager import DiskWeightStore
from sparseflow.kernels.bounds import Margin, candidates, upper_bounds
from sparseflow.models.opt_sparse import SparseOPTForCausalLM
from sparseflow.orchestration.neuron_predictor import CodesOfLayer, coded_rows

D = 1e-9


@pytest.fixture(scope="module")
def store(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(Checkpoint(demo_model), tmp_path_factory.mktemp("codes") / "demo", quiet=True)


@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("margin", Margin)
def test_bytes_read_are_the_coarse_plane_once_and_each_open_row_of_the_fine_one(
    store: Path, rng: np.random.Generator, margin: Margin, planes: int
) -> None:
    source = DiskWeightStore(store).initialize_from_pretrained()
    rows = coded_rows(source)[1]
    x = torch.from_numpy(rng.standard_normal((3, source.profile.hidden_dimension)).astype(np.float32))
    predictor = CodesOfLayer(rows, margin, D, 1.0, planes)
    pass_nbytes = sum(t.nbytes for t in (rows.dither, rows.coarse, rows.scales, rows.norms, rows.coarse_error_norms))
    row_nbytes = rows.fine[0].nbytes + rows.fine_error_norms[0].nbytes
    is_open = ~(upper_bounds(rows, x, margin, D, 1.0, 1) <= 0)
    assert np.array_equal(predictor.select(x), candidates(rows, x, margin, D, 1.0, planes))
    once = pass_nbytes + (planes == 2) * row_nbytes * int(is_open.any(0).sum())
    assert predictor.nbytes_read == once
    assert torch.equal(predictor.bounds(x), upper_bounds(rows, x, margin, D, 1.0, planes))
    assert predictor.nbytes_read == once + 3 * pass_nbytes + (planes == 2) * row_nbytes * int(is_open.sum())
    source.close()


def test_a_decode_step_touches_what_the_predictor_read_for_it(store: Path) -> None:
    model = SparseOPTForCausalLM.from_pretrained(store)
    model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=8, min_new_tokens=8)
    tensors, n_layers = model.source.predictor_tensors(), model.config.num_hidden_layers
    all_nbytes = sum(tensor.nbytes for tensor in tensors.values())
    coarse_nbytes = sum(tensors[f"{layer}.coarse"].nbytes for layer in range(n_layers))
    decode = model.stats.decode
    assert coarse_nbytes < decode.predictor_nbytes_per_layer * n_layers < all_nbytes
    dense = sum(weight.nbytes for name, weight in model.source.dense().items() if "embed_" not in name)
    dense += model.lm_head.weight.nbytes * model.config.tie_word_embeddings
    expected = decode.predictor_nbytes_per_layer * n_layers + decode.halves_share * model.source.profile.neurons_nbytes
    assert model.bytes_touched_per_token() == int(dense + expected)
    model.close()
