"""What is said of where weights lie, and of options that have no effect."""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sparseflow.cli.knobs import KNOBS, PLACED_KNOBS, given_options, idle_knobs
from sparseflow.cli.main import build_parser, main
from sparseflow.cli.opening import add_opening
from sparseflow.cli.placement import Placement, lines, placement_of
from sparseflow.cli.sampling import add_sampling
from sparseflow.core.config import OffloadStrategy
from sparseflow.models.opt_sparse import SparseOPTForCausalLM
from sparseflow.store.manifest import Manifest

Capture = pytest.CaptureFixture[str]


def told(store: Path, capsys: Capture, *options: str) -> tuple[str, str]:
    """stdout and stderr of a short generation."""
    capsys.readouterr()
    assert main(["generate", str(store), "--prompt", "To be, or", "--max-new-tokens", "2", *options]) == 0
    captured = capsys.readouterr()
    return captured.out, captured.err


def placement(store: Path, capsys: Capture, *options: str) -> dict[str, Any]:
    fields: dict[str, Any] = json.loads(told(store, capsys, *options, "--json")[0])["placement"]
    return fields


def test_all_in_memory_is_mapped_and_nothing_on_disk(demo_store: Path, capsys: Capture) -> None:
    found = placement(demo_store, capsys)
    manifest = Manifest.load(demo_store)
    assert found["mapped"] == manifest.nbytes_under("")
    assert (found["private"], found["disk"], found["neurons_in_memory"]) == (0, 0, 1)
    assert (found["device"], found["page_locked"], found["shared"], found["transport"]) == (None, None, None, None)
    assert (found["fidelity"], found["computes_on"], found["io_reason"]) == (
        "exact",
        "cpu",
        "all neurons are in memory",
    )
    assert found["process_private"] > 50 << 20


def test_below_memory_arena_and_disk_are_told_apart(demo_store: Path, capsys: Capture) -> None:
    profile = Manifest.load(demo_store).profile
    found = placement(demo_store, capsys, "--cpu-cache-ratio", "0.25", "--io", "buffered", "--threads", "1")
    assert found["neurons_in_memory"] == pytest.approx(0.25)
    assert found["disk"] == profile.neurons_nbytes - profile.neurons_nbytes // 4
    assert found["private"] > profile.neurons_nbytes // 4
    assert found["mapped"] == Manifest.load(demo_store).nbytes_under("") - Manifest.load(demo_store).nbytes_under(
        "neurons/"
    )
    assert (found["io"], found["io_reason"], found["threads"]) == ("buffered", "as --io says", 1)
    assert found["disk_bytes_per_s"] > 0


def test_people_read_it_on_stderr_unless_they_want_quiet_or_json(demo_store: Path, capsys: Capture) -> None:
    out, err = told(demo_store, capsys, "--cpu-cache-ratio", "0.25")
    assert [line.split()[0] for line in err.splitlines()] == ["weights:", "reading:", "running:"]
    assert "left on disk" in err
    assert "room for 25% of the neurons in memory" in err
    assert told(demo_store, capsys, "--quiet") == (out, "")
    assert told(demo_store, capsys, "--json")[1] == ""


PLACED = Placement(
    *(None, None, None, 0, 100 << 20, 0, 1.0, "map", "all neurons are in memory", None),
    *("exact", 2, "cpu", None, None, 200 << 20, 100 << 20),
)


def test_a_gpu_and_a_server_are_told_with_what_they_hold() -> None:
    placed = replace(
        PLACED, device=3 << 30, page_locked=2 << 30, shared=5 << 30, mapped=None, computes_on="cuda:0",
        transport="pull", transport_reason="as the driver allows", threads=1,
    )  # fmt: skip
    assert list(lines(placed)) == [
        "weights:  3GiB on cuda:0, 5GiB shared with the server, 2GiB of host memory page-locked",
        "reading:  nothing while it runs: all neurons are in memory",
        "to cuda:0:  by pull (as the driver allows)",
        "running:  exact on cuda:0, 1 thread; this process has 200MiB private and 100MiB shared, with Python and torch",
    ]


def test_what_has_slots_is_counted_as_the_device_does(demo_store: Path) -> None:
    strategy = OffloadStrategy(device_cache="copy", gpu_cache_ratio=0.5)
    model = SparseOPTForCausalLM.from_pretrained(demo_store, strategy=strategy)
    try:
        found = placement_of(model, build_parser().parse_args(["generate", str(demo_store)]))
        nbytes = model.device_report()["nbytes"]
        assert found.device == sum(nbytes.values()) > nbytes["slots"] > 0
        assert found.transport == model.device_report()["transport"]
    finally:
        model.close()


def parsed(words: list[str]) -> argparse.Namespace:
    """As `main` has them."""
    arguments = build_parser().parse_args(words)
    arguments.given = given_options(build_parser(), words)
    return arguments


def idle(options: list[str], placed: Placement = PLACED) -> list[str]:
    """Options of `generate` that are said to have no effect."""
    arguments = parsed(["generate", "store", *options])
    return [line.split()[0] for line in idle_knobs(arguments) + idle_knobs(arguments, placed)]


ON_GPU = replace(PLACED, device=1 << 30, computes_on="cuda:0")
IN_PART = replace(PLACED, neurons_in_memory=0.3, disk=1 << 20)


@pytest.mark.parametrize(
    ("options", "placed", "effective"),
    [
        (["--io", "direct"], PLACED, IN_PART),
        (["--io", "auto"], PLACED, IN_PART),
        (["--eviction", "lru"], PLACED, IN_PART),
        (["--aggressive-offload"], PLACED, IN_PART),
        (["--cpu-cache-ratio", "0.5"], IN_PART, replace(IN_PART, neurons_in_memory=0.5)),
        (["--gpu-cache-ratio", "0.5"], PLACED, ON_GPU),
        (["--device-memory", "8GiB"], PLACED, ON_GPU),
        (["--device-hints"], PLACED, ON_GPU),
        (["--activation-threshold", "0.5"], replace(PLACED, fidelity="dense"), PLACED),
        (["--audit", "2"], replace(PLACED, fidelity="dense"), PLACED),
    ],
)
def test_an_option_without_effect_where_weights_lie_so_is_named_and_only_then(
    options: list[str], placed: Placement, effective: Placement
) -> None:
    assert idle(options, placed) == [options[0]]
    assert idle(options, effective) == []


WARM = ["--temperature", "0.7"]


@pytest.mark.parametrize(
    ("words", "option", "remedy"),
    [
        (["generate", "s", "--top-p", "0.9"], "--top-p", WARM),
        (["generate", "s", "--top-k", "50"], "--top-k", WARM),  # the default, but given
        (["chat", "s", "--seed", "0"], "--seed", WARM),
        (["serve", "s", "--gpu-cache-ratio", "0.5"], "--gpu-cache-ratio", ["--device", "cuda"]),
        (["serve", "s", "--device-memory", "1GiB"], "--device-memory", ["--device", "cuda"]),
        (["serve", "s", "--device-hints"], "--device-hints", ["--device", "cuda"]),
        (["demo", "--temperature", "0", "--seed", "7"], "--seed", WARM),
        (["demo", "--cache-ratio", "0.3"], "--gpu-cache-ratio", None),
        (["info", "--cache-ratio", "0.3"], "--gpu-cache-ratio", ["model"]),
        (["trace", "record", "s", "--out", "o", "--text", "t", "--seed", "0"], "--seed", ["--text"]),
        (["calibrate", "s", "--text", "t", "--codes-only", "--epochs", "2"], "--epochs", None),
        (["calibrate", "s", "--text", "t", "--codes-only", "--keep-all"], "--keep-all", None),
        (["bench", "--reserve", "64MiB"], "--reserve", ["--limit", "2GiB"]),
        (["bench", "--quick", "--tokens", "32"], "--tokens", None),
        (["bench", "--quick", "--rounds", "3"], "--rounds", None),
        (["status", "--count", "2"], "--count", ["--watch", "1"]),
    ],
)
def test_an_option_without_effect_beside_others_is_named_and_only_then(
    words: list[str], option: str, remedy: list[str] | None
) -> None:
    assert [line.split()[0] for line in idle_knobs(parsed(words))] == [option]
    if remedy == ["--text"]:
        words, remedy = [word for word in words if word not in ("--text", "t")], []
    if remedy is not None:
        assert idle_knobs(parsed([*words, *remedy])) == []


def test_each_option_of_the_tables_is_tried_above_and_exists() -> None:
    placed, beside = (
        test.pytestmark[0].args[1]  # type: ignore[attr-defined]
        for test in (
            test_an_option_without_effect_where_weights_lie_so_is_named_and_only_then,
            test_an_option_without_effect_beside_others_is_named_and_only_then,
        )
    )
    assert {options[0] for options, _, _ in placed} == {knob.option for knob in PLACED_KNOBS}
    assert {option for _, option, _ in beside} == {knob.option for knobs in KNOBS.values() for knob in knobs}
    assert {words[0] for words, _, _ in beside} == KNOBS.keys()
    arguments = vars(build_parser().parse_args(["generate", "store"]))
    assert {knob.name for knob in PLACED_KNOBS} <= arguments.keys()
    assert {knob.name for knob in PLACED_KNOBS} - {"audit"} <= vars(build_parser().parse_args(["chat", "s"])).keys()


# Each has an effect wherever it is given, or is refused.
ALWAYS_WORKS = {
    *("--server", "--model", "--dtype", "--fidelity", "--threads", "--memory", "--device", "--borrow-dense"),
    *("--max-new-tokens", "--stop", "--temperature", "--repetition-penalty"),
}


def test_each_option_of_opening_and_sampling_can_be_idle_or_always_works() -> None:
    parser = argparse.ArgumentParser(add_help=False)
    add_opening(parser)
    add_sampling(parser, max_new_tokens=1)
    options = {option for action in parser._actions for option in action.option_strings}
    known = {knob.option for knob in (*KNOBS["generate"], *PLACED_KNOBS)}
    assert options == (known | ALWAYS_WORKS) - {"--audit"}
    assert not known & ALWAYS_WORKS


def test_what_is_given_is_told_from_what_is_the_default() -> None:
    words = ["generate", "store", "--top-k", "50", "--prompt", "a"]
    assert {"top_k", "prompt"} <= given_options(build_parser(), words)
    assert not {"top_p", "seed", "io", "quiet", "json"} & given_options(build_parser(), words)


def test_without_options_nothing_is_warned_of_wherever_the_weights_lie() -> None:
    for placed in (PLACED, ON_GPU, replace(PLACED, fidelity="dense")):
        assert idle([], placed) == []


def test_warnings_are_one_line_each_on_stderr(demo_store: Path, capsys: Capture) -> None:
    _, err = told(demo_store, capsys, "--quiet", "--seed", "1", "--io", "map", "--cpu-cache-ratio", "1")
    assert err.splitlines() == [
        "sparseflow: warning: --seed 1 has no effect: at temperature 0 the likeliest token is always taken; "
        "give --temperature above 0 to sample",
        "sparseflow: warning: --io map has no effect: all neurons are in memory and none is read while it runs; "
        "--memory or --cpu-cache-ratio would lower that",
    ]


def test_with_json_logs_the_placement_and_warnings_are_objects_too(demo_store: Path, capsys: Capture) -> None:
    _, err = told(demo_store, capsys, "--io", "map", "--log-format", "json")
    placed, warning = map(json.loads, err.splitlines())
    assert placed["placement"]["computes_on"] == "cpu"
    assert (warning["level"], warning["message"].split()[0]) == ("WARNING", "--io")
