"""What would come from disk: an arena of the decode's own kind, fed token by token."""

import numpy as np
import pytest
import torch

from sparseflow.evaluation.disk_replay import REPLAYED_TOKENS, DiskReplay
from sparseflow.store.profile import ModelProfile

PROFILE = ModelProfile("tiny", 8, 40, 2, 2, 64, 100, dtype="float32")


def noted(ratios: list[float], windows: torch.Tensor) -> DiskReplay:
    """windows: (n_windows, n_layers, n_tokens, ffn_dim) bool, as one contestant's choices."""
    disk = DiskReplay(PROFILE, ratios)
    for window in windows:
        for layer, is_chosen in enumerate(window):
            disk.note(1, layer, is_chosen)
    return disk


def test_neurons_that_stay_are_read_once_and_others_each_time() -> None:
    windows = torch.zeros(2, 2, 20, 40, dtype=torch.bool)
    windows[:, :, :, :4] = True  # of every token
    found = noted([1.0, 0.5], windows).bytes_per_token(1)
    assert found == {"1": 0, "0.5": 0}
    windows[:, 0, ::2, 4:8] = True  # 4 of layer 0 come back with every second token, too late for 12 slots
    windows[:, 0, 1::2, 8:12] = True
    assert noted([0.15], windows).bytes_per_token(1)["0.15"] == pytest.approx(4 * PROFILE.bundle_nbytes)


def test_more_memory_never_reads_more() -> None:
    rng = np.random.default_rng()
    windows = torch.from_numpy(rng.random((3, 2, 30, 40)) < rng.random(40) ** 3)
    found = noted([0.2, 0.4, 0.6, 1.0], windows).bytes_per_token(1)
    assert found is not None
    reads = list(found.values())
    assert reads == sorted(reads, reverse=True)
    asked = windows.sum() / (3 * 30) * PROFILE.bundle_nbytes
    assert 0 < reads[0] < 1.2 * asked


def test_only_the_start_of_a_long_text_is_replayed() -> None:
    windows = torch.zeros(3, 2, REPLAYED_TOKENS // 2, 40, dtype=torch.bool)
    windows[:2, :, :, 0] = True
    windows[2] = True
    assert noted([0.1], windows).bytes_per_token(1) == {"0.1": 0}


def test_nothing_is_told_where_nothing_was_asked_or_chosen() -> None:
    windows = torch.ones(1, 2, 5, 40, dtype=torch.bool)
    assert noted([], windows).bytes_per_token(1) is None
    assert noted([0.5], windows).bytes_per_token(0) is None
