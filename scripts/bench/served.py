"""Decode speed of a weight server's client beside the same engine in the process, token by token in turn.

    python scripts/bench/served.py --store /tmp/store-1.3b --cpu-cache-ratio 1.0 0.3

A round starts a server of its own, opens the store in this process and at the server, and feeds both models the same
random tokens, first those that fill the arena, which are not counted. Who is first changes with every token. A ratio is
one of throughputs, made from both medians of one round; it is given with the smallest and the largest of the rounds.

    python scripts/bench/served.py --store /tmp/store-1.3b --cpu-cache-ratio 0.3 --prefetch

compares lookahead with none instead, each with a server (so an arena) and a client of its own, and says what `auto`
would choose. Without lookahead, too, the parts of a fetch that is too large for one are hinted. `--io` compares on
another way to read; the page cache is left as it is, so `buffered` and `map` read what it holds. Only ratios mean much
on a shared machine; what memory and disk allow at the moment stands beside them.
"""

import argparse
import contextlib
import copy
import json
import os
import signal
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import torch
from decode_vs_dense import Decoder
from memory_child import ENDING_DEADLINE_S, FIRST_ORDINARY_ID, BenchError
from sparseflow_daemon.launch import launch

from sparseflow import OffloadStrategy, SparseOPTForCausalLM
from sparseflow.engine.counts import FetchCounts
from sparseflow.engine.reading import IO_MODES
from sparseflow.errors import SparseFlowError
from sparseflow.orchestration.lookahead import Lookahead
from sparseflow.utils.tensor_ops import read_bandwidth

DEFAULT_RATIOS = {"served": [1.0, 0.3], "prefetch": [0.3]}

Models = dict[str, SparseOPTForCausalLM]  # label -> model; the second is measured by the first
Row = dict[str, Any]


@contextlib.contextmanager
def server(arguments: argparse.Namespace, ratio: float, name: str) -> Iterator[str]:
    """A weight server that is ready; its name. It is gone on leaving, however that comes about."""
    others = psutil.Process().children()
    words = [arguments.store, "--name", name, "--memory", arguments.memory, "--io", arguments.io]
    try:
        launch([*map(str, words), "--cpu-cache-ratio", str(ratio)], name)
        yield name
    finally:
        left = [child for child in psutil.Process().children() if child not in others]  # one not yet ready, too
        for end in (psutil.Process.terminate, psutil.Process.kill):
            for process in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    end(process)
            _, left = psutil.wait_procs(left, ENDING_DEADLINE_S)


def in_process_and_served(arguments: argparse.Namespace, ratio: float, stack: contextlib.ExitStack) -> Models:
    """The store opened here, and at a server. `stack` ends both."""
    name = stack.enter_context(server(arguments, ratio, "served"))
    in_process = SparseOPTForCausalLM.from_pretrained(
        arguments.store,
        memory=arguments.memory,
        io=arguments.io,
        strategy=OffloadStrategy(cpu_cache_ratio=ratio),
    )
    stack.callback(in_process.close)
    served = SparseOPTForCausalLM.from_server(name)
    stack.callback(served.close)
    return {"in-process": in_process, "served": served}


def prefetch_off_and_on(arguments: argparse.Namespace, ratio: float, stack: contextlib.ExitStack) -> Models:
    """Two servers with a client each, one of which looks ahead. `stack` ends all.

    Raises:
        BenchError: nothing is read that could be foreseen.
    """
    models = {}
    for mode in ("off", arguments.prefetch):
        name = stack.enter_context(server(arguments, ratio, f"prefetch-{mode}"))
        models[mode] = model = SparseOPTForCausalLM.from_server(name)
        stack.callback(model.close)
        if not model.source.read_times.layer_s:
            raise BenchError(f"--cpu-cache-ratio {ratio:g}: all bundles are in memory, give --prefetch a lower one")
        model.coordinator.lookahead.mode = mode
    return models


def decode_in_turn(models: Models, arguments: argparse.Namespace, seed: int) -> tuple[dict[str, Decoder], int]:
    """Feed all the same tokens.

    Returns the decoders, with times and counts of the tokens after the warm-up, and after how many of these the
    likeliest next token was the same.
    """
    draw = torch.Generator().manual_seed(seed)
    vocab_size = next(iter(models.values())).config.vocab_size

    def draw_tokens(*shape: int) -> torch.Tensor:
        return torch.randint(FIRST_ORDINARY_ID, vocab_size, shape, generator=draw)

    with torch.inference_mode():
        prompt = draw_tokens(1, arguments.prompt_tokens)
        decoders = {label: Decoder(model, prompt) for label, model in models.items()}
        order, n_same = list(decoders.values()), 0
        for n, token in enumerate(draw_tokens(arguments.warm_up + arguments.tokens, 1, 1)):
            if n == arguments.warm_up:
                for decoder in order:
                    decoder.model.reset_stats()
                    decoder.step_s.clear()
                n_same = 0
            for decoder in order:
                decoder.step(token)
            n_same += all(torch.equal(decoder.next_token, order[0].next_token) for decoder in order)
            order.reverse()
    return decoders, n_same


def describe(decoder: Decoder, memory_bytes_per_s: float) -> Row:
    """What one model took for its tokens, and what memory and disk would have taken at full speed."""
    model, n_tokens = decoder.model, len(decoder.step_s)
    status, fetches = model.source.status(), model.stats.decode.fetches or FetchCounts()
    per_token = {f"{name}_per_token": value / n_tokens for name, value in asdict(fetches).items()}
    disk_s = per_token["bytes_from_disk_per_token"] / status.disk_bytes_per_s if status.disk_bytes_per_s else 0.0
    return {
        "s_per_token_median": statistics.median(decoder.step_s),
        "s_per_token_mean": statistics.mean(decoder.step_s),
        "hit_rate": fetches.hit_rate,
        **per_token,
        "resident_share": status.n_resident / status.n_bundles,
        "io": status.io,
        "auto_lookahead": auto_choice(model.coordinator.lookahead),
        "disk_bytes_per_s": status.disk_bytes_per_s,
        "bytes_touched_per_token": model.bytes_touched_per_token(),
        "memory_limit_s_per_token": model.bytes_touched_per_token() / memory_bytes_per_s,
        "disk_limit_s_per_token": disk_s,
    }


def auto_choice(lookahead: Lookahead) -> str:
    """What `auto` would do now, whatever is forced: `off` or `before`."""
    auto = copy.copy(lookahead)
    auto.mode = "auto"
    return "before" if auto.from_before else "off"


def run_round(arguments: argparse.Namespace, ratio: float, seed: int) -> Row:
    """Open both, decode, end both."""
    open_models: Callable[..., Models] = prefetch_off_and_on if arguments.prefetch else in_process_and_served
    with contextlib.ExitStack() as stack:
        decoders, n_same = decode_in_turn(open_models(arguments, ratio, stack), arguments, seed)
        bandwidth = read_bandwidth()
        rivals = {label: describe(decoder, bandwidth) for label, decoder in decoders.items()}
    base, rated = rivals.values()
    return {
        "throughput_ratio": base["s_per_token_median"] / rated["s_per_token_median"],
        "n_same_token": n_same,
        "memory_bytes_per_s": bandwidth,
        "rivals": rivals,
    }


def summarise(rounds: Sequence[Row], n_tokens: int) -> Row:
    """Medians over the rounds; of the ratio, the smallest and the largest too."""
    ratios = [each["throughput_ratio"] for each in rounds]
    return {
        "throughput_ratio": statistics.median(ratios),
        "throughput_ratio_smallest": min(ratios),
        "throughput_ratio_largest": max(ratios),
        "n_same_token": sum(each["n_same_token"] for each in rounds),
        "n_compared": len(rounds) * n_tokens,
        "memory_bytes_per_s": statistics.median(each["memory_bytes_per_s"] for each in rounds),
        "rivals": {label: _median_row([each["rivals"][label] for each in rounds]) for label in rounds[0]["rivals"]},
    }


def _median_row(rows: Sequence[Row]) -> Row:
    """Of every number; what is a word is given as all words that there were."""
    merged: Row = {}
    for name, first in rows[0].items():
        values = [row[name] for row in rows]
        if isinstance(first, str):
            merged[name] = "/".join(sorted(set(values)))
        else:
            merged[name] = None if None in values else statistics.median(values)
    return merged


def compare(arguments: argparse.Namespace, ratio: float) -> Row:
    """All rounds at one size of the arena."""
    rounds = []
    for n in range(arguments.rounds):
        rounds.append(run_round(arguments, ratio, arguments.seed + n))
        print(f"ratio {ratio:g}, round {n}: {rounds[-1]['throughput_ratio']:.3f}", file=sys.stderr, flush=True)
    return {"cpu_cache_ratio": ratio, **summarise(rounds, arguments.tokens), "rounds": rounds}


COLUMNS = (  # heading, key, unit, digits
    ("ms/token", "s_per_token_median", 1e-3, 2),
    ("mean", "s_per_token_mean", 1e-3, 2),
    ("waiting", "wait_s_per_token", 1e-3, 2),
    ("memory's limit", "memory_limit_s_per_token", 1e-3, 2),
    ("disk's limit", "disk_limit_s_per_token", 1e-3, 2),
    ("messages/token", "messages_per_token", 1, 1),
    ("hit rate", "hit_rate", 1, 3),
    ("MB read/token", "bytes_from_disk_per_token", 1e6, 2),
    ("in memory", "resident_share", 1, 3),
)
HINT_COLUMNS = (
    ("hinted/token", "hinted_per_token", 1, 1),
    ("useful", "hints_useful_per_token", 1, 1),
    ("late", "hints_late_per_token", 1, 1),
    ("wasted", "hints_wasted_per_token", 1, 1),
)


def format_table(comparisons: Sequence[Row], columns: Sequence[tuple[str, str, float, int]]) -> str:
    """For people: two lines for each size of the arena."""
    lines = [["cpu cache ratio", "", *(heading for heading, *_ in columns), "throughput (smallest-largest)"]]
    for each in comparisons:
        ratio, *spread = (each[f"throughput_ratio{end}"] for end in ("", "_smallest", "_largest"))
        last = ["1", f"{ratio:.3f} ({spread[0]:.3f}-{spread[1]:.3f})"]
        for (label, row), throughput in zip(each["rivals"].items(), last, strict=True):
            cells = [f"{row[key] / unit:.{n}f}" if row[key] is not None else "-" for _, key, unit, n in columns]
            lines.append([f"{each['cpu_cache_ratio']:g}", label, *cells, throughput])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.rjust, line, widths)) for line in lines)


def remarks(comparison: Row) -> Iterator[str]:
    """What a reader of the table must know of one size of the arena."""
    rivals = comparison["rivals"]
    row = list(rivals.values())[-1]
    yield f"same token {comparison['n_same_token']} of {comparison['n_compared']}"
    memory = f"{comparison['memory_bytes_per_s'] / 1e9:.1f} GB/s, {row['bytes_touched_per_token'] / 1e6:.1f} MB a token"
    yield f"memory is read at {memory}"
    if row["disk_bytes_per_s"]:
        yield f"disk ({row['io']}) gives bundles at random at {row['disk_bytes_per_s'] / 1e6:.0f} MB/s"
        yield "auto lookahead: " + ", ".join(f"{each['auto_lookahead']} ({label})" for label, each in rivals.items())
    for label, each in rivals.items():
        if each["misses_per_token"] and not each["evictions_per_token"]:
            yield f"{label}: nothing was evicted, so its arena was not full yet; raise --warm-up"


def print_result(result: Row, arguments: argparse.Namespace) -> None:
    """What was measured, for people."""
    what = f"lookahead {arguments.prefetch!r} against none" if arguments.prefetch else "served against in the process"
    print(
        f"{what}: {arguments.tokens} tokens after {arguments.warm_up}, {arguments.rounds} rounds, "
        f"{result['threads']} threads, --memory {arguments.memory}, --io {arguments.io}"
    )
    print(format_table(result["comparisons"], COLUMNS + HINT_COLUMNS if arguments.prefetch else COLUMNS))
    for comparison in result["comparisons"]:
        print(f"ratio {comparison['cpu_cache_ratio']:g}: {'; '.join(remarks(comparison))}")


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, required=True, help="the model, converted")
    parser.add_argument(
        "--cpu-cache-ratio",
        type=float,
        nargs="+",
        help="at most this share of bundles in memory; default: "
        + ", with --prefetch ".join(" ".join(map(str, ratios)) for ratios in DEFAULT_RATIOS.values()),
    )
    parser.add_argument(
        "--prefetch",
        nargs="?",
        const="before",
        choices=("before", "input"),
        help="compare lookahead with none instead, from the MLP before (before) or the layer's input (input)",
    )
    parser.add_argument("--rounds", type=int, default=3, help="each with servers of its own")
    parser.add_argument("--warm-up", type=int, default=24, help="tokens before those that count, to fill the arena")
    parser.add_argument("--tokens", type=int, default=64, help="decode steps of each model that count, in each round")
    parser.add_argument("--prompt-tokens", type=int, default=8)
    parser.add_argument("--memory", default="6GiB", help="of each server, and of the model in this process")
    parser.add_argument("--io", choices=IO_MODES, default="auto", help="how bundles are read")
    parser.add_argument("--seed", type=int, default=1, help="of prompt and tokens")
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    arguments = parser.parse_args()
    if arguments.cpu_cache_ratio is None:
        arguments.cpu_cache_ratio = DEFAULT_RATIOS["prefetch" if arguments.prefetch else "served"]
    if not all(0 < ratio <= 1 for ratio in arguments.cpu_cache_ratio):
        parser.error("--cpu-cache-ratio is above 0 and at most 1")
    if min(arguments.rounds, arguments.tokens, arguments.prompt_tokens) < 1 or arguments.warm_up < 0:
        parser.error("--rounds, --tokens and --prompt-tokens are 1 or more, --warm-up 0 or more")
    if not (arguments.store / "manifest.json").is_file():
        parser.error(f"{arguments.store}: has no manifest.json; give --store a store (sparseflow convert makes one)")
    return arguments


def main() -> int:
    """0: measured."""
    arguments = parse_arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that servers are ended
    with tempfile.TemporaryDirectory(prefix="sf-") as scratch:  # a short path: sockets are made in it
        os.environ |= {"SPARSEFLOW_RUNTIME_DIR": scratch, "SPARSEFLOW_HOME": f"{scratch}/home"}
        comparisons = [compare(arguments, ratio) for ratio in arguments.cpu_cache_ratio]
    result = {
        "settings": {name: str(value) if isinstance(value, Path) else value for name, value in vars(arguments).items()},
        "threads": torch.get_num_threads(),
        "comparisons": comparisons,
    }
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1), encoding="utf-8")
    print_result(result, arguments)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (BenchError, SparseFlowError) as problem:
        sys.exit(f"served: {problem}")
