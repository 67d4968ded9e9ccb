"""Stores as somebody hostile would make them: changed at will, and every checksum and fingerprint computed anew."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from sparseflow.store.manifest import MANIFEST_NAME
from sparseflow.store.shard_format import hash_file, hash_table, read_checksum_table, read_places


def sign(content: Any) -> None:
    """Put the fingerprints into the content of a manifest that fit the rest of it, as far as any do."""
    try:
        layout = content["profile"] | {"model_identifier": "", "layer_sparsity_map": None}
        order = content["neuron_permutation"]
        order = order if order is None else {int(layer): neurons for layer, neurons in order.items()}
        files = content["files"]
        predictors = {name: files[name] for name in files if name.startswith("predictors/") or name == "profile.json"}
        weights = {name: files[name] for name in files if name not in predictors}
        signed = [content["format_version"], layout, order, weights, content["checksum_tables"]]
        content["fingerprint"] = {"weights": digest(signed), "predictors": digest(predictors)}
    except (KeyError, TypeError, AttributeError, ValueError):
        pass


def digest(content: Any) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())


def forge(store: Path, change: Callable[[Any], object] = lambda content: None) -> None:
    """Change the manifest; its fingerprints fit."""
    content = json.loads((store / MANIFEST_NAME).read_bytes())
    change(content)
    sign(content)
    (store / MANIFEST_NAME).write_text(json.dumps(content), encoding="utf-8")


def relist(store: Path, name: str) -> None:
    """Have the manifest say of a file what it is now."""
    entry = hash_file(store / name)

    def change(content: Any) -> None:
        content["files"][name] = {"nbytes": entry.nbytes, "xxh3_64": entry.xxh3_64}
        if name.startswith("neurons/"):
            content["checksum_tables"][name] = hash_table(read_checksum_table(store / name))

    forge(store, change)


def overwrite(store: Path, name: str, tensor: str, index: int, value: np.generic) -> None:
    """Put a number into a tensor of a file."""
    place = read_places(store / name)[tensor]
    with open(store / name, "r+b") as file:
        file.seek(place.offset + index * value.nbytes)
        file.write(value.tobytes())
    relist(store, name)


def edit_json(store: Path, name: str, change: Callable[[Any], object]) -> None:
    """Change one of the store's JSON files, but its manifest."""
    content = json.loads((store / name).read_bytes())
    change(content)
    (store / name).write_text(json.dumps(content), encoding="utf-8")
    relist(store, name)
