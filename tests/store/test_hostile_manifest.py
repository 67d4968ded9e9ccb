"""A manifest by somebody hostile, with fingerprints that fit: one error names the file, the value and the remedy."""

import json
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from forged_stores import forge, sign

from sparseflow.errors import DiskError, ShardCorrupt
from sparseflow.store.codes import code_specs
from sparseflow.store.manifest import DENSE_NAME, MANIFEST_NAME, Manifest, predictor_name, shard_name
from sparseflow.store.profile import ModelProfile
from sparseflow.store.shard_format import FileEntry, file_nbytes, shard_specs

PROFILE = ModelProfile("facebook/opt-tiny", 64, 256, 2, 4, 128, 1000, dtype="bfloat16")
SHARD_NBYTES = file_nbytes(shard_specs(256, 64, "bfloat16"))
CODE_NBYTES = file_nbytes(code_specs(256, 64))
FILES = {name: FileEntry(100, "0123456789abcdef") for name in (DENSE_NAME, "config.json", "profile.json")}
FILES |= {shard_name(layer): FileEntry(SHARD_NBYTES, "00000000000000aa") for layer in range(2)}
FILES |= {predictor_name(layer): FileEntry(CODE_NBYTES, "00000000000000bb") for layer in range(2)}
TABLES = {shard_name(layer): "00000000000000ab" for layer in range(2)}
SOURCE = {"name": "facebook/opt-tiny", "checkpoint_dtype": "float16", "dither_seed": 7}
MANIFEST = Manifest(PROFILE, FILES, SOURCE, TABLES)

Content = dict[str, Any]
Edit = Callable[[Content], object]


@pytest.fixture
def store(tmp_path: Path) -> Path:
    MANIFEST.save(tmp_path)
    return tmp_path


def refusal(store: Path) -> str:
    """What the manifest is refused with."""
    with pytest.raises(ShardCorrupt) as caught:
        Manifest.load(store).require_all_parts(store)
    assert str(store / MANIFEST_NAME) in str(caught.value)
    assert "remove the store and convert the model again" in str(caught.value)
    assert len(str(caught.value)) < 1000
    return str(caught.value)


def test_fingerprints_that_are_computed_anew_fit(store: Path) -> None:
    forge(store, lambda content: content["profile"].update(max_sequence_length=99))
    manifest = Manifest.load(store)
    manifest.require_all_parts(store)
    assert manifest.profile.max_sequence_length == 99


def of_profile(**changes: object) -> Edit:
    return lambda content: content["profile"].update(changes)


def of_entry(**changes: object) -> Edit:
    return lambda content: content["files"][DENSE_NAME].update(changes)


def with_order(order: object) -> Edit:
    return lambda content: content.update(neuron_permutation=order)


NOT_SIZES = [True, False, 0, -1, 2.0, "64", None, [64], {"64": 64}, 2**31, 10**400, float("nan"), float("inf")]
SIZES = ["hidden_dimension", "ffn_dimension", "num_layers", "num_attention_heads", "max_sequence_length", "vocab_size"]


@pytest.mark.parametrize("value", NOT_SIZES, ids=lambda value: repr(value)[:8])
@pytest.mark.parametrize("field", [*SIZES, "parts_per_bundle"])
def test_size_that_is_none_is_named(field: str, value: object, store: Path) -> None:
    forge(store, of_profile(**{field: value}))
    assert f"{field} is " in refusal(store)


EDITS: dict[str, tuple[Edit, str]] = {
    "parts that no bundle has": (of_profile(parts_per_bundle=3), "parts_per_bundle is 3"),
    "heads that do not divide": (of_profile(num_attention_heads=5), "no multiple of 5 heads"),
    "dtype is a list": (of_profile(dtype=["float16"]), "unknown dtype"),
    "identifier is a number": (of_profile(model_identifier=1), "model_identifier is 1"),
    "identifier is empty": (of_profile(model_identifier=""), "model_identifier is ''"),
    "identifier moves the cursor": (of_profile(model_identifier="\x1b[2Jopt"), "model_identifier is '\\x1b"),
    "identifier is half a letter": (of_profile(model_identifier="\ud800"), "model_identifier is"),
    "identifier is blank": (of_profile(model_identifier=" \u00a0"), "model_identifier is"),
    "identifier ends a line": (of_profile(model_identifier="opt\u2028tiny"), "model_identifier is"),
    "identifier is a book": (of_profile(model_identifier="x" * 10**6), "model_identifier is"),
    "shares are a list": (of_profile(layer_sparsity_map=[0.5]), "layer_sparsity_map is"),
    "share above all": (of_profile(layer_sparsity_map={"1": 1.5}), "share of layer 1 is 1.5"),
    "share is NaN": (of_profile(layer_sparsity_map={"1": float("nan")}), "share of layer 1 is nan"),
    "share is true": (of_profile(layer_sparsity_map={"1": True}), "share of layer 1 is True"),
    "share of no layer": (of_profile(layer_sparsity_map={"2": 0.5}), "layer '2'"),
    "layer written otherwise": (of_profile(layer_sparsity_map={"01": 0.5}), "layer '01'"),
    "negative bytes": (of_entry(nbytes=-1), f"nbytes of {DENSE_NAME} is -1"),
    "bytes are true": (of_entry(nbytes=True), f"nbytes of {DENSE_NAME} is True"),
    "bytes are a fraction": (of_entry(nbytes=100.0), f"nbytes of {DENSE_NAME} is 100.0"),
    "bytes are a text": (of_entry(nbytes="100"), f"nbytes of {DENSE_NAME} is '100'"),
    "bytes that no disk has": (of_entry(nbytes=2**60), f"nbytes of {DENSE_NAME} is {2**60}"),
    "bytes of 4000 digits": (of_entry(nbytes=10**4000), f"nbytes of {DENSE_NAME} is 1000"),
    "checksum is short": (of_entry(xxh3_64="abc"), f"xxh3_64 of {DENSE_NAME} is 'abc'"),
    "checksum in capitals": (of_entry(xxh3_64="0123456789ABCDEF"), "not 16 hexadecimal digits"),
    "checksum of other digits": (of_entry(xxh3_64="\u0660" * 16), "not 16 hexadecimal digits"),
    "checksum is a number": (of_entry(xxh3_64=7), "not 16 hexadecimal digits"),
    "entry with more": (of_entry(path="/etc/passwd"), "path"),
    "entry with an endless key": (of_entry(**{"x" * 10**6: 1}), "xxx"),
    "file twice as small": (lambda c: c["files"][shard_name(1)].update(nbytes=4), f"{shard_name(1)} has 4 bytes"),
    "codes of another size": (lambda c: c["files"][predictor_name(0)].update(nbytes=4), f"{predictor_name(0)} has 4"),
    "a wider model": (of_profile(hidden_dimension=128), "bundle_nbytes is 256, not 512"),
    "more neurons": (of_profile(ffn_dimension=2**30), f"{shard_name(0)} has"),
    "table is short": (lambda c: c["checksum_tables"].update({shard_name(0): "0"}), "checksum table of"),
    "table is null": (lambda c: c["checksum_tables"].update({shard_name(0): None}), "checksum table of"),
    "table of a file elsewhere": (lambda c: c["checksum_tables"].update({"../x": "0" * 16}), "leaves the store"),
    "tables are a list": (lambda c: c.update(checksum_tables=[]), "checksum_tables is []"),
    "source is a list": (lambda c: c.update(source=[1]), "source is [1]"),
    "source is nested": (lambda c: c["source"].update(name={"a": [1]}), "source name is"),
    "source moves the cursor": (lambda c: c["source"].update(name="\x1b[2J"), "source name is"),
    "seed is infinite": (lambda c: c["source"].update(dither_seed=float("inf")), "source dither_seed is inf"),
    "order is a list": (with_order([[1, 0]]), "neuron_permutation is"),
    "order names one twice": (with_order({"0": [0, *range(255)]}), "does not name each of 256 neurons once"),
    "order names one that is not": (with_order({"0": [*range(255), 256]}), "does not name each"),
    "order of true and false": (with_order({"0": [False, True, *range(2, 256)]}), "does not name each"),
    "order of fractions": (with_order({"0": [0.0, *range(1, 256)]}), "does not name each"),
    "order of some": (with_order({"0": [1, 0]}), "not a list of 256 neurons"),
    "order of no layer": (with_order({"2": list(range(256))}), "layer '2'"),
    "order of a negative layer": (with_order({"-1": list(range(256))}), "layer '-1'"),
    "stride of other bundles": (lambda c: c.update(stride_nbytes=512), "stride_nbytes is 512"),
    "bundles of another size": (lambda c: c.update(bundle_nbytes=1), "bundle_nbytes is 1"),
    "profile is null": (lambda c: c.update(profile=None), "profile is None"),
    "files are a text": (lambda c: c.update(files="all"), "files is 'all'"),
}


@pytest.mark.parametrize(("edit", "named"), EDITS.values(), ids=EDITS)
def test_value_that_cannot_be_is_named(edit: Edit, named: str, store: Path) -> None:
    forge(store, edit)
    assert named in refusal(store)


NAMES = ["../x", "/etc/passwd", "//x", "a//b", "./x", "x/", "x/.", "a/../b", "a\\b", "a\0b", "", ".", "..", "a\nb", "Å"]


@pytest.mark.parametrize("name", NAMES, ids=repr)
def test_file_name_that_is_elsewhere_or_written_otherwise_is_refused(name: str, store: Path) -> None:
    entry = {"nbytes": 1, "xxh3_64": "0" * 16}
    forge(store, lambda content: content["files"].update({name: entry}))
    assert "leaves the store" in refusal(store)


def test_manifest_that_lists_itself_is_refused(store: Path) -> None:
    entry = {"nbytes": 1, "xxh3_64": "0" * 16}
    forge(store, lambda content: content["files"].update({MANIFEST_NAME: entry}))
    assert "lists itself" in refusal(store)


@pytest.mark.parametrize("version", [True, 3.0, float("nan"), 10**4000, ["x" * 10**6], {}])
def test_version_of_another_type_is_refused_in_a_line(version: object, store: Path) -> None:
    forge(store, lambda content: content.update(format_version=version))
    with pytest.raises(DiskError, match="format version") as caught:
        Manifest.load(store)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("part", ["config.json", DENSE_NAME, shard_name(1), predictor_name(0)])
def test_part_that_is_not_listed_is_named(part: str, store: Path) -> None:
    forge(store, lambda content: content["files"].pop(part))
    assert f"1 parts are not listed, {part} first" in refusal(store)


def test_shard_whose_table_is_not_listed_is_named(store: Path) -> None:
    forge(store, lambda content: content["checksum_tables"].pop(shard_name(1)))
    assert f"checksum table of {shard_name(1)}" in refusal(store)


@pytest.mark.parametrize("edit", [of_profile(num_layers=10**6), of_profile(ffn_dimension=2**31 - 1, num_layers=2)])
def test_sizes_beyond_the_files_listed_take_neither_time_nor_memory(edit: Edit, store: Path) -> None:
    forge(store, edit)
    refusal(store)
    tracemalloc.start()
    started_s = time.process_time()
    refusal(store)
    peak_nbytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert time.process_time() - started_s < 5
    assert peak_nbytes < 4 << 20


FIELDS = ["profile", "files", "source", "checksum_tables", "neuron_permutation", "fingerprint"]


@pytest.mark.parametrize("field", FIELDS)
def test_field_nested_out_of_all_reason_is_refused(field: str, store: Path) -> None:
    content = json.loads((store / MANIFEST_NAME).read_bytes())
    content[field] = "HERE"
    text = json.dumps(content).replace('"HERE"', "[" * 900 + "]" * 900)
    (store / MANIFEST_NAME).write_text(text)
    assert len(refusal(store)) < 1000


def test_field_given_twice_counts_once(store: Path) -> None:
    """The last one does, as in every reader of JSON; it is checked like any other."""
    content = json.loads((store / MANIFEST_NAME).read_bytes())
    content["files"] = {}
    sign(content)
    text = json.dumps(content)
    (store / MANIFEST_NAME).write_text(text.replace('"files": {}', '"files": {"/etc/passwd": 1}, "files": {}'))
    assert Manifest.load(store).files == {}


def test_saving_does_not_write_through_a_link_that_lies_in_its_way(store: Path, tmp_path_factory: Any) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "precious"
    elsewhere.write_text("precious")
    (store / (MANIFEST_NAME + ".tmp")).symlink_to(elsewhere)
    MANIFEST.save(store)
    assert elsewhere.read_text() == "precious"
    assert Manifest.load(store) == MANIFEST
