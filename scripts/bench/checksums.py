"""What comparing every bundle read from disk with its checksum costs: one model, block by block, with and without.

    python scripts/make_synthetic_opt.py --preset opt-1.3b --out /tmp/store-1.3b --store
    python scripts/bench/checksums.py --store /tmp/store-1.3b --ratio 0.2

decodes random tokens in blocks, of each pair one with and one without, in an order that is drawn; each pair gives a
ratio. Beside it: the share of the time that was spent in comparing, by a stopwatch around it.
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from live_recall import Stopwatch, ratio_of
from numpy.typing import NDArray
from transformers import DynamicCache

from sparseflow import DiskWeightStore, OffloadStrategy, SparseFlowConfig, SparseOPTForCausalLM
from sparseflow.engine.shard_files import ShardFiles


class Comparing:
    """Stands in for `ShardFiles.are_intact`, and can be left out."""

    def __init__(self, are_intact: Callable[..., NDArray[np.bool_]]) -> None:
        self.stopwatch = Stopwatch(are_intact)
        self.is_on = True
        self.n_bundles = 0

    def method(self) -> Callable[..., NDArray[np.bool_]]:
        """What takes its place: as it does, or as if all were intact."""

        def are_intact(shards: ShardFiles, layer: int, ids: NDArray[np.uint32], *rest: Any) -> NDArray[np.bool_]:
            if not self.is_on:
                return np.ones(len(ids), bool)
            self.n_bundles += len(ids)
            found: NDArray[np.bool_] = self.stopwatch(shards, layer, ids, *rest)
            return found

        return are_intact


def compare(model: SparseOPTForCausalLM, comparing: Comparing, arguments: argparse.Namespace) -> dict[str, Any]:
    """Times of both ways."""
    seconds: dict[bool, list[float]] = {True: [], False: []}
    cache = DynamicCache(config=model.config)

    def decode(n_tokens: int, *shape: int) -> float:
        tokens = torch.randint(4, model.config.vocab_size, (n_tokens, *(shape or (1, 1))))
        begin = time.perf_counter()
        for token in tokens:
            model(token, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return time.perf_counter() - begin

    with torch.inference_mode():
        decode(1, 1, 8)
        decode(arguments.warm_tokens)
        model.reset_stats()
        comparing.stopwatch.total_s, comparing.n_bundles = 0.0, 0
        for _ in range(arguments.pairs):
            for is_on in random.sample((True, False), 2):
                comparing.is_on = is_on
                seconds[is_on].append(decode(arguments.block))
    on_s, off_s = seconds[True], seconds[False]
    n_tokens = arguments.block * arguments.pairs
    return {
        "on_ms_per_token": 1000 * statistics.mean(on_s) / arguments.block,
        "off_ms_per_token": 1000 * statistics.mean(off_s) / arguments.block,
        "ratio": ratio_of(on_s, off_s),
        "share_of_time_comparing": comparing.stopwatch.total_s / sum(on_s),
        "bundles_compared_per_token": comparing.n_bundles / n_tokens,
        "us_per_bundle": 1e6 * comparing.stopwatch.total_s / comparing.n_bundles if comparing.n_bundles else None,
    }


def main() -> None:
    """One JSON line for each ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--ratio", type=float, nargs="+", default=[0.2], help="of all bundles in memory")
    parser.add_argument("--pairs", type=int, default=24, help="of blocks, one with and one without")
    parser.add_argument("--block", type=int, default=8, help="tokens")
    parser.add_argument("--warm-tokens", type=int, default=24, help="not counted")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    are_intact = ShardFiles.are_intact
    for ratio in arguments.ratio:
        torch.manual_seed(arguments.seed)
        random.seed(arguments.seed)
        strategy = OffloadStrategy(cpu_cache_ratio=ratio)
        comparing = Comparing(are_intact)
        ShardFiles.are_intact = comparing.method()  # type: ignore[method-assign]
        with DiskWeightStore(arguments.store) as store:
            store.initialize_from_pretrained(strategy=strategy)
            model = SparseOPTForCausalLM(SparseFlowConfig(store.profile, strategy), store)
            found = compare(model, comparing, arguments)
            how = {"cpu_cache_ratio": ratio, "threads": torch.get_num_threads(), "io": store.status().io}
        print(json.dumps(how | found), flush=True)


if __name__ == "__main__":
    main()
