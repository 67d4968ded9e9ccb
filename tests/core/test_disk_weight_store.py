"""A store opens whole or with one error; what it hands out is the file's own pages, and the file stays as it is."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import opt_family
import psutil
import pytest
import torch
from opt_family import FAMILY, same_bits, tensors_in
from transformers import OPTConfig

from sparseflow.core import store_home
from sparseflow.core.checkpoint import Checkpoint
from sparseflow.core.converter import convert
from sparseflow.core.weight_manager import DiskWeightStore
from sparseflow.errors import (
    BadRequest,
    DiskError,
    FingerprintMismatch,
    NotEnoughMemory,
    ShardCorrupt,
    SparseFlowError,
)
from sparseflow.store.manifest import DENSE_NAME, MANIFEST_NAME, Manifest, check_content, predictor_name, shard_name
from sparseflow.store.shard_format import read_places
from sparseflow.utils.home import sparseflow_home

EVERY_FILE = (DENSE_NAME, shard_name(0), shard_name(1), predictor_name(1), "config.json", "generation_config.json")


@pytest.fixture
def checkpoint(family_checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    """A checkpoint to be changed, in a folder of its own."""
    return Path(shutil.copytree(family_checkpoint("base"), tmp_path / "tiny-opt"))


@pytest.fixture
def store(family_store: Callable[..., Path], tmp_path: Path) -> Path:
    """A store to be damaged, in a folder of its own."""
    return Path(shutil.copytree(family_store("base"), tmp_path / "store"))


@pytest.fixture
def no_conversion(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From when it is called, a conversion fails the test."""

    def forbid() -> None:
        monkeypatch.setattr(store_home, "convert", lambda *_args, **_kwargs: pytest.fail("converts again"))

    return forbid


def opened(name: str | Path, *, hf_config: OPTConfig | None = None, **arguments: Any) -> DiskWeightStore:
    options = {key: arguments.pop(key) for key in ("strategy", "memory") if key in arguments}
    return DiskWeightStore(name, **arguments).initialize_from_pretrained(hf_config, **options)


def flip(path: Path, offset: int) -> None:
    """Change one byte; a negative offset counts from the end."""
    content = bytearray(path.read_bytes())
    content[offset] ^= 0x10
    path.write_bytes(content)


def all_ids(source: DiskWeightStore) -> np.ndarray:
    return np.arange(source.profile.ffn_dimension, dtype=np.uint32)


class TestFinding:
    def test_checkpoint_is_converted_into_sparseflow_home(self, checkpoint: Path, sparseflow_home: Path) -> None:
        with opened(checkpoint) as source:
            assert source.path.parent == sparseflow_home / "stores"
            assert source.path.name.startswith("tiny-opt-")

    def test_checkpoint_is_converted_into_the_cache_directory_given(self, checkpoint: Path, tmp_path: Path) -> None:
        with opened(checkpoint, cache_dir=tmp_path / "mine") as source:
            assert source.path.parent == tmp_path / "mine"

    def test_store_is_opened_where_it_is(self, store: Path, sparseflow_home: Path) -> None:
        with opened(store) as source:
            assert source.path == store
        assert list(sparseflow_home.iterdir()) == []

    def test_opening_again_does_not_convert_again(
        self, checkpoint: Path, no_conversion: Callable[[], None], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with opened(checkpoint) as source:
            path = source.path
        no_conversion()
        monkeypatch.chdir(checkpoint.parent)
        for name in (checkpoint, "tiny-opt", "./tiny-opt", path):
            with opened(name) as source:
                assert source.path == path

    def test_opening_from_inside_the_folder_does_not_convert_again(
        self, checkpoint: Path, no_conversion: Callable[[], None], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with opened(checkpoint) as source:
            path = source.path
        no_conversion()
        monkeypatch.chdir(checkpoint)
        with opened(".") as source:
            assert source.path == path

    def test_store_that_another_process_finishes_meanwhile_is_opened(
        self, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def convert_second(source: Checkpoint, destination: Path, **options: Any) -> Path:
            convert(source, destination, **options)
            return convert(source, destination, **options)

        monkeypatch.setattr(store_home, "convert", convert_second)
        with opened(checkpoint) as source:
            assert source.status().state == "ready"

    def test_changed_weights_are_converted_anew(self, checkpoint: Path) -> None:
        with opened(checkpoint) as source:
            before = source.path
        opt_family.make("base", checkpoint, seed=1)
        expected = tensors_in(checkpoint / "model.safetensors")["model.decoder.layers.0.fc1.weight"]
        with opened(checkpoint) as source:
            assert source.path != before
            assert same_bits(source.fetch(0, all_ids(source)).wait(1).base[:, 0], expected)

    @pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer.json"])
    def test_changed_companion_file_is_in_the_store_opened_next(self, name: str, checkpoint: Path) -> None:
        path = checkpoint / name
        path.write_text(path.read_text() if path.exists() else "{}")
        opened(checkpoint).close()
        path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": 5}))
        with opened(checkpoint) as source:
            assert json.loads(source.model_files[name])["eos_token_id"] == 5

    def test_each_dtype_has_a_store_of_its_own(self, checkpoint: Path) -> None:
        paths = set()
        for dtype in (*opt_family.DTYPES, None):
            with opened(checkpoint, dtype=dtype) as source:
                assert source.profile.dtype == (dtype or "float32")
                assert (
                    source.dense()["model.decoder.embed_tokens.weight"].dtype == opt_family.DTYPES[dtype or "float32"]
                )
                paths.add(source.path)
        assert len(paths) == 3, "the checkpoint's own dtype, named or not, is one store"

    def test_dtype_that_a_store_does_not_have_is_a_bad_request(self, store: Path) -> None:
        with pytest.raises(BadRequest, match=r"holds float32, bfloat16 is asked for; convert .* --dtype bfloat16"):
            opened(store, dtype="bfloat16")
        opened(store, dtype="float32").close()

    @pytest.mark.parametrize("variables", [{"XDG_CACHE_HOME": "/somewhere"}, {"HOME": "/someone"}], ids=str)
    def test_home_without_a_variable_is_in_the_user_s_cache(
        self, variables: dict[str, str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name in ("SPARSEFLOW_HOME", "XDG_CACHE_HOME"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        expected = {"XDG_CACHE_HOME": "/somewhere/sparseflow", "HOME": "/someone/.cache/sparseflow"}
        assert sparseflow_home() == Path(expected[next(iter(variables))])


class TestModelConfiguration:
    @pytest.mark.parametrize("name", FAMILY)
    def test_of_the_same_model_is_accepted(self, name: str, family_store: Callable[..., Path]) -> None:
        opened(family_store(name), hf_config=OPTConfig(**FAMILY[name])).close()

    @pytest.mark.parametrize("name", [name for name in FAMILY if name != "base"])
    def test_of_another_member_of_the_family_does_not_match(self, name: str, store: Path) -> None:
        with pytest.raises(FingerprintMismatch, match="use the configuration in the store"):
            opened(store, hf_config=OPTConfig(**FAMILY[name]))

    @pytest.mark.parametrize(
        "change",
        [
            {"vocab_size": 127},
            {"max_position_embeddings": 65},
            {"num_attention_heads": 8},
            {"num_hidden_layers": 1},
            {"do_layer_norm_before": False},
        ],
        ids=lambda change: next(iter(change)),
    )
    def test_that_differs_in_one_value_does_not_match(self, change: dict[str, int], store: Path) -> None:
        with pytest.raises(FingerprintMismatch):
            opened(store, hf_config=OPTConfig(**(FAMILY["base"] | change)))


class TestMemory:
    def test_too_small_says_what_is_needed_and_allowed(self, demo_model: Path) -> None:
        with pytest.raises(NotEnoughMemory, match=r"[0-9.]+MiB must be resident .*, allowed are 1MiB.*allow more"):
            opened(demo_model, memory="1MiB")

    def test_automatic_is_what_is_free(self, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        free = psutil.virtual_memory()._replace(available=1000)
        monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
        with pytest.raises(NotEnoughMemory, match=r"free are 0.88KiB.*free some"):
            opened(store)

    def test_that_is_no_size_is_a_bad_request(self, store: Path) -> None:
        with pytest.raises(BadRequest, match="write a size above 0 with its unit, such as 6GiB"):
            opened(store, memory="lots")


class TestDamage:
    @pytest.mark.parametrize(("layer", "neuron", "part"), [(0, 0, 0), (1, 137, 1), (1, 255, 0)])
    def test_flipped_byte_in_a_bundle_names_file_layer_and_neuron(
        self, layer: int, neuron: int, part: int, store: Path
    ) -> None:
        path = store / shard_name(layer)
        start = read_places(path)["bundles"].offset
        hidden_nbytes = 64 * 4
        flip(path, start + (2 * neuron + part) * hidden_nbytes + 100)
        with pytest.raises(ShardCorrupt, match=rf"{shard_name(layer)}: layer {layer}, 1 of 256 .* neuron {neuron} "):
            opened(store)

    def test_flipped_byte_in_a_checksum_names_its_neuron(self, store: Path) -> None:
        flip(store / shard_name(1), -8 * 10)
        with pytest.raises(ShardCorrupt, match=f"{shard_name(1)}: layer 1, .* neuron {256 - 10} "):
            opened(store)

    @pytest.mark.parametrize("name", [DENSE_NAME, predictor_name(0), predictor_name(1), "config.json"])
    @pytest.mark.parametrize("offset", [60, -1])
    def test_flipped_byte_in_another_file_names_it(self, name: str, offset: int, store: Path) -> None:
        flip(store / name, offset)
        with pytest.raises(ShardCorrupt, match=f"{name}: .*convert the model again"):
            opened(store)

    @pytest.mark.parametrize("offset", [0, 7, 12, 60, 400])
    def test_flipped_byte_in_the_header_of_a_shard_names_it(self, offset: int, store: Path) -> None:
        flip(store / shard_name(1), offset)
        with pytest.raises(ShardCorrupt, match=shard_name(1)):
            opened(store)

    def test_shards_that_changed_places_are_corrupt(self, store: Path) -> None:
        one, other = (store / shard_name(layer) for layer in (0, 1))
        one.rename(store / "other")
        other.rename(one)
        (store / "other").rename(other)
        with pytest.raises(ShardCorrupt, match="layer"):
            opened(store)

    @pytest.mark.parametrize("name", EVERY_FILE)
    @pytest.mark.parametrize("kept", [0, 7, 0.5, -1])
    def test_truncated_file_is_named(self, name: str, kept: float, store: Path) -> None:
        content = (store / name).read_bytes()
        (store / name).write_bytes(content[: kept if isinstance(kept, int) else int(kept * len(content))])
        with pytest.raises(ShardCorrupt, match=f"{name}: .*convert the model again"):
            opened(store)

    @pytest.mark.parametrize("name", EVERY_FILE)
    def test_file_that_grew_is_named(self, name: str, store: Path) -> None:
        with open(store / name, "ab") as file:
            file.write(b"\0" * 8)
        with pytest.raises(ShardCorrupt, match=f"{name}: .*convert the model again"):
            opened(store)

    @pytest.mark.parametrize("name", EVERY_FILE)
    def test_missing_file_is_named(self, name: str, store: Path) -> None:
        (store / name).unlink()
        with pytest.raises(DiskError, match=f"{name}: file is missing; remove the store and convert"):
            opened(store)

    def test_without_a_manifest_it_is_no_store(self, store: Path) -> None:
        (store / MANIFEST_NAME).unlink()
        with pytest.raises(DiskError, match="not a store"):
            Manifest.load(store)
        with pytest.raises(DiskError):
            opened(store)

    @pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"format_version": 3}', "\xff"], ids=repr)
    def test_manifest_that_is_none_is_named(self, content: str, store: Path) -> None:
        (store / MANIFEST_NAME).write_text(content, encoding="latin-1")
        with pytest.raises(ShardCorrupt, match=MANIFEST_NAME):
            opened(store)

    def test_manifest_of_another_format_says_which_are_read(self, store: Path) -> None:
        path = store / MANIFEST_NAME
        path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 99}))
        with pytest.raises(DiskError, match="format version 99, this SparseFlow reads 3"):
            opened(store)

    def test_manifest_edited_by_hand_does_not_fit_its_fingerprint(self, store: Path) -> None:
        path = store / MANIFEST_NAME
        content = json.loads(path.read_text())
        content["profile"]["num_layers"] = 1
        path.write_text(json.dumps(content))
        with pytest.raises(ShardCorrupt, match="fingerprint"):
            opened(store)

    def test_failed_opening_leaves_the_store_closed_and_can_be_repeated(self, store: Path) -> None:
        flip(store / shard_name(0), -1)
        source = DiskWeightStore(store)
        with pytest.raises(ShardCorrupt):
            source.initialize_from_pretrained()
        with pytest.raises(BadRequest):
            source.fetch(0, np.zeros(1, np.uint32))
        flip(store / shard_name(0), -1)
        with source.initialize_from_pretrained():
            assert source.status().state == "ready"


USES: dict[str, Callable[[DiskWeightStore], object]] = {
    "dense": lambda source: source.dense(),
    "predictor_tensors": lambda source: source.predictor_tensors(),
    "fetch": lambda source: source.fetch(0, np.zeros(1, np.uint32)),
}


class TestLife:
    @pytest.mark.parametrize("use", USES)
    def test_use_before_open_is_a_bad_request_naming_the_remedy(self, use: str, store: Path) -> None:
        with pytest.raises(BadRequest, match=r"call initialize_from_pretrained\(\) first"):
            USES[use](DiskWeightStore(store))

    @pytest.mark.parametrize("use", USES)
    def test_use_after_close_is_a_bad_request(self, use: str, store: Path) -> None:
        source = opened(store)
        USES[use](source)
        source.close()
        with pytest.raises(BadRequest, match="the store is not open"):
            USES[use](source)

    def test_status_says_what_is_held(self, store: Path) -> None:
        with opened(store) as source:
            status = source.status()
            assert (status.state, status.n_bundles, status.n_resident) == ("ready", 2 * 256, 2 * 256)
            assert status.memory["shared"] > 2 * 256 * source.profile.bundle_nbytes
        status = source.status()
        assert (status.state, status.n_resident, status.memory["shared"]) == ("closed", 0, 0)

    def test_status_before_open_is_an_answer_or_one_error(self, store: Path) -> None:
        try:
            state = DiskWeightStore(store).status().state
        except SparseFlowError:
            return
        assert state == "closed"

    def test_close_may_be_called_twice_and_before_open(self, store: Path) -> None:
        source = DiskWeightStore(store)
        source.close()
        source.initialize_from_pretrained()
        source.close()
        source.close()

    def test_open_again_after_close(self, store: Path) -> None:
        source = opened(store)
        expected = source.fetch(1, all_ids(source)).wait(1).base.clone()
        source.close()
        with source.initialize_from_pretrained():
            assert same_bits(source.fetch(1, all_ids(source)).wait(1).base, expected)

    def test_opening_and_closing_leaves_no_file_open(self, store: Path) -> None:
        opened(store).close()
        before = sorted(os.listdir("/proc/self/fd"))
        for _ in range(3):
            with opened(store) as source:
                source.dense()
                source.predictor_tensors()
                source.fetch(0, all_ids(source))
        assert sorted(os.listdir("/proc/self/fd")) == before

    def test_closed_store_is_mapped_no_more(self, store: Path) -> None:
        with opened(store) as source:
            source.fetch(0, all_ids(source))
            assert mappings_of(store / shard_name(0))
        assert not mappings_of(store / shard_name(0))

    def test_two_stores_of_one_folder_are_independent(self, store: Path) -> None:
        one, other = opened(store), opened(store)
        one.close()
        assert other.fetch(0, all_ids(other)).wait(1).base.isfinite().all()
        other.close()


def mappings_of(path: Path) -> list[dict[str, int]]:
    """What /proc/self/smaps says of each mapping of a file, in bytes."""
    found: list[dict[str, int]] = []
    ours = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if not words[0].endswith(":"):
            ours = words[-1] == str(path)
            if ours:
                found.append({})
        elif ours and words[-1] == "kB":
            found[-1][words[0].rstrip(":")] = int(words[1]) * 1024
    return found


class TestSharedPages:
    @pytest.fixture
    def large_store(self, demo_model: Path) -> DiskWeightStore:
        """Dense weights of several MiB, so that pages count."""
        return opened(demo_model)

    def test_bundles_and_dense_equal_the_files(self, store: Path) -> None:
        with opened(store) as source:
            for name, tensor in tensors_in(store / DENSE_NAME).items():
                assert same_bits(source.dense()[name], tensor)
            predictors = source.predictor_tensors()
            for layer in range(2):
                for name, tensor in tensors_in(store / predictor_name(layer)).items():
                    assert same_bits(predictors[f"{layer}.{name}"], tensor)
                ids = np.array([3, 77, 255], np.uint32)
                with source.fetch(layer, ids) as fetch:
                    bundles = fetch.wait(1)
                    wanted = bundles.base[torch.from_numpy(bundles.slots.astype(np.int64))]
                    assert same_bits(wanted, tensors_in(store / shard_name(layer))["bundles"][[3, 77, 255]])

    def test_reading_dense_tensors_copies_nothing(self, large_store: DiskWeightStore) -> None:
        with large_store as source:
            tensors = [source.dense(), source.dense()]
            for tensor in (tensor for mapping in tensors for tensor in mapping.values()):
                tensor.float().sum()
            mapped = mappings_of(source.path / DENSE_NAME)
            size = (source.path / DENSE_NAME).stat().st_size
            assert size > 4 << 20
            assert sum(mapping["Rss"] for mapping in mapped) > 2 * size - (1 << 20)
            assert sum(mapping["Private_Dirty"] + mapping["Anonymous"] for mapping in mapped) == 0

    def test_reading_bundles_copies_nothing(self, large_store: DiskWeightStore) -> None:
        with large_store as source:
            for layer in range(source.profile.num_layers):
                source.fetch(layer, all_ids(source)).wait(1).base.float().sum()
                mapped = mappings_of(source.path / shard_name(layer))
                assert sum(mapping["Rss"] for mapping in mapped) >= source.profile.neurons_nbytes // 8
                assert sum(mapping["Private_Dirty"] + mapping["Anonymous"] for mapping in mapped) == 0

    def test_stray_write_does_not_reach_the_file(self, store: Path) -> None:
        with opened(store) as source:
            name = "model.decoder.embed_tokens.weight"
            tensor = source.dense()[name]
            tensor.fill_(7)
            source.fetch(1, all_ids(source)).wait(1).base.fill_(7)
            source.predictor_tensors()["0.coarse"].fill_(7)
            assert (tensor == 7).all()
            assert not (source.dense()[name] == 7).any()
        for file, entry in Manifest.load(store).files.items():
            check_content(store, file, entry)
        opened(store).close()

    def test_tensors_outlive_the_store_s_closing(self, store: Path) -> None:
        source = opened(store)
        dense = source.dense()
        base = source.fetch(0, all_ids(source)).wait(1).base
        source.close()
        assert all(tensor.isfinite().all() for tensor in dense.values())
        assert base.isfinite().all()
