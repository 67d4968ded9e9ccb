"""One case of the GPU benchmark, in a process of its own: `python -m sparseflow.bench.gpu.child`.

It imports what takes long, and waits. A line of JSON tells it what to run; it loads, warms up, says `ready`, waits for
any line more (two of them begin at once), and measures. Each line that it prints is JSON with all that came to be known
since the last, so what was known before a kill stays known. An end of its input ends it.
"""

import ctypes
import itertools
import json
import os
import random
import signal
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sparseflow.bench.child import PR_SET_PDEATHSIG, Settings, dense_nbytes_per_token
from sparseflow.bench.gpu.cases import CPU_OFFLOAD, DEVICE_MAP, SPARSEFLOW, TRANSFORMERS

Tell = Callable[[dict[str, Any]], None]

WARM_UP_SHARE = 1 / 3  # of the time to measure, at most
LEAST_TOKENS = 4  # of a generation, which has one step less
FIRST, WARM_UP, GREEDY = "first", "warm-up", "greedy"  # stand for the number of a generation
GREEDY_TOKENS = 24  # chosen at the end, to compare


def import_ahead() -> None:
    """What any case needs; none of it touches a GPU."""
    import accelerate  # noqa: F401
    import torch  # noqa: F401

    import sparseflow.bench.gpu.peers
    import sparseflow.models.opt_sparse  # noqa: F401


def prompt_of(settings: Settings, number: int | str) -> list[int]:
    """Random ids, the same for every case of a seed. Each generation has others: a cache has not seen its tokens."""
    return random_ids(settings, f"prompt {number}", settings["prompt_tokens"])


def random_ids(settings: Settings, purpose: str, n: int) -> list[int]:
    """Ordinary ids that depend on the seed and on what they are for."""
    draw = random.Random(f"{settings['seed']}/{purpose}")
    return [draw.randrange(4, settings["vocab_size"]) for _ in range(n)]


def plan_generations(budget_s: float, step_s: float, n_generations: int, n_tokens: int) -> tuple[int, int]:
    """How many generations, of how many tokens each, so that all end in time: fewer tokens first, then one generation.

    Args:
        step_s: what a token takes.
        n_tokens: of a generation, if there is time.
    """
    n_fitting = int(budget_s / n_generations / step_s)
    if n_fitting >= min(LEAST_TOKENS, n_tokens):
        return n_generations, min(n_tokens, n_fitting)
    return 1, min(n_tokens, max(LEAST_TOKENS, int(budget_s / step_s)))


class Times:
    """What `generate` takes for a streamer: notes when each token had come to the host."""

    def __init__(self) -> None:
        self.of_tokens: list[float] = []
        self._has_prompt = False

    def put(self, _ids: Any) -> None:
        """First the prompt, then token by token."""
        if self._has_prompt:
            self.of_tokens.append(time.perf_counter())
        self._has_prompt = True

    def end(self) -> None:
        """Nothing more comes."""


class Loaded:
    """A model, and what is known of the bytes that it moves."""

    def __init__(self, model: Any, pcie_bytes_per_token: float | None = None, **found: Any) -> None:
        """pcie_bytes_per_token: None where the model counts them itself."""
        self.model, self.pcie_bytes_per_token, self.found = model, pcie_bytes_per_token, found
        model.generation_config.eos_token_id = None  # all decode as many tokens

    def generate(
        self,
        prompt: Sequence[int],
        n_tokens: int,
        device: str,
        given: Sequence[int] | None = None,
        within_s: float | None = None,
    ) -> dict[str, Any]:
        """The likeliest id at each position, and when each was there.

        Args:
            given: what is decoded, whatever is likeliest; None: the likeliest.
            within_s: no further token is begun after that.
        """
        import torch
        from transformers import LogitsProcessorList, StoppingCriteriaList

        ids, times = torch.tensor([list(prompt)], device=device), Times()
        how: dict[str, Any] = {"max_new_tokens": n_tokens, "do_sample": False, "streamer": times}
        forced = None if given is None else _forced(given[:n_tokens], len(prompt), device)
        if forced is not None:
            how["logits_processor"] = LogitsProcessorList([forced])
        start = time.perf_counter()
        if within_s is not None:
            how["stopping_criteria"] = StoppingCriteriaList([_after(start + within_s)])
        output = self.model.generate(ids, attention_mask=torch.ones_like(ids), **how)
        found = output[0, len(prompt) :] if forced is None else forced.likeliest
        return generation(found[: len(times.of_tokens)].tolist(), start, times.of_tokens)


def _forced(given: Sequence[int], n_before: int, device: str) -> Any:
    """Makes each given id the likeliest, and keeps on the device what was."""
    import torch
    from transformers import LogitsProcessor

    class Forced(LogitsProcessor):
        likeliest = torch.zeros(len(given), dtype=torch.int64, device=device)

        def __call__(self, input_ids: Any, scores: Any) -> Any:
            n = input_ids.shape[1] - n_before
            self.likeliest[n] = scores[0].argmax()
            scores[0, given[n]] = float("inf")
            return scores

    return Forced()


def _after(end: float) -> Callable[..., Any]:
    import torch
    from transformers import StoppingCriteria

    class Ended(StoppingCriteria):
        def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
            return torch.full((len(input_ids),), time.perf_counter() > end, device=input_ids.device)

    return Ended()


def generation(ids: list[int], start: float, times: Sequence[float]) -> dict[str, Any]:
    """What one call of `generate` showed. start, times: seconds of one clock; times: when each token was there."""
    steps = [after - before for before, after in itertools.pairwise(times)]
    return {
        "ids": ids,
        "start": start,
        "end": times[-1],
        "time_to_first_token_s": times[0] - start,
        "decode_tokens_per_s": len(steps) / sum(steps) if steps else None,
        "median_step_s": statistics.median(steps) if steps else None,
        "shortest_step_s": min(steps) if steps else None,
        "longest_step_s": max(steps) if steps else None,
    }


# --- the programs


def load_sparseflow(settings: Settings) -> Loaded:
    """SparseFlow, with the store in this process or at a server."""
    from sparseflow.core.config import OffloadStrategy
    from sparseflow.models.opt_sparse import SparseOPTForCausalLM

    shared = {
        "device": settings["device"],
        "device_memory": settings["cap_nbytes"] or "auto",
        "fidelity": settings["fidelity"],
    }
    if settings["server"]:
        return Loaded(
            SparseOPTForCausalLM.from_server(
                settings["server"], gpu_cache_ratio=1.0, device_hints=settings["hints"], **shared
            )
        )
    strategy = OffloadStrategy(gpu_cache_ratio=1.0, device_hints=settings["hints"])
    return Loaded(SparseOPTForCausalLM.from_pretrained(settings["store"], strategy=strategy, **shared))


def load_transformers(settings: Settings) -> Loaded:
    """transformers' dense model, all on the device."""
    from sparseflow.bench.gpu.peers import dense_model

    return Loaded(dense_model(Path(settings["store"]), settings["device"]), 0)


def load_offloaded(settings: Settings) -> Loaded:
    """The same in host memory, by accelerate's `cpu_offload` or its `device_map`."""
    import torch

    from sparseflow.bench.gpu.peers import dense_model, mapped, offloaded
    from sparseflow.orchestration.device.slots import CONTEXT_NBYTES

    model, device = dense_model(Path(settings["store"])), torch.device(settings["device"])
    if settings["program"] == CPU_OFFLOAD:
        return Loaded(model, offloaded(model, device))
    room_nbytes = settings["cap_nbytes"] - CONTEXT_NBYTES - kept_nbytes(model.config)
    nbytes, device_map = mapped(model, device, room_nbytes)
    return Loaded(model, nbytes, device_map={name: str(place) for name, place in device_map.items()})


def kept_nbytes(config: Any) -> int:
    """Bytes of keys and values that SparseFlow's plan of a device leaves room for."""
    from sparseflow.orchestration.device.slots import KEPT_TOKENS

    return int(2 * KEPT_TOKENS * config.num_hidden_layers * config.hidden_size * config.dtype.itemsize)


LOADERS: dict[str, Callable[[Settings], Loaded]] = {
    SPARSEFLOW: load_sparseflow,
    TRANSFORMERS: load_transformers,
    CPU_OFFLOAD: load_offloaded,
    DEVICE_MAP: load_offloaded,
}


def sparse_report(model: Any, n_decoded: int) -> dict[str, Any]:
    """What only SparseFlow can say. n_decoded: tokens since its counts began, but for the first after each prompt."""
    from dataclasses import asdict

    counts = model.stats.decode
    report = {
        "active_share": counts.active_share,
        "candidate_share": counts.candidate_share,
        "device_bytes_per_token": model.bytes_touched_per_token(),
        "device": model.device_report(),
    }
    if counts.device is not None:
        report |= {
            "hit_rate": counts.device.hit_rate,
            "hit_rates": counts.device.hit_rates,
            "pcie_bytes_per_token": counts.device.nbytes_moved / n_decoded,
            "device_counts": asdict(counts.device),
        }
    return report


# --- a run


def run_case(settings: Settings, tell: Tell, wait: Callable[[], None]) -> None:
    """Load, warm up, wait, and measure; tell what is known as soon as it is."""
    import torch

    device, start = settings["device"], time.perf_counter()
    config = json.loads((Path(settings["store"]) / "config.json").read_bytes())
    settings = settings | {"vocab_size": config["vocab_size"]}
    loaded = LOADERS[settings["program"]](settings)
    tell({"state": "loaded", "load_s": time.perf_counter() - start} | loaded.found)
    warm_up_s = settings["measure_s"] * WARM_UP_SHARE

    def decode(number: int | str, n_tokens: int, within_s: float | None = None) -> dict[str, Any]:
        is_random = settings["text"] == "random" and number != GREEDY
        given = random_ids(settings, f"text {number}", n_tokens) if is_random else None
        return loaded.generate(prompt_of(settings, number), n_tokens, device, given, within_s)

    first = decode(FIRST, LEAST_TOKENS)  # compiles kernels and captures a graph, which has its time
    warm_up = first
    if first["shortest_step_s"] * LEAST_TOKENS < warm_up_s:
        warm_up = decode(WARM_UP, settings["warm_up_tokens"], warm_up_s)
    is_sparse = settings["program"] == SPARSEFLOW
    if is_sparse:
        loaded.model.reset_stats()
    tell({"state": "ready", "first_s": first["end"] - first["start"], "warm_up_step_s": warm_up["median_step_s"]})
    wait()
    step_s = warm_up["median_step_s"] or warm_up["time_to_first_token_s"]  # none: time was up with the first token
    planned = plan_generations(settings["measure_s"], step_s, settings["generations"], settings["new_tokens"])
    made: list[dict[str, Any]] = []
    for number in range(planned[0]):
        made.append(decode(number, planned[1]))
        tell({"generations": made})
    report: dict[str, Any] = {"state": "done"} | _moved(loaded, settings, config, made)
    if device != "cpu":
        report |= {
            "allocated_peak_nbytes": torch.cuda.max_memory_allocated(),
            "reserved_peak_nbytes": torch.cuda.max_memory_reserved(),
        }
    n_greedy = min(GREEDY_TOKENS, int(settings["measure_s"] * WARM_UP_SHARE / step_s))
    if n_greedy >= LEAST_TOKENS:
        report["greedy"] = decode(GREEDY, n_greedy)
    tell(report)
    if is_sparse:
        loaded.model.close()


def _moved(
    loaded: Loaded, settings: Settings, config: dict[str, Any], made: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """Bytes of a token: read from the device's memory, and brought there; with all that SparseFlow counts."""
    import torch

    if settings["program"] == SPARSEFLOW:
        return sparse_report(loaded.model, sum(len(one["ids"]) - 1 for one in made))
    width = getattr(torch, str(config.get("dtype") or "float16")).itemsize
    return {
        "device_bytes_per_token": dense_nbytes_per_token(config, width),
        "pcie_bytes_per_token": loaded.pcie_bytes_per_token,
    }


def measure_machine(_settings: Settings, tell: Tell, _wait: Callable[[], None]) -> None:
    """What kind of GPU it is, its limits, and the versions of what computes."""
    import importlib.metadata

    import torch

    from sparseflow.bench.gpu.device import measure_device

    names = ("triton", "transformers", "accelerate", "numpy")
    versions = {"torch": torch.__version__, "cuda": torch.version.cuda}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    tell({"state": "ready"})
    tell({"state": "done", "versions": versions, "device": measure_device()})


def _plain(value: Any) -> Any:
    """JSON's form of numpy's and torch's numbers and arrays; a text of anything else."""
    return value.tolist() if hasattr(value, "tolist") else str(value)


def main() -> None:
    """Wait to be told, and run. Whatever libraries print goes to stderr."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # do not outlive a parent that was killed
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as parent:
        os.dup2(2, 1)
        import_ahead()
        line = sys.stdin.readline()
        if not line:
            return

        def tell(what: dict[str, Any]) -> None:
            print(json.dumps(what, default=_plain), file=parent, flush=True)

        settings = json.loads(line)
        runs = measure_machine if settings["program"] == "machine" else run_case
        runs(settings, tell, lambda: None if sys.stdin.readline() else sys.exit("nobody waits any more"))


if __name__ == "__main__":
    main()
