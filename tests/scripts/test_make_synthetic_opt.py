"""The script of synthetic models: neurons fire as often as it says, and both of its forms hold the same weights."""

import importlib.util
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from child_process import run_python
from torch import Tensor
from transformers import OPTForCausalLM

from sparseflow.core.checkpoint import Checkpoint
from sparseflow.core.converter import convert
from sparseflow.store.manifest import DENSE_NAME, MANIFEST_NAME, Manifest

SCRIPT = Path(__file__).parents[2] / "scripts" / "make_synthetic_opt.py"
LAYERS, FFN = 4, 512  # of the preset
RANK_BANDS = ((0, 4), (4, 16), (16, 64), (64, 192), (192, FFN))

PEAK_OF_A_STORE = """
import importlib.util, json, sys
from pathlib import Path

def status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))

spec = importlib.util.spec_from_file_location("make_synthetic_opt", sys.argv[1])
script = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)
out, sizes = Path(sys.argv[2]), map(int, sys.argv[3:])
script.make_store(script.Recipe(script.PRESETS["tiny"]), out / "warm-up", "warm-up")
Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
before = status("VmRSS")
recipe = script.Recipe(script.Shape(*sizes), n_calibration_texts=12, n_heldout_texts=4)
script.make_store(recipe, out / "store", "mid-size")
print(status("VmHWM") - before)
"""


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("make_synthetic_opt", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def make(script: ModuleType, out: Path, *flags: str) -> Path:
    assert script.main(["--preset", "tiny", "--out", str(out), *flags]) == 0
    return out


@pytest.fixture(scope="module")
def folder(script: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A transformers folder. To be read only."""
    return make(script, tmp_path_factory.mktemp("folder") / "tiny")


@pytest.fixture(scope="module")
def store(script: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of the same arguments. To be read only."""
    return make(script, tmp_path_factory.mktemp("store") / "tiny", "--store")


def fresh_ids(model: OPTForCausalLM, n_texts: int, n_tokens: int = 32) -> Tensor:
    """Tokens that no biases were set by, nor measured with."""
    generator = torch.Generator().manual_seed(987)
    return torch.randint(4, model.config.vocab_size, (n_texts, n_tokens), generator=generator)


def firing(model: OPTForCausalLM, ids: Tensor) -> Tensor:
    """Which neurons fire in a forward pass of transformers: (layers, texts, tokens, ffn) bool."""
    layers = model.model.decoder.layers
    fired: list[Tensor] = []
    hooks = [
        layer.fc1.register_forward_hook(lambda _fc1, _inputs, output: fired.append(output > 0)) for layer in layers
    ]
    with torch.inference_mode():
        model(ids)
    for hook in hooks:
        hook.remove()
    return torch.stack([layer.view(*ids.shape, -1) for layer in fired])


@pytest.fixture(scope="module")
def model(folder: Path) -> OPTForCausalLM:
    """The folder as transformers opens it, computing in float32."""
    return OPTForCausalLM.from_pretrained(folder, dtype="float32").eval()


@pytest.fixture(scope="module")
def fired(model: OPTForCausalLM) -> Tensor:
    """Which neurons fire for fresh tokens."""
    return firing(model, fresh_ids(model, n_texts=400))


class TestFolder:
    def test_opens_with_transformers_and_with_checkpoint(self, folder: Path) -> None:
        model, report = OPTForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
        assert not any(report.values()), report
        assert model.dtype == torch.float16
        checkpoint = Checkpoint(folder)
        assert checkpoint.dtype() == "float16"
        for name, parameter in model.named_parameters():
            assert checkpoint.shaped(name, tuple(parameter.shape)).equal(parameter), name

    def test_small_files_are_what_transformers_writes(self, folder: Path, tmp_path: Path) -> None:
        OPTForCausalLM.from_pretrained(folder, dtype="auto").save_pretrained(tmp_path)
        for name in ("config.json", "generation_config.json"):
            assert json.loads((folder / name).read_text()) == json.loads((tmp_path / name).read_text())

    def test_shards_and_index_are_what_transformers_makes_of_them(
        self, script: ModuleType, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(script, "SHARD_NBYTES", 600_000)
        sharded = make(script, tmp_path / "sharded")
        shards = sorted(path.name for path in sharded.glob("*.safetensors"))
        assert shards == [f"model-{n:05d}-of-00004.safetensors" for n in range(1, 5)]
        whole = OPTForCausalLM.from_pretrained(folder, dtype="auto")
        for name, weight in OPTForCausalLM.from_pretrained(sharded, dtype="auto").state_dict().items():
            assert weight.equal(whole.state_dict()[name]), name
        whole.save_pretrained(tmp_path / "saved", max_shard_size="600KB")
        ours, theirs = (
            json.loads((place / "model.safetensors.index.json").read_text()) for place in (sharded, tmp_path / "saved")
        )
        assert ours["metadata"] == theirs["metadata"]
        assert ours["weight_map"].keys() == theirs["weight_map"].keys()

    def test_failed_run_leaves_nothing(
        self, script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def interrupted(*_: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(script, "calibrate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            script.main(["--preset", "tiny", "--out", str(tmp_path / "tiny")])
        assert not list(tmp_path.iterdir())


class TestFiring:
    def test_frequency_falls_off_with_rank(self, script: ModuleType, fired: Tensor) -> None:
        recipe = script.Recipe(script.PRESETS["tiny"])
        for layer in range(LAYERS):
            expected, order = script.frequencies(recipe, layer).sort(descending=True)
            measured = fired[layer].double().mean(dim=(0, 1))[order]
            for start, end in RANK_BANDS:
                band = slice(start, end)
                assert measured[band].mean().item() == pytest.approx(expected[band].mean().item(), rel=0.12), (
                    layer,
                    band,
                )

    def test_single_neurons_fire_as_often_as_theirs_shall(self, script: ModuleType, fired: Tensor) -> None:
        recipe = script.Recipe(script.PRESETS["tiny"])
        for layer in range(LAYERS):
            expected = script.frequencies(recipe, layer)
            measured = fired[layer].double().mean(dim=(0, 1))
            n_tokens = fired[layer][..., 0].numel()
            # Tokens of a text are not independent, and calibration saw a sample as well: a few times the binomial.
            deviation = (measured - expected).abs() / (expected * (1 - expected) / n_tokens).sqrt()
            assert deviation.quantile(0.9) < 8, layer

    def test_layer_means_rise_from_one_to_ten_percent(self, fired: Tensor) -> None:
        means = fired.double().mean(dim=(1, 2, 3))
        assert means.tolist() == pytest.approx([0.01, 0.0215, 0.0464, 0.1], rel=0.05)

    def test_neurons_that_fire_often_are_not_neighbours(self, fired: Tensor) -> None:
        often = fired[-1].double().mean(dim=(0, 1)).topk(FFN // 8).indices.sort().values
        n_pairs = int((often.diff() == 1).sum())
        assert n_pairs < 24  # 8 if they lie at random, 63 side by side

    def test_printed_shares_are_those_of_transformers_on_the_heldout_tokens(
        self, script: ModuleType, model: OPTForCausalLM, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        make(script, tmp_path / "again", "--json")
        printed = json.loads(capsys.readouterr().out)
        recipe = script.Recipe(script.PRESETS["tiny"])
        fired = firing(model, recipe.token_ids()[recipe.n_calibration_texts :])
        followed, again = fired[:, :, 1:], fired[:, :, 1:] & fired[:, :, :-1]
        overlap = again.sum(dim=(1, 2, 3)) / followed.sum(dim=(1, 2, 3))
        for layer, row in enumerate(printed["layers"]):
            assert row["active_share"] == pytest.approx(fired[layer].double().mean().item(), rel=1e-3)
            assert row["overlap"] == pytest.approx(overlap[layer].item(), rel=1e-3)
        assert printed["active_share"] == pytest.approx(fired.double().mean().item(), rel=1e-3)

    def test_firing_does_not_depend_on_the_position(self, model: OPTForCausalLM) -> None:
        late = firing(model, fresh_ids(model, n_texts=32, n_tokens=160))[:, :, 128:]
        assert late.double().mean(dim=(1, 2, 3)).tolist() == pytest.approx([0.01, 0.0215, 0.0464, 0.1], rel=0.15)

    def test_logits_are_spread_and_do_not_repeat_the_token(self, model: OPTForCausalLM) -> None:
        ids = fresh_ids(model, n_texts=16)
        with torch.inference_mode():
            logits = model(ids).logits
        assert logits.std().item() == pytest.approx(3, rel=0.2)
        likeliest = logits.argmax(dim=-1)
        assert (likeliest == ids).double().mean() < 0.05
        assert len(likeliest.unique()) > ids.numel() / 4


class TestStore:
    def test_files_are_those_of_converting_the_folder(self, folder: Path, store: Path, tmp_path: Path) -> None:
        converted = convert(Checkpoint(folder), tmp_path / "converted", quiet=True)
        manifests = [Manifest.load(place) for place in (store, converted)]
        assert manifests[0].files == manifests[1].files
        assert manifests[0].weights_fingerprint == manifests[1].weights_fingerprint

    def test_interrupted_run_goes_on(
        self, script: ModuleType, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write = script.SyntheticCheckpoint.tensor

        def fails_at_third_layer(self: object, name: str) -> Tensor:
            if name == "decoder.layers.2.fc2.weight":
                raise KeyboardInterrupt
            return write(self, name)

        with monkeypatch.context() as patch:
            patch.setattr(script.SyntheticCheckpoint, "tensor", fails_at_third_layer)
            with pytest.raises(KeyboardInterrupt):
                make(script, tmp_path / "tiny", "--store")
        finished = tmp_path / "tiny.partial" / DENSE_NAME
        written_ns = finished.stat().st_mtime_ns
        resumed = make(script, tmp_path / "tiny", "--store")
        assert (resumed / DENSE_NAME).stat().st_mtime_ns == written_ns
        assert Manifest.load(resumed).files == Manifest.load(store).files

    def test_peak_memory_is_a_few_layers(self, tmp_path: Path) -> None:
        hidden, ffn, layers, vocab = 1024, 4096, 10, 4000
        sizes = (hidden, ffn, layers, 16, vocab, 64)
        # Real models' tensors are above glibc's threshold and leave with their owner; so shall these.
        run = run_python(PEAK_OF_A_STORE, SCRIPT, tmp_path, *sizes, timeout_s=300, MALLOC_MMAP_THRESHOLD_=str(1 << 19))
        layer_nbytes = 2 * (2 * hidden * ffn + 4 * hidden * hidden)
        limit = 4 * layer_nbytes  # one in float32, and as much again for what is drawn and what passes through
        assert (tmp_path / "store" / MANIFEST_NAME).exists()
        assert layers * layer_nbytes > 2 * limit, "a script that holds all of it would pass"
        assert int(run) < limit, f"{int(run) / 2**20:.0f} MiB of {limit / 2**20:.0f}"


@pytest.mark.parametrize("form", [[], ["--store"]])
class TestArguments:
    def test_same_seed_same_bytes_and_another_others(
        self, form: list[str], script: ModuleType, folder: Path, store: Path, tmp_path: Path
    ) -> None:
        place = store if form else folder
        same, other = make(script, tmp_path / "same", *form), make(script, tmp_path / "other", *form, "--seed", "1")
        weights = {path.relative_to(place) for path in place.rglob("*.safetensors")}
        assert weights
        for name in weights:
            assert (same / name).read_bytes() == (place / name).read_bytes()
            assert (other / name).read_bytes() != (place / name).read_bytes()

    def test_existing_place_is_refused_and_left_alone(
        self, form: list[str], script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "precious").write_text("keep", encoding="utf-8")
        assert script.main(["--preset", "tiny", "--out", str(tmp_path), *form]) == 2
        assert f"--out {tmp_path}: exists already; remove it, or name another place" in capsys.readouterr().err
        assert [path.name for path in tmp_path.iterdir()] == ["precious"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_other_dtypes_are_stored_as_such(dtype: str, script: ModuleType, tmp_path: Path) -> None:
    assert Checkpoint(make(script, tmp_path / dtype, "--dtype", dtype)).dtype() == dtype


@pytest.mark.parametrize("mean", [0.003, 0.01, 0.1, 0.5])
def test_ranked_frequencies_have_the_mean_and_the_form(script: ModuleType, mean: float) -> None:
    firing_shares = script.ranked_frequencies(3001, mean)
    assert firing_shares.mean().item() == pytest.approx(mean, rel=1e-9)
    assert firing_shares.max() <= 0.95
    products = firing_shares * torch.arange(1, 3002)
    assert products[firing_shares < 0.95].std() < 1e-9


def test_presets_have_the_published_shapes_and_go_by_either_name(script: ModuleType) -> None:
    shapes = {"125m": (768, 3072, 12, 12), "1.3b": (2048, 8192, 24, 32)}
    shapes |= {"6.7b": (4096, 16384, 32, 32), "13b": (5120, 20480, 40, 40)}
    for name, shape in shapes.items():
        assert script.PRESETS[script.SHORT_NAMES[name]] == script.Shape(*shape, vocab=50272, positions=2048)


def test_identity_follows_every_argument(script: ModuleType, tmp_path: Path) -> None:
    recipe = script.Recipe(script.PRESETS["tiny"])
    others = [replace(recipe, seed=1), replace(recipe, dtype="float32"), replace(recipe, n_calibration_texts=64)]
    others.append(replace(recipe, shape=replace(recipe.shape, heads=8)))
    identities = [script.SyntheticCheckpoint(each, tmp_path, "any").identity() for each in (recipe, *others)]
    assert len({json.dumps(identity) for identity in identities}) == len(identities)
    assert json.loads(json.dumps(identities[0])) == identities[0]
