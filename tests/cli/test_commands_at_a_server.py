"""`generate` and `chat` with the weights of a server: the same text, and what is said of where the weights lie."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from processes import Host

from sparseflow.cli.main import main
from sparseflow.store.manifest import Manifest

Capture = pytest.CaptureFixture[str]


def test_text_and_placement_of_a_served_model(host: Host, demo_store: Path, capsys: Capture) -> None:
    arguments = ["--prompt", "To be, or", "--max-new-tokens", "12", "--json"]
    assert main(["generate", str(demo_store), *arguments]) == 0
    alone = json.loads(capsys.readouterr().out)
    host.serve(demo_store, name="mine", cpu_cache_ratio=0.5)
    assert main(["generate", "--server", "mine", *arguments]) == 0
    served = json.loads(capsys.readouterr().out)
    assert served["token_ids"] == alone["token_ids"]
    placement, profile = served["placement"], Manifest.load(demo_store).profile
    assert (placement["mapped"], placement["private"]) == (None, 0)
    assert placement["shared"] > profile.neurons_nbytes // 2
    assert placement["disk"] == pytest.approx(profile.neurons_nbytes / 2, rel=0.01)
    assert placement["neurons_in_memory"] == pytest.approx(0.5, rel=0.01)
    assert placement["disk_bytes_per_s"] > 0


def test_a_chat_at_a_server_says_so_and_keeps_its_text(
    host: Host, demo_store: Path, typed: Callable[..., None], capsys: Capture
) -> None:
    host.serve(demo_store, name="mine")
    typed("To be, or", "That is")
    assert main(["chat", "--server", "mine", "--max-new-tokens", "8"]) == 0
    out, err = capsys.readouterr()
    assert "shared with the server" in err
    assert "nothing while it runs: all neurons are in memory" in err
    typed("To be, or", "That is")
    assert main(["chat", str(demo_store), "--max-new-tokens", "8"]) == 0
    assert capsys.readouterr().out == out
