"""The file format to the byte, against safetensors' own reader, and what a damaged file is answered with."""

import json
import mmap
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash
from safetensors import safe_open

from sparseflow.errors import DiskError, ShardCorrupt
from sparseflow.store.shard_format import (
    ALIGNMENT_NBYTES,
    ELEMENT_NBYTES,
    HEADER_LIMIT_NBYTES,
    FileEntry,
    TensorFileWriter,
    TensorPlace,
    TensorSpec,
    bundle_checksums,
    file_nbytes,
    hash_file,
    header_bytes,
    map_file,
    read_places,
    shard_specs,
)

SMALL_SPECS = [TensorSpec("a", "F16", (2, 3)), TensorSpec("sums", "U64", (2,))]
SMALL_ARRAYS = [np.arange(6, dtype=np.float16).reshape(2, 3), np.array([1, 2**63 + 5], np.uint64)]
# The small file from byte 8 on, before padding.
SMALL_JSON = (
    b'{"__metadata__":{"format":"pt"},'
    b'"a":{"dtype":"F16","shape":[2,3],"data_offsets":[0,12]},'
    b'"sums":{"dtype":"U64","shape":[2],"data_offsets":[12,28]}}'
)
SMALL_DATA = b"".join(array.tobytes() for array in SMALL_ARRAYS)


def write_small(path: Path) -> FileEntry:
    with TensorFileWriter(path, SMALL_SPECS) as writer:
        for array in SMALL_ARRAYS:
            writer.write(array)
        return writer.finish()


def file_of(header: bytes, content: bytes) -> bytes:
    """A file with any header, padded as ours are."""
    header += b" " * (-(8 + len(header)) % ALIGNMENT_NBYTES)
    return len(header).to_bytes(8, "little") + header + content


def with_entry(**changes: object) -> bytes:
    """The small file, its tensor `a` described otherwise."""
    header = json.loads(SMALL_JSON)
    header["a"] |= changes
    return file_of(json.dumps(header).encode(), SMALL_DATA)


# --- writing


def test_small_file_is_these_bytes(tmp_path: Path) -> None:
    """
    byte 0            8                                    4096                     4108
    | f8 0f 00 .. 00  | SMALL_JSON, blanks to byte 4096    | a: 6 halves, 12 bytes  | sums: 2 uint64, 16 bytes |
    """
    write_small(tmp_path / "small")
    content = (tmp_path / "small").read_bytes()
    assert content[:8] == bytes([0xF8, 0x0F, 0, 0, 0, 0, 0, 0])  # 4088
    assert content[8:4096] == SMALL_JSON.ljust(4088, b" ")
    assert content[4096:] == SMALL_DATA


@pytest.mark.parametrize("name_nbytes", range(3, 4001, 571))
def test_data_starts_on_a_page_with_less_than_a_page_of_padding(name_nbytes: int) -> None:
    header = header_bytes([TensorSpec("x" * name_nbytes, "I8", (1,))])
    used = len(header.rstrip(b" "))
    assert len(header) % 4096 == 0
    assert 0 <= len(header) - used < 4096
    assert int.from_bytes(header[:8], "little") == len(header) - 8


def test_header_that_ends_on_a_page_gets_no_padding() -> None:
    spare = len(header_bytes([TensorSpec("", "I8", (1,))])) - len(
        header_bytes([TensorSpec("", "I8", (1,))]).rstrip(b" ")
    )
    assert header_bytes([TensorSpec("x" * spare, "I8", (1,))]).endswith(b"}}")
    assert len(header_bytes([TensorSpec("x" * spare, "I8", (1,))])) == 4096
    assert len(header_bytes([TensorSpec("x" * (spare + 1), "I8", (1,))])) == 8192


def test_entry_has_size_and_hash_of_the_file_on_disk(tmp_path: Path) -> None:
    entry = write_small(tmp_path / "small")
    content = (tmp_path / "small").read_bytes()
    assert entry == FileEntry(len(content), xxhash.xxh3_64_hexdigest(content))
    assert entry == hash_file(tmp_path / "small")
    assert entry.nbytes == file_nbytes(SMALL_SPECS)


def test_pieces_of_any_size_make_the_same_file(tmp_path: Path) -> None:
    whole = write_small(tmp_path / "whole")
    with TensorFileWriter(tmp_path / "pieces", SMALL_SPECS) as writer:
        for row in SMALL_ARRAYS[0]:
            writer.write(row)
        writer.write(SMALL_ARRAYS[1][:0])
        for number in SMALL_ARRAYS[1]:
            writer.write(number)
        assert writer.finish() == whole


def test_array_that_is_not_contiguous_is_written_in_its_logical_order(tmp_path: Path) -> None:
    array = np.arange(12, dtype=np.int8).reshape(3, 4)
    with TensorFileWriter(tmp_path / "file", [TensorSpec("t", "I8", (4, 3))]) as writer:
        writer.write(array.T)
        writer.finish()
    assert (tmp_path / "file").read_bytes()[4096:] == array.T.tobytes(order="C")


def test_abandoned_writer_leaves_nothing(tmp_path: Path) -> None:
    with TensorFileWriter(tmp_path / "small", SMALL_SPECS) as writer:
        writer.write(SMALL_ARRAYS[0])
        assert not (tmp_path / "small").exists()
    assert list(tmp_path.iterdir()) == []


def test_error_while_writing_leaves_nothing_and_is_not_hidden(tmp_path: Path) -> None:
    writer = TensorFileWriter(tmp_path / "small", SMALL_SPECS)
    with pytest.raises(KeyboardInterrupt), writer:
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arrays", [SMALL_ARRAYS[:1], [*SMALL_ARRAYS, SMALL_ARRAYS[0]]], ids=["too few", "too many"])
def test_file_of_another_size_than_declared_is_not_finished(tmp_path: Path, arrays: list[np.ndarray]) -> None:
    with TensorFileWriter(tmp_path / "small", SMALL_SPECS) as writer:
        for array in arrays:
            writer.write(array)
        with pytest.raises(AssertionError, match=f"of {file_nbytes(SMALL_SPECS)}"):
            writer.finish()
    assert list(tmp_path.iterdir()) == []


def test_abandoned_rewrite_keeps_the_old_file(tmp_path: Path) -> None:
    write_small(tmp_path / "small")
    before = (tmp_path / "small").read_bytes()
    with TensorFileWriter(tmp_path / "small", [TensorSpec("other", "I8", (1,))]):
        pass
    assert (tmp_path / "small").read_bytes() == before


# --- reading, ours and safetensors' own

TORCH_DTYPES = {
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "I8": torch.int8,
    "I16": torch.int16,
    "U64": torch.uint64,
}


def random_bits(rng: np.random.Generator, spec: TensorSpec) -> np.ndarray:
    return rng.integers(0, 256, spec.nbytes, dtype=np.uint8)


@pytest.mark.parametrize("dtype", ELEMENT_NBYTES)
def test_safetensors_reads_the_bits_that_were_written(tmp_path: Path, rng: np.random.Generator, dtype: str) -> None:
    specs = [TensorSpec("one", dtype, (3, 5)), TensorSpec("two", dtype, (7,))]
    bits = [random_bits(rng, spec) for spec in specs]
    with TensorFileWriter(tmp_path / "file", specs) as writer:
        for array in bits:
            writer.write(array)
        writer.finish()
    with safe_open(tmp_path / "file", "pt") as file:
        assert list(file.keys()) == ["one", "two"]
        assert file.metadata() == {"format": "pt"}
        for spec, written in zip(specs, bits, strict=True):
            tensor = file.get_tensor(spec.name)
            assert tensor.dtype == TORCH_DTYPES[dtype]
            assert tuple(tensor.shape) == spec.shape
            assert torch.equal(tensor.flatten().view(torch.uint8), torch.from_numpy(written))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_shard_opens_with_safetensors_and_holds_bundles_and_checksums(
    tmp_path: Path, rng: np.random.Generator, dtype: str
) -> None:
    bundle_spec, checksum_spec = specs = shard_specs(5, 7, dtype)
    bundles = random_bits(rng, bundle_spec).reshape(5, -1)
    with TensorFileWriter(tmp_path / "shard", specs) as writer:
        writer.write(bundles)
        writer.write(bundle_checksums(bundles))
        writer.finish()
    with safe_open(tmp_path / "shard", "pt") as file:
        read = file.get_tensor("bundles")
        checksums = file.get_tensor("checksums")
    assert read.dtype == getattr(torch, dtype)
    assert tuple(read.shape) == (5, 2, 7)
    assert np.array_equal(read.view(torch.uint8).numpy().reshape(5, -1), bundles)
    assert tuple(checksums.shape) == checksum_spec.shape
    assert checksums.tolist() == [xxhash.xxh3_64_intdigest(bundle.tobytes()) for bundle in bundles]


def test_read_places_finds_the_tensors_in_order(tmp_path: Path) -> None:
    write_small(tmp_path / "small")
    places = read_places(tmp_path / "small")
    assert places == {"a": TensorPlace(SMALL_SPECS[0], 4096), "sums": TensorPlace(SMALL_SPECS[1], 4108)}
    assert list(places) == ["a", "sums"]


def test_file_without_tensors_and_empty_tensors_are_read(tmp_path: Path) -> None:
    for specs in ([], [TensorSpec("none", "F32", (0, 4)), TensorSpec("scalar", "I8", ())]):
        with TensorFileWriter(tmp_path / "file", specs) as writer:
            writer.write(np.zeros(sum(spec.nbytes for spec in specs), np.uint8))
            writer.finish()
        assert [place.spec for place in read_places(tmp_path / "file").values()] == specs


def test_map_shows_the_file_and_a_stray_write_does_not_reach_it(tmp_path: Path) -> None:
    write_small(tmp_path / "small")
    before = (tmp_path / "small").read_bytes()
    mapping = map_file(tmp_path / "small")
    assert isinstance(mapping, mmap.mmap)
    assert mapping[:] == before
    mapping[4096] ^= 0xFF
    assert (tmp_path / "small").read_bytes() == before
    mapping.close()


# --- damaged files


def test_missing_file_is_a_disk_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(DiskError, match="file is missing") as caught:
        read_places(tmp_path / "absent")
    assert str(tmp_path / "absent") in str(caught.value)
    assert not isinstance(caught.value, ShardCorrupt)


def test_folder_in_place_of_a_file_is_a_disk_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(DiskError) as caught:
        read_places(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert not isinstance(caught.value, ShardCorrupt)


SMALL_FILE = file_of(SMALL_JSON, SMALL_DATA)
DAMAGED = {
    "empty": b"",
    "shorter than its length field": SMALL_FILE[:5],
    "nothing but a length": SMALL_FILE[:8],
    "cut inside the header": SMALL_FILE[:100],
    "cut inside the data": SMALL_FILE[:-1],
    "a byte too many": SMALL_FILE + b"\0",
    "all zeros": bytes(len(SMALL_FILE)),
    "header length zero": bytes(8) + SMALL_FILE[8:],
    "header length past the end": len(SMALL_FILE).to_bytes(8, "little") + SMALL_FILE[8:],
    "header length 2**64 - 1": b"\xff" * 8 + SMALL_FILE[8:],
    "not JSON": file_of(b"bundles of neurons", SMALL_DATA),
    "not text": file_of(b"\xff\xfe\xfa", SMALL_DATA),
    "JSON cut short": file_of(SMALL_JSON[:-1], SMALL_DATA),
    "JSON list": file_of(b"[]", b""),
    "JSON number": file_of(b"17", b""),
    "JSON null": file_of(b"null", b""),
    "JSON nested out of all reason": file_of(b"[" * 4000, b""),
    "huge number": file_of(SMALL_JSON.replace(b"[2,3]", b"[" + b"9" * 3000 + b"]"), SMALL_DATA),
    "entry is a list": file_of(b'{"a":[]}', b""),
    "entry is a number": file_of(b'{"a":3}', b""),
    "entry without dtype": file_of(b'{"a":{"shape":[1],"data_offsets":[0,2]}}', b"ab"),
    "unknown dtype": with_entry(dtype="F8_E4M3"),
    "dtype out of all reason": with_entry(dtype="F" * 10**6),
    "name out of all reason": file_of(b'{"' + b"x" * 10**6 + b'":{"dtype":1,"shape":[],"data_offsets":[]}}', b""),
    "dtype is a list": with_entry(dtype=["F16"]),
    "overlap": with_entry(data_offsets=[0, 14]),
    "gap": with_entry(data_offsets=[2, 14], shape=[6]),
    "gap before the next": with_entry(data_offsets=[0, 10], shape=[5]),
    "backwards": with_entry(data_offsets=[12, 0]),
    "negative offsets": with_entry(data_offsets=[-12, 0]),
    "past the end": with_entry(data_offsets=[0, 1 << 40], shape=[1 << 39]),
    "one offset": with_entry(data_offsets=[0]),
    "three offsets": with_entry(data_offsets=[0, 12, 12]),
    "offsets as text": with_entry(data_offsets=["0", "12"]),
    "offsets as an object": with_entry(data_offsets={"0": 12}),
    "shape larger than the data": with_entry(shape=[2, 4]),
    "shape smaller than the data": with_entry(shape=[2, 2]),
    "negative shape": with_entry(shape=[-2, -3]),
    "fractional shape": with_entry(shape=[1.5, 4]),
    "shape as text": with_entry(shape="23"),
    "shape of text": with_entry(shape=["2", "3"]),
    "shape of true": with_entry(shape=[True, 6]),
    "shape of whole fractions": with_entry(shape=[2.0, 3.0]),
    "shape of nothing and all": with_entry(shape=[0, 1 << 62], data_offsets=[0, 0]),
    "shape of many dimensions": with_entry(shape=[1] * 7 + [2, 3]),
    "offsets of true": with_entry(data_offsets=[False, 12]),
    "offsets of whole fractions": with_entry(data_offsets=[0.0, 12.0]),
    "infinite offset": with_entry(data_offsets=[0, float("inf")]),
    "offset that is NaN": with_entry(data_offsets=[float("nan"), 12]),
    "data that begins on no page": (len(SMALL_JSON) + 1).to_bytes(8, "little") + SMALL_JSON + b" " + SMALL_DATA,
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_damaged_file_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "layer-007.safetensors"
    path.write_bytes(content)
    with pytest.raises(ShardCorrupt) as caught:
        read_places(path)
    assert str(path) in str(caught.value)
    assert "convert the model again" in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_shape_of_thousands_of_long_numbers_is_refused_before_they_are_multiplied(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(with_entry(shape=[10**4000 + 1] * 400))
    started_s = time.process_time()
    with pytest.raises(ShardCorrupt) as caught:
        read_places(path)
    assert time.process_time() - started_s < 5
    assert len(str(caught.value)) < 1000


def test_header_above_the_limit_is_refused_though_the_file_is_as_long(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    with open(path, "wb") as file:
        file.write((HEADER_LIMIT_NBYTES + 1).to_bytes(8, "little") + b"{}")
        file.truncate(HEADER_LIMIT_NBYTES + 4096)
    with pytest.raises(ShardCorrupt, match=f"header of {HEADER_LIMIT_NBYTES + 1} bytes"):
        read_places(path)
