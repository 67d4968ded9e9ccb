"""Text to a calibrated store: layer by layer, resumable, and the store stays whole whatever happens.

Work lies in `STORE.calibration` beside the store until all layers are fitted: the residual stream between layers, and
for each layer its predictors and its record. A rerun with the same arguments goes on with the layers that are missing.
Then the store's manifest forgets the last calibration, the new files take its place, and the manifest lists them: at
every moment the store opens, calibrated or not.
"""

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparseflow.calibration import activations
from sparseflow.calibration.activity_statistics import layer_statistics
from sparseflow.calibration.cuts import RECALLS
from sparseflow.calibration.layer_fit import LayerFitter
from sparseflow.core.exclusive import exclusive
from sparseflow.core.journal import Journal
from sparseflow.errors import BadRequest
from sparseflow.models.opt_sparse import SparseOPTForCausalLM
from sparseflow.orchestration.low_rank import normalised
from sparseflow.orchestration.neuron_predictor import coded_rows, failure_probability
from sparseflow.store.calibration import (
    PROFILE_NAME,
    PROFILE_VERSION,
    Calibration,
    LayerRecord,
    calibrated_name,
    parse_layer,
)
from sparseflow.store.manifest import Manifest
from sparseflow.store.shard_format import FileEntry, TensorFileWriter, TensorSpec, hash_file
from sparseflow.utils.progress import progress, waiting
from sparseflow.utils.tokenizer import token_windows, tokenizer_of

DEFAULT_RECALL = 0.99
DEFAULT_WINDOW = 256
DEFAULT_EPOCHS = 2
_VALIDATION_SHARE = 0.2  # of the windows: nothing is fitted to them but the cuts
_LOOKAHEAD_LAYERS = 3  # this one and two before
_DTYPES = {torch.float16: "F16", torch.float32: "F32"}


@dataclass(frozen=True)
class CalibrationSettings:
    """What a calibration depends on beside the store and the texts."""

    recall: float = DEFAULT_RECALL
    """Of the active neurons, that `calibrated` shall find."""
    tokens: int | None = None
    """At most so many; None: all of the text."""
    window: int = DEFAULT_WINDOW
    """Tokens that attend to each other; at most the model's positions."""
    epochs: int = DEFAULT_EPOCHS
    """Of training; 0: no trained predictors."""
    keeps_all: bool = False
    """Store also predictors that are the cheapest at no recall, to compare them."""
    seed: int = 0
    codes_only: bool = False
    """Only cuts on the codes that every store has: what low ranks take grows with the cube of the width."""

    def __post_init__(self) -> None:
        if not RECALLS[0] <= self.recall <= RECALLS[-1]:
            raise BadRequest(f"recall {self.recall}: give one between {RECALLS[0]} and {RECALLS[-1]}")
        if self.window < 2 or self.epochs < 0 or (self.tokens is not None and self.tokens < 1):
            raise BadRequest(f"{self}: give a window of 2 tokens or more, and 0 epochs or more")


def calibrate(
    store: Path,
    texts: Sequence[Path],
    settings: CalibrationSettings | None = None,
    *,
    memory: str | int = "auto",
    quiet: bool = True,
) -> Calibration:
    """Fit predictors to texts, and write them and `profile.json` into the store.

    Args:
        memory: as `SparseOPTForCausalLM.from_pretrained`.
        quiet: no progress bars.

    Raises:
        DiskError, BadRequest, NotEnoughMemory: as their texts say.
    """
    settings = settings or CalibrationSettings()
    store = store.absolute()
    with exclusive(store.with_name(store.name + ".calibration"), "calibrating") as folder, torch.no_grad():
        with waiting(f"opening {store}", quiet=quiet):
            model = SparseOPTForCausalLM.from_pretrained(
                store, memory=memory, fidelity="dense", attn_implementation="sdpa", quiet=quiet
            )
        try:
            calibration = _Run(model, folder, texts, settings, quiet=quiet).run()
        finally:
            model.close()
        install(store, folder, calibration)
        shutil.rmtree(folder)
    return calibration


def install(store: Path, folder: Path, calibration: Calibration) -> None:
    """Put a finished calibration into a store. Whoever has the store open keeps what it had."""
    manifest = Manifest.load(store)
    names = [calibrated_name(layer) for layer in range(len(calibration.layers))]
    old = {PROFILE_NAME, *(name for name in manifest.files if name.startswith("predictors/calibrated-"))}
    kept = {name: entry for name, entry in manifest.files.items() if name not in old}
    replace(manifest, files=kept).save(store)
    (folder / PROFILE_NAME).write_bytes(calibration.to_json())
    added: dict[str, FileEntry] = {}
    for name in (*names, PROFILE_NAME):
        os.replace(folder / name, store / name)
        added[name] = hash_file(store / name)
    replace(manifest, files=kept | added).save(store)


class _Run:
    """One run over all layers, from where an earlier one has stopped."""

    def __init__(
        self,
        model: SparseOPTForCausalLM,
        folder: Path,
        texts: Sequence[Path],
        settings: CalibrationSettings,
        *,
        quiet: bool,
    ) -> None:
        self._model, self._folder, self._settings, self._quiet = model, folder, settings, quiet
        self._window = min(settings.window, model.config.max_position_embeddings)
        self._profile = model.source.profile
        tokenizer = tokenizer_of(model.source.model_files)
        self._windows = token_windows(tokenizer, texts, self._window, settings.tokens)
        if len(self._windows) < 2:
            raise BadRequest(
                f"{self._windows.numel()} tokens: some are fitted to and others judge that, which takes two windows of "
                f"{self._window} at least; give more text"
            )
        self._n_training = max(1, int(len(self._windows) * (1 - _VALIDATION_SHARE))) * self._window
        identity = asdict(settings) | {
            "version": PROFILE_VERSION,
            "weights": model.source.manifest.weights_fingerprint,  # type: ignore[attr-defined]
            "texts": [hash_file(path).xxh3_64 for path in texts],
        }
        self._journal = Journal(folder, identity)

    def run(self) -> Calibration:
        self._journal.start()
        (self._folder / "predictors").mkdir(exist_ok=True)
        codes = coded_rows(self._model.source)
        if self._stream(0) not in self._journal.finished:
            activations.embed(self._model, self._windows, self._folder / self._stream(0))
            self._record(self._stream(0))
        layers = range(self._profile.num_layers)
        with progress(layers, "calibrate", quiet=self._quiet, unit="layer") as bar:
            for layer in bar:
                if self._record_name(layer) not in self._journal.finished:
                    self._fit(layer, codes[layer])
        records = [self._read_record(layer) for layer in layers]
        return Calibration(self._settings.recall, self._windows.numel(), RECALLS, records)

    def _fit(self, layer: int, codes: Any) -> None:
        path = partial(Path.joinpath, self._folder)
        activity = activations.run_layer(
            *(self._model, layer, self._window, path(self._stream(layer)), path(self._stream(layer + 1))),
            *(path("inputs"),),
            quiet=self._quiet,
        )
        fitter = LayerFitter(
            *(self._profile, activity, self._n_training, self._settings.recall),
            epochs=self._settings.epochs,
            keeps_all=self._settings.keeps_all,
            codes_only=self._settings.codes_only,
            quiet=self._quiet,
        )
        earlier = range(layer, max(-1, layer - _LOOKAHEAD_LAYERS), -1)
        streams = [activations.open_stream(path(self._stream(n)), self._model) for n in earlier]
        seen = [lambda rows, stream=stream: normalised(stream[rows]) for stream in streams]
        fit = fitter.fit(codes, failure_probability(self._profile), seen, self._settings.seed)
        statistics = layer_statistics(activity, self._window)
        record = LayerRecord(**statistics, predictors=fit.records, lookahead=fit.lookahead)
        name = calibrated_name(layer)
        self._journal.record(name, _write_tensors(path(name), fit.tensors))
        path(self._record_name(layer)).write_text(json.dumps(asdict(record)), encoding="utf-8")
        self._record(self._stream(layer + 1))
        self._record(self._record_name(layer))
        path("inputs").unlink()
        if layer + 1 >= _LOOKAHEAD_LAYERS:
            path(self._stream(layer + 1 - _LOOKAHEAD_LAYERS)).unlink(missing_ok=True)

    def _read_record(self, layer: int) -> LayerRecord:
        content = json.loads((self._folder / self._record_name(layer)).read_bytes())
        return parse_layer(content, len(RECALLS), self._profile)

    def _record(self, name: str) -> None:
        self._journal.record(name, hash_file(self._folder / name))

    @staticmethod
    def _stream(layer: int) -> str:
        """What enters a layer."""
        return f"stream-{layer:03d}"

    @staticmethod
    def _record_name(layer: int) -> str:
        return f"layer-{layer:03d}.json"


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> FileEntry:
    ordered = sorted(tensors.items(), key=lambda item: -item[1].itemsize)  # so that each lies aligned
    specs = [TensorSpec(name, _DTYPES[tensor.dtype], tuple(tensor.shape)) for name, tensor in ordered]
    with TensorFileWriter(path, specs) as writer:
        for _, tensor in ordered:
            writer.write(np.ascontiguousarray(tensor.numpy()))
        return writer.finish()
