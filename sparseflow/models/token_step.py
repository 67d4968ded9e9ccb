"""One token through the whole model on a GPU, as one row of kernels: captured once as a graph, then replayed.

Everything that changes from token to token lies on the device: the token, its position, where keys and values are, who
has which device slot. So the host does nothing between a token's first kernel and its last. It is for a single sequence
whose bundles are all in host memory that the device reads; anything else goes through the modules.
"""

import weakref
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import Cache

from sparseflow.kernels.device.ops import ReachableBundles
from sparseflow.models.kv_cache import Room, can_reserve, reserve, room_of
from sparseflow.orchestration.device.coordinator import Ahead, DeviceCoordinator

if TYPE_CHECKING:
    from sparseflow.models.opt_sparse import SparseOPTForCausalLM


class TokenStep:
    """Runs one token of a model that it `can_run`."""

    def __init__(self, model: "SparseOPTForCausalLM", coordinator: DeviceCoordinator) -> None:
        decoder, device, dtype = model.model.decoder, model.device, model.dtype
        self._device, self._dtype = device, dtype  # which a model finds anew whenever it is asked
        self._model, self._coordinator, self._decoder = model, coordinator, decoder
        self._layers = list(decoder.layers)
        attention = self._layers[0].self_attn
        hidden = attention.embed_dim
        self._shape = (1, attention.num_heads, 1, attention.head_dim)  # of a token's keys
        self._token = torch.zeros(1, dtype=torch.int64, device=device)
        self._position = torch.zeros(1, dtype=torch.int64, device=device)
        self._caches = torch.zeros(len(self._layers), 3, dtype=torch.int64, device=device)
        self._rooms: list[weakref.ref[Room]] = []
        modules = list(model.modules())
        self._hooks = [module._forward_hooks for module in modules] + [module._forward_pre_hooks for module in modules]
        self._stream = torch.zeros(1, hidden, dtype=dtype, device=device)
        self._x = torch.zeros(1, hidden, device=device)
        self._qkv = torch.zeros(attention.num_heads, 3, attention.head_dim, device=device)
        self._attended = torch.zeros(hidden, device=device)
        self._logits = torch.zeros(1, 1, model.config.vocab_size, dtype=dtype, device=device)
        self._hosts: list[ReachableBundles] = []
        self._graph: torch.cuda.CUDAGraph | None = None
        self._hinted_layers: tuple[bool, ...] = ()  # in the graph
        self._n_runs = 0
        self.uses_graph = device.type == "cuda"

    @staticmethod
    def can_run(model: "SparseOPTForCausalLM") -> bool:
        """Whether all that it would have to compute is what it computes."""
        decoder, config = model.model.decoder, model.config
        return (
            config.do_layer_norm_before
            and config.layer_norm_elementwise_affine
            and decoder.final_layer_norm is not None
            and decoder.project_in is None
            and decoder.project_out is None
        )

    def __call__(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: Cache | None,
    ) -> Tensor | None:
        """Logits of one token, (1, 1, vocab_size), and the cache holds it too; None where this is no such step."""
        if input_ids is None or input_ids.shape != (1, 1) or cache is None:
            return None
        n_past = int(cache.get_seq_length())
        if n_past == 0 or n_past >= self._model.config.max_position_embeddings or self._is_watched():
            return None
        if attention_mask is not None and (attention_mask.dim() != 2 or not bool(attention_mask.all())):
            return None
        if position_ids is not None and (position_ids.numel() != 1 or int(position_ids) != n_past):
            return None
        if not self._coordinator.can_step() or not self._find_bundles():
            return None
        has_room = self._has_room(cache, n_past + 1)
        if not has_room and not self._reserve(cache):
            return None
        self._coordinator.begin_pass(decoding=True)
        self._token.copy_(input_ids.view(1))
        self._position.fill_(n_past)
        self._run()
        if has_room:
            self._reserve(cache)  # no more than views, made while the device computes
        self._coordinator.note_token()
        return self._logits.clone()

    def _is_watched(self) -> bool:
        """Whether somebody wants to see or change what modules do, or attention is not torch's."""
        return any(self._hooks) or self._model.config._attn_implementation != "sdpa"

    def _find_bundles(self) -> bool:
        first = self._coordinator.bringer.reach(0)
        if first is None:
            return False
        if not self._hosts or self._hosts[0].address != first.address:
            hosts = [self._coordinator.bringer.reach(layer) for layer in range(len(self._layers))]
            self._hosts = [host for host in hosts if host is not None]
            self._graph, self._n_runs = None, 0
        return len(self._hosts) == len(self._layers)

    def _has_room(self, cache: Cache, length: int) -> bool:
        """Whether the device knows where keys and values lie, and there is room for so many."""
        return (
            len(cache.layers) == len(self._rooms)
            and all((found := room_of(cache, n)) is not None and found is room() for n, room in enumerate(self._rooms))
            and all((kept := room()) is not None and length <= kept.length for room in self._rooms[:1])
        )

    def _reserve(self, cache: Cache) -> bool:
        """Make the token's place the last one of the cache, and tell the device where that is if it has changed."""
        n_layers = len(self._layers)
        if not all(can_reserve(cache, layer) for layer in range(n_layers)):
            return False
        for layer in range(n_layers):
            reserve(cache, layer, self._shape, self._dtype, self._device)
        rooms = [room for layer in range(n_layers) if (room := room_of(cache, layer)) is not None]
        if [ref() for ref in self._rooms] != rooms:
            self._rooms = [weakref.ref(room) for room in rooms]
            table = [[room.key_buffer.data_ptr(), room.value_buffer.data_ptr(), room.length] for room in rooms]
            self._caches.copy_(torch.tensor(table))
        return True

    def _run(self) -> None:
        """As they are for the first token, which compiles them; as a graph from the second on."""
        self._n_runs += 1
        hinted_layers = self._coordinator.hinted_layers
        if self._hinted_layers != hinted_layers:
            self._graph = None
        if self._graph is None and self.uses_graph and self._n_runs > 1:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._launch()
            self._graph, self._hinted_layers = graph, hinted_layers
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
        following = [Ahead(stream, host) for host in self._hosts[1:]]
        for n, (layer, ahead) in enumerate(zip(self._layers, [*following, None], strict=True)):
            mlp_x = self._coordinator.layers.inputs[n, :1]
            attention, norm, mlp_norm = layer.self_attn, layer.self_attn_layer_norm, layer.final_layer_norm
            normalise(stream, norm.weight, norm.bias, norm.eps, x)
            with layer.turn:
                bias = None if attention.qkv_bias is None else attention.qkv_bias.view(-1)
                multiply(x, attention.qkv_weight.view(-1, attention.embed_dim), bias, self._qkv)
                attend(self._qkv, self._caches[n], self._position, attention.scaling, self._attended, stream)
                multiply(self._attended, attention.out_proj.weight, attention.out_proj.bias, stream, stream)
            self._coordinator.normalise_and_choose(n, stream, mlp_norm, mlp_x)
            self._coordinator.run_chosen(n, self._hosts[n], mlp_x, stream, stream, ahead)
        norm = decoder.final_layer_norm
        normalise(stream, norm.weight, norm.bias, norm.eps, x)
        multiply(x, self._model.lm_head.weight, None, self._logits)
