"""Checkpoint to store: layer by layer, atomic, resumable, checksummed.

The store grows in `NAME.partial` beside its place: each file appears there under its final name when it is whole, and
a line of `journal.jsonl` records it. A rerun after a kill checks the recorded files and goes on with the rest. The
manifest comes last, then the folder gets its name. Memory stays under two layers' weights plus the largest tensor of
the rest.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sparseflow.core.checkpoint import COMPANION_FILES, Checkpoint
from sparseflow.core.config import dtype_name, profile_of
from sparseflow.errors import BadRequest, DiskError, NotEnoughDisk, UnsupportedModel
from sparseflow.store import codes, shard_format
from sparseflow.store.manifest import DENSE_NAME, Manifest, check_content, predictor_name, shard_name
from sparseflow.store.profile import ModelProfile
from sparseflow.store.shard_format import DTYPE_CODES, FileEntry, TensorFileWriter, TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

_JOURNAL = "journal.jsonl"
_SPARE_NBYTES = 16 << 20  # manifest, tokenizer, journal: what is not counted tensor by tensor


@dataclass(frozen=True)
class DenseTensor:
    """A tensor of dense.safetensors: its name there, its shape, and how to make it from the checkpoint."""

    spec: TensorSpec
    make: Callable[[], "Tensor"]


def convert(source: Checkpoint, destination: Path, *, dtype: str | None = None, quiet: bool = False) -> Path:
    """Make a store from a checkpoint.

    Args:
        source: the checkpoint.
        destination: where the store shall be; must not exist.
        dtype: `float16`, `bfloat16` or `float32`; None: the checkpoint's.
        quiet: no progress bar on stderr.

    Returns:
        `destination`.

    Raises:
        BadRequest: the destination exists, or the dtype is unknown. NotEnoughDisk: before the first byte is written.
        UnsupportedModel, DiskError: the checkpoint cannot be used.
    """
    stored_dtype = dtype_name(dtype) if dtype else source.dtype()
    unfinished = destination.with_name(destination.name + ".partial")
    with _exclusive(unfinished):
        if destination.exists():
            with suppress(OSError):  # only if it is empty, made just now
                unfinished.rmdir()
            raise BadRequest(f"{destination}: exists already; remove it, or choose another place for the store")
        job = _Conversion(source, unfinished, profile_of(source.config, stored_dtype, source.name))
        job.run(quiet)
        os.replace(unfinished, destination)
        (destination / _JOURNAL).unlink()
    _sync_folder(destination.parent)
    return destination


class _Conversion:
    def __init__(self, source: Checkpoint, folder: Path, profile: ModelProfile) -> None:
        self.source = source
        self.folder = folder
        self.profile = profile
        self.identity = {
            "source": source_identity(source),
            "dtype": profile.dtype,
            "seed": codes.ROUNDING_SEED,
            "format_version": Manifest.__dataclass_fields__["format_version"].default,
        }
        self.finished: dict[str, FileEntry] = {}

    def run(self, quiet: bool) -> None:
        from tqdm import tqdm

        dense = list(dense_tensors(self.source, self.profile))
        p = self.profile
        shard = shard_format.shard_specs(p.ffn_dimension, p.hidden_dimension, p.dtype)
        coded = codes.code_specs(p.ffn_dimension, p.hidden_dimension)
        sizes = {DENSE_NAME: shard_format.file_nbytes([tensor.spec for tensor in dense])}
        for layer in range(p.num_layers):
            sizes[shard_name(layer)] = shard_format.file_nbytes(shard)
            sizes[predictor_name(layer)] = shard_format.file_nbytes(coded)
        self._resume()
        self._require_disk(sum(sizes.values()) - sum(sizes[name] for name in self.finished))
        for folder in ("neurons", "predictors"):
            (self.folder / folder).mkdir(exist_ok=True)
        with tqdm(total=sum(sizes.values()), unit="B", unit_scale=True, desc="convert", disable=quiet) as bar:
            bar.update(sum(sizes[name] for name in self.finished))
            self._file(DENSE_NAME, bar, partial(self._write_dense, dense))
            for layer in range(p.num_layers):
                self._file(shard_name(layer), bar, partial(self._write_shard, layer, shard))
                self._file(predictor_name(layer), bar, partial(self._write_codes, layer, coded))
        self._write_companions()
        description = {"name": p.model_identifier, "dtype": self.source.dtype(), "rounding_seed": codes.ROUNDING_SEED}
        Manifest(self.profile, self.finished, description).save(self.folder)
        _sync_folder(self.folder)

    def _resume(self) -> None:
        """Take over the files that an earlier run of the same conversion finished; else start afresh."""
        self.finished = _read_journal(self.folder, self.identity)
        if not self.finished:
            for entry in self.folder.iterdir():
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
            _append_line(self.folder / _JOURNAL, self.identity)

    def _require_disk(self, needed: int) -> None:
        free = shutil.disk_usage(self.folder).free
        if needed + _SPARE_NBYTES > free:
            raise NotEnoughDisk(
                f"{self.folder.parent}: the store needs {(needed + _SPARE_NBYTES) / 2**30:.2f} GiB more, "
                f"{free / 2**30:.2f} GiB are free; free some, or choose another (the path given, or SPARSEFLOW_HOME)"
            )

    def _file(self, name: str, bar: Any, write: Callable[[str], FileEntry]) -> None:
        if name in self.finished:
            return
        entry = write(name)
        self.source.release()
        self.finished[name] = entry
        _append_line(self.folder / _JOURNAL, {"name": name, **asdict(entry)})
        bar.update(entry.nbytes)

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
        weight = self._in_dtype(self._mlp_weight(layer, "fc1"), f"layer {layer} fc1").float().numpy()
        blocks = list(codes.code_layer(weight, layer))
        with TensorFileWriter(self.folder / name, specs) as writer:
            for part in zip(*blocks, strict=True):  # all codes, then all scales, ...
                writer.write(np.concatenate(part))
            return writer.finish()

    def _mlp_weight(self, layer: int, part: str) -> "Tensor":
        p = self.profile
        shape = (p.ffn_dimension, p.hidden_dimension)
        return _shaped(self.source, f"decoder.layers.{layer}.{part}.weight", shape if part == "fc1" else shape[::-1])

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

    def _write_companions(self) -> None:
        config = self.source.config.to_dict() | {"dtype": self.profile.dtype}
        (self.folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        names = ["config.json"]
        for name in COMPANION_FILES:
            if (self.source.folder / name).is_file():
                shutil.copyfile(self.source.folder / name, self.folder / name)
                names.append(name)
        for name in names:
            self.finished[name] = shard_format.hash_file(self.folder / name)


def source_identity(source: Checkpoint) -> list[list[str | int]]:
    """Name, size and time of every file a store depends on; equal if and only if nothing was touched."""
    paths = [source.folder / "config.json", *source.files()]
    facts = [(path.name, path.stat()) for path in paths]
    return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in facts]


def dense_tensors(source: Checkpoint, profile: ModelProfile) -> Iterator[DenseTensor]:
    """What is kept whole, under the parameter names of `SparseOPTForCausalLM`, large tensors first."""
    config = source.config
    hidden, heads = profile.hidden_dimension, profile.num_attention_heads
    embedding = config.word_embed_proj_dim
    code = DTYPE_CODES[profile.dtype]

    def plain(name: str, *shape: int) -> DenseTensor:
        target = name if name == "lm_head.weight" else f"model.{name}"
        return DenseTensor(TensorSpec(target, code, shape), lambda: _shaped(source, name, shape))

    def qkv(layer: str, kind: str, *shape: int) -> DenseTensor:
        """(heads, 3, head_dim, ...): head by head, so that q, k, v are one product and a head is one slice."""

        def make() -> "Tensor":
            import torch

            parts = [
                _shaped(source, f"{layer}.self_attn.{p}_proj.{kind}", shape).unflatten(0, (heads, -1)) for p in "qkv"
            ]
            return torch.stack(parts, dim=1)

        spec = TensorSpec(f"model.{layer}.self_attn.qkv_{kind}", code, (heads, 3, hidden // heads, *shape[1:]))
        return DenseTensor(spec, make)

    layers = [f"decoder.layers.{n}" for n in range(profile.num_layers)]
    yield plain("decoder.embed_tokens.weight", profile.vocab_size, embedding)
    if not config.tie_word_embeddings:
        yield plain("lm_head.weight", profile.vocab_size, embedding)
    yield plain("decoder.embed_positions.weight", profile.max_sequence_length + 2, hidden)
    if embedding != hidden:
        yield plain("decoder.project_in.weight", hidden, embedding)
        yield plain("decoder.project_out.weight", embedding, hidden)
    for layer in layers:
        yield qkv(layer, "weight", hidden, hidden)
        yield plain(f"{layer}.self_attn.out_proj.weight", hidden, hidden)
    for layer in layers:
        if config.enable_bias:
            yield qkv(layer, "bias", hidden)
            yield plain(f"{layer}.self_attn.out_proj.bias", hidden)
            yield plain(f"{layer}.fc1.bias", profile.ffn_dimension)
            yield plain(f"{layer}.fc2.bias", hidden)
        if config.layer_norm_elementwise_affine:
            for norm in ("self_attn_layer_norm", "final_layer_norm"):
                yield plain(f"{layer}.{norm}.weight", hidden)
                yield plain(f"{layer}.{norm}.bias", hidden)
    has_final_norm = config.do_layer_norm_before and not config._remove_final_layer_norm
    if has_final_norm and config.layer_norm_elementwise_affine:
        yield plain("decoder.final_layer_norm.weight", hidden)
        yield plain("decoder.final_layer_norm.bias", hidden)


def _shaped(source: Checkpoint, name: str, shape: tuple[int, ...]) -> "Tensor":
    tensor = source.tensor(name)
    if tuple(tensor.shape) != shape:
        raise DiskError(f"{source.folder}: tensor {name!r} is {tuple(tensor.shape)}, its config.json says {shape}")
    return tensor


def _raw(tensor: "Tensor") -> NDArray[np.uint8]:
    import torch

    return tensor.contiguous().view(torch.uint8).numpy()


@contextmanager
def _exclusive(folder: Path) -> Iterator[None]:
    """Make the folder and hold it: only one process converts into it at a time."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise DiskError(f"{folder}: cannot be made ({error.strerror}); choose another place") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise DiskError(f"{folder}: another process is converting into it; wait for it to end") from error
    finally:
        os.close(descriptor)


def _read_journal(folder: Path, identity: dict[str, Any]) -> dict[str, FileEntry]:
    """Files recorded as finished for this very conversion whose bytes are still those written."""
    try:
        lines = (folder / _JOURNAL).read_text(encoding="utf-8").split()
    except FileNotFoundError:
        return {}
    finished: dict[str, FileEntry] = {}
    for line in lines:
        with suppress(ValueError, KeyError, DiskError):  # a line cut short by a kill, a file changed since: made again
            record = json.loads(line)
            if line is lines[0]:
                if record != identity:
                    return {}
                continue
            entry = FileEntry(record["nbytes"], record["xxh3_64"])
            check_content(folder, record["name"], entry)
            finished[record["name"]] = entry
    return finished


def _append_line(path: Path, record: dict[str, Any]) -> None:
    # The newline comes first, so that a line cut short by a kill spoils none but itself.
    with open(path, "a", encoding="utf-8") as file:
        file.write("\n" + json.dumps(record, separators=(",", ":")))
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
