"""Checkpoint to store: layer by layer, atomic, resumable, checksummed.

The store grows in `NAME.partial` beside its place: each file appears there under its final name when it is whole, and
the journal records it. A rerun after a kill checks the recorded files and goes on with the rest. The
manifest comes last, then the folder gets its name. Memory stays under two layers' weights plus the largest tensor of
the rest; with several threads, for each of them.

Tensors that a source holds on another device are laid out and coded there, and come here as bytes to be written.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from sparseflow.core.checkpoint import COMPANION_FILES, Checkpoint
from sparseflow.core.config import dtype_name, profile_of
from sparseflow.core.dense_layout import DenseTensor, dense_tensors
from sparseflow.core.exclusive import exclusive
from sparseflow.core.journal import Journal
from sparseflow.errors import BadRequest, DiskError, NotEnoughDisk, UnsupportedModel
from sparseflow.store import codes, shard_format
from sparseflow.store.manifest import DENSE_NAME, FORMAT_VERSION, Manifest, predictor_name, shard_name
from sparseflow.store.profile import ModelProfile
from sparseflow.store.shard_format import FileEntry, TensorFileWriter, TensorSpec, hash_table, read_checksum_table
from sparseflow.utils.progress import OF_BYTES, progress
from sparseflow.utils.sizes import format_size

if TYPE_CHECKING:
    from torch import Tensor

_Writers = Mapping[str, tuple[int, Callable[[str], FileEntry]]]  # each large file's size, and what writes it

_SPARE_NBYTES = 16 << 20  # manifest, tokenizer, journal: what is not counted tensor by tensor


def convert(
    source: Checkpoint, destination: Path, *, dtype: str | None = None, quiet: bool = False, n_threads: int = 1
) -> Path:
    """Make a store from a checkpoint.

    Args:
        source: the checkpoint.
        destination: where the store shall be; must not exist.
        dtype: `float16`, `bfloat16` or `float32`; None: the checkpoint's.
        quiet: no progress bar on stderr.
        n_threads: files written at once; more than 1 only from a source whose `tensor` several threads may call.

    Returns:
        `destination`.

    Raises:
        BadRequest: the destination exists, or the dtype is unknown. NotEnoughDisk: before the first byte is written.
        UnsupportedModel, DiskError: the checkpoint cannot be used.
    """
    destination = destination.absolute()
    if destination.exists():
        raise BadRequest(f"{destination}: exists already; remove it, or choose another place for the store")
    checkpoint_dtype = source.dtype()
    stored_dtype = dtype_name(dtype) if dtype else checkpoint_dtype
    unfinished = destination.with_name(destination.name + ".partial")
    with exclusive(unfinished, "converting into"):
        if destination.exists():  # made by another process meanwhile
            unfinished.rmdir()
            raise BadRequest(f"{destination}: exists already; remove it, or choose another place for the store")
        try:
            profile = profile_of(source.config, stored_dtype, source.name)
            _Conversion(source, unfinished, profile, n_threads).run(quiet)
            os.replace(unfinished, destination)
            _sync_folder(destination.parent)
        except NotEnoughDisk:
            with suppress(OSError):  # only if it is empty; what an earlier run finished is kept
                unfinished.rmdir()
            raise
        except UnsupportedModel:  # the checkpoint has to change first, and then nothing made from it is of use
            shutil.rmtree(unfinished)
            raise
        except OSError as error:
            if isinstance(error, DiskError):
                raise
            raise DiskError(
                f"{unfinished}: writing failed ({error.strerror}); mend that and run it again: what is finished is kept"
            ) from error
    return destination


class _Conversion:
    """One run: what is to be written, where, and what an earlier run has left."""

    def __init__(self, source: Checkpoint, folder: Path, profile: ModelProfile, n_threads: int) -> None:
        self.source = source
        self.folder = folder
        self.profile = profile
        self.n_threads = n_threads
        self.description = {
            "name": source.name,
            "checkpoint_dtype": source.dtype(),
            "dither_seed": codes.DITHER_SEED,
        }
        identity = {"source": source.identity(), "dtype": profile.dtype, "format_version": FORMAT_VERSION}
        self.journal = Journal(folder, identity | self.description)

    def run(self, quiet: bool) -> None:
        writers = self._writers()
        finished = sum(entry.nbytes for entry in self.journal.finished.values())
        total = sum(nbytes for nbytes, _ in writers.values())
        self._require_disk(total - finished)
        self.journal.start()
        for folder in ("neurons", "predictors"):
            (self.folder / folder).mkdir(exist_ok=True)
        with progress(desc="convert", quiet=quiet, total=total, initial=finished, **OF_BYTES) as bar:
            missing = {name: writer for name, writer in writers.items() if name not in self.journal.finished}
            for name, entry in self._written(missing):
                self.journal.record(name, entry)
                self.source.release()
                bar.update(entry.nbytes)
        files = self.journal.finished | self._write_companions()
        shards = [shard_name(layer) for layer in range(self.profile.num_layers)]
        tables = {name: hash_table(read_checksum_table(self.folder / name)) for name in shards}
        Manifest(self.profile, files, self.description, tables).save(self.folder)
        self.journal.remove()
        _sync_folder(self.folder)

    def _written(self, writers: _Writers) -> Iterator[tuple[str, FileEntry]]:
        """Write the files, and name each one that is whole. After an error no other is begun."""
        if self.n_threads == 1:
            for name, (_, write) in writers.items():
                yield name, write(name)
            return
        pool = ThreadPoolExecutor(self.n_threads)
        failure: BaseException | None = None
        try:
            names = {pool.submit(write, name): name for name, (_, write) in writers.items()}
            for future in as_completed(names):
                if future.cancelled():
                    continue
                if error := future.exception():
                    failure = failure or error
                    for other in names:
                        other.cancel()
                else:
                    yield names[future], future.result()
        finally:
            pool.shutdown(cancel_futures=True)
        if failure:
            raise failure

    def _writers(self) -> _Writers:
        p = self.profile
        dense = list(dense_tensors(self.source, p))
        shard = shard_format.shard_specs(p.ffn_dimension, p.hidden_dimension, p.dtype)
        coded = codes.code_specs(p.ffn_dimension, p.hidden_dimension)
        shard_nbytes, code_nbytes = shard_format.file_nbytes(shard), shard_format.file_nbytes(coded)
        dense_nbytes = shard_format.file_nbytes([tensor.spec for tensor in dense])
        writers: dict[str, tuple[int, Callable[[str], FileEntry]]] = {}
        writers[DENSE_NAME] = dense_nbytes, partial(self._write_dense, dense)
        for layer in range(p.num_layers):
            writers[shard_name(layer)] = shard_nbytes, partial(self._write_shard, layer, shard)
            writers[predictor_name(layer)] = code_nbytes, partial(self._write_codes, layer, coded)
        return writers

    def _require_disk(self, needed: int) -> None:
        free = shutil.disk_usage(self.folder).free
        if needed + _SPARE_NBYTES > free:
            raise NotEnoughDisk(
                f"{self.folder.parent}: the store needs {format_size(needed + _SPARE_NBYTES)} more, "
                f"{format_size(free)} are free; free some, or choose another (the path given, or SPARSEFLOW_HOME)"
            )

    def _write_dense(self, dense: Sequence[DenseTensor], name: str) -> FileEntry:
        with TensorFileWriter(self.folder / name, [tensor.spec for tensor in dense]) as writer:
            for tensor in dense:
                writer.write(_raw(self._in_dtype(tensor.make(), tensor.spec.name)))
                self.source.release()
            return writer.finish()

    def _write_shard(self, layer: int, specs: Sequence[TensorSpec], name: str) -> FileEntry:
        import torch

        p = self.profile
        fc1, fc2 = (self._mlp_weight(layer, part) for part in ("fc1", "fc2"))
        with TensorFileWriter(self.folder / name, specs) as writer:
            checksums = []
            for start in range(0, p.ffn_dimension, 1024):
                rows = slice(start, start + 1024)
                bundles = torch.stack((fc1[rows], fc2[:, rows].T), dim=1)  # (n, 2, hidden)
                raw = _raw(self._in_dtype(bundles, f"layer {layer} fc1 and fc2")).reshape(-1, p.bundle_nbytes)
                writer.write(raw)
                checksums.append(shard_format.bundle_checksums(raw))
            writer.write(np.concatenate(checksums))
            return writer.finish()

    def _write_codes(self, layer: int, specs: Sequence[TensorSpec], name: str) -> FileEntry:
        # Coded from the weights as stored: rounding to the store's dtype must not escape the bound.
        dither = codes.layer_dither(self.profile.hidden_dimension, layer)
        parts = _coded_parts(self._in_dtype(self._mlp_weight(layer, "fc1"), f"layer {layer} fc1"), dither)
        with TensorFileWriter(self.folder / name, specs) as writer:
            writer.write(dither)
            for part in parts:
                writer.write(part)
            return writer.finish()

    def _mlp_weight(self, layer: int, part: str) -> "Tensor":
        p = self.profile
        shape = (p.ffn_dimension, p.hidden_dimension)
        return self.source.shaped(f"decoder.layers.{layer}.{part}.weight", shape if part == "fc1" else shape[::-1])

    def _in_dtype(self, tensor: "Tensor", what: str) -> "Tensor":
        import torch

        converted = tensor.to(getattr(torch, self.profile.dtype))
        low, high = converted.aminmax()  # NaN comes through; no temporary as large as the tensor
        if not (torch.isfinite(low) and torch.isfinite(high)):
            raise UnsupportedModel(
                f"{self.source.folder}: {what} holds NaN or infinity as {self.profile.dtype}; "
                "is the checkpoint intact? If its values are too large, convert with --dtype bfloat16 or float32"
            )
        return converted

    def _write_companions(self) -> dict[str, FileEntry]:
        config = self.source.config.to_dict() | {"dtype": self.profile.dtype}
        (self.folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        names = ["config.json"]
        for name in COMPANION_FILES:
            if (self.source.folder / name).is_file():
                shutil.copyfile(self.source.folder / name, self.folder / name)
                names.append(name)
        return {name: shard_format.hash_file(self.folder / name) for name in names}


def _coded_parts(weight: "Tensor", dither: NDArray[np.float32]) -> Iterator[NDArray[np.generic]]:
    """All coarse codes of a layer, then all fine ones, and so on: the fields of `Codes`."""
    if weight.device.type == "cpu":
        weight = weight.float()  # the narrow one may go
        blocks = list(codes.code_layer(weight.numpy(), dither))
        yield from (np.concatenate(part) for part in zip(*blocks, strict=True))
        return
    import torch

    from sparseflow.core.torch_codes import code_layer

    yield from map(_raw, code_layer(weight, torch.from_numpy(dither).to(weight.device)))


def _raw(tensor: "Tensor") -> NDArray[np.uint8]:
    import torch

    if tensor.device.type != "cpu":  # by page-locked memory, which is several times as fast; torch keeps it for others
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        tensor = host.copy_(tensor)
    return tensor.contiguous().view(torch.uint8).numpy()


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
