"""dense.safetensors: what of a checkpoint is kept whole, and how it is laid out."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sparseflow.core.checkpoint import Checkpoint
from sparseflow.errors import UnsupportedModel
from sparseflow.store.profile import ModelProfile
from sparseflow.store.shard_format import DTYPE_CODES, TensorSpec

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class DenseTensor:
    """A tensor of dense.safetensors: its name there, its shape, and how to make it from the checkpoint."""

    spec: TensorSpec
    make: Callable[[], "Tensor"]


def dense_tensors(source: Checkpoint, profile: ModelProfile) -> Iterator[DenseTensor]:
    """What is kept whole, under the parameter names of `SparseOPTForCausalLM`, large tensors first."""
    config = source.config
    hidden, heads = profile.hidden_dimension, profile.num_attention_heads
    embedding = config.word_embed_proj_dim
    code = DTYPE_CODES[profile.dtype]

    def plain(name: str, *shape: int) -> DenseTensor:
        target = name if name == "lm_head.weight" else f"model.{name}"
        return DenseTensor(TensorSpec(target, code, shape), lambda: source.shaped(name, shape))

    def qkv(layer: str, kind: str, *shape: int) -> DenseTensor:
        """(heads, 3, head_dim, ...): head by head, so that q, k, v are one product and a head is one slice."""

        def make() -> "Tensor":
            import torch

            parts = [
                source.shaped(f"{layer}.self_attn.{p}_proj.{kind}", shape).unflatten(0, (heads, -1)) for p in "qkv"
            ]
            return torch.stack(parts, dim=1)

        spec = TensorSpec(f"model.{layer}.self_attn.qkv_{kind}", code, (heads, 3, hidden // heads, *shape[1:]))
        return DenseTensor(spec, make)

    if config.tie_word_embeddings:
        _require_tied_head(source)
    layers = [f"decoder.layers.{n}" for n in range(profile.num_layers)]
    yield plain("decoder.embed_tokens.weight", profile.vocab_size, embedding)
    if not config.tie_word_embeddings:
        yield plain("lm_head.weight", profile.vocab_size, embedding)
    yield plain("decoder.embed_positions.weight", profile.max_sequence_length + 2, hidden)
    if embedding != hidden:
        yield plain("decoder.project_in.weight", hidden, embedding)
        yield plain("decoder.project_out.weight", embedding, hidden)
    for layer in layers:
        yield qkv(layer, "weight", hidden, hidden)
        yield plain(f"{layer}.self_attn.out_proj.weight", hidden, hidden)
    for layer in layers:
        if config.enable_bias:
            yield qkv(layer, "bias", hidden)
            yield plain(f"{layer}.self_attn.out_proj.bias", hidden)
            yield plain(f"{layer}.fc1.bias", profile.ffn_dimension)
            yield plain(f"{layer}.fc2.bias", hidden)
        if config.layer_norm_elementwise_affine:
            for norm in ("self_attn_layer_norm", "final_layer_norm"):
                yield plain(f"{layer}.{norm}.weight", hidden)
                yield plain(f"{layer}.{norm}.bias", hidden)
    has_final_norm = config.do_layer_norm_before and not config._remove_final_layer_norm
    if has_final_norm and config.layer_norm_elementwise_affine:
        yield plain("decoder.final_layer_norm.weight", hidden)
        yield plain("decoder.final_layer_norm.bias", hidden)


def _require_tied_head(source: Checkpoint) -> None:
    if "lm_head.weight" not in source:
        return
    if not source.tensor("lm_head.weight").equal(source.tensor("decoder.embed_tokens.weight")):
        raise UnsupportedModel(
            f"{source.folder}: config.json ties the head to the embeddings, but lm_head.weight differs from them; "
            'if the head is the right one, write "tie_word_embeddings": false into config.json'
        )
