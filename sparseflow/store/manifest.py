"""manifest.json: what a store holds, to the byte, and the fingerprints that identify it.

    STORE/
      manifest.json
      config.json, generation_config.json, tokenizer files     as transformers writes them
      dense.safetensors                                        embeddings, norms, biases, attention
      neurons/layer-NNN.safetensors                            bundles and their checksums
      predictors/layer-NNN.safetensors                         codes of fc1

The manifest is written last. A folder without one is not a store.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

import xxhash

from sparseflow.errors import DiskError, ShardCorrupt
from sparseflow.store.profile import DTYPE_NBYTES, ModelProfile
from sparseflow.store.shard_format import FileEntry, hash_file

FORMAT_VERSION = 3
MANIFEST_NAME = "manifest.json"
DENSE_NAME = "dense.safetensors"
_MANIFEST_LIMIT_NBYTES = 64 << 20


def shard_name(layer: int) -> str:
    """Path of a layer's bundles inside the store."""
    return f"neurons/layer-{layer:03d}.safetensors"


def predictor_name(layer: int) -> str:
    """Path of a layer's codes inside the store."""
    return f"predictors/layer-{layer:03d}.safetensors"


@dataclass(frozen=True)
class Manifest:
    """The whole of manifest.json.

    files: path inside the store -> size and checksum, of every file but the manifest itself.
    neuron_permutation: layer -> the checkpoint's neuron at each position of the store; None where the order is the
    checkpoint's own.
    source: what was converted: name, dtype of the checkpoint, seed of the codes' dither.
    checksum_tables: path of a shard -> xxh3-64 (hexadecimal) of its table of bundle checksums: what ties a bundle that
    is read alone to this store, layer and neuron.
    """

    profile: ModelProfile
    files: Mapping[str, FileEntry]
    source: Mapping[str, Any]
    checksum_tables: Mapping[str, str] = field(default_factory=dict)
    neuron_permutation: Mapping[int, list[int]] | None = None
    format_version: int = FORMAT_VERSION

    @property
    def weights_fingerprint(self) -> str:
        """Identifies the weights and their layout."""
        layout = asdict(replace(self.profile, model_identifier="", layer_sparsity_map=None))
        weights = {name: asdict(entry) for name, entry in self.files.items() if not _is_predictors(name)}
        return _fingerprint([self.format_version, layout, self.neuron_permutation, weights, self.checksum_tables])

    @property
    def predictors_fingerprint(self) -> str:
        """Identifies predictors and profile; calibrating a store changes only this one."""
        return _fingerprint({name: asdict(entry) for name, entry in self.files.items() if _is_predictors(name)})

    def nbytes_under(self, prefix: str) -> int:
        """Bytes of all files whose path starts with `prefix`."""
        return sum(entry.nbytes for name, entry in self.files.items() if name.startswith(prefix))

    def require_all_parts(self, store: Path) -> None:
        """
        Raises:
            ShardCorrupt: the manifest lists no file for some part of the model.
        """
        layers = range(self.profile.num_layers)
        expected = {"config.json", DENSE_NAME, *map(shard_name, layers), *map(predictor_name, layers)}
        tables = {f"checksum table of {shard_name(layer)}" for layer in layers}
        listed = self.files.keys() | {f"checksum table of {name}" for name in self.checksum_tables}
        if missing := (expected | tables) - listed:
            raise ShardCorrupt(
                f"{store / MANIFEST_NAME}: {len(missing)} parts are not listed, {min(missing)} first; "
                "remove the store and convert the model again"
            )

    def save(self, store: Path) -> None:
        """Write manifest.json atomically."""
        content = asdict(self) | {
            "bundle_nbytes": self.profile.bundle_nbytes,
            "stride_nbytes": self.profile.stride_nbytes,
            "fingerprint": {"weights": self.weights_fingerprint, "predictors": self.predictors_fingerprint},
        }
        temporary = store / (MANIFEST_NAME + ".tmp")
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, store / MANIFEST_NAME)

    @classmethod
    def load(cls, store: Path) -> "Manifest":
        """Read and check manifest.json.

        Raises:
            DiskError: there is none, or it is of another format version.
            ShardCorrupt: it is not a manifest of ours, or its fingerprints are not its own.
        """
        path = store / MANIFEST_NAME
        try:
            if path.stat().st_size > _MANIFEST_LIMIT_NBYTES:
                raise ShardCorrupt(
                    f"{path}: more than {_MANIFEST_LIMIT_NBYTES} bytes; remove the store and convert the model again"
                )
            content = json.loads(path.read_bytes())
            version = content["format_version"]
        except OSError as error:
            if isinstance(error, DiskError):
                raise
            raise DiskError(
                f"{store}: not a store ({MANIFEST_NAME}: {error.strerror}); make one with: sparseflow convert"
            ) from error
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ShardCorrupt(
                f"{path}: not a manifest ({error}); remove the store and convert the model again"
            ) from error
        if version != FORMAT_VERSION:
            raise DiskError(
                f"{path}: format version {version}, this SparseFlow reads {FORMAT_VERSION}; "
                "remove the store and convert the model again"
            )
        try:
            return cls._parse(content)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ShardCorrupt(f"{path}: {error}; remove the store and convert the model again") from error

    @classmethod
    def _parse(cls, content: dict[str, Any]) -> "Manifest":
        profile = ModelProfile(**content["profile"])
        for name in ("hidden_dimension", "ffn_dimension", "num_layers", "num_attention_heads", "vocab_size"):
            if not isinstance(getattr(profile, name), int) or getattr(profile, name) < 1:
                raise ValueError(f"{name} is {getattr(profile, name)!r}")
        if profile.layer_sparsity_map is not None:
            shares = {int(layer): share for layer, share in profile.layer_sparsity_map.items()}
            profile = replace(profile, layer_sparsity_map=shares)
        if profile.dtype not in DTYPE_NBYTES:
            raise ValueError(f"unknown dtype {profile.dtype!r}")
        for name in content["files"]:
            parts = PurePosixPath(name).parts
            if not parts or ".." in parts or PurePosixPath(name).is_absolute():
                raise ValueError(f"file name {name!r} leaves the store")
        files = {name: FileEntry(**entry) for name, entry in content["files"].items()}
        permutation = content["neuron_permutation"]
        if permutation is not None:
            permutation = {int(layer): order for layer, order in permutation.items()}
        manifest = cls(
            profile, files, content["source"], content["checksum_tables"], permutation, content["format_version"]
        )
        if content["fingerprint"]["weights"] != manifest.weights_fingerprint:
            raise ValueError("the weights' fingerprint is not that of the files listed")
        if content["fingerprint"]["predictors"] != manifest.predictors_fingerprint:
            raise ValueError("the predictors' fingerprint is not that of the files listed")
        return manifest


def _is_predictors(name: str) -> bool:
    return name.startswith("predictors/") or name == "profile.json"


def _fingerprint(content: Any) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())


def check_size(store: Path, name: str, entry: FileEntry) -> None:
    """Cheap check that a file is there and whole.

    Raises:
        DiskError: missing. ShardCorrupt: shorter or longer than the manifest says.
    """
    path = store / name
    try:
        nbytes = path.stat().st_size
    except OSError as error:
        raise DiskError(f"{path}: file is missing; remove the store and convert the model again") from error
    if nbytes != entry.nbytes:
        raise ShardCorrupt(
            f"{path}: {nbytes} bytes, the manifest says {entry.nbytes}; remove the store and convert the model again"
        )


def check_content(store: Path, name: str, entry: FileEntry) -> None:
    """Compare a whole file with its checksum.

    Raises:
        DiskError: missing. ShardCorrupt: other bytes than were written.
    """
    check_size(store, name, entry)
    if hash_file(store / name) != entry:
        raise ShardCorrupt(
            f"{store / name}: bytes differ from their checksum; remove the store and convert the model again"
        )
