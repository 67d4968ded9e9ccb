"""The checkpoints that other tests stand on are what they claim to be."""

from collections.abc import Callable
from pathlib import Path

import opt_family
import pytest
import torch
from transformers import OPTForCausalLM

WITH_BIASES = [name for name, config in opt_family.FAMILY.items() if config.get("enable_bias", True)]


def logits_of(folder: Path) -> torch.Tensor:
    model = OPTForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        return model(opt_family.random_ids(model.config, 4, 24, seed=5)).logits


@pytest.mark.parametrize("name", WITH_BIASES)
def test_about_a_tenth_of_the_neurons_fires(name: str, family_checkpoint: Callable[..., Path]) -> None:
    model = OPTForCausalLM.from_pretrained(family_checkpoint(name))
    shares = opt_family.active_shares(model, opt_family.random_ids(model.config, 8, 40, seed=5))
    assert len(shares) == opt_family.FAMILY[name]["num_hidden_layers"]
    assert all(0.05 < share < 0.15 for share in shares), shares


@pytest.mark.parametrize("name", opt_family.FAMILY)
def test_logits_differ_from_token_to_token(name: str, family_checkpoint: Callable[..., Path]) -> None:
    logits = logits_of(family_checkpoint(name))
    assert logits.std() > 0.2
    assert logits.argmax(-1).unique().numel() > 10


def test_making_one_leaves_the_global_generator_alone(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    opt_family.make("base", tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


def test_same_seed_gives_the_same_checkpoint_and_another_seed_another(tmp_path: Path) -> None:
    weights = []
    for number, seed in enumerate((0, 0, 1)):
        opt_family.make("base", tmp_path / str(number), seed=seed)
        weights.append((tmp_path / str(number) / "model.safetensors").read_bytes())
    assert weights[0] == weights[1] != weights[2]
