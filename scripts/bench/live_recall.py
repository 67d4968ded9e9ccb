"""What measuring recall while decoding costs: one model, token by token in turn, with and without.

    python scripts/make_synthetic_opt.py --preset opt-1.3b --out /tmp/store-1.3b --store
    python scripts/bench/live_recall.py --store /tmp/store-1.3b --ratio 1.0 0.3

decodes random tokens in blocks, of each pair one with and one without, in an order that is drawn. Blocks are long
enough for a sample or more, as medians of tokens would hide what happens in one of several; each pair gives a ratio.
Where others use the machine too, time on the processor says more than time by the clock (with OMP_NUM_THREADS=1: a
thread that waits for another counts as busy); waiting for the disk is not in it.
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from sparseflow import DiskWeightStore, OffloadStrategy, SparseFlowConfig, SparseOPTForCausalLM


class Stopwatch:
    """Stands in for a function, and times its calls."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self.total_s = 0.0

    def __call__(self, *arguments: Any) -> Any:
        """As the function."""
        start = time.perf_counter()
        result = self._function(*arguments)
        self.total_s += time.perf_counter() - start
        return result


class Decoder:
    """A text in the middle of being decoded."""

    def __init__(self, model: SparseOPTForCausalLM) -> None:
        self._model = model
        self._cache = DynamicCache(config=model.config)
        self._step(torch.randint(4, model.config.vocab_size, (1, 8)))

    def _step(self, tokens: torch.Tensor) -> None:
        self._model(tokens, past_key_values=self._cache, use_cache=True, logits_to_keep=1)

    def block_s(self, n_tokens: int, *, is_on: bool) -> tuple[float, float]:
        """The time of so many tokens, by the clock and on the processor."""
        self._model.coordinator.live_recall.is_on = is_on
        tokens = torch.randint(4, self._model.config.vocab_size, (n_tokens, 1, 1))
        start = time.perf_counter(), time.process_time()
        for token in tokens:
            self._step(token)
        return time.perf_counter() - start[0], time.process_time() - start[1]


def compare(model: SparseOPTForCausalLM, n_pairs: int, n_warm: int, block: int) -> dict[str, Any]:
    """Times of both ways. n_warm: tokens that are not counted. block: tokens."""
    times: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    with torch.inference_mode():
        decoder = Decoder(model)
        decoder.block_s(n_warm, is_on=True)
        model.reset_stats()
        live = model.coordinator.live_recall
        stopwatch = Stopwatch(live.step)
        live.step = stopwatch  # type: ignore[method-assign]
        for _ in range(n_pairs):
            for is_on in random.sample((True, False), 2):
                times[is_on].append(decoder.block_s(block, is_on=is_on))
    (on_s, on_cpu_s), (off_s, off_cpu_s) = (zip(*times[is_on], strict=True) for is_on in (True, False))
    fetches = model.stats.decode.fetches
    return {
        "on_ms_per_token": 1000 * statistics.mean(on_s) / block,
        "off_ms_per_token": 1000 * statistics.mean(off_s) / block,
        "ratio": ratio_of(on_s, off_s),
        "processor_ratio": ratio_of(on_cpu_s, off_cpu_s),
        "share_of_time_measuring": stopwatch.total_s / sum(on_s),
        "sampled_steps": model.stats.decode.sampled.sampled_steps,
        "steps_between_samples": live.pace.interval,
        "recall": model.stats.recall,
        "recall_error": model.stats.recall_error,
        "recall_samples": model.stats.recall_samples,
        "hit_rate": fetches.hit_rate if fetches else None,
    }


def ratio_of(on_s: Sequence[float], off_s: Sequence[float]) -> dict[str, Any]:
    """Of sums and of pairs."""
    ratios = [on / off for on, off in zip(on_s, off_s, strict=True)]
    lower, median, upper = statistics.quantiles(ratios)
    error = statistics.stdev(ratios) / len(ratios) ** 0.5
    return {"of_sums": sum(on_s) / sum(off_s), "median": median, "quartiles": [lower, upper], "error_of_mean": error}


def main() -> None:
    """One JSON line for each ratio and fidelity."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--ratio", type=float, nargs="+", default=[1.0], help="of all bundles in memory")
    parser.add_argument("--fidelity", nargs="+", default=["exact"])
    parser.add_argument("--threshold", type=float, default=1.0, help="factor of the margins; below 1 misses some")
    parser.add_argument("--pairs", type=int, default=24, help="of blocks, one with and one without")
    parser.add_argument("--block", type=int, default=12, help="tokens")
    parser.add_argument("--warm-tokens", type=int, default=24, help="not counted")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    for ratio in arguments.ratio:
        for fidelity in arguments.fidelity:
            torch.manual_seed(arguments.seed)
            random.seed(arguments.seed)
            strategy = OffloadStrategy(cpu_cache_ratio=ratio, activation_threshold=arguments.threshold)
            with DiskWeightStore(arguments.store) as store:
                store.initialize_from_pretrained(strategy=strategy)
                model = SparseOPTForCausalLM(SparseFlowConfig(store.profile, strategy), store, fidelity=fidelity)
                found = compare(model, arguments.pairs, arguments.warm_tokens, arguments.block)
            how = {"cpu_cache_ratio": ratio, "threads": torch.get_num_threads(), "fidelity": model.fidelity}
            print(json.dumps(how | found), flush=True)


if __name__ == "__main__":
    main()
