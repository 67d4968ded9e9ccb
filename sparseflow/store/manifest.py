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
from pathlib import Path
from typing import Any

import xxhash

from sparseflow.errors import DiskError, ShardCorrupt
from sparseflow.store import manifest_fields as fields
from sparseflow.store.checks import mapping, reason_of, shown
from sparseflow.store.codes import code_specs
from sparseflow.store.profile import ModelProfile
from sparseflow.store.shard_format import FileEntry, file_nbytes, hash_file, shard_specs
from sparseflow.store.stored_files import require_written, stat_inside

FORMAT_VERSION = 3
MANIFEST_NAME = "manifest.json"
DENSE_NAME = "dense.safetensors"
_MANIFEST_LIMIT_NBYTES = 64 << 20


def is_store(folder: Path) -> bool:
    """Whether a folder claims to be a store, and not a checkpoint; it may be none all the same."""
    return os.path.lexists(folder / MANIFEST_NAME)


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

    @property
    def companions(self) -> list[str]:
        """Files that travel as they are: config.json, the tokenizer's, profile.json."""
        return [name for name in self.files if "/" not in name and not name.endswith(".safetensors")]

    def require_all_parts(self, store: Path) -> None:
        """Compare the manifest with itself; nothing is opened, and nothing made that is larger than the manifest.

        Raises:
            ShardCorrupt: it lists no file for some part of the model, or one of another size than the profile's.
        """
        path, profile = store / MANIFEST_NAME, self.profile
        if 2 * profile.num_layers > len(self.files):
            raise ShardCorrupt(
                f"{path}: num_layers is {profile.num_layers}, two files each, and {len(self.files)} files are listed; "
                "remove the store and convert the model again"
            )
        layers = range(profile.num_layers)
        expected = {"config.json", DENSE_NAME, *map(shard_name, layers), *map(predictor_name, layers)}
        tables = {f"checksum table of {shard_name(layer)}" for layer in layers}
        listed = self.files.keys() | {f"checksum table of {name}" for name in self.checksum_tables}
        if missing := (expected | tables) - listed:
            raise ShardCorrupt(
                f"{path}: {len(missing)} parts are not listed, {min(missing)} first; "
                "remove the store and convert the model again"
            )
        shard_nbytes = file_nbytes(shard_specs(profile.ffn_dimension, profile.hidden_dimension, profile.dtype))
        code_nbytes = file_nbytes(code_specs(profile.ffn_dimension, profile.hidden_dimension))
        for layer in layers:
            for name, nbytes in ((shard_name(layer), shard_nbytes), (predictor_name(layer), code_nbytes)):
                if self.files[name].nbytes != nbytes:
                    raise ShardCorrupt(
                        f"{path}: {name} has {self.files[name].nbytes} bytes, {nbytes} by the sizes of the model "
                        f"({profile.ffn_dimension} neurons, {profile.hidden_dimension} wide); "
                        "remove the store and convert the model again"
                    )

    def require_files(self, store: Path) -> None:
        """Look at every file that is listed, not into it.

        Raises:
            DiskError, ShardCorrupt: as `check_size`.
        """
        for name, entry in self.files.items():
            check_size(store, name, entry)

    def save(self, store: Path) -> None:
        """Write manifest.json atomically."""
        content = asdict(self) | {
            "bundle_nbytes": self.profile.bundle_nbytes,
            "stride_nbytes": self.profile.stride_nbytes,
            "fingerprint": {"weights": self.weights_fingerprint, "predictors": self.predictors_fingerprint},
        }
        temporary = store / (MANIFEST_NAME + ".tmp")
        temporary.unlink(missing_ok=True)  # left by a kill; or a link, that would be written through
        with open(temporary, "x", encoding="utf-8") as file:
            json.dump(content, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, store / MANIFEST_NAME)

    @classmethod
    def load(cls, store: Path) -> "Manifest":
        """Read and check manifest.json.

        Raises:
            DiskError: there is none, it is no file of its own, or it is of another format version.
            ShardCorrupt: it is not a manifest of ours, or its fingerprints are not its own.
        """
        path = store / MANIFEST_NAME
        try:
            if stat_inside(store, MANIFEST_NAME).st_size > _MANIFEST_LIMIT_NBYTES:
                raise ShardCorrupt(
                    f"{path}: more than {_MANIFEST_LIMIT_NBYTES} bytes; remove the store and convert the model again"
                )
            content = json.loads(path.read_bytes())
            version = content["format_version"]
        except OSError as error:
            if isinstance(error, DiskError):
                raise
            raise DiskError(
                f"{store}: not a store ({MANIFEST_NAME}: {error.strerror}); make one with: "
                "sparseflow convert MODEL STORE"
            ) from error
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ShardCorrupt(
                f"{path}: not a manifest ({reason_of(error)}); remove the store and convert the model again"
            ) from error
        if type(version) is not int or version != FORMAT_VERSION:
            raise DiskError(
                f"{path}: format version {shown(version)}, this SparseFlow reads {FORMAT_VERSION}; "
                "remove the store and convert the model again"
            )
        try:
            return cls._parse(content)
        except (ValueError, KeyError) as error:
            raise ShardCorrupt(f"{path}: {reason_of(error)}; remove the store and convert the model again") from error

    @classmethod
    def _parse(cls, content: dict[str, Any]) -> "Manifest":
        profile = fields.parse_profile(content["profile"])
        shares = fields.parse_shares(profile.layer_sparsity_map, profile.num_layers)
        fields.require_sizes_of(profile, content)
        manifest = cls(
            replace(profile, layer_sparsity_map=shares),
            fields.parse_files(content["files"]),
            fields.parse_source(content["source"]),
            fields.parse_tables(content["checksum_tables"]),
            fields.parse_permutation(content["neuron_permutation"], profile.num_layers, profile.ffn_dimension),
        )
        fingerprint = mapping(content["fingerprint"], "fingerprint")
        if fingerprint["weights"] != manifest.weights_fingerprint:
            raise ValueError("the weights' fingerprint is not that of the files listed")
        if fingerprint["predictors"] != manifest.predictors_fingerprint:
            raise ValueError("the predictors' fingerprint is not that of the files listed")
        return manifest


def _is_predictors(name: str) -> bool:
    return name.startswith("predictors/") or name == "profile.json"


def _fingerprint(content: Any) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())


def check_size(store: Path, name: str, entry: FileEntry) -> None:
    """Cheap check that a file is there and whole, before anything opens it.

    Raises:
        DiskError: missing, or no file in the store itself.
        ShardCorrupt: shorter or longer than the manifest says, or never written.
    """
    path = store / name
    try:
        found = stat_inside(store, name)
    except FileNotFoundError as error:
        raise DiskError(f"{path}: file is missing; remove the store and convert the model again") from error
    except OSError as error:
        if isinstance(error, DiskError):
            raise
        raise DiskError(f"{path}: cannot be read ({error.strerror}); check the disk and its permissions") from error
    if found.st_size != entry.nbytes:
        raise ShardCorrupt(
            f"{path}: {found.st_size} bytes, the manifest says {entry.nbytes}; "
            "remove the store and convert the model again"
        )
    require_written(path, found)


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
