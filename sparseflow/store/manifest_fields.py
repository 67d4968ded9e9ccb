"""The fields of manifest.json, each checked before anything is made of it: whoever wrote a store may mean harm.

Checksums do not help there, since they can be computed anew. Everything here raises ValueError.
"""

from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from sparseflow.store.checks import (
    MOST_NBYTES,
    MOST_OF_A_SIZE,
    checksum,
    in_one_line,
    mapping,
    number,
    record,
    shown,
    whole_number,
)
from sparseflow.store.profile import DTYPE_NBYTES, ModelProfile
from sparseflow.store.shard_format import FileEntry

_SIZES = ("hidden_dimension", "ffn_dimension", "num_layers", "num_attention_heads", "max_sequence_length", "vocab_size")
_PARTS_PER_BUNDLE = 2
_LONGEST_TEXT = 4096


def parse_profile(content: object) -> ModelProfile:
    """Sizes of a model that may exist."""
    profile = record(ModelProfile, content, "profile")
    require_text(profile.model_identifier, "model_identifier")
    for name in _SIZES:
        whole_number(getattr(profile, name), name, 1, MOST_OF_A_SIZE)
    if profile.hidden_dimension % profile.num_attention_heads:
        raise ValueError(
            f"hidden_dimension {profile.hidden_dimension} is no multiple of {profile.num_attention_heads} heads"
        )
    if not isinstance(profile.dtype, str) or profile.dtype not in DTYPE_NBYTES:
        raise ValueError(f"unknown dtype {shown(profile.dtype)}")
    whole_number(profile.parts_per_bundle, "parts_per_bundle", _PARTS_PER_BUNDLE, _PARTS_PER_BUNDLE)
    return profile


def parse_shares(content: object, n_layers: int) -> dict[int, float] | None:
    """Of the device cache: layer -> share."""
    if content is None:
        return None
    shares = mapping(content, "layer_sparsity_map")
    return {_layer(layer, n_layers): number(share, f"share of layer {layer}", 0, 1) for layer, share in shares.items()}


def parse_files(content: object) -> dict[str, FileEntry]:
    """Path inside the store -> size and checksum."""
    files = {}
    for name, entry in mapping(content, "files").items():
        require_name(name)
        found = record(FileEntry, entry, f"entry of {shown(name)}")
        whole_number(found.nbytes, f"nbytes of {name}", 0, MOST_NBYTES)
        checksum(found.xxh3_64, f"xxh3_64 of {name}")
        files[name] = found
    return files


def parse_tables(content: object) -> dict[str, str]:
    """Path of a shard -> checksum of its table."""
    tables = mapping(content, "checksum_tables")
    for name, value in tables.items():
        require_name(name)
        checksum(value, f"checksum table of {name}")
    return dict(tables)


def parse_source(content: object) -> dict[str, Any]:
    """What was converted: names and numbers, nothing nested."""
    source = mapping(content, "source")
    for name, value in source.items():
        require_text(name, "a name in source")
        if isinstance(value, str):
            require_text(value, f"source {name}")
        elif value is not None and type(value) is not bool:
            number(value, f"source {name}", -(2**63), 2**64)
    return dict(source)


def parse_permutation(content: object, n_layers: int, ffn_dim: int) -> dict[int, list[int]] | None:
    """Layer -> the checkpoint's neuron at each position."""
    if content is None:
        return None
    orders = mapping(content, "neuron_permutation")
    for layer, order in orders.items():
        if not isinstance(order, list) or len(order) != ffn_dim:
            raise ValueError(f"order of layer {shown(layer)} is {shown(order)}, not a list of {ffn_dim} neurons")
        if not all(type(neuron) is int for neuron in order) or sorted(order) != list(range(ffn_dim)):
            raise ValueError(f"order of layer {shown(layer)} does not name each of {ffn_dim} neurons once")
    return {_layer(layer, n_layers): order for layer, order in orders.items()}


def require_sizes_of(profile: ModelProfile, content: Mapping[str, Any]) -> None:
    """What is said twice is said alike."""
    for name in ("bundle_nbytes", "stride_nbytes"):
        expected = getattr(profile, name)
        whole_number(content.get(name), name, expected, expected)


def require_name(name: str) -> None:
    """That of a file inside the store, in the one way in which it can be written.

    Raises:
        ValueError: it is elsewhere, or is the manifest itself.
    """
    path = PurePosixPath(name)
    is_inside = bool(path.parts) and not path.is_absolute() and ".." not in path.parts
    is_plain = name == str(path) and name.isascii() and name.isprintable() and "\\" not in name
    if not is_inside or not is_plain:
        raise ValueError(f"file name {shown(name)} leaves the store, or is written otherwise than ours")
    if name == "manifest.json":
        raise ValueError("manifest.json lists itself")


def require_text(value: Any, what: str) -> None:
    """
    Raises:
        ValueError: no text that can be shown in a line.
    """
    is_text = isinstance(value, str) and value.strip().strip("/ ") and len(value) <= _LONGEST_TEXT
    if not is_text or in_one_line(value) != value:
        raise ValueError(f"{what} is {shown(value)}, not a text of one line")


def _layer(name: str, n_layers: int) -> int:
    """A layer's number, as a key of JSON; each has one way to be written."""
    if not (name.isascii() and name.isdecimal()) or len(name) > 10 or str(int(name)) != name or int(name) >= n_layers:
        raise ValueError(f"layer {shown(name)}: the model has layers 0 to {n_layers - 1}")
    return int(name)
