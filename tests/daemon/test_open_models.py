"""Several models in one server's memory: what is said where it does not hold them."""

from collections.abc import Callable
from pathlib import Path

import pytest
from sparseflow_daemon import served_model
from sparseflow_daemon.config import ServerConfig
from sparseflow_daemon.served_model import open_models

from sparseflow.engine.memory_plan import fixed_nbytes
from sparseflow.errors import NotEnoughMemory
from sparseflow.store.manifest import Manifest
from sparseflow.utils.sizes import format_size


@pytest.fixture
def store(family_store: Callable[[str, str], Path]) -> Path:
    return family_store("base", "float32")


def test_memory_that_does_not_hold_the_dense_parts_is_told_as_it_was_given(store: Path) -> None:
    fixed = format_size(fixed_nbytes(Manifest.load(store)))
    with pytest.raises(NotEnoughMemory, match=f"^{fixed} must be resident.*allowed are 1KiB; allow more"):
        open_models(ServerConfig(stores=(store,), memory="1KiB"))


def test_dense_parts_of_all_models_count(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fixed = fixed_nbytes(Manifest.load(store))
    free = int((2 * fixed - 1) / served_model.AUTO_SHARE)
    monkeypatch.setattr(served_model, "free_memory", lambda: free)
    with pytest.raises(NotEnoughMemory, match=f"^{format_size(2 * fixed)} must be resident.*free are .*; free some"):
        open_models(ServerConfig(stores=(store, store)))
