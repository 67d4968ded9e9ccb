"""What has to be known of a model to place and move its neurons."""

from collections.abc import Mapping
from dataclasses import dataclass

DTYPE_NBYTES: Mapping[str, int] = {"float16": 2, "bfloat16": 2, "float32": 4}


@dataclass(frozen=True)
class ModelProfile:
    """Sizes of one model, and of its bundles.

    `layer_sparsity_map` maps a layer to its own share of neurons kept in the device cache; other layers use
    `OffloadStrategy.gpu_cache_ratio`.
    """

    model_identifier: str
    hidden_dimension: int
    ffn_dimension: int
    num_layers: int
    num_attention_heads: int
    max_sequence_length: int
    vocab_size: int
    layer_sparsity_map: Mapping[int, float] | None = None
    dtype: str = "float16"
    parts_per_bundle: int = 2  # fc1 row, fc2 column

    @property
    def part_nbytes(self) -> int:
        """Bytes of one row of fc1."""
        return self.hidden_dimension * DTYPE_NBYTES[self.dtype]

    @property
    def bundle_nbytes(self) -> int:
        """Bytes of one neuron's weights."""
        return self.parts_per_bundle * self.part_nbytes

    @property
    def stride_nbytes(self) -> int:
        """Bytes from one bundle to the next in a shard."""
        return self.bundle_nbytes

    @property
    def neurons_nbytes(self) -> int:
        """Bytes of all bundles of all layers."""
        return self.num_layers * self.ffn_dimension * self.bundle_nbytes
