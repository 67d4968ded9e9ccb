"""Tiny random OPT checkpoints, one for each way in which members of the family differ."""

import json
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import OPTConfig, OPTForCausalLM

_SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "ffn_dim": 256,
    "vocab_size": 128,
    "max_position_embeddings": 64,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "init_std": 0.1,
}

FAMILY: dict[str, dict[str, Any]] = {
    "base": _SIZES,
    "post_norm": _SIZES | {"do_layer_norm_before": False, "num_hidden_layers": 3},
    "projected": _SIZES | {"do_layer_norm_before": False, "word_embed_proj_dim": 32},  # as OPT-350m
    "untied": _SIZES | {"tie_word_embeddings": False},
    "no_bias": _SIZES | {"enable_bias": False},
    "no_affine": _SIZES | {"layer_norm_elementwise_affine": False},
    "no_final_norm": _SIZES | {"_remove_final_layer_norm": True},
    "odd_sizes": _SIZES | {"hidden_size": 40, "num_attention_heads": 5, "ffn_dim": 130, "num_hidden_layers": 3},
}

ACTIVE_SHARE = 0.1
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def make(name: str, folder: Path, dtype: torch.dtype = torch.float32, seed: int = 0) -> OPTForCausalLM:
    """Save a member of the family as transformers does, and return it, in evaluation mode.

    Weights are normal with standard deviation `init_std`, norms spread around 1 and 0. Biases of fc1 are shifted so
    that about one activation in ten is positive on random tokens (without biases: about half). Nothing is drawn from
    the global generators. One seed gives one checkpoint per dtype, the narrower ones rounded from the float32 one.
    """
    config = OPTConfig(**FAMILY[name])
    with torch.random.fork_rng(devices=[]):
        model = OPTForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            norm_weight = "layer_norm.weight" in parameter_name
            spread = 0.25 if "layer_norm" in parameter_name else config.init_std
            parameter.normal_(1.0 if norm_weight else 0.0, spread, generator=generator)
        if config.enable_bias:
            _shift_fc1_biases(model, generator)
    model = model.to(dtype)
    model.save_pretrained(folder)
    return model


def random_ids(config: OPTConfig, n_rows: int, length: int, seed: int = 0) -> Tensor:
    """(n_rows, length) token ids above the special ones."""
    return torch.randint(3, config.vocab_size, (n_rows, length), generator=torch.Generator().manual_seed(seed))


def active_shares(model: OPTForCausalLM, ids: Tensor) -> list[float]:
    """Share of positive pre-activations, layer by layer, on these tokens."""
    with _pre_activations(model) as seen, torch.no_grad():
        model(ids)
    return [float((layer > 0).float().mean()) for layer in seen]


def _shift_fc1_biases(model: OPTForCausalLM, generator: torch.Generator) -> None:
    """Layer by layer, because a layer's inputs depend on what fires below it. Neurons of a layer keep their spread."""
    config = model.config
    ids = torch.randint(3, config.vocab_size, (8, 48), generator=generator)
    for number, layer in enumerate(model.model.decoder.layers):
        with _pre_activations(model) as seen:
            model(ids)
        layer.fc1.bias -= seen[number].flatten().quantile(1 - ACTIVE_SHARE)


@contextmanager
def _pre_activations(model: OPTForCausalLM) -> Iterator[list[Tensor]]:
    seen: list[Tensor] = []
    hooks = [
        layer.fc1.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
        for layer in model.model.decoder.layers
    ]
    yield seen
    for hook in hooks:
        hook.remove()


def write_wide(folder: Path, config: OPTConfig, dtype: torch.dtype, seed: int = 0) -> None:
    """A random checkpoint of any size in one safetensors file, holding one tensor at a time in memory."""
    folder.mkdir(parents=True)
    config.dtype = dtype
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in OPTForCausalLM(config).named_parameters()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + torch.Size(shape).numel() * dtype.itemsize
        code = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}[dtype]
        header[name] = {"dtype": code, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    generator = torch.Generator().manual_seed(seed)
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for shape in shapes.values():
            tensor = (torch.randn(shape, generator=generator) * config.init_std).to(dtype)
            file.write(tensor.view(torch.uint8).numpy().data)


def tensors_in(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, read by the safetensors package."""
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118  not a mapping


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether dtype, shape and every bit agree, signs of zeros and NaN included."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))
