"""Checkpoints are found and read in every form transformers writes, and nothing in one is ever executed."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import opt_family
import pytest
import torch
from child_process import run_python
from safetensors.torch import save_file
from torch import Tensor
from transformers import OPTForCausalLM

from sparseflow.core.checkpoint import Checkpoint, locate
from sparseflow.errors import DiskError, SparseFlowError, UnsupportedModel

Weights = dict[str, Tensor]


@pytest.fixture(scope="module")
def source(family_checkpoint: Callable[..., Path]) -> Path:
    return family_checkpoint("untied")


@pytest.fixture
def weights(source: Path) -> Weights:
    return opt_family.tensors_in(source / "model.safetensors")


@pytest.fixture
def folder(source: Path, tmp_path: Path) -> Path:
    """A checkpoint folder that has no weights yet."""
    made = tmp_path / "checkpoint"
    made.mkdir()
    shutil.copy(source / "config.json", made)
    return made


def without_prefix(weights: Weights) -> Weights:
    return {name.removeprefix("model."): tensor.clone() for name, tensor in weights.items()}


def halves(weights: Weights) -> list[Weights]:
    names = sorted(weights)
    return [{name: weights[name] for name in names[start::2]} for start in (0, 1)]


def write_index(folder: Path, listing: str, files: dict[str, Weights]) -> None:
    weight_map = {name: file for file, tensors in files.items() for name in tensors}
    (folder / listing).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), encoding="utf-8")


def save_single_safetensors(folder: Path, weights: Weights) -> None:
    save_file(weights, folder / "model.safetensors")


def save_sharded_safetensors(folder: Path, weights: Weights) -> None:
    model = OPTForCausalLM.from_pretrained(folder.parent / "whole")
    model.save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2


def save_single_bin(folder: Path, weights: Weights) -> None:
    torch.save(weights, folder / "pytorch_model.bin")


def save_sharded_bin(folder: Path, weights: Weights) -> None:
    files = {f"pytorch_model-{n}-of-2.bin": part for n, part in enumerate(halves(weights), 1)}
    for name, part in files.items():
        torch.save(part, folder / name)
    write_index(folder, "pytorch_model.bin.index.json", files)


def save_old_bin(folder: Path, weights: Weights) -> None:
    torch.save(weights, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)


def save_without_prefix(folder: Path, weights: Weights) -> None:
    save_file(without_prefix(weights), folder / "model.safetensors")


def save_old_bin_without_prefix(folder: Path, weights: Weights) -> None:
    save_old_bin(folder, without_prefix(weights))


FORMS: list[Callable[[Path, Weights], None]] = [
    save_single_safetensors,
    save_sharded_safetensors,
    save_single_bin,
    save_sharded_bin,
    save_old_bin,
    save_without_prefix,
    save_old_bin_without_prefix,
]


@pytest.mark.parametrize("save", FORMS, ids=lambda save: save.__name__)
def test_every_tensor_is_read_bit_for_bit(
    save: Callable[[Path, Weights], None], folder: Path, source: Path, weights: Weights
) -> None:
    (folder.parent / "whole").symlink_to(source)
    save(folder, weights)
    checkpoint = Checkpoint(folder)
    for name, expected in without_prefix(weights).items():
        assert name in checkpoint
        assert opt_family.same_bits(checkpoint.tensor(name), expected), name
    assert checkpoint.dtype() == "float32"
    assert checkpoint.config.num_hidden_layers == 2
    assert "decoder.layers.2.fc1.weight" not in checkpoint


@pytest.mark.parametrize("dtype", opt_family.DTYPES)
def test_dtype_is_that_of_the_weights(dtype: str, family_checkpoint: Callable[..., Path]) -> None:
    assert Checkpoint(family_checkpoint("base", dtype)).dtype() == dtype


def test_safetensors_come_before_pickled_files(folder: Path, weights: Weights) -> None:
    save_file(weights, folder / "model.safetensors")
    save_single_bin(folder, {name: tensor + 1 for name, tensor in weights.items()})
    name = "decoder.layers.0.fc1.weight"
    assert torch.equal(Checkpoint(folder).tensor(name), weights[f"model.{name}"])


def test_tensor_is_read_again_after_release(folder: Path, weights: Weights) -> None:
    save_sharded_bin(folder, weights)
    checkpoint = Checkpoint(folder)
    for _ in range(2):
        assert torch.equal(checkpoint.tensor("decoder.layers.1.fc2.bias"), weights["model.decoder.layers.1.fc2.bias"])
        checkpoint.release()


def test_missing_tensor_is_named(folder: Path, weights: Weights) -> None:
    del weights["model.decoder.layers.1.fc2.bias"]
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(DiskError, match=r"decoder\.layers\.1\.fc2\.bias"):
        Checkpoint(folder).tensor("decoder.layers.1.fc2.bias")


def test_tensor_that_only_the_index_knows_is_named(folder: Path, weights: Weights) -> None:
    files = {f"model-{n}.safetensors": part for n, part in enumerate(halves(weights))}
    write_index(folder, "model.safetensors.index.json", files)
    name = sorted(files["model-0.safetensors"])[0]
    del files["model-0.safetensors"][name]
    for file, part in files.items():
        save_file(part, folder / file)
    with pytest.raises(DiskError, match=rf"model-0\.safetensors.*{name}"):
        Checkpoint(folder).tensor(name.removeprefix("model."))


def test_missing_file_of_an_index_is_named(folder: Path, weights: Weights) -> None:
    save_sharded_bin(folder, weights)
    (folder / "pytorch_model-2-of-2.bin").unlink()
    with pytest.raises(DiskError, match=r"pytorch_model-2-of-2\.bin"):
        Checkpoint(folder)


def test_folder_without_weights_is_no_checkpoint(folder: Path) -> None:
    with pytest.raises(DiskError, match=r"model\.safetensors"):
        Checkpoint(folder)


def test_folder_without_configuration_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(DiskError, match=r"no config\.json"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "null",
        '"opt"',
        b"\xff\xfe\x00",
        '{"model_type": "opt", "hidden_size": "wide"}',
        '{"model_type": "opt", "num_hidden_layers": null}',
    ],
    ids=["empty", "cut", "list", "null", "text", "not-utf8", "word-for-a-size", "null-for-a-size"],
)
def test_configuration_that_is_none_is_one_error_naming_it(content: str | bytes, folder: Path) -> None:
    (folder / "config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(SparseFlowError, match="checkpoint"):
        Checkpoint(folder)


@pytest.mark.parametrize(
    ("change", "named"),
    [({"model_type": "llama"}, "llama"), ({"activation_function": "gelu"}, "gelu")],
    ids=["llama", "gelu"],
)
def test_model_that_is_not_a_relu_opt_is_unsupported(change: dict[str, Any], named: str, folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UnsupportedModel, match=named):
        Checkpoint(folder)


@pytest.mark.parametrize(
    "content",
    ["", "{", "{}", "[]", '{"weight_map": []}', '{"weight_map": null}'],
    ids=["empty", "cut", "no-map", "list", "list-for-a-map", "null-for-a-map"],
)
def test_index_that_is_none_is_one_error_naming_it(content: str, folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(DiskError, match=r"model\.safetensors\.index\.json"):
        Checkpoint(folder)


@pytest.mark.parametrize("name", ["../elsewhere.safetensors", "/etc/passwd", "a/b.safetensors", "", 5, ["x"], None])
def test_index_that_names_no_file_beside_it_is_refused(name: object, folder: Path) -> None:
    index = {"weight_map": {"lm_head.weight": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(DiskError, match="is no name of a file beside it"):
        Checkpoint(folder)


def test_index_of_deep_nesting_is_one_error(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text("[" * 100_000)
    with pytest.raises(DiskError, match="no index of weights"):
        Checkpoint(folder)


def test_what_asks_for_labels_or_code_is_not_taken(folder: Path, weights: Weights) -> None:
    save_file(weights, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config |= {"num_labels": 10**9, "attn_implementation": "someone/kernel", "auto_map": {"AutoConfig": "evil.Config"}}
    (folder / "config.json").write_text(json.dumps(config))
    taken = Checkpoint(folder).config
    assert taken.num_labels == 2
    assert not hasattr(taken, "auto_map")


@pytest.mark.parametrize(("folder_name", "name"), [("opt\u00a0tiny", "opt\u00a0tiny"), ("opt\ntiny", "opt\\ntiny")])
def test_name_is_one_that_a_line_can_show(folder: Path, weights: Weights, folder_name: str, name: str) -> None:
    save_file(weights, folder / "model.safetensors")
    renamed = folder.rename(folder.with_name(folder_name))
    assert Checkpoint(renamed).name == name


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("kept", [0, 0.3, 0.99])
def test_cut_weights_are_one_error_naming_the_file(name: str, kept: float, folder: Path, weights: Weights) -> None:
    save_single_safetensors(folder, weights) if name.endswith("s") else save_single_bin(folder, weights)
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(DiskError, match=name):
        Checkpoint(folder).tensor("lm_head.weight")


@pytest.mark.parametrize(
    "content",
    [[1, 2], 5, torch.zeros(3), {"lm_head.weight": 5}],
    ids=["list", "number", "tensor", "number-for-a-tensor"],
)
def test_pickled_file_that_is_no_state_dict_is_one_error(content: object, folder: Path) -> None:
    torch.save(content, folder / "pytorch_model.bin")
    with pytest.raises(DiskError, match="checkpoint"):
        Checkpoint(folder).tensor("lm_head.weight")


class Touch:
    """Creates a file where it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.marker), "w")


@pytest.mark.parametrize("new_format", [True, False], ids=["zip", "old"])
class TestPickledCode:
    @pytest.fixture
    def marker(self, new_format: bool, folder: Path, weights: Weights, tmp_path: Path) -> Path:
        marker = tmp_path / "executed"
        content = {**weights, "model.decoder.extra": Touch(marker)}
        torch.save(content, folder / "pytorch_model.bin", _use_new_zipfile_serialization=new_format)
        return marker

    @pytest.mark.filterwarnings("ignore::ResourceWarning")
    def test_would_run_in_a_reader_that_trusts_it(self, marker: Path, folder: Path) -> None:
        torch.load(folder / "pytorch_model.bin", weights_only=False)
        assert marker.exists()

    def test_is_refused_and_not_executed(self, marker: Path, folder: Path) -> None:
        with pytest.raises(DiskError, match=r"pytorch_model\.bin"):
            Checkpoint(folder)
        assert not marker.exists()

    def test_is_not_advertised_by_the_error(self, marker: Path, folder: Path) -> None:
        with pytest.raises(DiskError) as caught:
            Checkpoint(folder)
        assert "weights_only" not in str(caught.value)  # torch's own text tells how to run the code after all
        assert "\n" not in str(caught.value)


class TestLocate:
    def test_folder_is_found_by_any_spelling(
        self, source: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.chdir(source.parent)
        monkeypatch.setenv("HOME", str(source.parent))
        for name in (str(source), source.name, f"./{source.name}", f"~/{source.name}"):
            assert locate(name) == source.resolve()

    @pytest.mark.parametrize("name", ["./none", "/none/such", "~/none/such", "a/b/c", "~no-such-user/opt"])
    def test_path_that_is_none_is_not_asked_of_the_hub(self, name: str) -> None:
        with pytest.raises(DiskError, match="no such folder"):
            locate(name)

    def test_file_is_no_checkpoint(self, source: Path) -> None:
        with pytest.raises(DiskError, match="give the checkpoint's folder"):
            locate(str(source / "model.safetensors"))

    @pytest.mark.parametrize("name", ["opt 1.3b", "opt..x", "a/b?", "x" * 200])
    def test_name_that_can_be_neither_is_one_error(self, name: str) -> None:
        with pytest.raises(DiskError, match="no folder of that name"):
            locate(name)


REPORT = """
import sys
from sparseflow.core.checkpoint import Checkpoint, locate
from sparseflow.errors import SparseFlowError
try:
    folder = locate(sys.argv[1])
    print("found", folder, Checkpoint(folder).tensor("lm_head.weight").double().sum().item())
except SparseFlowError as error:
    print(type(error).__name__, error)
"""


class TestHubCache:
    """In a process of its own, because huggingface_hub reads its environment when it is imported."""

    @pytest.fixture
    def hub_home(self, source: Path, tmp_path: Path) -> Path:
        revision = "0123456789abcdef0123456789abcdef01234567"
        repository = tmp_path / "hf-home" / "hub" / "models--somebody--tiny-opt"
        shutil.copytree(source, repository / "snapshots" / revision)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(revision)
        return tmp_path / "hf-home"

    @pytest.fixture
    def report(self, hub_home: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
        for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "TRANSFORMERS_CACHE"):
            monkeypatch.delenv(variable, raising=False)

        def report(name: str) -> str:
            printed = run_python(REPORT, name, HF_HOME=str(hub_home), HF_HUB_OFFLINE="1")
            return printed.rstrip("\n")

        return report

    def test_id_is_found_offline(self, report: Callable[[str], str], hub_home: Path, weights: Weights) -> None:
        kind, folder, total = report("somebody/tiny-opt").split()
        assert kind == "found"
        assert Path(folder).is_relative_to(hub_home)
        assert float(total) == weights["lm_head.weight"].double().sum().item()

    def test_id_not_there_offline_is_one_error_with_a_remedy(self, report: Callable[[str], str]) -> None:
        printed = report("somebody/other-opt")
        assert printed.startswith("DiskError somebody/other-opt: ")
        assert "download it first" in printed
        assert "\n" not in printed
