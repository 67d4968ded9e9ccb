"""Bundles arrive whole in their slots; the sparse MLP computes from slots and host memory what float64 does."""

import pytest
import torch

from sparseflow.kernels.device import sparse_mlp as kernels
from sparseflow.kernels.device.ops import LayerMemory, PlainOps, ReachableBundles, TritonOps
from sparseflow.kernels.device.placement import PlacedStep, Placement
from sparseflow.kernels.device.sparse_mlp import sparse_mlp_ref

FEW_PROGRAMS = kernels.Shape(programs=7, at_once=2**10)  # so that each takes several lots of candidates
TOLERANCE = {torch.float16: 1e-5, torch.bfloat16: 1e-5, torch.float32: 1e-5}


def host_bundles(n_neurons: int, hidden: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    bundles = torch.randn(n_neurons, 2, hidden).to(dtype)
    return bundles.pin_memory() if device.type == "cuda" else bundles


def layer_memory(n_neurons: int, n_slots: int, hidden: int, dtype: torch.dtype, device: torch.device) -> LayerMemory:
    slab = torch.full((n_slots, 2, hidden), float("nan"), dtype=dtype, device=device)
    biases = torch.randn(n_neurons, device=device), torch.randn(hidden, device=device)
    n_active = torch.zeros(1, dtype=torch.int64, device=device)
    return LayerMemory(Placement(n_neurons, n_slots, device), slab, *biases, n_active)


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    if device.type == "cpu":  # where each takes its time
        monkeypatch.setattr(kernels, "SHAPE", FEW_PROGRAMS)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("n_neurons", "hidden", "n_tokens"), [(5, 4, 1), (40, 132, 2), (20, 1100, 1), (60, 36, 3)])
@pytest.mark.parametrize("kind", ["triton", "plain"])
def test_from_slots_and_host_memory_as_in_float64(
    kind: str, dtype: torch.dtype, n_neurons: int, hidden: int, n_tokens: int, device: torch.device
) -> None:
    ops = TritonOps(n_tokens, n_neurons, hidden, device) if kind == "triton" else PlainOps()
    bundles = host_bundles(n_neurons, hidden, dtype, device)
    host = ReachableBundles(bundles, bundles.data_ptr())
    n_slots = max(1, n_neurons // 3)  # too few for a step's candidates, so that some are read from host memory
    layer, step = layer_memory(n_neurons, n_slots, hidden, dtype, device), PlacedStep.empty(n_neurons, device)
    expected_active = 0
    for share in (0.5, 0.9, 0.0):
        mask = (torch.rand(n_tokens, n_neurons) < share).to(torch.int8).to(device)
        x = torch.randn(n_tokens, hidden, device=device)
        residual = torch.randn(n_tokens, hidden, device=device).to(dtype)
        y = torch.full((n_tokens, hidden), float("nan"), device=device)
        ops.place(layer, mask, step)
        ops.gather(host, step.missing, step.places, step.counts, layer.slab)
        for slot, neuron in enumerate(layer.placement.neuron_in.tolist()):
            if neuron >= 0:
                assert torch.equal(layer.slab[slot].cpu(), bundles[neuron])
        ops.compute(layer, host, step.missing, step, x, y, residual)
        ids = mask.any(0).nonzero().flatten()
        expected, active = sparse_mlp_ref(bundles.to(device)[ids], ids, layer.fc1_bias, layer.fc2_bias, x)
        expected_active += active
        size = expected.norm() + residual.norm() + 1e-6
        assert (y.double() - expected - residual.double()).norm() / size < TOLERANCE[dtype]
    assert abs(int(layer.n_active) - expected_active) <= 1  # one pre-activation may lie at 0


def test_few_programs_and_small_lots_will_do(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "SHAPE", FEW_PROGRAMS)
    test_from_slots_and_host_memory_as_in_float64("triton", torch.float16, 50, 132, 1, device)


def test_a_sum_is_the_same_each_time(device: torch.device) -> None:
    n_neurons, hidden = 60, 100
    bundles = host_bundles(n_neurons, hidden, torch.float16, device)
    host = ReachableBundles(bundles, bundles.data_ptr())
    layer = layer_memory(n_neurons, n_neurons, hidden, torch.float16, device)
    step, ops = PlacedStep.empty(n_neurons, device), TritonOps(1, n_neurons, hidden, device)
    mask = torch.ones(1, n_neurons, dtype=torch.int8, device=device)
    x, found = torch.randn(1, hidden, device=device), []
    for _ in range(3):
        ops.place(layer, mask, step)
        ops.gather(host, step.missing, step.places, step.counts, layer.slab)
        y = torch.empty(1, hidden, device=device)
        ops.compute(layer, host, step.missing, step, x, y, None)
        found.append(y)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
