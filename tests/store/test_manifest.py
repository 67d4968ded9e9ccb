"""The manifest: what comes back, what its fingerprints cover, what is refused."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sparseflow.errors import DiskError, ShardCorrupt
from sparseflow.store.manifest import (
    DENSE_NAME,
    FORMAT_VERSION,
    MANIFEST_NAME,
    Manifest,
    check_content,
    check_size,
    predictor_name,
    shard_name,
)
from sparseflow.store.profile import ModelProfile
from sparseflow.store.shard_format import FileEntry, hash_file

PROFILE = ModelProfile(
    model_identifier="facebook/opt-tiny",
    hidden_dimension=64,
    ffn_dimension=256,
    num_layers=2,
    num_attention_heads=4,
    max_sequence_length=128,
    vocab_size=1000,
    dtype="bfloat16",
)
DEEP = replace(PROFILE, num_layers=12, ffn_dimension=3)
FILES = {
    DENSE_NAME: FileEntry(1000, "00000000000000aa"),
    shard_name(0): FileEntry(2000, "00000000000000bb"),
    shard_name(1): FileEntry(3000, "00000000000000cc"),
    predictor_name(0): FileEntry(400, "00000000000000dd"),
    "config.json": FileEntry(50, "00000000000000ee"),
}
TABLES = {shard_name(0): "00000000000000ab", shard_name(1): "00000000000000ac"}
MANIFEST = Manifest(PROFILE, FILES, {"name": "facebook/opt-tiny", "dtype": "float16", "dither_seed": 7}, TABLES)


def edit(store: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest on disk, not its fingerprints."""
    content = json.loads((store / MANIFEST_NAME).read_bytes())
    change(content)
    (store / MANIFEST_NAME).write_text(json.dumps(content), encoding="utf-8")


def with_file(name: str, entry: FileEntry = FileEntry(1, "0000000000000001")) -> Manifest:  # noqa: B008  frozen
    return replace(MANIFEST, files=FILES | {name: entry})


# --- round trip


@pytest.mark.parametrize(
    "manifest",
    [
        MANIFEST,
        replace(MANIFEST, files={}),
        replace(MANIFEST, profile=DEEP, neuron_permutation={layer: [2, 0, 1] for layer in range(12)}),
        replace(MANIFEST, profile=replace(PROFILE, layer_sparsity_map={1: 0.25})),
        replace(MANIFEST, profile=replace(DEEP, layer_sparsity_map={2: 0.5, 10: 0.25})),
    ],
    ids=["plain", "no files", "permuted", "sparsity of one layer", "sparsity of layers 2 and 10"],
)
def test_manifest_comes_back_as_it_was_saved(tmp_path: Path, manifest: Manifest) -> None:
    manifest.save(tmp_path)
    assert Manifest.load(tmp_path) == manifest


def test_saved_manifest_states_sizes_and_fingerprints_in_plain_json(tmp_path: Path) -> None:
    MANIFEST.save(tmp_path)
    content = json.loads((tmp_path / MANIFEST_NAME).read_text(encoding="utf-8"))
    assert content["format_version"] == FORMAT_VERSION
    assert content["bundle_nbytes"] == 2 * 64 * 2
    assert content["stride_nbytes"] == 2 * 64 * 2
    assert content["files"][DENSE_NAME] == {"nbytes": 1000, "xxh3_64": "00000000000000aa"}
    assert content["fingerprint"] == {
        "weights": MANIFEST.weights_fingerprint,
        "predictors": MANIFEST.predictors_fingerprint,
    }


def test_saving_leaves_only_the_manifest(tmp_path: Path) -> None:
    MANIFEST.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [MANIFEST_NAME]


def test_save_that_fails_keeps_the_old_manifest(tmp_path: Path) -> None:
    MANIFEST.save(tmp_path)
    with pytest.raises(TypeError):
        replace(MANIFEST, source={"name": object()}).save(tmp_path)
    assert Manifest.load(tmp_path) == MANIFEST


def test_bytes_are_summed_by_folder() -> None:
    assert MANIFEST.nbytes_under("neurons/") == 5000
    assert MANIFEST.nbytes_under("predictors/") == 400
    assert MANIFEST.nbytes_under("") == 6450


def test_names_of_layer_files_have_three_digits_or_more() -> None:
    assert shard_name(7) == "neurons/layer-007.safetensors"
    assert predictor_name(1234) == "predictors/layer-1234.safetensors"


# --- fingerprints

OTHER = FileEntry(2000, "00000000000000bc")
WEIGHT_CHANGES = {
    "a shard's content": with_file(shard_name(0), OTHER),
    "the dense weights": with_file(DENSE_NAME, OTHER),
    "config.json": with_file("config.json", OTHER),
    "one more file": with_file("tokenizer.json"),
    "a table of checksums": replace(MANIFEST, checksum_tables=TABLES | {shard_name(0): "00000000000000ad"}),
    "the order of neurons": replace(MANIFEST, neuron_permutation={0: [1, 0]}),
    "the dtype": replace(MANIFEST, profile=replace(PROFILE, dtype="float16")),
    "a size": replace(MANIFEST, profile=replace(PROFILE, ffn_dimension=128)),
    "the format": replace(MANIFEST, format_version=FORMAT_VERSION + 1),
}
PREDICTOR_CHANGES = {
    "the codes of a layer": with_file(predictor_name(0), OTHER),
    "codes of another layer": with_file(predictor_name(1)),
    "the profile measured by calibration": with_file("profile.json"),
}


@pytest.mark.parametrize("changed", WEIGHT_CHANGES.values(), ids=WEIGHT_CHANGES)
def test_weights_and_layout_change_only_the_weights_fingerprint(changed: Manifest) -> None:
    assert changed.weights_fingerprint != MANIFEST.weights_fingerprint
    assert changed.predictors_fingerprint == MANIFEST.predictors_fingerprint


@pytest.mark.parametrize("changed", PREDICTOR_CHANGES.values(), ids=PREDICTOR_CHANGES)
def test_calibration_changes_only_the_predictors_fingerprint(changed: Manifest) -> None:
    assert changed.weights_fingerprint == MANIFEST.weights_fingerprint
    assert changed.predictors_fingerprint != MANIFEST.predictors_fingerprint


UNIDENTIFYING = {
    "the source": replace(MANIFEST, source={}),
    "the order of files": replace(MANIFEST, files=dict(reversed(FILES.items()))),
    "the model's name": replace(MANIFEST, profile=replace(PROFILE, model_identifier="another")),
    "shares of the device cache": replace(MANIFEST, profile=replace(PROFILE, layer_sparsity_map={0: 0.5})),
}


@pytest.mark.parametrize("changed", UNIDENTIFYING.values(), ids=UNIDENTIFYING)
def test_what_is_neither_weights_nor_predictors_changes_no_fingerprint(changed: Manifest) -> None:
    assert changed.weights_fingerprint == MANIFEST.weights_fingerprint
    assert changed.predictors_fingerprint == MANIFEST.predictors_fingerprint


# --- refusals


@pytest.mark.parametrize("version", [FORMAT_VERSION + 1, 0, "1", None, [1]])
def test_other_format_version_is_refused_by_number(tmp_path: Path, version: object) -> None:
    MANIFEST.save(tmp_path)
    edit(tmp_path, lambda content: content.update(format_version=version))
    with pytest.raises(DiskError, match="format version") as caught:
        Manifest.load(tmp_path)
    assert not isinstance(caught.value, ShardCorrupt)
    assert str(tmp_path / MANIFEST_NAME) in str(caught.value)


def test_folder_without_manifest_is_not_a_store_and_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(DiskError, match="sparseflow convert") as caught:
        Manifest.load(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_absent_folder_is_not_a_store(tmp_path: Path) -> None:
    with pytest.raises(DiskError, match="not a store"):
        Manifest.load(tmp_path / "absent")


def test_file_in_place_of_the_folder_is_not_a_store(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("weights")
    with pytest.raises(DiskError) as caught:
        Manifest.load(tmp_path / "file")
    assert str(tmp_path / "file") in str(caught.value)


def test_folder_in_place_of_the_manifest_is_refused(tmp_path: Path) -> None:
    (tmp_path / MANIFEST_NAME).mkdir()
    with pytest.raises(DiskError) as caught:
        Manifest.load(tmp_path)
    assert str(tmp_path) in str(caught.value)


UNREADABLE = {
    "empty": b"",
    "not JSON": b"bundles of neurons",
    "not text": b"\xff\xfe\x00\xd8",
    "cut short": b'{"format_version": 3, "profile"',
    "null": b"null",
    "number": b"1",
    "text": b'"format_version"',
    "list": b"[]",
    "no version": b"{}",
    "no profile": b'{"format_version": 3}',
    "nested out of all reason": b"[" * 100_000,
}


@pytest.mark.parametrize("content", UNREADABLE.values(), ids=UNREADABLE)
def test_what_is_not_a_manifest_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    (tmp_path / MANIFEST_NAME).write_bytes(content)
    with pytest.raises(ShardCorrupt) as caught:
        Manifest.load(tmp_path)
    assert str(tmp_path / MANIFEST_NAME) in str(caught.value)


def test_manifest_of_unreasonable_size_is_not_read(tmp_path: Path) -> None:
    with open(tmp_path / MANIFEST_NAME, "wb") as file:
        file.truncate((64 << 20) + 1)
    with pytest.raises(ShardCorrupt, match="more than"):
        Manifest.load(tmp_path)


TAMPERING: dict[str, Callable[[dict[str, Any]], object]] = {
    "shard checksum": lambda content: content["files"][shard_name(0)].update(xxh3_64="0" * 16),
    "shard size": lambda content: content["files"][shard_name(0)].update(nbytes=1),
    "shard removed": lambda content: content["files"].pop(shard_name(1)),
    "file added": lambda content: content["files"].update({"x": {"nbytes": 1, "xxh3_64": "0"}}),
    "predictor checksum": lambda content: content["files"][predictor_name(0)].update(xxh3_64="0" * 16),
    "predictor removed": lambda content: content["files"].pop(predictor_name(0)),
    "weights' fingerprint": lambda content: content["fingerprint"].update(weights="0" * 32),
    "predictors' fingerprint": lambda content: content["fingerprint"].update(predictors="0" * 32),
    "fingerprints removed": lambda content: content.pop("fingerprint"),
    "permutation": lambda content: content.update(neuron_permutation={"0": [1, 0]}),
    "permutation of text": lambda content: content.update(neuron_permutation={"zero": [1, 0]}),
    "permutation is a list": lambda content: content.update(neuron_permutation=[[1, 0]]),
    "layer count": lambda content: content["profile"].update(num_layers=3),
    "unknown dtype": lambda content: content["profile"].update(dtype="float64"),
    "unknown profile field": lambda content: content["profile"].update(colour="blue"),
    "profile is a list": lambda content: content.update(profile=[]),
    "files is a list": lambda content: content.update(files=[DENSE_NAME]),
    "file entry is text": lambda content: content["files"].update({DENSE_NAME: "1000"}),
    "file entry has no size": lambda content: content["files"][DENSE_NAME].pop("nbytes"),
    "source removed": lambda content: content.pop("source"),
}


@pytest.mark.parametrize("change", TAMPERING.values(), ids=TAMPERING)
def test_tampered_manifest_is_refused_by_name(tmp_path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    MANIFEST.save(tmp_path)
    edit(tmp_path, change)
    with pytest.raises(ShardCorrupt) as caught:
        Manifest.load(tmp_path)
    assert str(tmp_path / MANIFEST_NAME) in str(caught.value)


@pytest.mark.parametrize("name", ["../outside", "neurons/../../outside", "..", "/etc/passwd", "", "."])
def test_file_name_that_leaves_the_store_is_refused(tmp_path: Path, name: str) -> None:
    with_file(name).save(tmp_path)  # fingerprints fit: only the name is wrong
    with pytest.raises(ShardCorrupt, match="leaves the store"):
        Manifest.load(tmp_path)


# --- files against their entries


def test_file_as_listed_passes_both_checks(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"neurons")
    entry = hash_file(tmp_path / "file")
    check_size(tmp_path, "file", entry)
    check_content(tmp_path, "file", entry)


def test_flipped_byte_is_found_by_content_though_the_size_is_right(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"neurons")
    entry = hash_file(tmp_path / "file")
    (tmp_path / "file").write_bytes(b"neurOns")
    check_size(tmp_path, "file", entry)
    with pytest.raises(ShardCorrupt, match="checksum"):
        check_content(tmp_path, "file", entry)


@pytest.mark.parametrize("check", [check_size, check_content])
@pytest.mark.parametrize("content", [b"neuron", b"neurons!"])
def test_shorter_or_longer_file_is_corrupt(
    tmp_path: Path, check: Callable[[Path, str, FileEntry], None], content: bytes
) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ShardCorrupt, match=f"{len(content)} bytes, the manifest says 7"):
        check(tmp_path, "file", FileEntry(7, "0" * 16))


@pytest.mark.parametrize("check", [check_size, check_content])
def test_missing_file_is_a_disk_error(tmp_path: Path, check: Callable[[Path, str, FileEntry], None]) -> None:
    with pytest.raises(DiskError, match="missing") as caught:
        check(tmp_path, "absent", FileEntry(7, "0" * 16))
    assert not isinstance(caught.value, ShardCorrupt)
