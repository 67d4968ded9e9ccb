"""A conversion killed at any moment leaves no half store, and a rerun goes on where it stopped."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import opt_family
import pytest
import torch
from child_process import run_forked
from transformers import OPTConfig

pytestmark = pytest.mark.usefixtures("fork_server")

N_KILLS = 20
SCRIPT = Path(__file__).with_name("kill_conversions.py")
LARGE_ENOUGH_TO_HIT = {  # half a second or more to convert
    "hidden_size": 512,
    "ffn_dim": 4096,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "vocab_size": 1000,
    "max_position_embeddings": 64,
}


@pytest.fixture(scope="module")
def large_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("large") / "checkpoint"
    opt_family.write_wide(folder, OPTConfig(**LARGE_ENOUGH_TO_HIT), torch.float32)
    return folder


def rounds(checkpoint: Path, work: Path, *arguments: object, timeout_s: float) -> list[dict[str, Any]]:
    try:
        printed = run_forked(SCRIPT, checkpoint, work, *arguments, timeout_s=timeout_s)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    whole, *records = [json.loads(line) for line in printed.splitlines()]
    print(f"uninterrupted: {whole}")
    for record in records:
        print(record)
    return records


def test_11_twenty_conversions_killed_at_random_moments_leave_no_half_store(
    large_checkpoint: Path, tmp_path: Path
) -> None:
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    records = rounds(large_checkpoint, tmp_path / "work", "moments", N_KILLS, seed, timeout_s=60 + 30 * N_KILLS)
    assert sum(record["killed"] for record in records) == N_KILLS, "too few hit: the checkpoint is too small"
    assert [record for record in records if record["violations"]] == []


def test_11_conversion_killed_before_each_change_to_disk(
    family_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    checkpoint = Path(shutil.copytree(family_checkpoint("base"), tmp_path / "checkpoint"))
    (checkpoint / "tokenizer.json").write_text("{}")
    records = rounds(checkpoint, tmp_path / "work", "steps", timeout_s=120)
    n_files = 1 + 2 * 2 + 3  # dense; shards and predictors; what is copied
    assert len(records) > 2 * n_files, "fewer kills than files appear and get their names"
    assert all(record["killed"] for record in records[:-1])
    assert [record for record in records if record["violations"]] == []
