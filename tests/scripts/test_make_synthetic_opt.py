"""The script of synthetic models: neurons fire as often as it says, and both of its forms hold the same weights."""

import importlib.util
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from child_process import run_python
from opt_family import tensors_in
from torch import Tensor
from transformers import OPTForCausalLM

from sparseflow.calibration import activity_statistics, tensor_records
from sparseflow.calibration.activations import LayerActivity
from sparseflow.calibration.cuts import RECALLS
from sparseflow.calibration.layer_fit import LayerFitter
from sparseflow.cli.main import main as sparseflow
from sparseflow.core import torch_codes
from sparseflow.core.checkpoint import Checkpoint
from sparseflow.core.converter import convert
from sparseflow.core.weight_manager import DiskWeightStore
from sparseflow.engine import budgets
from sparseflow.kernels.bounds import CodedRows, Margin, Scorer
from sparseflow.models.opt_sparse import SparseOPTForCausalLM
from sparseflow.orchestration.calibrated_predictor import calibrated_predictor, calibration_of
from sparseflow.store.codes import Codes, code_layer, layer_dither
from sparseflow.store.manifest import DENSE_NAME, MANIFEST_NAME, Manifest, predictor_name, shard_name

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
        def interrupted(*_: object, **_records: object) -> None:
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

    @pytest.mark.slow
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


@pytest.fixture(scope="module")
def calibrated(script: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of the same arguments with a profile. To be read only."""
    return make(script, tmp_path_factory.mktemp("calibrated") / "tiny", "--store", "--calibrate")


def fresh_generator() -> torch.Generator:
    """pytest shows the seed beside a failure."""
    generator = torch.Generator()
    print(f"seed {generator.seed()}")
    return generator


@dataclass(frozen=True)
class CodedLayer:
    """A layer of fresh random numbers, and tokens; not of the preset's sizes, nor of whole groups."""

    rows: CodedRows
    weight: Tensor
    x: Tensor
    active: Tensor


@pytest.fixture
def layer() -> CodedLayer:
    generator = fresh_generator()
    hidden, ffn, n_tokens = 200, 90, 320
    weight = torch.randn(ffn, hidden, generator=generator) / hidden**0.5
    bias = torch.linspace(-2, 0.3, ffn)
    x = torch.randn(n_tokens, hidden, generator=generator)
    dither = torch.from_numpy(layer_dither(hidden, 0))
    rows = CodedRows(dither, bias=bias, **torch_codes.code_layer(weight, dither)._asdict())
    return CodedLayer(rows, weight, x, torch.addmm(bias, x, weight.T) > 0)


FAILURE_PROBABILITY = 1e-9


class TestProfile:
    def test_makes_nothing_else_of_the_store(self, store: Path, calibrated: Path) -> None:
        plain, profiled = (Manifest.load(place) for place in (store, calibrated))
        assert plain.weights_fingerprint == profiled.weights_fingerprint
        added = {"profile.json", *(f"predictors/calibrated-{layer:03d}.safetensors" for layer in range(LAYERS))}
        assert profiled.files.keys() - plain.files.keys() == added
        assert {name: profiled.files[name] for name in plain.files} == plain.files
        assert [path.name for path in calibrated.parent.iterdir()] == ["tiny"]

    def test_verifies(self, calibrated: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert sparseflow(["verify", str(calibrated)]) == 0
        assert "18 of 18 files" in capsys.readouterr().out

    @pytest.mark.parametrize("fidelity", ["calibrated", "calibrated:0.9:coarse", "exact"])
    def test_store_generates(self, calibrated: Path, fidelity: str) -> None:
        model = SparseOPTForCausalLM.from_pretrained(calibrated, fidelity=fidelity)
        try:
            assert model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=8, do_sample=False).shape == (1, 11)
        finally:
            model.close()

    @pytest.mark.parametrize("kind", ["coarse", "codes"])
    @pytest.mark.parametrize("recall", [0.9, 0.99])
    def test_fresh_tokens_have_the_recall(
        self, calibrated: Path, model: OPTForCausalLM, kind: str, recall: float
    ) -> None:
        inputs: list[Tensor] = []
        hooks = [
            layer.fc1.register_forward_pre_hook(lambda _fc1, args: inputs.append(args[0]))
            for layer in model.model.decoder.layers
        ]
        fired = firing(model, fresh_ids(model, n_texts=64)).flatten(1, 2)  # (layers, tokens, ffn)
        for hook in hooks:
            hook.remove()
        with DiskWeightStore(calibrated).initialize_from_pretrained() as source:
            calibration = calibration_of(source)
            assert calibration is not None
            predictor = calibrated_predictor(source, calibration, recall, kind)
            for layer, x in enumerate(inputs):
                chosen = predictor.bounds(layer, x.contiguous()) > 0
                found = chosen[fired[layer]].double().mean().item()
                assert 1 - found == pytest.approx(1 - recall, rel=0.35), layer
                record = calibration.layers[layer].predictors[kind]
                share = np.interp(recall, RECALLS, record.candidate_shares)
                assert chosen.double().mean().item() == pytest.approx(share, rel=0.1), layer

    def test_bounds_are_those_of_the_kernel(self, script: ModuleType, layer: CodedLayer) -> None:
        scores = tensor_records.PlaneScores.of(layer.rows, layer.x, FAILURE_PROBABILITY)
        for cut in (-0.7, 0.0, 1.0):
            first = scores.coarse + cut * scores.coarse_margin
            second = scores.fine + cut * scores.fine_margin
            for planes, expected in ((1, first), (2, torch.where(first <= 0, first, second))):
                bounds, _ = Scorer(layer.rows, Margin.EXACT, FAILURE_PROBABILITY, cut, planes).bounds(layer.x)
                found = torch.from_numpy(bounds)
                close = torch.isclose(found, expected, rtol=1e-5, atol=2e-5)
                at_the_edge = first.abs() < 2e-5  # where one of them may take the other plane
                assert (close | at_the_edge).all()

    def test_records_are_those_of_sparseflow_calibrate(
        self, script: ModuleType, layer: CodedLayer, calibrated: Path
    ) -> None:
        n_training = 100
        packed = np.packbits(layer.active.numpy(), axis=1)
        activity = LayerActivity(layer.x, packed, layer.weight, layer.rows.bias)
        profile = Manifest.load(calibrated).profile
        fitter = LayerFitter(
            profile, activity, n_training, 0.99, epochs=0, keeps_all=False, codes_only=True, quiet=True
        )
        expected = fitter.fit(layer.rows, FAILURE_PROBABILITY, [], 0).records
        heldout = slice(n_training, None)
        scores = tensor_records.PlaneScores.of(layer.rows, layer.x[heldout], FAILURE_PROBABILITY)
        found = tensor_records.code_records(layer.rows, scores, layer.active[heldout])
        assert found.keys() == expected.keys()
        pair = 1 / layer.active[heldout].numel()
        for kind, record in expected.items():
            assert found[kind].rank is None
            np.testing.assert_allclose(found[kind].cuts, record.cuts, atol=1e-3)
            np.testing.assert_allclose(found[kind].nbytes, record.nbytes, rtol=1e-3)
            np.testing.assert_allclose(found[kind].candidate_shares, record.candidate_shares, atol=3 * pair)
            np.testing.assert_allclose(found[kind].found, record.found, atol=3 / layer.active[heldout].sum())

    @pytest.mark.parametrize("is_silent", [False, True])
    def test_statistics_are_those_of_sparseflow_calibrate(
        self, script: ModuleType, layer: CodedLayer, is_silent: bool
    ) -> None:
        active = layer.active & (not is_silent)
        activity = LayerActivity(layer.x, np.packbits(active.numpy(), axis=1), layer.weight, layer.rows.bias)
        assert tensor_records.layer_statistics(active, 32) == activity_statistics.layer_statistics(activity, 32)

    def test_layer_that_never_fires_has_records(self, script: ModuleType, layer: CodedLayer) -> None:
        scores = tensor_records.PlaneScores.of(layer.rows, layer.x, FAILURE_PROBABILITY)
        records = tensor_records.code_records(layer.rows, scores, torch.zeros_like(layer.active))
        assert list(records["codes"].found) == [1.0] * len(RECALLS)
        assert list(records["coarse"].candidate_shares) == [0.0] * len(RECALLS)

    @pytest.mark.parametrize("n_tokens", [1, 9, 700])
    def test_miss_curve_is_that_of_the_engine(self, script: ModuleType, n_tokens: int) -> None:
        active = torch.rand(n_tokens, 75, generator=fresh_generator()) < 0.1
        assert tensor_records.miss_curve(active) == budgets.miss_curve(active.numpy(), 75).tolist()

    def test_folder_has_none(self, script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert script.main(["--preset", "tiny", "--out", str(tmp_path / "tiny"), "--calibrate"]) == 2
        assert "give --store as well" in capsys.readouterr().err
        assert not list(tmp_path.iterdir())


class TestDevice:
    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
    def test_gpu_that_is_not_there_is_a_bad_request(
        self, script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert script.main(["--preset", "tiny", "--out", str(tmp_path / "tiny"), "--device", "cuda"]) == 2
        assert "--device cuda: torch finds no GPU here" in capsys.readouterr().err

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    def test_gpu_makes_a_model_of_the_same_statistics(self, script: ModuleType, tmp_path: Path) -> None:
        place = make(script, tmp_path / "tiny", "--store", "--calibrate", "--device", "cuda")
        assert sparseflow(["verify", str(place)]) == 0
        with DiskWeightStore(place).initialize_from_pretrained() as source:
            calibration = calibration_of(source)
            assert calibration is not None
            shares = [layer.active_share for layer in calibration.layers]
            assert shares == pytest.approx([0.01, 0.0215, 0.0464, 0.1], rel=0.1)
            for layer in range(LAYERS):  # codes made on the GPU are numpy's of the weights as stored
                weight = tensors_in(place / shard_name(layer))["bundles"][:, 0].float().numpy()
                parts = zip(*code_layer(weight, layer_dither(128, layer)), strict=True)
                stored = tensors_in(place / predictor_name(layer))
                for name, part in zip(Codes._fields, parts, strict=True):
                    np.testing.assert_allclose(stored[name].numpy(), np.concatenate(part), rtol=1e-6, err_msg=name)

    def test_several_writers_give_the_same_store(self, script: ModuleType, store: Path, tmp_path: Path) -> None:
        source = script.SyntheticCheckpoint(script.Recipe(script.PRESETS["tiny"]), tmp_path, "synthetic-tiny")
        made = convert(source, tmp_path / "made", quiet=True, n_threads=4)
        assert Manifest.load(made) == Manifest.load(store)


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
    others += [replace(recipe, device="cuda")] if torch.cuda.is_available() else []
    others.append(replace(recipe, shape=replace(recipe.shape, heads=8)))
    identities = [script.SyntheticCheckpoint(each, tmp_path, "any").identity() for each in (recipe, *others)]
    assert len({json.dumps(identity) for identity in identities}) == len(identities)
    assert json.loads(json.dumps(identities[0])) == identities[0]
