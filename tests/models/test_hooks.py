"""Forward hooks of a layer's parts are called for every token, decoded ones too, and change nothing."""

from collections.abc import Callable
from pathlib import Path

import torch

from sparseflow import SparseOPTForCausalLM


def test_hooks_see_decoded_tokens(demo_model: Path) -> None:
    model = SparseOPTForCausalLM.from_pretrained(demo_model, dtype="float32")
    prompt = torch.randint(4, model.config.vocab_size, (1, 6))
    ids = model.generate(prompt, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    layer = model.model.decoder.layers[3]
    seen: list[tuple[int, ...]] = []
    for part in (layer.self_attn_layer_norm, layer.final_layer_norm):
        part.register_forward_hook(lambda _, __, y: seen.append(tuple(y.shape)))
    hooked = model.generate(prompt, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert torch.equal(hooked, ids)
    hidden = model.config.hidden_size
    assert seen == [(1, 6, hidden)] * 2 + [(1, 1, hidden)] * 8
    model.close()


def test_what_a_hook_was_given_stays(family_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """Behind a post-norm layer's first norm lies the residual stream itself, to which the MLP's output is added."""
    model = SparseOPTForCausalLM.from_pretrained(family_checkpoint("post_norm", "float32"), cache_dir=tmp_path)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    for layer in model.model.decoder.layers:
        layer.self_attn_layer_norm.register_forward_hook(lambda _, __, y: seen.append((y, y.clone())))
    model(torch.randint(4, model.config.vocab_size, (1, 5)))
    assert len(seen) == len(model.model.decoder.layers)
    assert all(torch.equal(given, copy) for given, copy in seen)
    model.close()
