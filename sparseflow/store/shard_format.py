"""Shards, dense weights and predictors on disk: safetensors files whose data starts on a page.

    byte 0      8         8 + n = data_start, a multiple of 4096
    +-----------+---------+----------------------------------------+
    | n, uint64 | header  | tensors, one after the other, no gaps  |
    | little    | JSON,   |                                        |
    | endian    | padded  |                                        |
    |           | with    |                                        |
    |           | blanks  |                                        |
    +-----------+---------+----------------------------------------+

Any safetensors reader opens them. A shard, `neurons/layer-NNN.safetensors`, holds

    bundles    (ffn_dim, 2, hidden)   neuron by neuron: fc1 row, then fc2 column
    checksums  (ffn_dim,) U64         xxh3-64 of each bundle's bytes

What this module does not promise: that bytes are intact. The reader of a bundle compares its checksum.
"""

import json
import math
import mmap
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import xxhash
from numpy.typing import NDArray

from sparseflow.errors import DiskError, ShardCorrupt
from sparseflow.store.checks import MOST_NBYTES, reason_of, shown, whole_number

ALIGNMENT_NBYTES = 4096
_MOST_DIMENSIONS = 8
HEADER_LIMIT_NBYTES = 16 << 20  # far above any header of ours; a larger one is not read into memory

ELEMENT_NBYTES: Mapping[str, int] = {"F16": 2, "BF16": 2, "F32": 4, "U64": 8, "I8": 1, "I16": 2}
DTYPE_CODES: Mapping[str, str] = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor in a file: `dtype` is safetensors' code (F16, BF16, F32, U64, I8, I16)."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the data."""
        return math.prod(self.shape) * ELEMENT_NBYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class FileEntry:
    """Size and xxh3-64 (hexadecimal) of a whole file."""

    nbytes: int
    xxh3_64: str


@dataclass(frozen=True, slots=True)
class TensorPlace:
    """Where a tensor lies: `offset` in bytes from the start of the file."""

    spec: TensorSpec
    offset: int


def header_bytes(specs: Sequence[TensorSpec]) -> bytes:
    """Length and header of a file with these tensors in this order, padded to the alignment."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for spec in specs:
        header[spec.name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + spec.nbytes],
        }
        offset += spec.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT_NBYTES)
    return len(text).to_bytes(8, "little") + text


def file_nbytes(specs: Sequence[TensorSpec]) -> int:
    """Size of the file that `TensorFileWriter` makes of these tensors."""
    return len(header_bytes(specs)) + sum(spec.nbytes for spec in specs)


class TensorFileWriter:
    """Writes declared tensors in order, piece by piece, and hashes the file on the way.

    The file appears under its name only when it is whole and on disk: until then it is `NAME.tmp`.
    """

    def __init__(self, path: Path, specs: Sequence[TensorSpec]) -> None:
        self._path = path
        self._temporary = path.with_name(path.name + ".tmp")
        self._expected = file_nbytes(specs)
        self._written = 0
        self._hash = xxhash.xxh3_64()
        self._temporary.unlink(missing_ok=True)  # left by a kill; or a link, that would be written through
        self._file = open(self._temporary, "xb")  # noqa: SIM115  closed by __exit__
        self.write(np.frombuffer(header_bytes(specs), np.uint8))

    def write(self, array: NDArray[np.generic]) -> None:
        """Append the bytes of a C-contiguous array."""
        view = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
        self._file.write(view)
        self._hash.update(view)
        self._written += len(view)

    def finish(self) -> FileEntry:
        """Flush to disk and give the file its name."""
        assert self._written == self._expected, f"{self._path}: {self._written} bytes of {self._expected}"
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._temporary, self._path)
        return FileEntry(self._written, self._hash.hexdigest())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._file.close()  # which writes what is left, and fails where the disk is full
        finally:
            self._temporary.unlink(missing_ok=True)


def read_places(path: Path) -> dict[str, TensorPlace]:
    """Where each tensor of a file lies, after checking that the header describes this file to the byte.

    Raises:
        DiskError: the file cannot be read.
        ShardCorrupt: the header is not one, or its tensors overlap, leave gaps or pass the end of the file.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = _header_nbytes(file.read(8), size, path)
            header = file.read(length)
    except FileNotFoundError as error:
        raise DiskError(f"{path}: file is missing; remove the store and convert the model again") from error
    except OSError as error:
        if isinstance(error, DiskError):
            raise
        raise DiskError(f"{path}: cannot be read ({error.strerror}); check the disk and its permissions") from error
    return _places(header, size, path)


def places_in(content: NDArray[np.uint8], path: Path) -> dict[str, TensorPlace]:
    """As `read_places`, of a whole file that is in memory. content: (n,) uint8. path: what errors call it."""
    length = _header_nbytes(content[:8].tobytes(), len(content), path)
    return _places(content[8 : 8 + length].tobytes(), len(content), path)


def _header_nbytes(first: bytes, size: int, path: Path) -> int:
    length = int.from_bytes(first, "little")
    if not 2 <= length <= min(HEADER_LIMIT_NBYTES, size - 8):
        raise ShardCorrupt(
            f"{path}: header of {length} bytes, file of {size}; remove the store and convert the model again"
        )
    return length


def _places(header: bytes, size: int, path: Path) -> dict[str, TensorPlace]:
    try:
        return _parse_places(json.loads(header), 8 + len(header), size)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ShardCorrupt(
            f"{path}: header does not describe this file ({reason_of(error)}); "
            "remove the store and convert the model again"
        ) from error


def _parse_places(header: dict[str, dict[str, object]], data_start: int, size: int) -> dict[str, TensorPlace]:
    if data_start % ALIGNMENT_NBYTES:
        raise ValueError(f"data begins at byte {data_start}, no multiple of {ALIGNMENT_NBYTES}")
    header.pop("__metadata__", None)
    places: dict[str, TensorPlace] = {}
    expected = data_start
    for name, entry in header.items():
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or not isinstance(shape, list) or not isinstance(offsets, list):
            raise ValueError(f"tensor {shown(name)} is not described as a tensor")
        if dtype not in ELEMENT_NBYTES:
            raise ValueError(f"tensor {shown(name)} is of {shown(dtype)}, not of {', '.join(ELEMENT_NBYTES)}")
        if len(shape) > _MOST_DIMENSIONS:
            raise ValueError(f"tensor {shown(name)} has {len(shape)} dimensions, more than {_MOST_DIMENSIONS}")
        for n in (*shape, *offsets):
            whole_number(n, f"a size of tensor {shown(name)}", 0, MOST_NBYTES)
        spec = TensorSpec(name, dtype, tuple(shape))
        if [data_start + offset for offset in offsets] != [expected, expected + spec.nbytes]:
            raise ValueError(f"tensor {shown(name)} lies at {shown(offsets)}, not where its shape puts it")
        places[name] = TensorPlace(spec, expected)
        expected += spec.nbytes
    if expected != size:
        raise ValueError(f"tensors end at byte {expected}, the file at {size}")
    return places


def hash_file(path: Path) -> FileEntry:
    """Size and checksum of a file as it is on disk now."""
    digest = xxhash.xxh3_64()
    nbytes = 0
    with open(path, "rb") as file:
        while chunk := file.read(4 << 20):
            digest.update(chunk)
            nbytes += len(chunk)
    return FileEntry(nbytes, digest.hexdigest())


def bundle_checksums(bundles: Iterable[Any]) -> NDArray[np.uint64]:
    """xxh3-64 of each bundle. bundles: n times (bundle_nbytes,) uint8. Returns (n,) uint64."""
    return np.fromiter(map(xxhash.xxh3_64_intdigest, bundles), np.uint64)


def read_checksum_table(path: Path) -> NDArray[np.uint64]:
    """The checksums in a shard, one a bundle: (ffn_dim,) uint64.

    Raises:
        DiskError, ShardCorrupt: as `read_places`.
    """
    place = read_places(path)["checksums"]
    return np.fromfile(path, "<u8", place.spec.shape[0], offset=place.offset)


def hash_table(checksums: NDArray[np.uint64]) -> str:
    """xxh3-64 of a checksum table, hexadecimal, as the manifest has it."""
    return xxhash.xxh3_64_hexdigest(checksums.data)


def shard_specs(ffn_dim: int, hidden: int, dtype: str) -> list[TensorSpec]:
    """The tensors of one layer's shard; `dtype` as in `ModelProfile`."""
    return [
        TensorSpec("bundles", DTYPE_CODES[dtype], (ffn_dim, 2, hidden)),
        TensorSpec("checksums", "U64", (ffn_dim,)),
    ]


def map_file(path: Path) -> mmap.mmap:
    """Map a whole file copy-on-write: pages are the page cache's own, and a stray write cannot reach the file."""
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
