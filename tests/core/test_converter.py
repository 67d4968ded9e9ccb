"""A store holds the checkpoint's weights bit for bit, or it does not come to be and one error says why."""

import json
import random
import re
import resource
import shutil
import threading
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import opt_family
import pytest
import torch
from opt_family import DTYPES, FAMILY, same_bits, tensors_in
from safetensors.torch import save_file
from torch import Tensor

from sparseflow.core.checkpoint import COMPANION_FILES, Checkpoint
from sparseflow.core.converter import convert
from sparseflow.core.journal import Journal
from sparseflow.errors import BadRequest, DiskError, NotEnoughDisk, SparseFlowError, UnsupportedModel
from sparseflow.kernels.bounds import CodedRows, decoded
from sparseflow.store.codes import FINE_STEPS, GROUP
from sparseflow.store.manifest import DENSE_NAME, Manifest, check_content, predictor_name, shard_name
from sparseflow.store.shard_format import ALIGNMENT_NBYTES, hash_file

Weights = dict[str, Tensor]


@pytest.fixture
def checkpoint(family_checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    """A checkpoint to be changed, in a folder of its own."""
    return Path(shutil.copytree(family_checkpoint("base"), tmp_path / "changed"))


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Where a store shall be; nothing else is in its folder."""
    folder = tmp_path / "stores"
    folder.mkdir()
    return folder / "store"


def made(checkpoint: Path, place: Path, dtype: str | None = None) -> Path:
    return convert(Checkpoint(checkpoint), place, dtype=dtype, quiet=True)


def change_weights(checkpoint: Path, change: Callable[[Weights], Any]) -> None:
    weights = tensors_in(checkpoint / "model.safetensors")
    change(weights)
    save_file(weights, checkpoint / "model.safetensors")


def change_config(checkpoint: Path, **change: Any) -> None:
    path = checkpoint / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


def is_mlp_weight(name: str) -> bool:
    return name.endswith((".fc1.weight", ".fc2.weight"))


class TestContent:
    @pytest.fixture(params=DTYPES)
    def dtype(self, request: pytest.FixtureRequest) -> str:
        return str(request.param)

    @pytest.fixture(params=FAMILY)
    def name(self, request: pytest.FixtureRequest) -> str:
        return str(request.param)

    @pytest.fixture
    def weights(self, name: str, dtype: str, family_checkpoint: Callable[..., Path]) -> Weights:
        """The checkpoint's, rounded to the dtype asked for."""
        weights = tensors_in(family_checkpoint(name) / "model.safetensors")
        return {key: tensor.to(DTYPES[dtype]) for key, tensor in weights.items()}

    @pytest.fixture
    def store(self, name: str, dtype: str, family_checkpoint: Callable[..., Path], place: Path) -> Path:
        return made(family_checkpoint(name), place, dtype)

    def test_equals_the_checkpoint_bit_for_bit(self, store: Path, name: str, weights: Weights) -> None:
        config = FAMILY[name]
        heads, hidden = config["num_attention_heads"], config["hidden_size"]
        dense = tensors_in(store / DENSE_NAME)
        for layer in range(config["num_hidden_layers"]):
            bundles = tensors_in(store / shard_name(layer))["bundles"]
            prefix = f"model.decoder.layers.{layer}"
            assert same_bits(bundles[:, 0], weights.pop(f"{prefix}.fc1.weight"))
            assert same_bits(bundles[:, 1], weights.pop(f"{prefix}.fc2.weight").T)
            for kind in ("weight", "bias") if config.get("enable_bias", True) else ("weight",):
                joined = dense.pop(f"{prefix}.self_attn.qkv_{kind}")
                assert joined.shape[:3] == (heads, 3, hidden // heads)
                for number, part in enumerate("qkv"):
                    expected = weights.pop(f"{prefix}.self_attn.{part}_proj.{kind}")
                    assert same_bits(joined[:, number].reshape(expected.shape), expected), (layer, part, kind)
        assert dense.keys() == weights.keys()
        for tensor_name, tensor in dense.items():
            assert same_bits(tensor, weights[tensor_name]), tensor_name

    def test_codes_bound_the_weights_as_stored(self, store: Path, name: str, weights: Weights) -> None:
        hidden = FAMILY[name]["hidden_size"]
        for layer in range(FAMILY[name]["num_hidden_layers"]):
            coded = tensors_in(store / predictor_name(layer))
            steps = coded["scales"].double().repeat_interleave(GROUP, dim=1)[:, :hidden]
            weight = weights[f"model.decoder.layers.{layer}.fc1.weight"].double()
            rows = CodedRows(**coded, bias=torch.zeros(len(weight)))
            for values, plane, n_steps in zip(decoded(rows), ("coarse", "fine"), (FINE_STEPS, 1), strict=True):
                error = weight - values[:, :hidden]
                assert (error.abs() <= n_steps * steps / 2).all()
                assert (coded[f"{plane}_error_norms"].double() >= error.norm(dim=1)).all()
                assert (coded["norms"].double() >= values[:, :hidden].norm(dim=1)).all()

    def test_manifest_describes_every_file(self, store: Path, name: str, dtype: str) -> None:
        manifest = Manifest.load(store)
        files = {str(path.relative_to(store)) for path in store.rglob("*") if path.is_file()}
        assert manifest.files.keys() | {"manifest.json"} == files
        for file, entry in manifest.files.items():
            check_content(store, file, entry)
        profile, config = manifest.profile, FAMILY[name]
        assert (profile.hidden_dimension, profile.ffn_dimension) == (config["hidden_size"], config["ffn_dim"])
        assert (profile.num_layers, profile.dtype) == (config["num_hidden_layers"], dtype)
        assert manifest.source["checkpoint_dtype"] == "float32"
        assert json.loads((store / "config.json").read_text())["dtype"] == dtype


def test_tensors_start_on_a_page(family_store: Callable[..., Path]) -> None:
    files = sorted(family_store("odd_sizes").rglob("*.safetensors"))
    assert len(files) == 1 + 3 + 3
    for path in files:
        with open(path, "rb") as file:
            assert (8 + int.from_bytes(file.read(8), "little")) % ALIGNMENT_NBYTES == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_a_dtype_the_checkpoint_s_is_kept(dtype: str, family_store: Callable[..., Path]) -> None:
    store = family_store("base", dtype)
    assert Manifest.load(store).profile.dtype == dtype
    assert tensors_in(store / shard_name(0))["bundles"].dtype == DTYPES[dtype]


@pytest.mark.parametrize("dtype", ["float64", "int8", "half", "auto", "torch.float8_e4m3fn"])
def test_dtype_that_no_store_has_is_a_bad_request(dtype: str, checkpoint: Path, place: Path) -> None:
    with pytest.raises(BadRequest, match=re.escape(dtype.removeprefix("torch."))):
        made(checkpoint, place, dtype)
    assert not place.exists()


def test_tokenizer_and_generation_files_are_copied_byte_for_byte(checkpoint: Path, place: Path) -> None:
    for number, name in enumerate(COMPANION_FILES):
        (checkpoint / name).write_bytes(f"{{'file': {number}}}\r\n\xff".encode("latin-1"))
    (checkpoint / "notes.txt").write_text("of no use to a store")
    store = made(checkpoint, place)
    for name in COMPANION_FILES:
        assert (store / name).read_bytes() == (checkpoint / name).read_bytes()
    assert not (store / "notes.txt").exists()


def test_nothing_is_left_beside_the_store(checkpoint: Path, place: Path) -> None:
    store = made(checkpoint, place)
    assert [path.name for path in place.parent.iterdir()] == ["store"]
    assert not [path for path in store.rglob("*") if path.name.endswith((".tmp", ".jsonl", ".partial"))]


def test_missing_folders_above_the_store_are_made(checkpoint: Path, place: Path) -> None:
    assert made(checkpoint, place / "deeper" / "still").is_dir()


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_same_checkpoint_gives_the_same_bytes_and_fingerprints(dtype: str, checkpoint: Path, place: Path) -> None:
    one, other = made(checkpoint, place, dtype), made(checkpoint, place.with_name("other"), dtype)
    assert (one / "manifest.json").read_bytes() == (other / "manifest.json").read_bytes()
    manifest = Manifest.load(other)
    for name, entry in manifest.files.items():
        check_content(one, name, entry)
    assert manifest == Manifest.load(one)


def test_fingerprints_are_of_the_weights_whatever_the_folder_is_called(checkpoint: Path, place: Path) -> None:
    renamed = Path(shutil.copytree(checkpoint, checkpoint.with_name("renamed")))
    one, other = Manifest.load(made(checkpoint, place)), Manifest.load(made(renamed, place.with_name("other")))
    assert one.files == other.files
    assert one.predictors_fingerprint == other.predictors_fingerprint
    assert one.weights_fingerprint == other.weights_fingerprint


def test_another_checkpoint_gives_other_fingerprints(checkpoint: Path, place: Path) -> None:
    one = Manifest.load(made(checkpoint, place))
    change_weights(checkpoint, lambda weights: weights["model.decoder.layers.1.fc1.weight"].neg_())
    other = Manifest.load(made(checkpoint, place.with_name("other")))
    assert one.weights_fingerprint != other.weights_fingerprint
    assert one.predictors_fingerprint != other.predictors_fingerprint


def test_global_random_generators_are_left_alone(checkpoint: Path, place: Path) -> None:
    before = (torch.get_rng_state(), np.random.get_state(), random.getstate())
    made(checkpoint, place)
    assert torch.equal(before[0], torch.get_rng_state())
    for one, other in zip(before[1], np.random.get_state(), strict=True):
        assert np.array_equal(one, other)
    assert before[2] == random.getstate()


class TestPlace:
    @pytest.mark.parametrize("kind", ["store", "folder", "file"])
    def test_that_is_taken_is_a_bad_request_and_left_as_it_is(self, kind: str, checkpoint: Path, place: Path) -> None:
        if kind == "store":
            made(checkpoint, place)
        elif kind == "folder":
            place.mkdir()
        else:
            place.write_text("mine")
        before = sorted((path, path.stat().st_mtime_ns) for path in place.parent.rglob("*"))
        with pytest.raises(BadRequest, match=re.escape(str(place))):
            made(checkpoint, place)
        assert sorted((path, path.stat().st_mtime_ns) for path in place.parent.rglob("*")) == before

    def test_under_a_file_is_a_disk_error(self, checkpoint: Path, place: Path) -> None:
        place.parent.joinpath("file").write_text("")
        with pytest.raises(DiskError, match="choose another place"):
            made(checkpoint, place.parent / "file" / "store")

    def test_held_by_another_converter_is_one_error_and_does_not_disturb_it(
        self, checkpoint: Path, place: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        save = Manifest.save
        refused: list[DiskError] = []

        def save_while_another_starts(manifest: Manifest, folder: Path) -> None:
            with pytest.raises(DiskError, match="another process is converting into it; wait") as caught:
                made(checkpoint, place)
            refused.append(caught.value)
            save(manifest, folder)

        monkeypatch.setattr(Manifest, "save", save_while_another_starts)
        store = made(checkpoint, place)
        assert len(refused) == 1
        assert Manifest.load(store).files[DENSE_NAME].nbytes == (store / DENSE_NAME).stat().st_size


DiskUsage = namedtuple("DiskUsage", "total used free")


def test_disk_too_small_is_said_before_anything_is_written(
    checkpoint: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: DiskUsage(2**30, 2**30 - 1000, 1000))
    with pytest.raises(NotEnoughDisk, match=r"MiB more.*iB are free; free some"):
        made(checkpoint, place)
    left = [path for path in place.parent.rglob("*") if not path.is_dir()]
    assert left == []


def test_disk_large_enough_for_what_is_left_to_write_suffices(
    checkpoint: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_manifest(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Manifest, "save", no_manifest)
        with pytest.raises(KeyboardInterrupt):
            made(checkpoint, place)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: DiskUsage(2**30, 2**30 - 2**24, 2**24))
    assert made(checkpoint, place) == place


class InMemory(Checkpoint):
    """A checkpoint that several threads may read."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._weights = tensors_in(folder / "model.safetensors")

    def tensor(self, name: str) -> Tensor:
        return self._weights[f"model.{name}"]


class TestSeveralThreads:
    @pytest.mark.parametrize("n_threads", [2, 16])
    def test_give_the_store_that_one_gives(self, n_threads: int, checkpoint: Path, place: Path) -> None:
        expected = Manifest.load(made(checkpoint, place))
        store = convert(InMemory(checkpoint), place.with_name("other"), quiet=True, n_threads=n_threads)
        assert Manifest.load(store) == expected
        for name, entry in expected.files.items():
            check_content(store, name, entry)

    def test_end_with_the_error_of_the_first_that_fails(self, checkpoint: Path, place: Path) -> None:
        change_weights(checkpoint, set_value(FC2, float("nan")))
        before = threading.active_count()
        with pytest.raises(UnsupportedModel, match=r"layer 1 fc1 and fc2 holds NaN"):
            convert(InMemory(checkpoint), place, quiet=True, n_threads=3)
        assert threading.active_count() == before
        assert list(place.parent.iterdir()) == []

    def test_keep_what_was_finished_before_a_kill(
        self, checkpoint: Path, place: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        source = InMemory(checkpoint)

        def killed(name: str) -> Tensor:
            if name == FC2.removeprefix("model."):
                raise KeyboardInterrupt
            return InMemory.tensor(source, name)

        with monkeypatch.context() as patch:
            patch.setattr(source, "tensor", killed)
            with pytest.raises(KeyboardInterrupt):
                convert(source, place, quiet=True, n_threads=2)
        finished = place.with_name("store.partial") / DENSE_NAME
        written_ns = finished.stat().st_mtime_ns
        store = convert(source, place, quiet=True, n_threads=2)
        assert (store / DENSE_NAME).stat().st_mtime_ns == written_ns


@pytest.fixture
def files_limited() -> Iterator[None]:
    """No file may grow over 64 KiB: writing fails half way, as on a disk that fills up meanwhile."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 << 10, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_disk_that_fails_while_writing_is_a_disk_error(checkpoint: Path, place: Path, files_limited: None) -> None:
    with pytest.raises(DiskError):
        made(checkpoint, place)
    assert not place.exists()


def set_value(name: str, value: float) -> Callable[[Weights], Any]:
    return lambda weights: weights[name].view(-1).__setitem__(7, value)


FC1 = "model.decoder.layers.1.fc1.weight"
FC2 = "model.decoder.layers.1.fc2.weight"
KEY_BIAS = "model.decoder.layers.0.self_attn.k_proj.bias"


class TestBadCheckpoint:
    @pytest.fixture(autouse=True)
    def _leaves_nothing_that_opens(self, place: Path) -> Iterator[None]:
        yield
        assert not place.exists()
        assert list(place.parent.rglob("manifest.json")) == []

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("name", [FC1, FC2, KEY_BIAS, "model.decoder.embed_positions.weight"])
    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
    def test_weight_that_is_no_number(self, name: str, value: float, dtype: str, checkpoint: Path, place: Path) -> None:
        change_weights(checkpoint, set_value(name, value))
        with pytest.raises(UnsupportedModel, match=r"NaN or infinity.*is the checkpoint intact"):
            made(checkpoint, place, dtype)

    @pytest.mark.parametrize("name", [FC1, FC2, KEY_BIAS])
    def test_weight_too_large_for_float16(self, name: str, checkpoint: Path, place: Path) -> None:
        change_weights(checkpoint, set_value(name, 70000.0))
        with pytest.raises(UnsupportedModel, match=r"float16.*convert with --dtype bfloat16 or float32"):
            made(checkpoint, place, "float16")

    @pytest.mark.parametrize("name", [FC1, FC2, KEY_BIAS, "model.decoder.final_layer_norm.weight"])
    def test_wrong_shape(self, name: str, checkpoint: Path, place: Path) -> None:
        change_weights(checkpoint, lambda weights: weights.update({name: weights[name][:-1].clone()}))
        with pytest.raises(DiskError, match=re.escape(name.removeprefix("model.")) + r".*config\.json says"):
            made(checkpoint, place)

    @pytest.mark.parametrize("name", [FC1, FC2, KEY_BIAS, "model.decoder.embed_tokens.weight"])
    def test_missing_tensor(self, name: str, checkpoint: Path, place: Path) -> None:
        change_weights(checkpoint, lambda weights: weights.pop(name))
        with pytest.raises(DiskError, match=re.escape(name.removeprefix("model."))):
            made(checkpoint, place)

    def test_missing_shard_file(self, checkpoint: Path, place: Path) -> None:
        weights = tensors_in(checkpoint / "model.safetensors")
        (checkpoint / "model.safetensors").unlink()
        names = sorted(weights)
        weight_map = {name: f"model-{n % 2}.safetensors" for n, name in enumerate(names)}
        (checkpoint / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        save_file({name: weights[name] for name in names[::2]}, checkpoint / "model-0.safetensors")
        with pytest.raises(DiskError, match=r"model-1\.safetensors"):
            made(checkpoint, place)

    @pytest.mark.parametrize("kept", [4, 2000, -1])
    def test_truncated_safetensors(self, kept: int, checkpoint: Path, place: Path) -> None:
        path = checkpoint / "model.safetensors"
        path.write_bytes(path.read_bytes()[:kept])
        with pytest.raises(DiskError, match=r"model\.safetensors.*is the download complete"):
            made(checkpoint, place)

    def test_activation_that_is_not_relu(self, checkpoint: Path, place: Path) -> None:
        change_config(checkpoint, activation_function="gelu")
        with pytest.raises(UnsupportedModel, match=r"'gelu'.*Use a ReLU checkpoint"):
            made(checkpoint, place)

    def test_model_that_is_no_opt(self, checkpoint: Path, place: Path) -> None:
        change_config(checkpoint, model_type="llama")
        with pytest.raises(UnsupportedModel, match=r"'llama'.*OPT family"):
            made(checkpoint, place)

    @pytest.mark.parametrize("dtype", [None, "float16"])
    @pytest.mark.parametrize("name", ["model.decoder.layers.0.fc1.weight", FC1, "model.decoder.embed_tokens.weight"])
    def test_quantised_weights(self, name: str, dtype: str | None, checkpoint: Path, place: Path) -> None:
        change_weights(checkpoint, lambda weights: weights.update({name: (weights[name] * 100).to(torch.int8)}))
        with pytest.raises(UnsupportedModel, match=r"int8.*before it was quantised"):
            made(checkpoint, place, dtype)

    @pytest.mark.parametrize(
        "change",
        [
            {"num_attention_heads": 5},
            {"num_attention_heads": 0},
            {"num_hidden_layers": 3},
            {"ffn_dim": 0},
            {"hidden_size": -64},
            {"vocab_size": 64},
            {"word_embed_proj_dim": 32},
            {"tie_word_embeddings": False},
        ],
        ids=lambda change: "{}={}".format(*next(iter(change.items()))),
    )
    def test_configuration_that_is_not_of_these_weights(
        self, change: dict[str, Any], checkpoint: Path, place: Path
    ) -> None:
        change_config(checkpoint, **change)
        with pytest.raises(SparseFlowError):
            made(checkpoint, place)


def test_weight_too_large_for_float16_converts_to_wider_dtypes(checkpoint: Path, place: Path) -> None:
    change_weights(checkpoint, set_value(FC1, 70000.0))
    for dtype in ("bfloat16", "float32"):
        store = made(checkpoint, place.with_name(dtype), dtype)
        assert tensors_in(store / shard_name(1))["bundles"].max() > 69000


def test_failed_conversion_can_be_repeated_with_another_dtype(checkpoint: Path, place: Path) -> None:
    change_weights(checkpoint, set_value(FC2, 70000.0))
    with pytest.raises(UnsupportedModel):
        made(checkpoint, place, "float16")
    store = made(checkpoint, place, "float32")
    assert Manifest.load(store).profile.dtype == "float32"
    assert {tensors_in(path)["bundles"].dtype for path in store.glob("neurons/*")} == {torch.float32}
    assert [path.name for path in place.parent.iterdir()] == ["store"]


def test_a_rerun_never_mixes_two_checkpoints_whatever_the_folder_is_called(tmp_path: Path) -> None:
    """The journal identifies its conversion by a line that holds the name."""
    folder, place = tmp_path / "my model", tmp_path / "store"
    opt_family.make("base", folder)
    identity = Checkpoint(folder).identity()
    journal = Journal(tmp_path, {"name": "my model", "source": identity})
    journal.start()
    (tmp_path / "part").write_bytes(b"x")
    journal.record("part", hash_file(tmp_path / "part"))
    assert Journal(tmp_path, {"name": "my model", "source": identity}).finished.keys() == {"part"}
    assert Journal(tmp_path, {"name": "my model", "source": []}).finished == {}
    assert not place.exists()


def test_a_tied_head_that_differs_from_the_embeddings_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    opt_family.make("untied", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    with pytest.raises(UnsupportedModel, match=r'"tie_word_embeddings": false'):
        convert(Checkpoint(folder), tmp_path / "store", quiet=True)


@pytest.mark.parametrize("place", [".", "/"])
def test_a_place_that_exists_is_refused_by_its_whole_name(
    place: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadRequest, match="exists already"):
        convert(Checkpoint(checkpoint), Path(place), quiet=True)
