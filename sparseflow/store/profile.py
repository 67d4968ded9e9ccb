"""What has to be known of a model to place and move its neurons."""

from collections.abc import Mapping
from dataclasses import dataclass

DTYPE_NBYTES: Mapping[str, int] = {"float16": 2, "bfloat16": 2, "float32": 4}


@dataclass(frozen=True)
class ModelProfile:
    """Sizes of one model, and of its bundles."""

    model_identifier: str
    """What people call it; on a server, the part behind the last `/`."""
    hidden_dimension: int
    """Width of the residual stream, and of a neuron's rows."""
    ffn_dimension: int
    """Neurons of a layer."""
    num_layers: int
    """Counted from 0 everywhere."""
    num_attention_heads: int
    """Of a layer; divides `hidden_dimension`."""
    max_sequence_length: int
    """Positions: tokens of prompt and continuation together."""
    vocab_size: int
    """Rows of the embeddings."""
    layer_sparsity_map: Mapping[int, float] | None = None
    """Layer -> its own share of neurons kept in the device cache; others use `OffloadStrategy.gpu_cache_ratio`."""
    dtype: str = "float16"
    """Of the weights as stored: `float16`, `bfloat16` or `float32`."""
    parts_per_bundle: int = 2
    """A row of fc1, a column of fc2."""

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
