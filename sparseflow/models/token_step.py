"""One token through the whole model on a GPU, as one row of kernels: captured once as a graph, then replayed.

Everything that changes from token to token lies on the device: the token, its position, where keys and values are, who
has which device slot. So the host does nothing between a token's first kernel and its last. It is for a single sequence
whose bundles are all in host memory that the device reads; anything else goes through the modules.
"""

from typing import TYPE_CHECKING, Optional

import torch
from torch import Tensor
from transformers import Cache

from sparseflow.kernels.device.ops import ReachableBundles
from sparseflow.models.kv_cache import reserve, room_of
from sparseflow.orchestration.device_coordinator import DeviceCoordinator

if TYPE_CHECKING:
    from sparseflow.models.opt_sparse import SparseOPTForCausalLM


class TokenStep:
    """Runs one token. Made by `of`, for a model that it can run."""

    def __init__(self, model: "SparseOPTForCausalLM", coordinator: DeviceCoordinator) -> None:
        decoder, device, dtype = model.model.decoder, model.device, model.dtype
        self._model, self._coordinator, self._decoder = model, coordinator, decoder
        self._layers = list(decoder.layers)
        attention = self._layers[0].self_attn
        hidden = attention.embed_dim
        self._shape = (1, attention.num_heads, 1, attention.head_dim)  # of a token's keys
        self._token = torch.zeros(1, dtype=torch.int64, device=device)
        self._position = torch.zeros(1, dtype=torch.int64, device=device)
        self._caches = torch.zeros(len(self._layers), 3, dtype=torch.int64, device=device)
        self._told_caches: list[int] = []
        self._stream = torch.zeros(1, hidden, dtype=dtype, device=device)
        self._x = torch.zeros(1, hidden, device=device)
        self._qkv = torch.zeros(attention.num_heads, 3, attention.head_dim, device=device)
        self._attended = torch.zeros(hidden, device=device)
        self._logits = torch.zeros(1, 1, model.config.vocab_size, dtype=dtype, device=device)
        self._hosts: list[ReachableBundles] = []
        self._graph: torch.cuda.CUDAGraph | None = None
        self._n_runs = 0
        self.uses_graph = device.type == "cuda"

    @classmethod
    def of(cls, model: "SparseOPTForCausalLM") -> Optional["TokenStep"]:
        """None for a model on a CPU, one that computes dense, and one with parts that it does not know."""
        coordinator = model.coordinator
        if not isinstance(coordinator, DeviceCoordinator) or model.device.type == "cpu":
            return None
        return cls(model, coordinator) if cls.can_run(model) else None

    @staticmethod
    def can_run(model: "SparseOPTForCausalLM") -> bool:
        """Whether all that it would have to compute is what it computes."""
        decoder, config = model.model.decoder, model.config
        return (
            model.coordinator.predictor is not None
            and config.do_layer_norm_before
            and config.layer_norm_elementwise_affine
            and decoder.final_layer_norm is not None
            and decoder.project_in is None
            and decoder.project_out is None
        )

    def __call__(self, input_ids: Tensor | None, attention_mask: Tensor | None, cache: Cache | None) -> Tensor | None:
        """Logits of one token, (1, 1, vocab_size), and its keys and values in the cache; None where it is no such step."""
        if input_ids is None or input_ids.shape != (1, 1) or cache is None:
            return None
        n_past = int(cache.get_seq_length())
        if n_past == 0 or n_past >= self._model.config.max_position_embeddings or self._is_watched():
            return None
        if attention_mask is not None and (attention_mask.dim() != 2 or not bool(attention_mask.all())):
            return None
        if not self._find_bundles() or not self._find_caches(cache):
            return None
        self._coordinator.enter(decoding=True)
        self._token.copy_(input_ids.view(1))
        self._position.fill_(n_past)
        self._run()
        self._model.source.note_tokens(1)
        return self._logits.clone()

    def _is_watched(self) -> bool:
        """Whether somebody wants to see or change what modules do, or attention is not torch's."""
        watched = any(module._forward_hooks or module._forward_pre_hooks for module in self._model.modules())
        return watched or self._model.config._attn_implementation != "sdpa"

    def _find_bundles(self) -> bool:
        first = self._coordinator.reach(0)
        if first is None:
            return False
        if not self._hosts or self._hosts[0].address != first.address:
            hosts = [self._coordinator.reach(layer) for layer in range(len(self._layers))]
            self._hosts = [host for host in hosts if host is not None]
            self._graph, self._n_runs = None, 0
        return len(self._hosts) == len(self._layers)

    def _find_caches(self, cache: Cache) -> bool:
        """Make room for the token, and tell the device where keys and values lie if that has changed."""
        dtype, device = self._model.dtype, self._model.device
        told: list[int] = []
        for layer in range(len(self._layers)):
            if reserve(cache, layer, self._shape, dtype, device) is None:
                return False
            room = room_of(cache, layer)
            assert room is not None  # it was just made
            told += [room[0].data_ptr(), room[1].data_ptr(), room[0].shape[2]]
        if told != self._told_caches:
            self._told_caches = told
            self._caches.copy_(torch.tensor(told).view(-1, 3))
        return True

    def _run(self) -> None:
        """As they are for the first token, which compiles them; as a graph from the second on."""
        self._n_runs += 1
        if self._graph is None and self.uses_graph and self._n_runs > 1:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._launch()
            self._graph = graph
        if self._graph is None:
            self._launch()
        else:
            self._graph.replay()

    def _launch(self) -> None:
        from sparseflow.kernels.device.attention import attend
        from sparseflow.kernels.device.linear import multiply
        from sparseflow.kernels.device.norm import embed, normalise

        decoder, stream, x = self._decoder, self._stream, self._x
        positions = decoder.embed_positions
        embed(self._token, self._position, decoder.embed_tokens.weight, positions.weight, positions.offset, stream)
        for n, layer in enumerate(self._layers):
            attention, norm, mlp_norm = layer.self_attn, layer.self_attn_layer_norm, layer.final_layer_norm
            normalise(stream, norm.weight, norm.bias, norm.eps, x)
            bias = None if attention.qkv_bias is None else attention.qkv_bias.view(-1)
            multiply(x, attention.qkv_weight.view(-1, attention.embed_dim), bias, self._qkv)
            attend(self._qkv, self._caches[n], self._position, attention.scaling, self._attended, stream)
            multiply(self._attended, attention.out_proj.weight, attention.out_proj.bias, stream, stream)
            normalise(stream, mlp_norm.weight, mlp_norm.bias, mlp_norm.eps, x)
            self._coordinator.run_on(n, self._hosts[n], x, stream, stream)
        norm = decoder.final_layer_norm
        normalise(stream, norm.weight, norm.bias, norm.eps, x)
        multiply(x, self._model.lm_head.weight, None, self._logits)
