"""What is told of a store: whole, damaged, cut, none at all; how it is read, and what of it memory holds."""

import errno
from pathlib import Path

import pytest
from looking import by_name, verdicts
from served_shards import ServedShards

from sparseflow.doctor import stores
from sparseflow.engine import reading
from sparseflow.engine.memory_plan import MemoryPlan
from sparseflow.engine.read_queue import DirectRefused
from sparseflow.store.manifest import MANIFEST_NAME, shard_name

NEURON = 7


def test_whole_store_is_ok_and_told_in_four_lines(shards: ServedShards) -> None:
    findings = by_name(stores.look(shards.folder))
    assert list(findings) == ["manifest", "files", "reading", "memory"]
    assert findings["manifest"].verdict == findings["files"].verdict == findings["memory"].verdict == "ok"
    assert findings["manifest"].text.startswith("self-describing: 3 layers of 61 neurons, 128 wide, float16, ")
    assert findings["memory"].text == "all of it fits into memory"
    assert verdicts(stores.compare(shards.folder)) == {"checksums": "ok"}


def test_bit_that_differs_is_found_where_bytes_are_compared(shards: ServedShards) -> None:
    with shards.flipped(1, NEURON):
        assert "problem" not in verdicts(stores.look(shards.folder)).values()
        (found,) = stores.compare(shards.folder).findings
    assert found.verdict == "problem"
    assert str(shards.path(1)) in found.text
    assert found.remedy == "remove the store and convert the model again"


def test_every_file_that_differs_is_named(shards: ServedShards) -> None:
    with shards.flipped(0, NEURON), shards.flipped(2, NEURON):
        texts = [finding.text for finding in stores.compare(shards.folder).findings]
    assert len(texts) == 2
    assert str(shards.path(0)) in texts[0]
    assert str(shards.path(2)) in texts[1]


def test_file_that_the_disk_does_not_give_is_a_problem(shards: ServedShards, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("sparseflow.store.manifest.hash_file", refuse)
    found = stores.compare(shards.folder).findings
    assert len(found) == len(shards.manifest.files)
    assert {finding.verdict for finding in found} == {"problem"}
    assert "Input/output error" in found[0].text


def test_cut_shard_is_a_problem_with_both_sizes_and_is_not_read(shards: ServedShards) -> None:
    whole = shards.path(2).stat().st_size
    with shards.cut(2, NEURON):
        manifest, found = stores.look(shards.folder).findings
        kept = shards.path(2).stat().st_size
        (others,) = stores.compare(shards.folder).findings
    assert (manifest.verdict, found.verdict) == ("ok", "problem")
    assert (others.verdict, others.text) == ("ok", "7 of 8 files have the bytes that were written")
    assert f"{shards.path(2)}: {kept} bytes, the manifest says {whole}" in found.text


def test_file_that_is_missing_is_a_problem(shards: ServedShards) -> None:
    (shards.folder / "config.json").unlink()
    assert "config.json: file is missing" in stores.look(shards.folder).findings[1].text
    (shards.folder / "config.json").mkdir()
    assert stores.look(shards.folder).findings[1].verdict == "problem"


def test_shard_of_another_store_is_a_problem(shards: ServedShards) -> None:
    """Sizes fit, contents do not."""
    (shards.folder / shard_name(0)).write_bytes(shards.path(1).read_bytes())
    found = by_name(stores.look(shards.folder))["reading"]
    assert found.verdict == "problem"
    assert "its checksums are not those of this store" in found.text


@pytest.mark.parametrize("content", ["", "{}", '{"format_version": 1}', None])
def test_manifest_that_is_none_is_a_problem_told_once(shards: ServedShards, content: str | None) -> None:
    (shards.folder / MANIFEST_NAME).unlink()
    if content is not None:
        (shards.folder / MANIFEST_NAME).write_text(content)
    assert verdicts(stores.look(shards.folder)) == {"manifest": "problem"}
    assert stores.compare(shards.folder).findings == []


def test_folder_that_is_not_there_is_no_store(tmp_path: Path) -> None:
    (found,) = stores.look(tmp_path / "none").findings
    assert "not a store" in found.text
    assert found.remedy == "make one with: sparseflow convert MODEL STORE"


def test_store_without_direct_io_is_read_otherwise_and_says_why(
    shards: ServedShards, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise DirectRefused("Linux AIO: used up; raise fs.aio-max-nr")

    monkeypatch.setattr(reading, "AioQueue", refuse)
    found = by_name(stores.look(shards.folder))["reading"]
    assert found.verdict == "note"
    assert found.text.startswith("buffered, ")
    assert "used up" in found.text


def test_memory_that_holds_a_part_is_a_note_and_none_a_problem(
    shards: ServedShards, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stores, "plan_memory", lambda *_: MemoryPlan(0, shards.n_bundles // 3))
    found = by_name(stores.look(shards.folder))["memory"]
    assert found.verdict == "note"
    assert found.text.startswith("33% of the neurons")
    monkeypatch.undo()
    monkeypatch.setattr("sparseflow.engine.memory_plan.free_memory", lambda: 10_000)
    found = by_name(stores.look(shards.folder))["memory"]
    assert found.verdict == "problem"
    assert "must be resident" in found.text
    assert found.remedy == "free some, or use a smaller model"
