"""One rival of `below_memory.py`, in a process and a memory cgroup of its own: load, decode, report."""

import argparse
import ctypes
import json
import resource
import signal
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

PR_SET_PDEATHSIG = 1

# What may follow `sparseflow:`, and the values each may have.
OPTIONS = {
    "lookahead": ("auto", "off", "input", "before"),
    "async_transfer": ("yes", "no"),
    "io": ("auto", "direct", "buffered", "map"),
    "eviction": ("lfu", "lru", "fifo"),
    "fidelity": ("exact", "certified", "dense"),
    "cpu_cache_ratio": None,
}


def read_nbytes() -> int:
    """Bytes this process, with all its threads, had read from disks: faults, read-ahead and O_DIRECT included."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes:"))


def memory_now() -> dict[str, int]:
    """Bytes of this process: private, mapped from files, page tables."""
    names = {"RssAnon": "anonymous_nbytes", "RssFile": "mapped_nbytes", "VmPTE": "page_table_nbytes"}
    lines = (line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return {names[name]: int(value.split()[0]) * 1024 for name, value in lines if name in names}


def load_offloaded(checkpoint: Path, n_resident: int, copy: bool, scratch: Path) -> Any:
    """transformers' OPT, `n_resident` decoder layers on the cpu, the others on disk."""
    import torch
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig.from_pretrained(checkpoint)
    with torch.device("meta"):
        parts = [name for name, _ in OPTForCausalLM(config).model.decoder.named_children() if name != "layers"]
    device_map = {"lm_head": "cpu"} | {f"model.decoder.{name}": "cpu" for name in parts}
    for layer in range(config.num_hidden_layers):
        device_map[f"model.decoder.layers.{layer}"] = "cpu" if layer < n_resident else "disk"
    model = OPTForCausalLM.from_pretrained(checkpoint, dtype="auto", device_map=device_map, offload_folder=scratch)
    if copy:
        for parameter in model.parameters():
            if parameter.device.type == "cpu":
                parameter.data = parameter.data.clone()
    return model.eval()


def load_sparse(store: Path, memory: str, dtype: str | None, scratch: Path, options: dict[str, str]) -> Any:
    """SparseFlow's OPT. A checkpoint (the demo model) is converted into `scratch`. options: as `OPTIONS` says."""
    from sparseflow import OffloadStrategy, SparseOPTForCausalLM

    strategy = OffloadStrategy(
        cpu_cache_ratio=float(options.get("cpu_cache_ratio", 1)),
        eviction=options.get("eviction", "lfu"),
        async_transfer=options.get("async_transfer", "yes") == "yes",
    )
    model = SparseOPTForCausalLM.from_pretrained(
        store,
        memory=int(memory) if memory.isdecimal() else memory,
        dtype=dtype,
        cache_dir=scratch / "stores",
        strategy=strategy,
        io=options.get("io", "auto"),
        fidelity=options.get("fidelity", "exact"),
    )
    model.coordinator.lookahead.mode = options.get("lookahead", model.coordinator.lookahead.mode)
    return model


def decode(model: Any, n_prompt: int, n_tokens: int, seed: int) -> dict[str, Any]:
    """Read a prompt, then `n_tokens` given tokens one by one."""
    import torch
    from transformers import DynamicCache

    torch.manual_seed(seed)
    prompt = torch.randint(4, model.config.vocab_size, (1, n_prompt))
    tokens = torch.randint(4, model.config.vocab_size, (n_tokens, 1, 1))
    cache = DynamicCache(config=model.config)
    steps = []
    with torch.inference_mode():
        for ids in (prompt, *tokens):
            nbytes, faults = read_nbytes(), resource.getrusage(resource.RUSAGE_SELF).ru_majflt
            cpu_start = time.process_time()
            start = time.perf_counter()
            logits = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            likeliest = int(logits[0, -1].argmax())
            steps.append(
                {
                    "s": time.perf_counter() - start,
                    "cpu_s": time.process_time() - cpu_start,
                    "bytes_from_disk": read_nbytes() - nbytes,
                    "major_faults": resource.getrusage(resource.RUSAGE_SELF).ru_majflt - faults,
                    "likeliest": likeliest,
                }
            )
    first_token, first_step, *settled = steps
    seconds, nbytes = sum(s["s"] for s in settled), sum(s["bytes_from_disk"] for s in settled)
    return {
        "time_to_first_token_s": first_token["s"],
        "first_step_s": first_step["s"],
        "first_step_bytes_from_disk": first_step["bytes_from_disk"],
        "decode_tokens_per_s": len(settled) / seconds,
        "bytes_from_disk_per_token": nbytes / len(settled),
        "bytes_from_disk_per_s": nbytes / seconds,
        "cpu_s_per_token": sum(s["cpu_s"] for s in settled) / len(settled),
        "major_faults_per_token": sum(s["major_faults"] for s in settled) / len(settled),
        "step_s": [s["s"] for s in steps[1:]],
        "step_bytes_from_disk": [s["bytes_from_disk"] for s in steps[1:]],
        "likeliest": [s["likeliest"] for s in steps],
    }


def run_child(arguments: argparse.Namespace) -> None:
    """Load, decode, print what it took as JSON."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # do not outlive a parent that was killed
    start = time.perf_counter()
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    imported = time.perf_counter()
    nbytes = read_nbytes()
    if arguments.child == "sparseflow":
        options = dict(option.split("=") for option in arguments.option)
        model = load_sparse(arguments.store, arguments.memory, arguments.dtype, arguments.scratch, options)
    else:
        model = load_offloaded(arguments.checkpoint, arguments.resident, arguments.copy, arguments.scratch)
    result: dict[str, Any] = {
        "import_s": imported - start,
        "load_s": time.perf_counter() - imported,
        "load_bytes_from_disk": read_nbytes() - nbytes,
        "threads": torch.get_num_threads(),
    }
    result |= decode(model, arguments.prompt_tokens, arguments.tokens, arguments.seed) | memory_now()
    if arguments.child == "sparseflow":
        counts = model.stats.decode
        shares = {"candidate_share": counts.candidate_share, "active_share": counts.active_share}
        result |= {
            "fidelity": model.fidelity,
            "source": asdict(model.source.status()),
            "counts": asdict(counts) | shares,
        }
    maps = (line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text().splitlines())
    result["mapped_files"] = sorted({fields[5] for fields in maps if len(fields) == 6 and fields[5].startswith("/")})
    print(json.dumps(result))


def main() -> None:
    """The parent's arguments for one rival."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--child", required=True, help="the rival")
    for name in ("--checkpoint", "--store", "--scratch"):
        parser.add_argument(name, type=Path, required=True)
    for name in ("--tokens", "--prompt-tokens", "--seed", "--resident"):
        parser.add_argument(name, type=int, required=True)
    parser.add_argument("--memory", default="auto")
    parser.add_argument("--dtype")
    parser.add_argument("--copy", action="store_true")
    parser.add_argument("--option", nargs="*", default=[])
    run_child(parser.parse_args())


if __name__ == "__main__":
    main()
