"""Whatever a manifest says, with fingerprints that fit: each field is of its documented type and range, or refused."""

import contextlib
import json
import math
import tempfile
import unicodedata
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from choices import Choices
from forged_stores import sign
from hypothesis import strategies as st
from made_json import some_json
from many import a_million, on_a_share, on_some

from sparseflow.errors import DiskError
from sparseflow.store.codes import code_specs
from sparseflow.store.manifest import DENSE_NAME, MANIFEST_NAME, Manifest, predictor_name, shard_name
from sparseflow.store.profile import DTYPE_NBYTES, ModelProfile
from sparseflow.store.shard_format import FileEntry, file_nbytes, shard_specs

PROFILE = ModelProfile("facebook/opt-tiny", 8, 4, 2, 2, 16, 100, {1: 0.5}, "bfloat16")
FILES = {name: FileEntry(100, "0123456789abcdef") for name in (DENSE_NAME, "config.json", "profile.json")}
FILES |= {shard_name(n): FileEntry(file_nbytes(shard_specs(4, 8, "bfloat16")), "0" * 16) for n in range(2)}
FILES |= {predictor_name(n): FileEntry(file_nbytes(code_specs(4, 8)), "1" * 16) for n in range(2)}
TABLES = {shard_name(n): "00000000000000ab" for n in range(2)}
MANIFEST = Manifest(PROFILE, FILES, {"name": "opt", "dither_seed": 7}, TABLES, {0: [2, 0, 3, 1]})


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A store's folder in memory, where there is a place for that."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(prefix="sf-", dir=memory if memory.is_dir() else None) as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def store() -> Iterator[Path]:
    with scratch() as folder:
        yield folder


def check(store: Path, content: bytes) -> None:
    """Any bytes for a manifest."""
    (store / MANIFEST_NAME).write_bytes(content)
    try:
        manifest = Manifest.load(store)
        require_documented(manifest)
        manifest.require_all_parts(store)
    except DiskError as error:
        require_telling(str(error), store)
        return
    require_parts(manifest)
    manifest.save(store)
    assert Manifest.load(store) == manifest


def require_telling(refusal: str, store: Path) -> None:
    assert str(store) in refusal
    assert MANIFEST_NAME in refusal
    assert "convert" in refusal
    assert len(refusal) < 2000


def require_documented(manifest: Manifest) -> None:
    """Every field has its type and range; errors here are of the product."""
    profile = manifest.profile
    for size in ("hidden_dimension", "ffn_dimension", "num_layers", "num_attention_heads", "vocab_size"):
        require_whole(getattr(profile, size), 1, 2**31 - 1)
    require_whole(profile.max_sequence_length, 1, 2**31 - 1)
    assert type(profile.parts_per_bundle) is int
    assert profile.parts_per_bundle == 2
    assert profile.hidden_dimension % profile.num_attention_heads == 0
    assert profile.dtype in DTYPE_NBYTES
    assert isinstance(profile.model_identifier, str)
    assert profile.model_identifier.strip()
    assert not any(unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp") for letter in profile.model_identifier)
    for layer, share in (profile.layer_sparsity_map or {}).items():
        require_whole(layer, 0, profile.num_layers - 1)
        assert type(share) is float
        assert 0 <= share <= 1
    for name, entry in manifest.files.items():
        require_inside(name)
        require_whole(entry.nbytes, 0, 2**50)
        require_checksum(entry.xxh3_64)
    for name, table in manifest.checksum_tables.items():
        require_inside(name)
        require_checksum(table)
    for layer, order in (manifest.neuron_permutation or {}).items():
        require_whole(layer, 0, profile.num_layers - 1)
        assert sorted(order) == list(range(profile.ffn_dimension))
        assert all(type(neuron) is int for neuron in order)
    for value in manifest.source.values():
        assert value is None or isinstance(value, str | bool) or math.isfinite(value)
    assert type(manifest.format_version) is int


def require_whole(value: object, least: int, most: int) -> None:
    assert type(value) is int
    assert least <= value <= most


def require_checksum(value: object) -> None:
    assert isinstance(value, str)
    assert len(value) == 16
    assert int(value, 16) >= 0
    assert value == value.lower()


def require_inside(name: str) -> None:
    """Joined to a store, it is there and nowhere else."""
    base = Path("/store")
    assert name.isascii()
    assert name.isprintable()
    assert "\\" not in name
    assert name != MANIFEST_NAME
    assert str(base / name) == f"/store/{name}"
    assert (base / name).resolve() == base / name != base


def require_parts(manifest: Manifest) -> None:
    profile = manifest.profile
    for layer in range(profile.num_layers):
        shard = file_nbytes(shard_specs(profile.ffn_dimension, profile.hidden_dimension, profile.dtype))
        assert manifest.files[shard_name(layer)].nbytes == shard
        assert shard_name(layer) in manifest.checksum_tables
        codes = file_nbytes(code_specs(profile.ffn_dimension, profile.hidden_dimension))
        assert manifest.files[predictor_name(layer)].nbytes == codes
    assert {"config.json", DENSE_NAME} <= manifest.files.keys()


# --- what an attacker writes

with scratch() as _folder:
    MANIFEST.save(_folder)
    GOOD = (_folder / MANIFEST_NAME).read_text(encoding="utf-8")


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path to every value in JSON."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *[place for key, part in inner for place in places(part, (*path, key))]]


PLACES = [place for place in places(json.loads(GOOD)) if place]
NAMES = ["..", "../x", "/etc/passwd", "a//b", "./x", "a\\b", "a\0b", "", ".", "x", "neurons/y", "a/", MANIFEST_NAME]
TEXTS = [*NAMES, *FILES, "0" * 16, "float16", "float32", "nbytes", "xxh3_64", "0", "1", "-1", "01", "2"]
N_BYTES = 40
DECISIONS = st.binary(min_size=N_BYTES, max_size=N_BYTES)


def fitting(choices: Choices) -> Any:
    """What may well stand somewhere."""
    match choices.below(4):
        case 0:
            return choices.of([1, 2, 4, 8, 16, 0, 3, 100])
        case 1:
            return {"nbytes": choices.number(2), "xxh3_64": f"{choices.number(2):016x}"}
        case 2:
            return [choices.below(4) for _ in range(4)]
    return {choices.of(["0", "1", "2"]): choices.of([0.5, 1, [3, 2, 1, 0], "0" * 16])}


def edit(choices: Choices, content: Any) -> None:
    """At a place: another value, none at all, or one more beside it."""
    *path, last = PLACES[choices.number(2) % len(PLACES)]
    value = fitting(choices) if choices.one_in(2) else some_json(choices, TEXTS)
    with suppress(KeyError, IndexError, TypeError):  # the place is no more
        for key in path:
            content = content[key]
        match choices.below(4):
            case 0 | 1:
                content[last] = value
            case 2:
                content[choices.of(TEXTS)] = value
            case 3:
                del content[last]


def check_some(store: Path, decisions: bytes) -> None:
    choices = Choices(decisions)
    if choices.one_in(8):
        content, begin, end = GOOD.encode(), choices.number(2) % len(GOOD), choices.number(2) % len(GOOD)
        piece = choices.take(choices.below(12))
        check(store, piece if choices.one_in(4) else content[:begin] + piece + content[end:])
        return
    manifest = json.loads(GOOD)
    for _ in range(1 + choices.below(3)):
        edit(choices, manifest)
    if not choices.one_in(8):
        sign(manifest)
    check(store, json.dumps(manifest).encode())


def test_manifest_as_it_is_saved_is_read(store: Path) -> None:
    check(store, GOOD.encode())
    assert Manifest.load(store) == MANIFEST
    content = json.loads(GOOD)
    content.pop("fingerprint")
    sign(content)
    assert content == json.loads(GOOD), "the attacker's fingerprints do not fit"


def test_any_manifest_is_as_documented_or_refused(store: Path) -> None:
    on_some(lambda decisions: check_some(store, decisions), DECISIONS, n=400)


@a_million
def test_any_manifest_is_as_documented_or_refused_a_million_times(round_: int, store: Path) -> None:
    on_a_share(lambda decisions: check_some(store, decisions), round_, DECISIONS)
