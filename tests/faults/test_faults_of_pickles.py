"""Pickles, and whatever else could run what it reads: in no source of ours, and by none of the ways in."""

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from child_process import run_forked
from executing import Canary, executes
from processes import Host
from raw_peers import Connection, RawLine, RawSession, ask_ctl, packed
from served_shards import ServedShards
from still_serving import SHARE, assert_serves, refused

from sparseflow.protocol.messages import PROTOCOL_VERSION, Detach, Detached, ErrorReply

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("folder", ["sparseflow", "daemon", "scripts"])
def test_17_nothing_of_ours_runs_what_it_reads(folder: str) -> None:
    sources = sorted((ROOT / folder).rglob("*.py"))
    assert sources
    found = {str(path.relative_to(ROOT)): list(executes(path.read_text(encoding="utf-8"))) for path in sources}
    assert {path: ways for path, ways in found.items() if ways} == {}


def test_17_torch_files_are_read_only_where_people_bring_them() -> None:
    """Checkpoints, and predictors made elsewhere."""
    sources = [path for folder in ("sparseflow", "daemon") for path in (ROOT / folder).rglob("*.py")]
    readers = {path.name for path in sources if "torch.load" in path.read_text(encoding="utf-8")}
    assert readers == {"checkpoint.py", "calibrated_predictor.py"}


@pytest.mark.parametrize(
    "source",
    [
        *("import pickle", "from pickle import loads", "import multiprocessing as m", "from torch import load"),
        *("def f(x):\n    return eval(x)", "run = exec", "builtins.eval(x)", "sock.recv_pyobj()", "yaml.load(f)"),
        *("torch.load(path)", "torch.load(path, weights_only=False)", "torch.load(path, weights_only=chosen)"),
        *("np.load(path, allow_pickle=True)", "subprocess.run(line, shell=True)", "os.system(line)"),
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
    ],
)
def test_17_each_way_to_run_what_is_read_is_seen(source: str) -> None:
    assert len(list(executes(source))) == 1


def test_17_what_only_looks_like_it_is_not() -> None:
    assert list(executes("m.eval(); re.compile('x'); torch.load(p, weights_only=True); f(shell=False)")) == []


def test_17_the_canary_shows_a_reader_that_runs_what_it_reads(tmp_path: Path) -> None:
    canary = Canary(tmp_path / "executed")
    pickle.loads(canary.payload).close()
    assert canary.path.exists()


def test_17_a_pickle_for_a_server_is_never_run(host: Host, shards: ServedShards, tmp_path: Path) -> None:
    server = host.serve(shards.folder, cpu_cache_ratio=shards.ratio(2 * SHARE), max_sessions=1)
    canary = Canary(tmp_path / "executed")
    for packet in (
        canary.payload,
        packed(PROTOCOL_VERSION, 1, os.getpid(), canary.payload, {"weights": canary.payload}),
    ):
        with Connection() as peer:
            peer.send(packet)
            assert isinstance(peer.reply_or_end(), ErrorReply | None)
        assert isinstance(ask_ctl([packet]), ErrorReply)
        with RawSession() as session, RawLine(session) as line:
            line.send(packet)
            refused(line, "bad_request")
            line.send(session.acquire(1, canary.payload))
            refused(line, "bad_request", "arena_busy", request_id=1)  # by its length it may be whole neuron ids
            session.send(Detach())
            assert session.receive() == Detached(session.welcome.epoch)
    assert_serves(server, shards)
    assert not canary.path.exists()


WITH_PREDICTORS = """
import sys
from sparseflow import DiskWeightStore, SparseFlowConfig, SparseOPTForCausalLM
from sparseflow.errors import DiskError
store = DiskWeightStore(sys.argv[1]).initialize_from_pretrained()
try:
    SparseOPTForCausalLM(SparseFlowConfig(store.profile, predictor_weights_path=sys.argv[2]), store)
except DiskError as error:
    print(error)
"""

COMMAND = "import sys; from sparseflow.cli.main import main; print(main(sys.argv[1:]))"


@pytest.mark.parametrize("form", ["zip", "old", "bare"])
def test_17_a_pickle_for_weights_is_never_run(
    fork_server: None, family_checkpoint: Callable[..., Path], tmp_path: Path, form: str
) -> None:
    canary = Canary(tmp_path / "executed")
    folder = shutil.copytree(family_checkpoint("base"), tmp_path / "checkpoint")
    (folder / "model.safetensors").unlink()
    predictors = tmp_path / "predictors"
    predictors.mkdir()
    for path in (folder / "pytorch_model.bin", predictors / "layer_0_predictor_fc1.pt"):
        if form == "bare":
            path.write_bytes(canary.payload)
        else:
            torch.save({"lm_head.weight": canary}, path, _use_new_zipfile_serialization=form == "zip")
    told = run_forked(WITH_PREDICTORS, family_checkpoint("base"), predictors)
    assert "layer_0_predictor_fc1.pt" in told
    for command in ("convert", "generate"):
        assert run_forked(COMMAND, command, folder).splitlines()[-1] == "1"
    assert not canary.path.exists()
