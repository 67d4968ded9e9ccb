"""A store that is named is used as it is, or refused; what is no folder is looked for in the hub's cache."""

from collections.abc import Callable
from pathlib import Path

import pytest

from sparseflow.core.checkpoint import locate
from sparseflow.core.store_home import find_or_convert
from sparseflow.errors import BadRequest, DiskError


def test_a_store_of_another_dtype_than_is_asked_for_is_refused(family_store: Callable[..., Path]) -> None:
    store = family_store("base")
    assert find_or_convert(str(store), dtype="float32") == find_or_convert(str(store)) == store
    with pytest.raises(BadRequest, match=r"holds float32, float16 is asked for; convert .* --dtype float16"):
        find_or_convert(str(store), dtype="float16")


def test_a_hub_id_that_is_not_cached_is_told_with_the_folder_that_was_looked_in(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(DiskError) as refused:
        locate("nobody/nothing")
    assert f"not in the hub's cache ({tmp_path / 'hub'})" in str(refused.value)
