"""Tensors as views of memory that lies there already: mapped files, or memory that a server shares."""

from collections.abc import Callable, Container, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sparseflow.errors import DiskError, ShardCorrupt
from sparseflow.store.calibration import calibrated_name
from sparseflow.store.codes import CODE_RANGES, code_specs
from sparseflow.store.manifest import predictor_name
from sparseflow.store.profile import ModelProfile
from sparseflow.store.shard_format import TensorPlace, TensorSpec, map_file, places_in, read_places

if TYPE_CHECKING:
    from torch import Tensor


def map_tensors(path: Path, expected: Sequence[TensorSpec] | None = None) -> "dict[str, Tensor]":
    """All tensors of one of our files, as views of its pages: copy-on-write, so treat them as read-only.

    Raises:
        ShardCorrupt: the file does not hold the `expected` tensors, whose sizes kernels take for granted.
    """
    places = read_places(path)
    return _tensors(map_file(path), places, path, expected)


def view_tensors(content: Any, path: Path, expected: Sequence[TensorSpec] | None = None) -> "dict[str, Tensor]":
    """As `map_tensors`, of a file that is in memory.

    Args:
        content: a buffer that torch may take for writable.
        path: what errors call it.
    """
    return _tensors(content, places_in(np.frombuffer(content, np.uint8), path), path, expected)


def predictor_specs(profile: ModelProfile) -> list[TensorSpec]:
    """The tensors of one layer's codes."""
    return code_specs(profile.ffn_dimension, profile.hidden_dimension)


def predictors_by_layer(
    profile: ModelProfile, files: Container[str], opened: "Callable[..., dict[str, Tensor]]"
) -> "dict[str, Tensor]":
    """`LAYER.NAME` -> tensor, of all predictor files.

    Args:
        files: those there are; fitted predictors are not in every store.
        opened: the tensors of a file, given its name and, maybe, what is expected in it.

    Raises:
        ShardCorrupt: codes that no weights have.
    """
    tensors: dict[str, Tensor] = {}
    for layer in range(profile.num_layers):
        of_layer = opened(predictor_name(layer), predictor_specs(profile))
        require_sound_codes(of_layer, predictor_name(layer))
        if calibrated_name(layer) in files:
            of_layer |= opened(calibrated_name(layer))
        tensors |= {f"{layer}.{name}": tensor for name, tensor in of_layer.items()}
    return tensors


def require_sound_codes(codes: "Mapping[str, Tensor]", name: str) -> None:
    """
    Args:
        codes: of one layer, as `code_specs` names them.
        name: what errors call them.

    Raises:
        ShardCorrupt: NaN, or out of the range in which bounds hold: neurons would be skipped that are active.
    """
    for part, (least, most) in CODE_RANGES.items():
        low, high = map(float, codes[part].aminmax())  # NaN comes through
        if not (least <= low and high <= most):
            raise ShardCorrupt(
                f"{name}: {part} from {low:g} to {high:g}, they lie from {least:g} to {most:g}; "
                "remove the store and convert the model again"
            )


def view_bundles(slots: Any, profile: ModelProfile) -> "Tensor":
    """n bundles, one after the other, as (n, 2, hidden) of the store's dtype. slots: a buffer, or an array of bytes."""
    import torch

    raw = torch.from_numpy(slots) if isinstance(slots, np.ndarray) else torch.frombuffer(slots, dtype=torch.uint8)
    shape = (-1, profile.parts_per_bundle, profile.hidden_dimension)
    return raw.view(-1).view(getattr(torch, profile.dtype)).view(shape)


def _tensors(
    memory: Any, places: dict[str, TensorPlace], path: Path, expected: Sequence[TensorSpec] | None
) -> "dict[str, Tensor]":
    import torch

    floats = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
    dtypes = floats | {"I8": torch.int8, "I16": torch.int16, "U64": torch.uint64}
    if expected is not None and [place.spec for place in places.values()] != list(expected):
        raise ShardCorrupt(
            f"{path}: not laid out as this version of SparseFlow reads it; remove the store and convert the model again"
        )
    content = torch.frombuffer(memory, dtype=torch.uint8)
    tensors: dict[str, Tensor] = {}
    for name, place in places.items():
        raw = content[place.offset : place.offset + place.spec.nbytes]
        if raw.storage_offset() % raw.new_empty(0, dtype=dtypes[place.spec.dtype]).element_size():
            raise DiskError(f"{path}: tensor {name!r} is not aligned; remove the store and convert the model again")
        tensors[name] = raw.view(dtypes[place.spec.dtype]).view(place.spec.shape)
    return tensors
