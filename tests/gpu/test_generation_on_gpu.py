"""What a model writes on a GPU is what dense models write there, whatever is in slots: `pytest -m gpu tests/gpu`."""

import gc
import importlib.util
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import OPTForCausalLM

from sparseflow.bench.gpu.peers import dense_model
from sparseflow.bench.gpu.runs import RUNTIME_DIR, SERVER, Server, environment
from sparseflow.core.checkpoint import Checkpoint
from sparseflow.core.config import OffloadStrategy
from sparseflow.core.converter import convert
from sparseflow.engine.memory_plan import fixed_nbytes
from sparseflow.models.opt_sparse import SparseOPTForCausalLM
from sparseflow.orchestration.device.hints import TRIAL_TOKENS
from sparseflow.store.manifest import Manifest

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
MIB = 1 << 20
SCRIPT = Path(__file__).parents[2] / "scripts" / "make_synthetic_opt.py"
STORES = ["demo-float16", "demo-float32", "synthetic-float16", "synthetic-float32"]
RATIOS = [0.05, 0.3, 1.0]

# Logits that differ by less are tied: 16 bits round them by up to 1/256 of their size, of 8 or so, and sums in another
# order round otherwise.
TIED = {torch.float32: 1e-3, torch.float16: 0.06}

Open = Callable[..., SparseOPTForCausalLM]


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory, demo_model: Path) -> dict[str, Path]:
    """The demo model, trained; and random ones of the smallest shape. To be read only."""
    spec = importlib.util.spec_from_file_location("make_synthetic_opt", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    script = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    folder = tmp_path_factory.mktemp("stores")
    made = {name: folder / name for name in STORES}
    for name, store in made.items():
        kind, _, dtype = name.partition("-")
        if kind == "demo":
            convert(Checkpoint(demo_model), store, dtype=dtype, quiet=True)
        else:
            words = ["--preset", "tiny", "--dtype", dtype, "--store", "--calibrate", "--out", str(store)]
            assert script.main(words) == 0
    del sys.modules[spec.name]
    return made


@pytest.fixture
def opened() -> Iterator[Open]:
    """Opens models on the GPU; all are closed."""
    models: list[SparseOPTForCausalLM] = []

    def open_model(
        store: Path, *, ratio: float = 0.3, hints: bool = False, uses_graph: bool = True, **how: Any
    ) -> SparseOPTForCausalLM:
        how = {"fidelity": "exact", "device": DEVICE} | how
        strategy = OffloadStrategy(gpu_cache_ratio=ratio, device_hints=hints)
        model = SparseOPTForCausalLM.from_pretrained(store, strategy=strategy, **how)
        if not uses_graph and model.token_step is not None:
            model.token_step.uses_graph = False
        models.append(model)
        return model

    yield open_model
    for model in models:
        model.close()


@pytest.fixture(scope="module")
def dense(stores: dict[str, Path]) -> Callable[[str], OPTForCausalLM]:
    """transformers' dense model of a store, on the GPU."""
    made: dict[str, OPTForCausalLM] = {}

    def of(name: str) -> OPTForCausalLM:
        if name not in made:
            made[name] = dense_model(stores[name], DEVICE)
        return made[name]

    return of


def prompt(model: Any, length: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, model.config.vocab_size, (1, length), generator=generator).to(DEVICE)


def generate(model: Any, ids: torch.Tensor, n_tokens: int = 40, **how: Any) -> torch.Tensor:
    """Ids with their prompt: (n_sequences, length)."""
    how = {"attention_mask": torch.ones_like(ids), "do_sample": False} | how
    model.generation_config.eos_token_id = None
    found: torch.Tensor = model.generate(ids, max_new_tokens=n_tokens, **how)
    assert found.shape[1] == ids.shape[1] + n_tokens
    return found


def assert_as_dense(
    found: torch.Tensor, n_prompt: int, reference: OPTForCausalLM, mask: torch.Tensor | None = None
) -> None:
    """Each id is the likeliest after those before it, by the dense model; or as likely, within rounding."""
    if mask is not None:
        mask = torch.nn.functional.pad(mask, (0, found.shape[1] - mask.shape[1]), value=1)
    with torch.no_grad():
        logits = reference(found, attention_mask=mask).logits[:, n_prompt - 1 : -1].float()
    chosen = logits.gather(2, found[:, n_prompt:, None])[..., 0]
    behind = logits.max(-1).values - chosen
    assert behind.max() <= TIED[reference.dtype], behind.max(-1)


def assert_same_or_tied(found: torch.Tensor, expected: torch.Tensor, n_prompt: int, reference: OPTForCausalLM) -> None:
    """Equal ids in float32; in 16 bits up to where two ids are tied, and likeliest ones after that."""
    if reference.dtype == torch.float32:
        assert found.tolist() == expected.tolist()
    assert_as_dense(found, n_prompt, reference)


@pytest.mark.parametrize("uses_graph", [True, False], ids=["graph", "no graph"])
@pytest.mark.parametrize("name", ["demo-float32", "synthetic-float16"])
def test_hints_change_no_text(name: str, uses_graph: bool, stores: dict[str, Path], opened: Open, dense: Any) -> None:
    reference = dense(name)
    ids = prompt(reference, 20)
    model = opened(stores[name], ratio=0.1, hints=True, uses_graph=uses_graph)
    found = generate(model, ids, TRIAL_TOKENS + 60)  # so many that it is decided which layers get hints
    assert_same_or_tied(found, generate(reference, ids, TRIAL_TOKENS + 60), 20, reference)
    counts = model.stats.decode.device
    assert counts is not None
    assert sum(counts.foreseen) > 0
    assert counts.nbytes_moved == sum(counts.misses + counts.hinted) * model.source.profile.bundle_nbytes


@pytest.mark.parametrize("hints", [False, True])
def test_a_graph_outlives_steps_of_several_sequences(
    hints: bool, stores: dict[str, Path], opened: Open, dense: Any
) -> None:
    reference = dense("demo-float32")
    ids = prompt(reference, 20)
    model = opened(stores["demo-float32"], ratio=0.1, hints=hints)
    for n_sequences in (1, 3, 8, 1):
        many = ids.repeat(n_sequences, 1)
        assert_same_or_tied(generate(model, many), generate(reference, many), 20, reference)


@pytest.mark.parametrize("uses_graph", [True, False], ids=["graph", "no graph"])
def test_recall_is_measured(uses_graph: bool, stores: dict[str, Path], opened: Open) -> None:
    model = opened(stores["demo-float16"], ratio=0.1, uses_graph=uses_graph)
    model.coordinator.live_recall.every_step = True
    generate(model, prompt(model, 20), 10)
    decode = model.stats.decode
    assert model.stats.recall == 1
    assert decode.sampled.steps == decode.sampled.sampled_steps == decode.layer_steps
    assert decode.sampled.found == pytest.approx(decode.active_pairs, rel=1e-3)  # sums in another order


@pytest.mark.parametrize("uses_graph", [True, False], ids=["graph", "no graph"])
@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("name", STORES)
def test_exact_writes_what_dense_models_write(
    name: str, ratio: float, uses_graph: bool, stores: dict[str, Path], opened: Open, dense: Any
) -> None:
    reference = dense(name)
    ids = prompt(reference, 20)
    model = opened(stores[name], ratio=ratio, uses_graph=uses_graph)
    found = generate(model, ids)
    assert_same_or_tied(found, generate(reference, ids), 20, reference)
    own = opened(stores[name], ratio=ratio, fidelity="dense", uses_graph=uses_graph)
    assert_same_or_tied(found, generate(own, ids), 20, reference)
    report = model.device_report()
    assert sum(report["slots"]) == report["n_slots"]
    assert report["uses_graph"] is uses_graph
    counts = model.stats.decode.device
    assert counts is not None
    assert sum(counts.misses) < sum(counts.candidates)
    assert (counts.nbytes_moved > 0) is (sum(counts.misses) > 0)


@pytest.mark.parametrize("name", STORES)
def test_a_graph_writes_what_its_kernels_write(name: str, stores: dict[str, Path], opened: Open) -> None:
    with_graph, without = opened(stores[name]), opened(stores[name], uses_graph=False)
    ids = prompt(with_graph, 12)
    assert generate(with_graph, ids).tolist() == generate(without, ids).tolist()


@pytest.mark.parametrize("length", [1, 100])
@pytest.mark.parametrize("name", STORES)
def test_prompts_of_any_length(name: str, length: int, stores: dict[str, Path], opened: Open, dense: Any) -> None:
    reference = dense(name)
    ids = prompt(reference, length)
    found = generate(opened(stores[name]), ids)
    assert_same_or_tied(found, generate(reference, ids), length, reference)


@pytest.mark.parametrize("name", STORES)
def test_two_sequences_with_padding(name: str, stores: dict[str, Path], opened: Open, dense: Any) -> None:
    reference = dense(name)
    ids = torch.cat([prompt(reference, 10, seed) for seed in (1, 2)])
    mask = torch.ones_like(ids)
    ids[0, :4], mask[0, :4] = reference.config.pad_token_id, 0
    found = generate(opened(stores[name]), ids, attention_mask=mask)
    if reference.dtype == torch.float32:
        assert found.tolist() == generate(reference, ids, attention_mask=mask).tolist()
    assert_as_dense(found, 10, reference, mask)


@pytest.mark.parametrize("name", STORES)
def test_sampling_with_a_seed_gives_the_same_again(name: str, stores: dict[str, Path], opened: Open) -> None:
    model = opened(stores[name])
    ids = prompt(model, 8)

    def sampled(seed: int) -> list[list[int]]:
        torch.manual_seed(seed)
        return generate(model, ids, do_sample=True, temperature=1.0, top_k=0).tolist()

    assert sampled(3) == sampled(3)
    assert sampled(3) != sampled(4)


@pytest.mark.parametrize("name", STORES)
def test_keys_and_values_grow_past_their_room(name: str, stores: dict[str, Path], opened: Open, dense: Any) -> None:
    reference = dense(name)
    ids = prompt(reference, 5)
    n_tokens = min(200, reference.config.max_position_embeddings - 5)
    found = generate(opened(stores[name]), ids, n_tokens)
    assert_same_or_tied(found, generate(reference, ids, n_tokens), 5, reference)


@pytest.mark.parametrize("fidelity", ["certified", "calibrated"])
def test_other_fidelities_write_as_many_tokens(fidelity: str, stores: dict[str, Path], opened: Open) -> None:
    model = opened(stores["synthetic-float16"], fidelity=fidelity)
    generate(model, prompt(model, 20))
    assert 0 < model.stats.decode.candidate_share < 1
    assert 0 < model.stats.decode.device.hit_rate <= 1


def test_a_second_run_finds_its_neurons_in_slots(stores: dict[str, Path], opened: Open) -> None:
    model = opened(stores["synthetic-float16"], ratio=1.0)
    ids = prompt(model, 10)
    generate(model, ids)
    model.reset_stats()
    generate(model, ids)
    counts = model.stats.decode.device
    assert (counts.hit_rate, counts.nbytes_moved) == (1.0, 0)


def test_closing_gives_the_devices_memory_back(stores: dict[str, Path], opened: Open) -> None:
    def written_and_closed(fidelity: str) -> int:
        """Bytes that torch had on the device meanwhile."""
        model = opened(stores["synthetic-float16"], fidelity=fidelity)
        generate(model, prompt(model, 10))
        meanwhile = torch.cuda.memory_allocated()
        model.close()
        model.close()
        return meanwhile

    def left() -> int:
        gc.collect()
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    for fidelity in ("exact", "dense"):  # what libraries keep, they have then
        written_and_closed(fidelity)
    before = left()
    for fidelity in ("exact", "dense"):
        assert written_and_closed(fidelity) > before + MIB
        assert abs(left() - before) < MIB


def test_two_models_at_once_do_not_mix(stores: dict[str, Path], opened: Open) -> None:
    names = ("synthetic-float16", "demo-float16")
    models = [opened(stores[name], ratio=0.1) for name in names]
    ids = [prompt(model, 10) for model in models]
    alone = [generate(model, own, 40).tolist() for model, own in zip(models, ids, strict=True)]
    texts = list(ids)
    caches: list[Any] = [None, None]
    for _ in range(40):  # token by token in turn
        for k, model in enumerate(models):
            with torch.no_grad():
                seen = texts[k] if caches[k] is None else texts[k][:, -1:]
                output = model(seen, past_key_values=caches[k], use_cache=True)
            caches[k] = output.past_key_values
            texts[k] = torch.cat([texts[k], output.logits[:, -1:].argmax(-1)], dim=1)
    assert [text.tolist() for text in texts] == alone


def test_less_memory_than_the_model(stores: dict[str, Path], opened: Open, dense: Any) -> None:
    """Bundles come from disk to an arena in host memory, and from there to the GPU."""
    name = "demo-float32"
    reference = dense(name)
    manifest = Manifest.load(stores[name])
    memory = fixed_nbytes(manifest) + manifest.nbytes_under("neurons/") - MIB
    model = opened(stores[name], memory=memory)
    status = model.source.status()
    assert status.n_resident < status.n_bundles
    assert status.counts is not None
    ids = prompt(reference, 20)
    found = generate(model, ids)
    assert found.tolist() == generate(reference, ids).tolist()
    assert status.counts != model.source.status().counts


@pytest.mark.parametrize("ratio", [1.0, 0.4], ids=["all in the arena", "a part in the arena"])
def test_a_servers_client_writes_what_dense_models_write(
    ratio: float, stores: dict[str, Path], dense: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "synthetic-float32"
    reference = dense(name)
    ids = prompt(reference, 20)
    with tempfile.TemporaryDirectory(prefix="sf-") as scratch:
        runtime_dir = Path(scratch) / "run"
        runtime_dir.mkdir(mode=0o700)
        monkeypatch.setenv(RUNTIME_DIR, str(runtime_dir))
        options = [] if ratio == 1.0 else ["--cpu-cache-ratio", str(ratio)]
        server = Server(stores[name], Path(scratch), environment(runtime_dir), time.monotonic() + 60, options=options)
        try:
            model = SparseOPTForCausalLM.from_server(SERVER, device=DEVICE, gpu_cache_ratio=0.3)
            try:
                assert generate(model, ids).tolist() == generate(reference, ids).tolist()
                assert model.device_report()["transport"] in ("pull", "staging", "push")
            finally:
                model.close()
        finally:
            server.end()


def test_every_bundle_has_a_slot_where_there_is_room(stores: dict[str, Path], opened: Open) -> None:
    store = stores["synthetic-float16"]
    profile = Manifest.load(store).profile
    model = opened(store, ratio=1.0, device_memory="auto")
    assert model.device_report()["n_slots"] == profile.num_layers * profile.ffn_dimension
