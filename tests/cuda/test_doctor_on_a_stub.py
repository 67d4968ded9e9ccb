"""The whole of `sparseflow doctor` over a driver that is a stub: every trial is a process of its own."""

import json
from pathlib import Path

import pytest

from sparseflow.cli.main import main


def test_all_that_needs_no_kernel_on_the_device_is_found_to_work(
    stub: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", "--json"]) == 1  # torch sees through it
    result = json.loads(capsys.readouterr().out)
    assert result["device"]["name"] == "Stub 0"
    assert result["bandwidth"]["pinned_bytes_per_s"] > 0
    assert [result["page_lock"][name]["works"] for name in ("read_only", "writable")] == [True, True]
    assert [result[name]["works"] for name in ("ipc", "pull", "push")] == [True, True, True]
    assert result["graphs"]["works"] is False
    assert result["graphs"]["reason"]
    assert list(Path(stub.parent).iterdir()) == [stub]
