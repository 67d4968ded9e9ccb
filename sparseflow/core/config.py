"""Settings, validated when they are made. Each default is written here and nowhere else."""

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Self

from sparseflow.engine.budgets import divide_slots, shares_of
from sparseflow.engine.engine import DEFAULT_EVICTION, EVICTIONS
from sparseflow.errors import BadRequest, FingerprintMismatch, ShardCorrupt, UnsupportedModel
from sparseflow.store.checks import MOST_OF_A_SIZE, mapping, shown
from sparseflow.store.profile import DTYPE_NBYTES, ModelProfile

if TYPE_CHECKING:
    import torch
    from transformers import OPTConfig

__all__ = [
    "ModelProfile",
    "OffloadStrategy",
    "SparseFlowConfig",
    "dtype_name",
    "profile_of",
    "require_device",
    "require_relu_opt",
    "require_same_network",
    "require_sizes",
    "same_sizes",
]


@dataclass(frozen=True)
class OffloadStrategy:
    """What is kept where, and how it moves."""

    gpu_cache_ratio: float = 0.3
    """At most this share of all bundles has a slot on the GPU; less where its memory does not hold it. Without effect
    on a CPU, which computes from host memory."""
    cpu_cache_ratio: float = 1.0
    """At most this share of all bundles is kept in host memory; less where the memory given does not hold it."""
    aggressive_offload: bool = False
    """Keep one layer's slots in host memory, for all layers in turn."""
    activation_threshold: float = 1.0
    """Scales the margin of the predictor's bound; 1.0 leaves the fidelity as it is."""
    use_lru_eviction: bool = True
    """Evict by use, as `eviction` says, else the bundle that came first."""
    async_transfer: bool = True
    """Go on computing while what is foreseen is read; else wait for it, which is slower, to compare with."""
    eviction: str = DEFAULT_EVICTION
    """Of bundles in host memory: the least often used of late (`lfu`), the least recently used (`lru`), or the one that
    came first (`fifo`)."""
    device_cache: str = "auto"
    """`auto`: a GPU keeps bundles in slots, a CPU computes them where they lie. `copy`: a CPU copies them to slots as
    well, which is slower, and what a GPU does otherwise."""

    device_hints: bool = False
    """Bring bundles to their device slots while the layer before computes, and attention, as foreseen there. The first
    tokens find out for which layers that is worth while."""

    def __post_init__(self) -> None:
        for name in ("gpu_cache_ratio", "cpu_cache_ratio"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0 < value <= 1:
                raise BadRequest(f"{name}={value!r}: give a share of all bundles above 0 and at most 1")
        threshold = self.activation_threshold
        if not isinstance(threshold, int | float) or not 0 <= threshold < float("inf"):
            raise BadRequest(
                f"activation_threshold={self.activation_threshold!r}: give a factor of the margin, 0 or more; "
                "1.0 keeps the fidelity as it is"
            )
        if self.eviction not in EVICTIONS:
            raise BadRequest(f"eviction={self.eviction!r}: one of {', '.join(EVICTIONS)}")
        if self.device_cache not in ("auto", "copy"):
            raise BadRequest(f"device_cache={self.device_cache!r}: auto or copy")

    @property
    def arena_eviction(self) -> str:
        """How the arena evicts: `eviction`, or `fifo` without `use_lru_eviction`."""
        return self.eviction if self.use_lru_eviction else "fifo"


def require_device(device: object) -> None:
    """
    Raises:
        BadRequest: neither the CPU nor a GPU that there is.
    """
    name = str(device)
    kind, _, number = name.partition(":")
    if name == "cpu":
        return
    if kind != "cuda" or (number and not number.isdecimal()):
        raise BadRequest(f"device {name!r}: give 'cpu', 'cuda', or 'cuda:N' for the GPU of that number")
    import torch

    n_devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if int(number or 0) >= n_devices:
        raise BadRequest(
            f"device {name!r}: torch {torch.__version__} sees {n_devices} GPUs here; use device='cpu', or install a "
            "torch build for your GPU (`sparseflow doctor` says what is there)"
        )


@dataclass(frozen=True)
class SparseFlowConfig:
    """A model's sizes, a strategy, and where to compute."""

    profile: ModelProfile
    """The model's sizes. Of the weights' source, `source.profile`; they must be the same."""
    strategy: OffloadStrategy = field(default_factory=OffloadStrategy)
    """What is kept where."""
    compute_dtype: "torch.dtype | None" = None
    """That of the store, whatever is computed from it; None: the same. Another one is refused."""
    primary_device: str = "cpu"
    """Where to compute: `cpu`, `cuda` or `cuda:N`."""
    secondary_device: str = "cpu"
    """Where weights wait: `cpu`."""
    borrows_dense: bool = False
    """Take dense weights and codes as the server lends them on the GPU (`sparseflow-daemon --share-dense-gpu`)."""
    device_memory: str | int = "auto"
    """The most that a GPU may be filled with by this process, a size or `auto` (nine tenths of what is free there)."""
    enable_profiling: bool = True
    """Count active and candidate neurons while running."""
    predictor_weights_path: str | None = None
    """A folder of predictors made elsewhere, two weights a layer: `layer_{i}_predictor_fc1.pt` (rank, hidden) and
    `layer_{i}_predictor_fc2.pt` (ffn_dim, rank), ReLU between, a neuron chosen where the result is above 0. None: the
    fidelity decides."""
    hf_config: "OPTConfig | None" = None
    """transformers' configuration of the same model; None: the one in the store."""

    def get_gpu_neuron_count(self, layer_idx: int | None = None) -> int:
        """Neurons of a layer that may have a slot on the GPU; layer_idx None: of a layer without a share of its own."""
        ratio = self.strategy.gpu_cache_ratio
        if layer_idx is not None and self.profile.layer_sparsity_map:
            ratio = self.profile.layer_sparsity_map.get(layer_idx, ratio)
        return int(self.profile.ffn_dimension * ratio)

    def with_divided_slots(self, miss_curves: Sequence[Sequence[float]], least: int = 1) -> Self:
        """The same, with as many device slots, but each layer's number by what it gains from them.

        Args:
            miss_curves: one a layer: misses a token at evenly spaced numbers of slots from 0 to ffn_dim, as
                `profile.json` of a calibrated store has them.
            least: slots that each layer has in any case.

        Raises:
            BadRequest: that is more than there are, or curves that do not fit the model.
        """
        profile = self.profile
        if len(miss_curves) != profile.num_layers:
            raise BadRequest(
                f"{len(miss_curves)} miss curves, the model has {profile.num_layers} layers; give one each"
            )
        n_slots = profile.num_layers * int(profile.ffn_dimension * self.strategy.gpu_cache_ratio)
        slots = divide_slots(miss_curves, profile.ffn_dimension, n_slots, least)
        shares = shares_of(slots, profile.ffn_dimension)
        return replace(self, profile=replace(profile, layer_sparsity_map=shares))

    def get_head_dimension(self) -> int:
        """Width of one attention head."""
        return self.profile.hidden_dimension // self.profile.num_attention_heads

    @classmethod
    def from_transformers_config(cls, hf_config: "OPTConfig", strategy: OffloadStrategy | None = None) -> Self:
        """The sizes that transformers' configuration has, and its dtype (float16 where it names none).

        Raises:
            UnsupportedModel: not an OPT, or its activation is not ReLU. BadRequest: no dtype of ours.
        """
        dtype = hf_config.dtype or "float16"
        profile = profile_of(hf_config, dtype_name(dtype))
        return cls(profile=profile, strategy=strategy or OffloadStrategy(), hf_config=hf_config)


def dtype_name(dtype: Any) -> str:
    """`float16`, `bfloat16` or `float32`, from a torch.dtype or its name.

    Raises:
        BadRequest: any other.
    """
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPE_NBYTES:
        raise BadRequest(f"dtype {name!r}: weights are stored as one of {', '.join(DTYPE_NBYTES)}")
    return name


def require_relu_opt(config: Mapping[str, Any], where: str) -> None:
    """
    Raises:
        UnsupportedModel: the configuration is not of a ReLU OPT; the message says why that matters.
    """
    if config.get("model_type") != "opt":
        raise UnsupportedModel(
            f"{where}: model_type {config.get('model_type')!r}; SparseFlow runs the OPT family (model_type 'opt')"
        )
    activation = config.get("activation_function", "relu")
    if activation != "relu":
        raise UnsupportedModel(
            f"{where}: activation_function {activation!r}; a neuron can only be skipped where its activation is "
            "exactly zero, which ReLU gives and this one does not. Use a ReLU checkpoint (the OPT models are)"
        )


# They could have transformers make labels without end, or load code for attention.
_NEVER_TAKEN = ("id2label", "label2id", "num_labels", "attn_implementation", "_attn_implementation", "auto_map")


def opt_config(content: Mapping[str, Any], where: str) -> "OPTConfig":
    """transformers' configuration of a ReLU OPT, from what config.json says.

    Raises:
        UnsupportedModel: it is none.
    """
    from transformers import GenerationConfig, OPTConfig

    require_relu_opt(content, where)
    try:
        config = OPTConfig.from_dict({name: value for name, value in content.items() if name not in _NEVER_TAKEN})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about settings that fit each other badly
            GenerationConfig.from_model_config(config)  # as every model of it begins
    except Exception as error:  # transformers checks each field in its own way
        reason = str(error).strip() or type(error).__name__
        raise UnsupportedModel(f"{where}: {reason.splitlines()[-1].strip()}") from error
    require_sizes(config, where)
    return config


def stored_config(content: bytes, profile: ModelProfile) -> "OPTConfig":
    """A store's config.json, of which only what says what the network is, and how text is generated, is taken.

    The rest could have transformers load code, or make labels without end.

    Raises:
        ShardCorrupt: no configuration. UnsupportedModel: of no ReLU OPT.
        FingerprintMismatch: of another size than the store's weights.
    """
    from transformers import GenerationConfig, OPTConfig

    where = "config.json"
    known = (OPTConfig().to_dict().keys() | GenerationConfig().to_dict().keys()) - {"id2label", "label2id"}
    try:
        found = mapping(json.loads(content), where)
    except (ValueError, RecursionError) as error:
        raise ShardCorrupt(f"{where}: {error}; remove the store and convert the model again") from error
    config = opt_config({name: value for name, value in found.items() if name in known}, where)
    if not same_sizes(profile_of(config, profile.dtype, profile.model_identifier), profile):
        raise FingerprintMismatch(
            f"{where}: of a model of other sizes than the manifest says ({profile}); "
            "remove the store and convert the model again"
        )
    return config


def require_sizes(config: "OPTConfig", where: str) -> None:
    """
    Raises:
        UnsupportedModel: sizes that no model can have.
    """
    sizes = ("hidden_size", "ffn_dim", "num_hidden_layers", "num_attention_heads", "vocab_size", "word_embed_proj_dim")
    for name in (*sizes, "max_position_embeddings"):
        size = getattr(config, name)
        if type(size) is not int or not 1 <= size <= MOST_OF_A_SIZE:
            raise UnsupportedModel(f"{where}: {name} is {shown(size)}; it must be a number from 1 to {MOST_OF_A_SIZE}")
    if config.hidden_size % config.num_attention_heads:
        raise UnsupportedModel(
            f"{where}: hidden_size {config.hidden_size} is no multiple of {config.num_attention_heads} attention heads"
        )
    padding = config.pad_token_id
    if padding is not None and (type(padding) is not int or not -config.vocab_size <= padding < config.vocab_size):
        raise UnsupportedModel(
            f"{where}: pad_token_id is {shown(padding)}; the vocabulary has {config.vocab_size} tokens"
        )


# What of a transformers configuration decides which network the weights are for.
_NETWORK_FIELDS = (
    "hidden_size",
    "ffn_dim",
    "num_hidden_layers",
    "num_attention_heads",
    "vocab_size",
    "word_embed_proj_dim",
    "max_position_embeddings",
    "do_layer_norm_before",
    "enable_bias",
    "layer_norm_elementwise_affine",
    "tie_word_embeddings",
    "_remove_final_layer_norm",
)


def require_same_network(given: Mapping[str, Any], stored: Mapping[str, Any], where: str) -> None:
    """Compare two configurations, as dictionaries.

    Raises:
        FingerprintMismatch: naming each field that differs.
    """
    differing = [
        f"{name}: {given.get(name)!r} given, {stored.get(name)!r} stored"
        for name in _NETWORK_FIELDS
        if given.get(name) != stored.get(name)
    ]
    if differing:
        raise FingerprintMismatch(
            f"{where}: the configuration given is of another model ({'; '.join(differing)}); "
            "use the configuration in the store"
        )


def profile_of(hf_config: "OPTConfig", dtype: str, name: str | None = None) -> ModelProfile:
    """The sizes of a transformers OPT. name: what people call it; None: where its configuration came from.

    Raises:
        UnsupportedModel: not an OPT, or its activation is not ReLU.
    """
    name = name or getattr(hf_config, "name_or_path", "") or "unknown"
    require_relu_opt(hf_config.to_dict(), name)
    return ModelProfile(
        model_identifier=name,
        hidden_dimension=hf_config.hidden_size,
        ffn_dimension=hf_config.ffn_dim,
        num_layers=hf_config.num_hidden_layers,
        num_attention_heads=hf_config.num_attention_heads,
        max_sequence_length=hf_config.max_position_embeddings,
        vocab_size=hf_config.vocab_size,
        dtype=dtype,
    )


def same_sizes(one: ModelProfile, other: ModelProfile) -> bool:
    """Whether two profiles describe models of one shape, whatever their names, dtypes and cache shares."""
    neutral = {"model_identifier": "", "layer_sparsity_map": None, "dtype": "float16"}
    return replace(one, **neutral) == replace(other, **neutral)  # type: ignore[arg-type]
