"""Settings: what is refused, and what is read from a transformers configuration."""

from dataclasses import FrozenInstanceError, replace
from types import SimpleNamespace

import pytest
import torch
from transformers import GPT2Config, OPTConfig

from sparseflow.core.config import (
    ModelProfile,
    OffloadStrategy,
    SparseFlowConfig,
    dtype_name,
    profile_of,
    require_relu_opt,
    require_same_network,
    require_sizes,
    same_sizes,
)
from sparseflow.errors import BadRequest, FingerprintMismatch, UnsupportedModel

NAN, INF = float("nan"), float("inf")

PROFILE = ModelProfile(
    model_identifier="facebook/opt-tiny",
    hidden_dimension=96,
    ffn_dimension=200,
    num_layers=3,
    num_attention_heads=4,
    max_sequence_length=128,
    vocab_size=1000,
)


def opt_config(**changes: object) -> OPTConfig:
    sizes = {"hidden_size": 96, "ffn_dim": 200, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 1000}
    return OPTConfig(**sizes | {"word_embed_proj_dim": 96, "max_position_embeddings": 128} | changes)


# --- strategy


def test_default_strategy_keeps_the_fidelity() -> None:
    assert OffloadStrategy().activation_threshold == 1.0


@pytest.mark.parametrize("name", ["gpu_cache_ratio", "cpu_cache_ratio"])
@pytest.mark.parametrize("value", [0.0, -0.1, 1.0001, 30, NAN, INF, -INF])
def test_ratio_that_is_no_share_is_refused_by_name_and_value(name: str, value: float) -> None:
    with pytest.raises(BadRequest, match=f"{name}={value!r}"):
        OffloadStrategy(**{name: value})


@pytest.mark.parametrize("name", ["gpu_cache_ratio", "cpu_cache_ratio"])
@pytest.mark.parametrize("value", [1e-9, 0.5, 1.0, 1])
def test_ratio_above_zero_up_to_one_is_kept(name: str, value: float) -> None:
    assert getattr(OffloadStrategy(**{name: value}), name) == value


@pytest.mark.parametrize("value", [-1e-9, -1, NAN, INF, -INF])
def test_threshold_that_is_no_factor_is_refused_by_value(value: float) -> None:
    with pytest.raises(BadRequest, match=f"activation_threshold={value!r}"):
        OffloadStrategy(activation_threshold=value)


@pytest.mark.parametrize("value", [0, 0.5, 1.0, 100.0])
def test_threshold_of_zero_or_more_is_kept(value: float) -> None:
    assert OffloadStrategy(activation_threshold=value).activation_threshold == value


def test_refusal_is_also_a_value_error() -> None:
    with pytest.raises(ValueError, match="gpu_cache_ratio"):
        OffloadStrategy(gpu_cache_ratio=2)


def test_settings_are_frozen_and_a_changed_copy_is_validated_again() -> None:
    strategy = OffloadStrategy()
    with pytest.raises(FrozenInstanceError):
        strategy.gpu_cache_ratio = 0.5
    with pytest.raises(BadRequest):
        replace(strategy, gpu_cache_ratio=0)
    with pytest.raises(BadRequest, match="eviction='random': one of lfu, lru, fifo"):
        OffloadStrategy(eviction="random")
    with pytest.raises(FrozenInstanceError):
        SparseFlowConfig(PROFILE).primary_device = "cuda"


# --- neurons on the GPU


@pytest.mark.parametrize(("ratio", "count"), [(0.3, 60), (0.5, 100), (1.0, 200), (0.999, 199)])
def test_gpu_neuron_count_is_the_ratio_of_a_layers_neurons_rounded_down(ratio: float, count: int) -> None:
    config = SparseFlowConfig(PROFILE, OffloadStrategy(gpu_cache_ratio=ratio))
    assert config.get_gpu_neuron_count() == count
    assert config.get_gpu_neuron_count(2) == count


def test_layer_with_a_share_of_its_own_uses_that() -> None:
    profile = replace(PROFILE, layer_sparsity_map={0: 0.1, 2: 1.0})
    config = SparseFlowConfig(profile, OffloadStrategy(gpu_cache_ratio=0.5))
    assert [config.get_gpu_neuron_count(layer) for layer in range(3)] == [20, 100, 200]
    assert config.get_gpu_neuron_count() == 100


def test_slots_divided_by_miss_curves_go_where_they_spare_most() -> None:
    """Of 180 slots; layer 1 gains most from its first half, and layer 0 nothing at all."""
    config = SparseFlowConfig(PROFILE, OffloadStrategy(gpu_cache_ratio=0.3))
    curves = [[5.0, 5.0, 5.0], [100.0, 10.0, 0.0], [30.0, 15.0, 0.0]]
    divided = config.with_divided_slots(curves)
    assert [divided.get_gpu_neuron_count(layer) for layer in range(3)] == [1, 100, 79]
    assert config.profile.layer_sparsity_map is None
    assert divided.strategy == config.strategy
    assert config.with_divided_slots(curves, least=50).get_gpu_neuron_count(0) == 50


def test_slots_cannot_be_divided_by_curves_of_another_model() -> None:
    with pytest.raises(BadRequest, match="2 miss curves, the model has 3 layers"):
        SparseFlowConfig(PROFILE).with_divided_slots([[1.0, 0.0]] * 2)


def test_head_dimension_divides_the_hidden_one() -> None:
    assert SparseFlowConfig(PROFILE).get_head_dimension() == 24


# --- from transformers


def test_sizes_are_read_from_the_transformers_config() -> None:
    hf_config = opt_config(dtype="bfloat16", name_or_path="facebook/opt-tiny")
    config = SparseFlowConfig.from_transformers_config(hf_config)
    assert config.profile == replace(PROFILE, dtype="bfloat16")
    assert config.strategy == OffloadStrategy()
    assert config.hf_config is hf_config


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(None, "float16"), ("float32", "float32"), (torch.bfloat16, "bfloat16"), (torch.float16, "float16")],
)
def test_dtype_is_the_checkpoints_or_float16(dtype: object, expected: str) -> None:
    assert SparseFlowConfig.from_transformers_config(opt_config(dtype=dtype)).profile.dtype == expected


def test_strategy_given_is_used() -> None:
    strategy = OffloadStrategy(gpu_cache_ratio=0.25)
    config = SparseFlowConfig.from_transformers_config(opt_config(), strategy)
    assert config.strategy is strategy
    assert config.get_gpu_neuron_count(0) == 50


def test_model_without_a_name_is_unknown() -> None:
    assert profile_of(opt_config(), "float16").model_identifier == "unknown"


@pytest.mark.parametrize("activation", ["gelu", "silu", "relu6"])
def test_activation_other_than_relu_is_refused_with_the_reason(activation: str) -> None:
    hf_config = opt_config(activation_function=activation, name_or_path="my/model")
    with pytest.raises(UnsupportedModel, match=f"my/model: activation_function '{activation}'.*exactly zero"):
        SparseFlowConfig.from_transformers_config(hf_config)


def test_other_architecture_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedModel, match=r"model_type 'gpt2'.*OPT"):
        SparseFlowConfig.from_transformers_config(GPT2Config())


@pytest.mark.parametrize("config", [{}, {"model_type": None}, {"model_type": "OPT"}, {"model_type": "llama"}])
def test_raw_config_of_another_architecture_is_refused_naming_where_it_lies(config: dict[str, object]) -> None:
    with pytest.raises(UnsupportedModel, match=r"folder/config\.json: model_type"):
        require_relu_opt(config, "folder/config.json")


def test_raw_config_without_activation_is_relu_as_in_transformers() -> None:
    assert OPTConfig().activation_function == "relu"
    require_relu_opt({"model_type": "opt"}, "config.json")


def test_checkpoint_of_another_dtype_is_refused() -> None:
    with pytest.raises(BadRequest, match="float64"):
        SparseFlowConfig.from_transformers_config(opt_config(dtype="float64"))


# --- what this version and this store can serve


SIZES = (
    "hidden_size",
    "ffn_dim",
    "num_hidden_layers",
    "num_attention_heads",
    "vocab_size",
    "word_embed_proj_dim",
    "max_position_embeddings",
)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("value", [0, -1, None, "96", 96.0])
def test_size_that_no_model_has_is_refused_by_name_and_value(size: str, value: object) -> None:
    hf_config = SimpleNamespace(**opt_config().to_dict() | {size: value})
    with pytest.raises(UnsupportedModel, match=f"my/model: {size} is {value!r}"):
        require_sizes(hf_config, "my/model")


def test_hidden_size_that_heads_do_not_divide_is_refused() -> None:
    hf_config = SimpleNamespace(**opt_config().to_dict() | {"num_attention_heads": 5})
    with pytest.raises(UnsupportedModel, match="96 is no multiple of 5"):
        require_sizes(hf_config, "my/model")


def test_sizes_of_a_model_are_accepted() -> None:
    require_sizes(opt_config(), "my/model")


@pytest.mark.parametrize(
    "changes",
    [
        {"ffn_dim": 201},
        {"do_layer_norm_before": False},
        {"enable_bias": False},
        {"layer_norm_elementwise_affine": False},
        {"tie_word_embeddings": False},
        {"word_embed_proj_dim": 48},
    ],
)
def test_configuration_of_another_network_is_refused_naming_each_field(changes: dict[str, object]) -> None:
    given, stored = opt_config(num_hidden_layers=4, **changes).to_dict(), opt_config().to_dict()
    with pytest.raises(FingerprintMismatch) as caught:
        require_same_network(given, stored, "STORE")
    assert "num_hidden_layers: 4 given, 3 stored" in str(caught.value)
    ((name, value),) = changes.items()
    assert f"{name}: {value!r} given, {stored[name]!r} stored" in str(caught.value)


@pytest.mark.parametrize(
    "changes", [{"dtype": "float32"}, {"dropout": 0.5}, {"name_or_path": "x"}, {"use_cache": False}]
)
def test_configuration_that_differs_in_how_it_runs_is_the_same_network(changes: dict[str, object]) -> None:
    require_same_network(opt_config(**changes).to_dict(), opt_config().to_dict(), "STORE")


# --- dtypes and sizes


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32"])
def test_dtype_is_named_alike_from_torch_and_from_text(name: str) -> None:
    assert dtype_name(name) == dtype_name(f"torch.{name}") == dtype_name(getattr(torch, name)) == name


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, "half", "fp16", "Float16", "", None, 16])
def test_other_dtype_is_refused_with_those_that_there_are(dtype: object) -> None:
    with pytest.raises(BadRequest, match="float16, bfloat16, float32"):
        dtype_name(dtype)


@pytest.mark.parametrize("changes", [{"model_identifier": "x"}, {"dtype": "float32"}, {"layer_sparsity_map": {1: 0.5}}])
def test_sizes_are_the_same_whatever_name_dtype_and_cache_shares(changes: dict[str, object]) -> None:
    assert same_sizes(PROFILE, replace(PROFILE, **changes))


@pytest.mark.parametrize(
    "size",
    [
        "hidden_dimension",
        "ffn_dimension",
        "num_layers",
        "num_attention_heads",
        "max_sequence_length",
        "vocab_size",
        "parts_per_bundle",
    ],
)
def test_another_size_is_not_the_same(size: str) -> None:
    assert not same_sizes(PROFILE, replace(PROFILE, **{size: getattr(PROFILE, size) + 1}))


@pytest.mark.parametrize(("dtype", "nbytes"), [("float16", 2), ("bfloat16", 2), ("float32", 4)])
def test_bundle_is_an_fc1_row_and_an_fc2_column(dtype: str, nbytes: int) -> None:
    profile = replace(PROFILE, dtype=dtype)
    assert profile.part_nbytes == 96 * nbytes
    assert profile.bundle_nbytes == 2 * 96 * nbytes
    assert profile.neurons_nbytes == 3 * 200 * 2 * 96 * nbytes
