"""Whole stores of self-describing bundles: what a server asks of a store, with as little as possible beside bundles."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from shards import Shards

from sparseflow.store.codes import code_specs
from sparseflow.store.manifest import DENSE_NAME, Manifest, predictor_name
from sparseflow.store.shard_format import FileEntry, TensorFileWriter, TensorSpec, hash_file


class ServedShards(Shards):
    """Shards, and what makes a store of them. Its dense weights are one number, its codes 0: no model opens it."""

    def __init__(self, folder: Path, *, dense: int = 0, **sizes: Any) -> None:
        """
        Args:
            dense: the number; stores of other numbers have other weights.
        """
        super().__init__(folder, **sizes)
        (folder / "predictors").mkdir()
        (folder / "config.json").write_text("{}", encoding="utf-8")
        files = dict(self.manifest.files)
        files["config.json"] = hash_file(folder / "config.json")
        files[DENSE_NAME] = self._write_number(DENSE_NAME, dense)
        for layer in range(self.n_layers):
            files[predictor_name(layer)] = self._write_codes(predictor_name(layer))
        self.manifest = Manifest(self.profile, files, {}, self.manifest.checksum_tables)
        self.manifest.save(folder)

    def ratio(self, n_slots: int) -> float:
        """The `--cpu-cache-ratio` that makes an arena of so many slots."""
        return (n_slots - 0.5) / self.n_bundles

    def _write_codes(self, name: str) -> FileEntry:
        specs = code_specs(self.ffn_dim, self.profile.hidden_dimension)
        with TensorFileWriter(self.folder / name, specs) as writer:
            writer.write(np.zeros(sum(spec.nbytes for spec in specs), np.uint8))
            return writer.finish()

    def _write_number(self, name: str, number: int) -> FileEntry:
        values: NDArray[np.uint64] = np.array([number], np.uint64)
        with TensorFileWriter(self.folder / name, [TensorSpec("number", "U64", (1,))]) as writer:
            writer.write(values)
            return writer.finish()
