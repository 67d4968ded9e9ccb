"""Whether a model's parts belong together: what was asked for, what the source holds, and what its files say."""

import json
import warnings
from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import GenerationConfig, OPTConfig

from sparseflow.core.config import (
    SparseFlowConfig,
    dtype_name,
    require_device,
    require_same_network,
    same_sizes,
    stored_config,
)
from sparseflow.core.weight_source import WeightSource
from sparseflow.errors import BadRequest, FingerprintMismatch, ShardCorrupt


def require_match(config: SparseFlowConfig, source: WeightSource) -> OPTConfig:
    """The configuration in the source.

    Raises:
        FingerprintMismatch: config and source are of different models. BadRequest: a device or dtype that cannot be.
        ShardCorrupt, UnsupportedModel: the source's configuration is none.
    """
    stored = stored_config(source.model_files["config.json"], source.profile)
    if config.hf_config is not None:
        require_same_network(config.hf_config.to_dict(), stored.to_dict(), "this source")
    if not same_sizes(config.profile, source.profile):
        raise FingerprintMismatch(
            f"the configuration describes {config.profile}, the source holds {source.profile}; "
            "use the configuration of the model in the store"
        )
    require_device(config.primary_device)
    if config.secondary_device != "cpu":
        raise BadRequest(f"secondary_device={config.secondary_device!r}: weights wait in host memory; use 'cpu'")
    if config.compute_dtype is not None and dtype_name(config.compute_dtype) != source.profile.dtype:
        raise BadRequest(
            f"compute_dtype={config.compute_dtype}: the store holds {source.profile.dtype}; "
            f"convert the checkpoint with --dtype {dtype_name(config.compute_dtype)}"
        )
    return stored


def require_dense_dtype(dense: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """
    Raises:
        ShardCorrupt: weights of another dtype, which kernels would read as if they were of this one.
    """
    for name, weight in dense.items():
        if weight.dtype != dtype:
            raise ShardCorrupt(
                f"dense weights: {name} is {weight.dtype}, the store's are {dtype}; "
                "remove the store and convert the model again"
            )


def generation_config_of(source: WeightSource, hf_config: OPTConfig) -> GenerationConfig:
    """How text is generated where nothing else is said.

    Raises:
        ShardCorrupt: the source's file is no such configuration.
    """
    content = source.model_files.get("generation_config.json")
    if content is None:
        generation = GenerationConfig.from_model_config(hf_config)
    else:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # about the checkpoint's own settings
                generation = GenerationConfig.from_dict(json.loads(content))
        except Exception as error:  # transformers checks each field in its own way
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
            raise ShardCorrupt(
                f"generation_config.json: {reason}; remove the store and convert the model again"
            ) from error
    generation.disable_compile = True
    return generation
