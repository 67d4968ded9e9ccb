"""A store by somebody hostile, whose checksums all fit, is refused by one error; nothing else of the host is read."""

import argparse
import os
import shutil
import socket
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from forged_stores import forge, relist
from sparseflow_daemon.config import ServerConfig
from sparseflow_daemon.page_cache import page_cache_nbytes
from sparseflow_daemon.served_model import ServedModel, open_models

from sparseflow import DiskWeightStore, OffloadStrategy, SparseOPTForCausalLM
from sparseflow.cli import info, verify
from sparseflow.errors import DiskError, ShardCorrupt
from sparseflow.store.manifest import DENSE_NAME, MANIFEST_NAME, predictor_name, shard_name
from sparseflow.store.shard_format import FileEntry, hash_file
from sparseflow.store.stored_files import require_written

PATIENCE_S = 20.0
FILES = (DENSE_NAME, shard_name(1), predictor_name(0), "config.json", "generation_config.json", MANIFEST_NAME)
FOLDERS = ("neurons", "predictors")


@pytest.fixture
def store(family_store: Callable[..., Path], tmp_path: Path) -> Path:
    """A store to be changed, in a folder of its own."""
    return Path(shutil.copytree(family_store("base"), tmp_path / "store"))


def in_time(call: Callable[[], Any]) -> Any:
    """What a call gives or raises; one that waits for ever fails."""
    done: list[Any] = []

    def run() -> None:
        try:
            done.append(call())
        except BaseException as error:
            done.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(PATIENCE_S)
    assert done, "it waits for something"
    if isinstance(done[0], BaseException):
        raise done[0]
    return done[0]


# --- openers: each raises what it refuses a store with


def by_mapping(store: Path) -> None:
    DiskWeightStore(store).initialize_from_pretrained().close()


def below_memory(store: Path) -> None:
    strategy = OffloadStrategy(cpu_cache_ratio=0.5)
    with DiskWeightStore(store).initialize_from_pretrained(strategy=strategy) as source:
        assert source.status().n_resident == 0


def by_generating(store: Path) -> None:
    SparseOPTForCausalLM.from_pretrained(store).close()


def by_verifying(store: Path) -> None:
    damaged = verify.run(argparse.Namespace(store=store, json=True, quiet=True))["damaged"]
    assert isinstance(damaged, dict)
    for text in damaged.values():
        raise DiskError(text)


def by_serving(store: Path) -> None:
    (model,) = open_models(ServerConfig((store,), memory="1GiB")).values()
    try:
        model.load()
        if model.error is not None:
            assert not model.regions, "memory was taken before it was refused"
            raise model.error
    finally:
        model.close()


OPENERS: dict[str, Callable[[Path], None]] = {
    "mapped": by_mapping,
    "below memory": below_memory,
    "generate": by_generating,
    "verify": by_verifying,
    "served": by_serving,
}
all_openers = pytest.mark.parametrize("opener", OPENERS.values(), ids=OPENERS)


def refusal(opener: Callable[[Path], None], store: Path) -> str:
    """What it says: which file, and what to do."""
    with pytest.raises(DiskError) as caught:
        in_time(lambda: opener(store))
    assert "convert the model again" in str(caught.value)
    assert len(str(caught.value)) < 1000
    return str(caught.value)


@all_openers
def test_store_as_it_was_made_is_opened(opener: Callable[[Path], None], store: Path) -> None:
    opener(store)


@all_openers
def test_store_in_a_folder_that_is_a_link_is_opened(opener: Callable[[Path], None], store: Path) -> None:
    link = store.with_name("link")
    link.symlink_to(store, target_is_directory=True)
    opener(link)


# --- files that are none


def link_to_the_same(path: Path) -> None:
    """Elsewhere lies what was here, so that all checksums fit."""
    moved = path.parent.with_name("elsewhere") if path.parent.name in FOLDERS else path.with_name("elsewhere")
    there = moved.parent.parent / f"moved-{path.name}"
    path.rename(there)
    path.symlink_to(there)


def link_inside_the_store(path: Path) -> None:
    path.rename(path.with_name("moved"))
    path.symlink_to("moved")


def link_to_nothing(path: Path) -> None:
    path.unlink()
    path.symlink_to("/nowhere/at/all")


def fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def socket_file(path: Path) -> None:
    path.unlink()
    here = os.getcwd()
    os.chdir(path.parent)  # for a path that is short enough
    try:
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(path.name)
    finally:
        os.chdir(here)


def link_to_a_device(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


KINDS: dict[str, tuple[Callable[[Path], None], str]] = {
    "link elsewhere": (link_to_the_same, "a symbolic link"),
    "link inside": (link_inside_the_store, "a symbolic link"),
    "link to nothing": (link_to_nothing, "a symbolic link"),
    "link to a device": (link_to_a_device, "a symbolic link"),
    "FIFO": (fifo, "a FIFO"),
    "folder": (folder, "a folder"),
    "socket": (socket_file, "a socket"),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(("make", "kind"), KINDS.values(), ids=KINDS)
def test_file_that_is_none_of_the_store_is_refused(
    make: Callable[[Path], None], kind: str, name: str, store: Path
) -> None:
    make(store / name)
    for opener in OPENERS.values():
        assert f"{store / name}: is {kind}, not a file in the store itself" in refusal(opener, store)


@pytest.mark.parametrize("name", FOLDERS)
@all_openers
def test_folder_that_is_a_link_is_refused(opener: Callable[[Path], None], name: str, store: Path) -> None:
    (store / name).rename(store.with_name("moved"))
    (store / name).symlink_to(store.with_name("moved"), target_is_directory=True)
    assert f"{store / name}: is a symbolic link, not a folder" in refusal(opener, store)


@pytest.mark.parametrize("name", ["tokenizer.json", "profile.json", "predictors/calibrated-000.safetensors", "more/x"])
@all_openers
def test_file_that_few_stores_have_is_looked_at_too(opener: Callable[[Path], None], name: str, store: Path) -> None:
    precious = store.with_name("precious")
    precious.write_text("{}")
    (store / name).parent.mkdir(exist_ok=True)
    (store / name).symlink_to(precious)
    entry = hash_file(precious)
    forge(store, lambda c: c["files"].update({name: {"nbytes": entry.nbytes, "xxh3_64": entry.xxh3_64}}))
    assert f"{store / name}: is a symbolic link" in refusal(opener, store)


def test_info_of_a_store_whose_manifest_is_a_fifo_does_not_wait(store: Path) -> None:
    fifo(store / MANIFEST_NAME)
    arguments = argparse.Namespace(model=str(store), gpu_cache_ratio=0.3, json=True)
    assert "is a FIFO" in refusal(lambda _store: info.run(arguments), store)  # type: ignore[arg-type, return-value]


def test_checkpoint_whose_configuration_is_a_fifo_does_not_wait(
    family_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    checkpoint = Path(shutil.copytree(family_checkpoint("base"), tmp_path / "checkpoint"))
    fifo(checkpoint / "config.json")
    with pytest.raises(DiskError, match="is no file"):
        in_time(lambda: DiskWeightStore(checkpoint).initialize_from_pretrained())


def test_checkpoint_of_links_is_converted_as_the_hub_keeps_it(
    family_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    for path in family_checkpoint("base").iterdir():
        (checkpoint / path.name).symlink_to(path)
    DiskWeightStore(checkpoint).initialize_from_pretrained().close()


@pytest.fixture
def served(store: Path) -> Iterator[ServedModel]:
    (model,) = open_models(ServerConfig((store,), memory="1GiB")).values()
    yield model
    model.close()


@pytest.mark.parametrize("make", [fifo, link_to_the_same])
def test_status_of_a_server_does_not_open_what_is_no_file(
    make: Callable[[Path], None], served: ServedModel, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(store / "config.json")
    opened: list[str] = []
    real = os.open
    monkeypatch.setattr(os, "open", lambda path, *how: opened.append(str(path)) or real(path, *how))
    in_time(lambda: page_cache_nbytes([served]))
    assert str(store / DENSE_NAME) in opened
    assert str(store / "config.json") not in opened


# --- sizes


@all_openers
def test_store_that_lists_no_neurons_is_refused(opener: Callable[[Path], None], store: Path) -> None:
    def change(content: Any) -> None:
        content["files"] = {name: entry for name, entry in content["files"].items() if not name.startswith("neurons/")}

    forge(store, change)
    assert f"{store / MANIFEST_NAME}: 2 parts are not listed, {shard_name(0)} first" in refusal(opener, store)


def claim(store: Path, name: str, nbytes: int) -> None:
    forge(store, lambda content: content["files"][name].update(nbytes=nbytes))


@all_openers
def test_bytes_that_are_claimed_and_not_there_take_no_memory(opener: Callable[[Path], None], store: Path) -> None:
    claim(store, "generation_config.json", 1 << 28)
    assert "generation_config.json" in in_less_memory(lambda: refusal(opener, store))


@pytest.mark.parametrize("name", [DENSE_NAME, "config.json"])
@pytest.mark.parametrize("opener", [by_mapping, by_verifying])
def test_file_of_holes_is_refused_though_its_size_is_as_claimed(
    opener: Callable[[Path], None], name: str, store: Path
) -> None:
    nbytes = 1 << 40
    os.truncate(store / name, nbytes)
    claim(store, name, nbytes)
    assert f"{store / name}: {nbytes} bytes, of which" in in_less_memory(lambda: refusal(opener, store))


def test_file_with_some_holes_is_taken(store: Path) -> None:
    """As some programs copy files whose zeros they leave out."""
    nbytes = 32 << 20
    with open(store / "more.bin", "wb") as file:
        file.write(os.urandom(nbytes // 8))  # no disk makes less of it
        file.truncate(nbytes)
    relist(store, "more.bin")
    by_mapping(store)


def test_file_without_holes_is_taken_where_the_disk_says_that_it_takes_none(tmp_path: Path) -> None:
    """As some disks do that lie elsewhere, or compress."""
    path = tmp_path / "file"
    path.write_bytes(b"x" * (16 << 20))
    told: Any = SimpleNamespace(st_size=16 << 20, st_blocks=0)
    require_written(path, told)
    os.truncate(path, 1)
    os.truncate(path, 16 << 20)
    with pytest.raises(ShardCorrupt, match="of which 0 were ever written"):
        require_written(path, told)


def in_less_memory(call: Callable[[], Any]) -> Any:
    """The result of a call that takes seconds of the processor at most, and some MiB."""
    tracemalloc.start()
    started_s = time.process_time()
    try:
        result = call()
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
        assert time.process_time() - started_s < 5
    finally:
        tracemalloc.stop()
    return result


def test_bytes_of_a_folder_of_neurons_that_are_none_are_not_read(store: Path) -> None:
    """They would not count as resident, and take memory without being planned for."""
    (store / "neurons" / "more.txt").write_bytes(bytes(1000))
    entry = FileEntry(1000, hash_file(store / "neurons" / "more.txt").xxh3_64)
    forge(store, lambda c: c["files"].update({"neurons/more.txt": {"nbytes": 1000, "xxh3_64": entry.xxh3_64}}))
    with DiskWeightStore(store).initialize_from_pretrained() as source:
        assert "neurons/more.txt" not in source.model_files


@pytest.mark.parametrize("name", [DENSE_NAME, "config.json"])
@pytest.mark.parametrize("opener", [by_generating, by_serving])
def test_empty_file_is_an_error_of_that_file(opener: Callable[[Path], None], name: str, store: Path) -> None:
    (store / name).write_bytes(b"")
    relist(store, name)
    if opener is by_serving:  # which looks into none: its clients do
        opener(store)
        return
    with pytest.raises(ShardCorrupt, match=name):
        in_time(lambda: opener(store))
