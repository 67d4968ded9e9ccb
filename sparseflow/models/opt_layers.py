"""Layers of the sparse OPT: transformers' own, computed by our kernels, and an MLP that asks for its neurons."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import Cache, OPTConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.opt.modeling_opt import OPTAttention, OPTDecoderLayer, eager_attention_forward

from sparseflow.kernels.attention import attend
from sparseflow.kernels.attention_step import AttentionStep, AttentionWeights
from sparseflow.kernels.linear import linear
from sparseflow.models.kv_cache import append, reserve
from sparseflow.orchestration.coordinator import Coordinator


class FrozenLinear(nn.Linear):
    """A linear layer that is never trained."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(batch, length, in_features) to (batch, length, out_features), in the dtype of the weights."""
        y = linear(hidden_states.reshape(-1, self.in_features), self.weight, self.bias)
        return y.view(*hidden_states.shape[:-1], self.out_features).to(self.weight.dtype)


class WidenedNorm(nn.LayerNorm):
    """A layer norm of any dtype whose result is not rounded."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., hidden) to the same in float32."""
        weight = None if self.weight is None else self.weight.float()
        bias = None if self.bias is None else self.bias.float()
        return functional.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps)


class SparseOPTAttention(OPTAttention):
    """OPT's attention with q, k, v as one product over weights that lie head by head."""

    def __init__(self, config: OPTConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        del self.q_proj, self.k_proj, self.v_proj
        shape = (self.num_heads, 3, self.head_dim)
        self.qkv_weight = nn.Parameter(torch.empty(*shape, self.embed_dim), requires_grad=False)
        self.qkv_bias = nn.Parameter(torch.empty(shape), requires_grad=False) if config.enable_bias else None

    def forward(
        self,
        hidden_states: Tensor,
        past_key_values: Cache | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """(batch, length, hidden) to the same in float32, and the attention weights where the implementation does."""
        batch, length, _ = hidden_states.shape
        bias = None if self.qkv_bias is None else self.qkv_bias.view(-1)
        qkv = linear(hidden_states.reshape(-1, self.embed_dim), self.qkv_weight.view(-1, self.embed_dim), bias)
        query, key, value = qkv.view(batch, length, self.num_heads, 3, self.head_dim).transpose(1, 2).unbind(3)
        query = query * self.scaling  # before the product, where transformers' OPT scales too
        key, value = key.to(self.qkv_weight.dtype), value.to(self.qkv_weight.dtype)
        if past_key_values is not None:
            key, value = append(past_key_values, self.layer_idx, key, value)
        weights = None
        implementation = self.config._attn_implementation
        is_on_cpu = query.device.type == "cpu"
        if implementation == "sdpa" and length == 1 and attention_mask is None and is_on_cpu:
            output = attend(query[:, :, 0], key, value)
        else:
            output, weights = self._attend_by(implementation, query, key, value, attention_mask, **kwargs)
        y = linear(output.reshape(batch * length, -1), self.out_proj.weight, self.out_proj.bias)
        return y.view(batch, length, -1), weights

    def _attend_by(
        self, implementation: str, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """As transformers does it. On a CPU torch's sdpa gets float32: 16 bits take it two to five times as long."""
        attend_by = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        if implementation == "sdpa" and key.device.type == "cpu":
            key, value = key.float(), value.float()
            mask = mask.float() if mask is not None and mask.is_floating_point() else mask
        attended: tuple[Tensor, Tensor | None] = attend_by(
            self, query.to(key.dtype), key, value, mask, dropout=0.0, scaling=1.0, **kwargs
        )
        return attended


class _Bias(nn.Module):
    """What remains here of a linear layer whose weights are neurons."""

    def __init__(self, size: int, exists: bool) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.empty(size), requires_grad=False) if exists else None


class SparseOPTDecoderLayer(OPTDecoderLayer):
    """One decoder layer. Its MLP asks the coordinator, which is set once the weights are loaded."""

    coordinator: Coordinator

    def __init__(self, config: OPTConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.layer_idx = layer_idx
        self.self_attn = SparseOPTAttention(config, layer_idx)
        is_affine = config.layer_norm_elementwise_affine
        self.self_attn_layer_norm = WidenedNorm(config.hidden_size, elementwise_affine=is_affine)
        self.final_layer_norm = WidenedNorm(config.hidden_size, elementwise_affine=is_affine)
        self.fc1: _Bias = _Bias(config.ffn_dim, config.enable_bias)
        self.fc2: _Bias = _Bias(config.hidden_size, config.enable_bias)
        self._can_step = config.do_layer_norm_before and is_affine
        self._step_shape = (1, self.self_attn.num_heads, 1, self.self_attn.head_dim)  # of a token's keys
        self._step: AttentionStep | None = None
        self.turn: AbstractContextManager[None] = nullcontext()
        """When the attention's weights may be read."""

    @property
    def mlp_norm(self) -> nn.LayerNorm:
        """What stands between the residual stream and the MLP."""
        return self.final_layer_norm if self.do_layer_norm_before else self.self_attn_layer_norm

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = False,
        position_ids: Tensor | None = None,
        decoding: bool = False,
        is_plain: bool = False,
        **kwargs: Any,
    ) -> Tensor:
        """(batch, length, hidden) to the same.

        decoding: under which phase the step is counted. is_plain: one token, and nothing is asked for but the result.

        The residual stream is rounded to the model's dtype where transformers rounds it, and nothing else is.
        """
        self.coordinator.hint(self.layer_idx, hidden_states)
        with self.turn:
            step = self._attention_step(hidden_states, past_key_values) if is_plain and attention_mask is None else None
            stream, x = step or self._attend(hidden_states, attention_mask, past_key_values, **kwargs)
        y = self.coordinator.mlp(self.layer_idx, x, stream, decoding=decoding)
        hidden_states = (stream + y).to(stream.dtype).view(hidden_states.shape)  # hooks may hold the stream
        if not self.do_layer_norm_before:
            hidden_states = self.final_layer_norm(hidden_states).to(stream.dtype)
        return hidden_states

    def _attend(
        self, hidden_states: Tensor, attention_mask: Tensor | None, past_key_values: Cache | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """The residual stream after attention, (n_tokens, hidden), and the MLP's input, float32."""
        norm_first = self.do_layer_norm_before  # all but OPT-350m
        dtype = hidden_states.dtype
        x = self.self_attn_layer_norm(hidden_states) if norm_first else hidden_states
        attended, _ = self.self_attn(x, past_key_values, attention_mask, **kwargs)
        stream = (hidden_states + attended).to(dtype)
        if norm_first:
            x = self.final_layer_norm(stream)
        else:
            stream = self.self_attn_layer_norm(stream).to(dtype)
            x = stream.float()
        return stream.view(-1, self.embed_dim), x.view(-1, self.embed_dim)

    def _attention_step(self, hidden_states: Tensor, past_key_values: Cache | None) -> tuple[Tensor, Tensor] | None:
        """The same for one token in one call; None where it is not made for this layer or cache, or hooks look on."""
        if past_key_values is None or not self._can_step or hidden_states.device.type != "cpu":
            return None
        if any(module._forward_hooks for module in self._modules.values() if module is not None):
            return None
        reserved = reserve(past_key_values, self.layer_idx, self._step_shape, hidden_states.dtype)
        if reserved is None:
            return None
        if self._step is None:
            self._step = self._made_step()
        return self._step(hidden_states, *reserved)

    def forget_weights(self) -> None:
        """Let go of what shows the source's memory besides the parameters."""
        self._step = None

    def _made_step(self) -> AttentionStep:
        attention, norm, mlp_norm = self.self_attn, self.self_attn_layer_norm, self.final_layer_norm
        weights = AttentionWeights(
            norm.weight,
            norm.bias,
            attention.qkv_weight.view(-1, self.embed_dim),
            None if attention.qkv_bias is None else attention.qkv_bias.view(-1),
            attention.out_proj.weight,
            attention.out_proj.bias,
            mlp_norm.weight,
            mlp_norm.bias,
        )
        return AttentionStep(weights, attention.num_heads, attention.scaling, norm.eps, mlp_norm.eps)
