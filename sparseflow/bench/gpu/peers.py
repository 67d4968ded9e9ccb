"""transformers' dense OPT made from a store, without a checkpoint on disk; and accelerate's ways to offload it."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, OPTConfig, OPTForCausalLM

from sparseflow.core.tensor_views import map_tensors
from sparseflow.store.manifest import DENSE_NAME, Manifest, shard_name

_WHOLE_LAYERS = ["OPTDecoderLayer"]  # which accelerate keeps in one place


def dense_model(store: Path, device: torch.device | str = "cpu") -> OPTForCausalLM:
    """transformers' own model with the store's weights, in its dtype.

    Nothing of it lies in memory twice, but for a layer on its way to the device.

    Raises:
        SparseFlowError: the store is none, or damaged.
        ValueError: the weights are not those of the configuration.
    """
    manifest = Manifest.load(store)
    config = OPTConfig.from_dict(json.loads((store / "config.json").read_bytes()))
    config.dtype = getattr(torch, manifest.profile.dtype)
    with torch.device("meta"):
        model = OPTForCausalLM(config)
    weights = {name: weight.to(device) for name, weight in _weights(store, manifest)}
    missing, unexpected = model.load_state_dict(weights, strict=False, assign=True)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.decoder.embed_tokens.weight
        missing = [name for name in missing if name != "lm_head.weight"]
    if missing or unexpected:
        raise ValueError(f"{store}: weights do not fit the model: {missing} missing, {unexpected} unexpected")
    if (store / "generation_config.json").exists():
        settings = json.loads((store / "generation_config.json").read_bytes())
        model.generation_config = GenerationConfig.from_dict(settings)
    return model.requires_grad_(False).eval()


def _weights(store: Path, manifest: Manifest) -> Iterator[tuple[str, Tensor]]:
    """transformers' name of each weight, and a copy of it."""
    for name, weight in map_tensors(store / DENSE_NAME).items():
        before, qkv, kind = name.partition("self_attn.qkv_")
        if not qkv:
            yield name, weight.clone()
            continue
        for n, part in enumerate("qkv"):  # weight: (heads, 3, head_dim, ...)
            yield f"{before}self_attn.{part}_proj.{kind}", weight[:, n].flatten(0, 1).clone()
    for layer in range(manifest.profile.num_layers):
        bundles = map_tensors(store / shard_name(layer))["bundles"]  # (ffn, 2, hidden)
        prefix = f"model.decoder.layers.{layer}"
        yield f"{prefix}.fc1.weight", bundles[:, 0].contiguous()
        yield f"{prefix}.fc2.weight", bundles[:, 1].T.contiguous()


def offloaded(model: OPTForCausalLM, device: torch.device) -> int:
    """accelerate's `cpu_offload`: each weight comes from host memory when it is used.

    Returns:
        Bytes that a pass moves.
    """
    from accelerate import cpu_offload

    nbytes = moved_nbytes(model, {"": "cpu"})
    cpu_offload(model, execution_device=device)
    return nbytes


def mapped(model: OPTForCausalLM, device: torch.device, room_nbytes: int) -> tuple[int, dict[str, Any]]:
    """accelerate's `device_map="auto"`: as many whole layers as fit stay on the device, others come when they are used.

    Args:
        room_nbytes: of the device, for weights.

    Returns:
        Bytes that a pass moves, and the map.
    """
    from accelerate import dispatch_model, infer_auto_device_map

    number = device.index or 0
    most = {number: room_nbytes, "cpu": 1 << 50}
    device_map = infer_auto_device_map(model, max_memory=most, no_split_module_classes=_WHOLE_LAYERS)
    nbytes = moved_nbytes(model, device_map)
    dispatch_model(model, device_map, main_device=number)
    return nbytes, dict(device_map)


def moved_nbytes(model: nn.Module, device_map: Mapping[str, Any]) -> int:
    """Bytes of the weights of all modules that a map has on the cpu: each module moves its own, tied ones as well."""
    away = [name for name, place in device_map.items() if place == "cpu"]
    return sum(
        parameter.nbytes
        for name, module in model.named_modules()
        if any(not part or name == part or name.startswith(f"{part}.") for part in away)
        for parameter in module.parameters(recurse=False)
    )
