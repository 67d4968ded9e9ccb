"""`sparseflow trace`: what it records is what the model computes, and what it replays is a table."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from sparseflow.cli.main import main
from sparseflow.core.checkpoint import Checkpoint
from sparseflow.core.converter import convert
from sparseflow.engine.replay import POLICIES
from sparseflow.engine.trace import Trace
from sparseflow.evaluation.trace_run import record_trace
from sparseflow.models.opt_sparse import SparseOPTForCausalLM
from sparseflow.utils.tokenizer import tokenizer_of

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def store(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the demo model. To be read only."""
    return convert(Checkpoint(demo_model), tmp_path_factory.mktemp("demo") / "store", quiet=True)


@pytest.fixture(scope="module")
def recorded(store: Path, demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trace of 24 tokens. To be read only."""
    out = tmp_path_factory.mktemp("trace") / "demo.trace"
    record(store, demo_model, out)
    return out


def record(store: Path, demo_model: Path, out: Path, *more: str) -> None:
    arguments = ["trace", "record", str(store), "--text", str(demo_model / "heldout.txt"), "--tokens", "24"]
    assert main([*arguments, "--out", str(out), *more]) == 0


def test_trace_holds_what_each_step_chooses(store: Path, demo_model: Path, recorded: Path) -> None:
    """Asked of the predictor itself, with the whole text at once."""
    trace = Trace.load(recorded)
    assert (trace.n_layers, trace.ffn_dim, trace.n_tokens) == (8, 1024, 24)
    assert trace.layers.tolist() == list(range(8)) * 24
    model = SparseOPTForCausalLM.from_pretrained(store)
    tokens = tokenizer_of(model.source.model_files)((demo_model / "heldout.txt").read_text()[:2000]).input_ids[:25]
    inputs: dict[int, torch.Tensor] = {}
    for layer in model.model.decoder.layers:
        number = layer.layer_idx
        layer.mlp_norm.register_forward_hook(lambda _, __, y, number=number: inputs.__setitem__(number, y[0]))
    with torch.inference_mode():
        model(input_ids=torch.tensor([tokens]))
    assert trace.fingerprint == model.source.manifest.weights_fingerprint
    n_differing = 0
    for n, (layer, ids) in enumerate(trace):
        position = 1 + n // 8
        chosen = model.coordinator.predictor.select(layer, inputs[layer][position : position + 1].float().contiguous())
        n_differing += len(np.setxor1d(chosen, ids))
    model.close()
    assert n_differing <= 0.01 * len(trace.ids), "half precision rounds otherwise with all tokens at once, but little"


def test_windows_restart_where_positions_end(store: Path) -> None:
    """Two windows of three tokens: the first token of each is its prompt."""
    model = SparseOPTForCausalLM.from_pretrained(store)
    windows = torch.tensor([[5, 6, 7], [5, 6, 7]])
    trace = record_trace(model, "", windows, 100)
    steps = list(trace)
    assert trace.n_tokens == 4
    assert all((one.ids == other.ids).all() for one, other in zip(steps[:16], steps[16:], strict=True))
    assert record_trace(model, "", windows, 3).n_tokens == 3
    assert model.coordinator.source is model.source
    assert model.stats.decode.layer_steps == model.stats.prefill.layer_steps == 0
    model.close()


def test_parts_of_a_step_are_one_step(
    store: Path, demo_model: Path, recorded: Path, tmp_path: Path, capsys: Capture
) -> None:
    """In an arena that takes a step of this model in several fetches, the same neurons are noted."""
    small = tmp_path / "small.trace"
    record(store, demo_model, small, "--cpu-cache-ratio", "0.03")
    assert "24 tokens, 192 layer steps" in capsys.readouterr().out
    one, other = Trace.load(recorded), Trace.load(small)
    assert one.layers.tolist() == other.layers.tolist()
    assert len(np.setxor1d(one.ids, other.ids)) <= 0.01 * len(np.unique(one.ids))


def test_random_tokens_are_the_same_for_the_same_seed(demo_model: Path, tmp_path: Path, capsys: Capture) -> None:
    ids = []
    for seed in ("1", "1", "2"):
        arguments = ["trace", "record", str(demo_model), "--tokens", "3", "--seed", seed, "--out", str(tmp_path / "t")]
        assert main([*arguments, "--json"]) == 0
        result = json.loads(capsys.readouterr().out)
        assert (result["tokens"], result["layer_steps"]) == (3, 24)
        ids.append(Trace.load(tmp_path / "t").ids.tolist())
    assert ids[0] == ids[1] != ids[2]


def test_replay_gives_every_policy_at_every_size(recorded: Path, capsys: Capture) -> None:
    assert main(["trace", "--json", "replay", str(recorded), "--slots-ratio", "0.1", "0.3"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [row["policy"] for row in result["rows"]] == [name for name in POLICIES for _ in range(2)]
    assert (result["tokens"], result["counted_tokens"]) == (24, 22)
    misses = {(row["policy"], row["slots_ratio"]): row["misses_per_token"] for row in result["rows"]}
    for name in POLICIES:
        assert misses[name, 0.1] > misses[name, 0.3] >= misses["optimum", 0.3] > 0


def test_replay_prints_a_table(recorded: Path, capsys: Capture) -> None:
    assert main(["trace", "replay", str(recorded), "--policies", "lfu", "optimum", "--slots-ratio", "0.25"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["slots", "found", "lfu", "optimum"]
    assert lines[0].split() == ["slots", "25.0%"]


def test_replay_compares_budgets(recorded: Path, capsys: Capture) -> None:
    assert main(["trace", "replay", str(recorded), "--budgets", "--slots-ratio", "0.2", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert {row["policy"].split("-")[1] for row in rows} == {"equal", "profile", "shared"}


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["replay", "missing"], "missing: cannot be read"),
        (["replay", "TRACE", "--policies", "best"], "policy 'best': one of"),
        (["replay", "TRACE", "--slots-ratio", "0"], "0 slots"),
        (["record", "MODEL", "--out", "nowhere/trace"], "nowhere/trace: its folder does not exist"),
        (["record", "MODEL", "--out", "."], ".: is a folder; give a file in it"),
        (["record", "MODEL", "--out", "trace", "--text", "missing.txt"], "missing.txt: cannot be read as text"),
        (["record", "./missing", "--out", "trace"], "./missing: no such folder"),
        (["record", "MODEL", "--out", "trace", "--dtype", "float32"], "holds float16, float32 is asked for"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(
    store: Path, recorded: Path, capsys: Capture, arguments: list[str], text: str
) -> None:
    named = {"TRACE": str(recorded), "MODEL": str(store)}
    capsys.readouterr()
    assert main(["trace", *(named.get(argument, argument) for argument in arguments)]) in (1, 2)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert text in captured.err
