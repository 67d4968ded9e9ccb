"""The soak finds nothing where nothing is wrong, and what is wrong where something is."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SOAK = Path(__file__).parents[2] / "scripts" / "soak.py"

NO_CHECKSUMS = """
import numpy as np
from sparseflow.engine.shard_files import ShardFiles
ShardFiles.are_intact = lambda shards, layer, ids, *rest: np.ones(len(ids), bool)
"""


def soak(out: Path, *words: str, **variables: str) -> tuple[int, dict[str, Any]]:
    """Its exit code and its report."""
    command = [sys.executable, str(SOAK), "--clients", "2", "--every-s", "2", "--out", str(out), *words]
    code = subprocess.run(command, env=os.environ | variables, timeout=400, check=False).returncode
    return code, json.loads(out.read_text(encoding="utf-8"))


@pytest.mark.slow
def test_a_minute_is_clean(tmp_path: Path) -> None:
    code, report = soak(tmp_path / "out.json", "--minutes", "1")
    assert (code, report["wrong"], report["leaked"], report["failure"]) == (0, 0, 0, None)
    assert report["tokens"] > 100
    assert sum(report["disturbances"].values()) > 10


@pytest.mark.slow
def test_without_checksums_wrong_bytes_are_seen(tmp_path: Path) -> None:
    """A server that compares nothing, of whose reads one in two hundred is wrong."""
    (tmp_path / "sitecustomize.py").write_text(NO_CHECKSUMS, encoding="utf-8")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    code, report = soak(tmp_path / "out.json", "--minutes", "1", "--fault-rate", "0.005", PYTHONPATH=path)
    assert code == 1
    assert report["wrong"] > 0
