"""The sparse OPT: transformers' network, except how an MLP gets and uses its weights, and what computes it."""

import copy
import threading
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from transformers import Cache, GenerationConfig, OPTForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

from sparseflow.client.weight_client import WeightClient
from sparseflow.core.config import (
    OffloadStrategy,
    SparseFlowConfig,
    dtype_name,
    require_device,
)
from sparseflow.core.fidelity_name import DEFAULT_FIDELITY, require_fidelity
from sparseflow.core.weight_manager import DiskWeightStore
from sparseflow.core.weight_source import WeightSource
from sparseflow.errors import BadRequest, FingerprintMismatch, PromptTooLong
from sparseflow.models.device_placing import PlacedModel, has_slots
from sparseflow.models.matching import generation_config_of, require_dense_dtype, require_match
from sparseflow.models.opt_layers import FrozenLinear, SparseOPTDecoderLayer
from sparseflow.orchestration.calibrated_predictor import given_predictor
from sparseflow.orchestration.coordinator import Coordinator
from sparseflow.orchestration.density import Crossover
from sparseflow.orchestration.fidelity import make_predictor
from sparseflow.orchestration.stats import RunStats
from sparseflow.orchestration.transfer_coordinator import LayerBiases, TransferCoordinator


class SparseOPTForCausalLM(OPTForCausalLM):
    """transformers' OPT over a `WeightSource`: `generate` and all that belongs to it come from transformers.

    Dense weights are the source's own tensors, shared and read-only, so the model is for inference only and stays in
    the dtype and on the device it was made with.
    """

    _no_split_modules: ClassVar[list[str]] = ["SparseOPTDecoderLayer"]

    def __init__(
        self,
        config: SparseFlowConfig,
        source: WeightSource,
        *,
        fidelity: str | None = None,
        crossover: Crossover | None = None,
    ) -> None:
        """
        Args:
            config: sizes, strategy, device.
            source: an open source, such as `DiskWeightStore`.
            fidelity: `exact`, `certified`, `calibrated`, `calibrated:RECALL`, `dense`, or `oracle` (slow, for tests).
                None: `exact`, or what the predictors in `config.predictor_weights_path` choose, where that is set.
            crossover: when a layer step goes dense; None: measured on this machine.

        Raises:
            FingerprintMismatch: config and source are of different models.
            BadRequest: a device, dtype or fidelity that cannot be served.
        """
        stored = require_match(config, source)
        require_fidelity(fidelity or DEFAULT_FIDELITY)
        if fidelity is not None and config.predictor_weights_path is not None:
            raise BadRequest(
                f"fidelity {fidelity!r} and predictor_weights_path={config.predictor_weights_path!r} choose neurons by "
                "different predictors; give one of them"
            )
        source.use_strategy(config.strategy)
        hf_config = copy.deepcopy(config.hf_config) or stored
        hf_config.dtype = getattr(torch, source.profile.dtype)
        with torch.device("meta"):
            super().__init__(hf_config)
            layers = [SparseOPTDecoderLayer(hf_config, n) for n in range(hf_config.num_hidden_layers)]
            self.lm_head = FrozenLinear(hf_config.word_embed_proj_dim, hf_config.vocab_size, bias=False)
        self.model.decoder.layers = nn.ModuleList(layers)
        self.source = source
        """The weights: a `DiskWeightStore`, or a server's."""
        self.sparseflow_config = config
        """As given."""
        if config.predictor_weights_path is None:
            predictor = make_predictor(source, fidelity or DEFAULT_FIDELITY, config.strategy.activation_threshold)
        else:
            predictor = given_predictor(source, config.predictor_weights_path)
        self.fidelity = "dense" if predictor is None else predictor.fidelity
        """What is kept, such as `exact`; `threshold:VALUE` where margins were scaled, `given` for predictors given."""
        self.placed = PlacedModel(self, predictor) if has_slots(config) else None
        """What lies on a device; None where neurons are computed in host memory."""
        if self.placed is None:
            self._load_dense(source.dense())
            biases = [LayerBiases(layer.fc1.bias, layer.fc2.bias) for layer in layers]
            norms = [layer.mlp_norm for layer in layers]
            self.coordinator: Coordinator = TransferCoordinator(source, predictor, biases, norms, crossover)
        else:
            self._load_dense(self.placed.dense())
            self.coordinator = self.placed.coordinator([layer.fc2.bias for layer in layers])
        self.coordinator.profiling = config.enable_profiling
        for layer in layers:
            layer.coordinator = self.coordinator
        self.token_step = None if self.placed is None else self.placed.token_step()
        # Steps on a device share its buffers, so that threads take turns there.
        self._turns: AbstractContextManager[Any] = nullcontext() if self.placed is None else threading.RLock()
        self.generation_config = generation_config_of(source, hf_config)
        super().train(False)

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        strategy: OffloadStrategy | None = None,
        memory: str | int = "auto",
        io: str = "auto",
        fidelity: str = DEFAULT_FIDELITY,
        device: str = "cpu",
        device_memory: str | int = "auto",
        dtype: str | torch.dtype | None = None,
        cache_dir: str | Path | None = None,
        attn_implementation: str | None = None,
        quiet: bool = True,
        **unknown: Any,
    ) -> Self:
        """Open a store, a transformers checkpoint folder or a hub id; a checkpoint is converted once.

        Args:
            name: the store, folder or id.
            strategy: what is kept where; None: `OffloadStrategy()`.
            fidelity: which neurons are computed: `exact`, `certified`, `calibrated`, `calibrated:RECALL`,
                `calibrated:RECALL:PREDICTOR`, or `dense`.
            memory: the most that weights, arena and buffers may take, such as `6GiB`; `auto`: nine tenths of what is
                free. What does not fit stays on disk and is read as it is needed.
            io: how it is read: `direct`, `buffered`, `map`, or `auto`.
            device: `cpu`, `cuda` or `cuda:N`.
            device_memory: the most that a GPU may be filled with by this process, its context included, and keys and
                values of 256 tokens (those of more come on top); `auto`: nine tenths of what is free there. What is
                left by weights and codes is for neurons, of which `strategy.gpu_cache_ratio` are the most.
            dtype: `float16`, `bfloat16`, `float32`; None or `auto`: as the checkpoint or store has it.
            cache_dir: where converted stores are kept; None: `$SPARSEFLOW_HOME/stores`.
            attn_implementation: transformers' name of one, such as `eager`; None: its choice.
            quiet: no progress bar while converting.

        Raises:
            BadRequest: a value that cannot be served; told before anything is converted.
            UnsupportedModel: not a ReLU OPT. NotEnoughMemory, NotEnoughDisk: with both sizes.
            DiskError, ShardCorrupt: what is there cannot be read, or is not what was written.
        """
        if unknown:
            raise BadRequest(
                f"from_pretrained: {', '.join(unknown)} not known here; it takes strategy, memory, io, fidelity, "
                "device, device_memory, dtype, cache_dir, attn_implementation and quiet (device_map: memory; "
                "torch_dtype: dtype)"
            )
        require_device(device)
        require_fidelity(fidelity)
        stored_dtype = None if dtype in (None, "auto") else dtype_name(dtype)
        strategy = strategy or OffloadStrategy()
        store = DiskWeightStore(name, cache_dir, dtype=stored_dtype, quiet=quiet)
        store.initialize_from_pretrained(strategy=strategy, memory=memory, io=io, for_device=device != "cpu")
        try:
            config = SparseFlowConfig(store.profile, strategy, primary_device=device, device_memory=device_memory)
            model = cls(config, store, fidelity=fidelity)
            if attn_implementation is not None:
                model.set_attn_implementation(attn_implementation)
        except BaseException:
            store.close()
            raise
        return model

    @classmethod
    def from_server(
        cls,
        name: str,
        model: str | None = None,
        *,
        fidelity: str = DEFAULT_FIDELITY,
        device: str = "cpu",
        device_memory: str | int = "auto",
        gpu_cache_ratio: float = OffloadStrategy().gpu_cache_ratio,
        device_hints: bool = False,
        borrows_dense: bool = False,
        attn_implementation: str | None = None,
        activation_threshold: float = 1.0,
        **source: Any,
    ) -> Self:
        """Attach to a weight server of this host; its memory is used in place.

        Args:
            name: of the server (`sparseflow-daemon STORE --name NAME`).
            model: which of its models; None: its only one.
            fidelity, device, device_memory: as `from_pretrained` is told.
            gpu_cache_ratio, device_hints, activation_threshold: as in `OffloadStrategy`.
            borrows_dense: as in `SparseFlowConfig`.
            attn_implementation: transformers' name of one; None: its choice.
            source: what `WeightClient` takes: `expected` (the server's fields that must be as given), and in seconds
                `load_timeout_s` (600: while a server loads), `reconnect_timeout_s` (30: for one after one that ended).

        Raises:
            ServerNotRunning, NoAnswer: nobody serves under that name, or not in time.
            NoSuchModel, FingerprintMismatch, ProtocolMismatch, NotPermitted, ArenaBusy, Draining: as the server says.
            BadRequest: a value that cannot be served.
        """
        require_device(device)
        require_fidelity(fidelity)
        client = WeightClient(name, model, **source)
        try:
            strategy = replace(
                client.strategy,
                activation_threshold=activation_threshold,
                gpu_cache_ratio=gpu_cache_ratio,
                device_hints=device_hints,
            )
            config = SparseFlowConfig(
                client.profile,
                strategy,
                primary_device=device,
                device_memory=device_memory,
                borrows_dense=borrows_dense,
            )
            served = cls(config, client, fidelity=fidelity)
            if attn_implementation is not None:
                served.set_attn_implementation(attn_implementation)
        except BaseException:
            client.close()
            raise
        return served

    def close(self) -> None:
        """Give the weights back, and what the source holds. The model computes no more. May be called twice."""
        if self.placed is not None:
            self.token_step = None
            self.placed.close()  # before the source: a device reads its memory
        self.source.close()
        for layer in self.model.decoder.layers:
            layer.forget_weights()
        meta = {name: nn.Parameter(torch.empty_like(weight, device="meta"), requires_grad=False)
                for name, weight in self.named_parameters()}  # fmt: skip
        self.load_state_dict(meta, strict=False, assign=True)
        self.coordinator.close()

    @property
    def stats(self) -> RunStats:
        """What was computed since the model was made, or since `reset_stats`."""
        return self.coordinator.stats

    def reset_stats(self) -> None:
        """Start counting anew: `stats` is empty."""
        self.coordinator.stats = RunStats()

    def bytes_touched_per_token(self) -> int:
        """Bytes of weights that one decode step reads: the dense part; codes and bundles as `stats` counts them so far.

        Of an embedding table a token reads a row, of the head all; of a bundle that turns out inactive, fc1's half.
        """
        dense = sum(weight.nbytes for name, weight in self.source.dense().items() if "embed_" not in name)
        if self.config.tie_word_embeddings:
            dense += self.lm_head.weight.nbytes
        profile, counts = self.source.profile, self.stats.decode
        codes = counts.predictor_nbytes_per_layer * profile.num_layers
        return int(dense + codes + (counts.halves_share or 0) * profile.neurons_nbytes)

    @torch.compiler.disable  # kernels are given addresses, which a tracer would not keep
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        position_ids: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> Any:
        """As transformers' `OPTForCausalLM.forward`, whose `generate` looks at these names.

        input_ids, attention_mask, position_ids, labels: (batch, tokens) int64. Of what is returned, logits: (batch,
        tokens or `logits_to_keep`, vocabulary), the store's dtype.

        Raises:
            PromptTooLong: more positions than the model has.
        """
        if self.device.type == "meta":
            raise BadRequest("the model was closed; open it again")
        with self._turns:
            if (
                self.token_step is not None
                and labels is None
                and use_cache is not False
                and _asks_for_logits_only(kwargs)
            ):
                logits = self.token_step(input_ids, attention_mask, position_ids, past_key_values)
                if logits is not None:
                    return CausalLMOutputWithPast(logits=logits, past_key_values=past_key_values)
            past = 0 if past_key_values is None else int(past_key_values.get_seq_length())
            given = input_ids if input_ids is not None else inputs_embeds
            if given is not None and (length := past + given.shape[1]) > self.config.max_position_embeddings:
                padded = attention_mask is not None and attention_mask.dim() == 2
                self._require_positions(int(attention_mask.sum(1).max()) if padded else length)  # type: ignore[union-attr]
            return super().forward(
                input_ids=input_ids,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                inputs_embeds=inputs_embeds,
                labels=labels,
                use_cache=use_cache,
                position_ids=position_ids,
                logits_to_keep=logits_to_keep,
                decoding=past > 0,
                is_plain=given is not None and given.shape[:2] == (1, 1) and self.config._attn_implementation == "sdpa",
                **kwargs,
            )

    def _require_positions(self, n_positions: int) -> None:
        limit = self.config.max_position_embeddings
        if n_positions > limit:
            raise PromptTooLong(
                f"{n_positions} tokens (prompt and new ones together), the model has {limit} positions; "
                "shorten the prompt or lower max_new_tokens"
            )

    def _validate_generated_length(
        self, generation_config: GenerationConfig, input_ids_length: int, has_default_max_length: bool
    ) -> None:
        self._require_positions(max(input_ids_length, generation_config.max_length))
        super()._validate_generated_length(generation_config, input_ids_length, has_default_max_length)

    def device_report(self) -> dict[str, Any]:
        """What lies on the device, and how neurons get there; empty where there are no device slots.

        `nbytes` by what they hold, `transport` and `transport_reason`, `n_slots`, `uses_graph`, `n_streamed_layers`
        """
        return {} if self.placed is None else self.placed.report()

    def _load_dense(self, dense: Mapping[str, Tensor]) -> None:
        require_dense_dtype(dense, getattr(torch, self.source.profile.dtype))
        try:
            missing, unexpected = self.load_state_dict(dense, strict=False, assign=True)
        except RuntimeError as error:
            raise FingerprintMismatch(f"dense weights are of other sizes than config.json says: {error}") from error
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.decoder.embed_tokens.weight
            missing = [name for name in missing if name != "lm_head.weight"]
        if missing or unexpected:
            raise FingerprintMismatch(
                f"dense weights do not fit the model: {missing} missing, {unexpected} unexpected; convert it again"
            )
        self.requires_grad_(False)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """What `to`, `half`, `cuda`, `type` and their like come down to: nothing to do, or refused.

        Raises:
            BadRequest: another device or dtype.
        """
        here = torch.empty(0, dtype=self.dtype, device=self.device)
        try:
            there = fn(here)
        except (AssertionError, RuntimeError) as error:
            raise BadRequest(f"the model cannot be moved ({error}); leave the model on {self.device}") from error
        if there.device != here.device:
            raise BadRequest(
                f"device {there.device}: the model was made for {here.device} and stays there; "
                f"open it again with device={str(there.device)!r}"
            )
        if there.dtype != here.dtype:
            raise BadRequest(
                f"dtype {there.dtype}: the weights are the store's own, {self.dtype}; "
                f"open the checkpoint with dtype={str(there.dtype).removeprefix('torch.')!r} instead"
            )
        return self

    def train(self, mode: bool = True) -> Self:
        """
        Raises:
            BadRequest: for `mode=True`; the weights are shared and read-only.
        """
        if mode:
            raise BadRequest("train(True): the weights are shared and read-only; train the dense checkpoint instead")
        return super().train(False)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """
        Raises:
            BadRequest: always; the store is the saved form.
        """
        raise BadRequest(
            "save_pretrained: a store is not a transformers checkpoint; copy the store, or keep the checkpoint"
        )


def _asks_for_logits_only(kwargs: dict[str, Any]) -> bool:
    return kwargs.get("return_dict") is not False and all(
        value is None or value is False
        for name, value in kwargs.items()
        if name not in ("return_dict", "cache_position")
    )
