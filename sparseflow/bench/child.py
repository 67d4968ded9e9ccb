"""One case of the benchmark, in a process of its own: load a model, read a prompt, decode, report.

Run by its path with one JSON object as argument. It imports nothing of SparseFlow but for cases that run it, so that a
peer's case can run in an environment of that peer's own.
"""

import ctypes
import gc
import importlib.metadata
import itertools
import json
import os
import re
import resource
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

PR_SET_PDEATHSIG, MADV_PAGEOUT = 1, 21
Settings = dict[str, Any]

# What a case may be: its name, what may follow as `name:option=value,...`, and the values each option may have.
PEERS: dict[str, dict[str, tuple[str, ...] | None]] = {
    "sparseflow": {
        "fidelity": None,
        "lookahead": ("auto", "off", "input", "before", "trained"),
        "async_transfer": ("yes", "no"),
        "io": ("auto", "direct", "buffered", "map"),
        "eviction": ("lfu", "lru", "fifo"),
        "cpu_cache_ratio": None,
    },
    "transformers": {},
    "disk_offload": {},
    "device_map": {"layers": None, "copied": ("yes", "no")},
    "airllm": {"gc": ("stock", "stubbed")},
    "ctranslate2": {"compute": ("float32", "int8", "int8_float32")},
    "onnxruntime": {},
}


class Model(Protocol):
    """What is timed. Both give the likeliest next token."""

    def first(self, prompt: list[int]) -> int:
        """Read the prompt."""
        ...

    def next(self, token: int) -> int:
        """Decode one token more."""
        ...


class TorchModel:
    """Whatever has transformers' `forward`."""

    def __init__(self, model: Any, cache: Any = None, *, needs_mask: bool = False) -> None:
        self.model, self._cache, self._needs_mask = model, cache, needs_mask
        self._length = 0

    def first(self, prompt: list[int]) -> int:
        """As `Model.first`."""
        return self._step(prompt)

    def next(self, token: int) -> int:
        """As `Model.next`."""
        return self._step([token])

    def _step(self, ids: list[int]) -> int:
        import torch

        self._length += len(ids)
        how: dict[str, Any] = {"logits_to_keep": 1} if hasattr(self.model, "lm_head") else {}
        if self._needs_mask:
            how["attention_mask"] = torch.ones(1, self._length, dtype=torch.int64)
        with torch.inference_mode():
            output = self.model(torch.tensor([ids]), past_key_values=self._cache, use_cache=True, **how)
        self._cache = output.past_key_values
        return int(output.logits[0, -1].argmax())


def load_transformers(settings: Settings, **how: Any) -> TorchModel:
    """transformers' OPT, dense."""
    import torch
    import transformers
    from transformers import DynamicCache, OPTForCausalLM

    transformers.utils.logging.disable_progress_bar()
    dtype = getattr(torch, settings["dtype"]) if settings.get("dtype") else "auto"
    model = OPTForCausalLM.from_pretrained(settings["checkpoint"], dtype=dtype, **how).eval()
    return TorchModel(model, DynamicCache(config=model.config))


def load_disk_offload(settings: Settings) -> TorchModel:
    """accelerate's `disk_offload`: each parameter in a file of its own, written before decoding."""
    import torch
    from accelerate import disk_offload

    loaded = load_transformers(settings)
    folder = Path(settings["scratch"]) / "offload"
    loaded.model = disk_offload(loaded.model, offload_dir=str(folder), execution_device=torch.device("cpu"))
    gc.collect()
    return loaded


def load_device_map(settings: Settings, layers: str = "0", copied: str = "no") -> TorchModel:
    """transformers with accelerate: so many decoder layers on the cpu, the others on disk, read from the checkpoint.

    transformers leaves weights "on the cpu" mapped from the file, so the page cache may drop them; `copied` ones were
    copied to private memory after loading, which transformers does not offer and which spares it that.
    """
    import torch
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig.from_pretrained(settings["checkpoint"])
    with torch.device("meta"):
        parts = [name for name, _ in OPTForCausalLM(config).model.decoder.named_children() if name != "layers"]
    device_map = {"lm_head": "cpu"} | {f"model.decoder.{name}": "cpu" for name in parts}
    for layer in range(config.num_hidden_layers):
        device_map[f"model.decoder.layers.{layer}"] = "cpu" if layer < int(layers) else "disk"
    loaded = load_transformers(settings, device_map=device_map, offload_folder=str(Path(settings["scratch"]) / "map"))
    if copied == "yes":
        for parameter in loaded.model.parameters():
            if parameter.device.type == "cpu":
                parameter.data = parameter.data.clone()
    return loaded


def load_airllm(settings: Settings, gc: str = "stock") -> TorchModel:
    """AirLLM, told how OPT's layers are called. `stubbed`: without its collecting garbage after every layer."""
    import airllm.airllm_base as airllm
    import torch

    if gc == "stubbed":
        airllm.clean_memory = lambda: None

    class AirLLMOPT(airllm.AirLLMBaseModel):
        def set_layer_names_dict(self) -> None:
            self.layer_names_dict = {
                "embed": "model.decoder.embed_tokens",
                "layer_prefix": "model.decoder.layers",
                "norm": "model.decoder.final_layer_norm",
                "lm_head": "lm_head",
                "resident": ["model.decoder.embed_positions"],
            }

    model = AirLLMOPT(
        str(settings["checkpoint"]),
        device="cpu",
        dtype=getattr(torch, settings["dtype"] or settings["checkpoint_dtype"]),
        layer_shards_saving_path=str(settings["converted"]["airllm"]),
        prefetching=False,
    )
    return TorchModel(model)


class MadeUpTokenizer:
    """What CTranslate2's converter asks of a tokenizer, with a name for each id: a synthetic checkpoint has none."""

    bos_token, eos_token, unk_token = "</s>", "</s>", "<unk>"  # as OPT has them

    def __init__(self, vocab_size: int) -> None:
        special = ["<s>", "<pad>", "</s>", "<unk>"]
        names = special + [f"token{i}" for i in range(len(special), vocab_size)]
        self._ids = {name: i for i, name in enumerate(names)}

    def get_vocab(self) -> dict[str, int]:
        """Name -> id."""
        return self._ids


def convert_to_ctranslate2(checkpoint: Path, out: Path, quantization: str = "float16") -> None:
    """Make a CTranslate2 model whose weights are stored as `quantization`; it is loaded as any other."""
    from ctranslate2.converters import TransformersConverter

    class Converter(TransformersConverter):
        def load_tokenizer(self, tokenizer_class: Any, model_name_or_path: str, **kwargs: Any) -> MadeUpTokenizer:
            return MadeUpTokenizer(json.loads((checkpoint / "config.json").read_bytes())["vocab_size"])

    Converter(str(checkpoint), low_cpu_mem_usage=True).convert(str(out), quantization=quantization)


def convert_to_onnx(checkpoint: Path, out: Path) -> None:
    """Make an ONNX model."""
    from optimum.onnxruntime import ORTModelForCausalLM

    ORTModelForCausalLM.from_pretrained(checkpoint, export=True).save_pretrained(out)


CONVERTERS = {"ctranslate2": convert_to_ctranslate2, "onnxruntime": convert_to_onnx}


class CTranslate2Model:
    """CTranslate2 decodes what it likes best, all at once; a callback tells when each token was ready."""

    def __init__(self, folder: Path, compute: str, n_threads: int) -> None:
        import ctranslate2

        self._names = json.loads((folder / "vocabulary.json").read_bytes())
        self._model = ctranslate2.Generator(str(folder), device="cpu", compute_type=compute, intra_threads=n_threads)
        self.compute = self._model.compute_type

    def decode(self, prompt: list[int], n_tokens: int) -> tuple[list[int], list[float]]:
        """What it chooses after the prompt, 1 + n_tokens ids, and when each was there."""
        ids, times = [], []

        def note(result: Any) -> bool:
            ids.append(result.token_id)
            times.append(time.perf_counter())
            return False

        self._model.generate_batch(
            [[self._names[i] for i in prompt]],
            max_length=1 + n_tokens,
            min_length=1 + n_tokens,
            beam_size=1,
            sampling_topk=1,
            include_prompt_in_result=False,
            end_token=[],
            callback=note,
        )
        return ids, times

    def likeliest(self, ids: list[int], first: int) -> list[int]:
        """After each of the ids from `first` on, given all before."""
        import numpy as np

        logits = self._model.forward_batch([[self._names[i] for i in ids]])
        return [int(i) for i in np.asarray(logits)[0, first:].argmax(-1)]


def load_onnxruntime(settings: Settings) -> TorchModel:
    """ONNX Runtime through optimum."""
    import onnxruntime
    from optimum.onnxruntime import ORTModelForCausalLM

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = settings["threads"], 1
    model = ORTModelForCausalLM.from_pretrained(
        settings["converted"]["onnxruntime"], session_options=options, provider="CPUExecutionProvider"
    )
    return TorchModel(model, needs_mask=True)


def load_sparseflow(settings: Settings, **options: str) -> TorchModel:
    """SparseFlow. A checkpoint is converted into `scratch`."""
    from transformers import DynamicCache

    from sparseflow.core.config import OffloadStrategy
    from sparseflow.models.opt_sparse import SparseOPTForCausalLM

    strategy = OffloadStrategy(
        cpu_cache_ratio=float(options.get("cpu_cache_ratio", 1)),
        eviction=options.get("eviction", "lfu"),
        async_transfer=options.get("async_transfer", "yes") == "yes",
    )
    memory = str(settings.get("memory") or "auto")
    model = SparseOPTForCausalLM.from_pretrained(
        settings["store"],
        memory=int(memory) if memory.isdecimal() else memory,
        dtype=settings.get("dtype"),
        cache_dir=Path(settings["scratch"]) / "stores",
        strategy=strategy,
        io=options.get("io", "auto"),
        fidelity=options.get("fidelity", "exact"),
    )
    if "lookahead" in options:
        model.coordinator.lookahead.mode = options["lookahead"]  # type: ignore[attr-defined]
    return TorchModel(model, DynamicCache(config=model.config))


LOADERS = {
    "sparseflow": load_sparseflow,
    "transformers": load_transformers,
    "disk_offload": load_disk_offload,
    "device_map": load_device_map,
    "airllm": load_airllm,
    "onnxruntime": load_onnxruntime,
}


def read_nbytes() -> int:
    """Bytes this process, with all its threads, had read from disks: faults, read-ahead and O_DIRECT included."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes:"))


def memory_now() -> dict[str, int]:
    """Bytes of this process: private, mapped from files, shared, page tables, and the most of the first three."""
    names = {
        "RssAnon": "anonymous_nbytes",
        "RssFile": "mapped_nbytes",
        "RssShmem": "shared_nbytes",
        "VmPTE": "page_table_nbytes",
        "VmHWM": "peak_rss_nbytes",
    }
    lines = (line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return {names[name]: int(value.split()[0]) * 1024 for name, value in lines if name in names}


def evict(paths: Sequence[str]) -> None:
    """Take files out of memory, mapped here or not: what stands for a limit where no cgroup can be made."""
    libc, wanted = ctypes.CDLL(None), set(paths)
    for line in Path("/proc/self/maps").read_text().splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[5] in wanted:
            start, end = (int(part, 16) for part in fields[0].split("-"))
            libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), MADV_PAGEOUT)
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


class Meter:
    """What each step takes."""

    def __init__(self, evicted: Sequence[str]) -> None:
        """evicted: files to take out of memory before each step, in time that is not counted."""
        self._evicted = evicted
        self.steps: list[dict[str, Any]] = []

    def step(self, function: Any, argument: Any) -> None:
        """Call it, and note what that took and what it returned."""
        if self._evicted:
            evict(self._evicted)
        nbytes, faults = read_nbytes(), resource.getrusage(resource.RUSAGE_SELF).ru_majflt
        cpu_start, start = time.process_time(), time.perf_counter()
        likeliest = function(argument)
        self.steps.append(
            {
                "s": time.perf_counter() - start,
                "cpu_s": time.process_time() - cpu_start,
                "bytes_from_disk": read_nbytes() - nbytes,
                "major_faults": resource.getrusage(resource.RUSAGE_SELF).ru_majflt - faults,
                "likeliest": likeliest,
            }
        )

    def report(self) -> dict[str, Any]:
        """Rates are over the steps after the prompt and the first token, which still fill caches."""
        first_token, first_step, *settled = self.steps
        n, seconds = len(settled), sum(s["s"] for s in settled)
        nbytes = sum(s["bytes_from_disk"] for s in settled)
        return {
            "time_to_first_token_s": first_token["s"],
            "first_step_s": first_step["s"],
            "decode_tokens_per_s": n / seconds,
            "bytes_from_disk_per_token": nbytes / n,
            "bytes_from_disk_per_s": nbytes / seconds,
            "cpu_s_per_token": sum(s["cpu_s"] for s in settled) / n,
            "major_faults_per_token": sum(s["major_faults"] for s in settled) / n,
            "step_s": [s["s"] for s in self.steps[1:]],
            "likeliest": [s["likeliest"] for s in self.steps],
        }


def given_tokens(settings: Settings) -> tuple[list[int], list[int]]:
    """Prompt and the tokens to decode, the same for every case; drawn without numpy or torch."""
    import random

    draw = random.Random(settings["seed"])
    ids = [draw.randrange(4, settings["vocab_size"]) for _ in range(settings["prompt_tokens"] + settings["tokens"])]
    return ids[: settings["prompt_tokens"]], ids[settings["prompt_tokens"] :]


def decode_given(model: Model, settings: Settings) -> dict[str, Any]:
    """Read the prompt, then given tokens one by one."""
    prompt, tokens = given_tokens(settings)
    meter = Meter(settings.get("evicted", ()))
    meter.step(model.first, prompt)
    for token in tokens:
        meter.step(model.next, token)
    return meter.report()


def decode_own(model: CTranslate2Model, settings: Settings) -> dict[str, Any]:
    """The same figures of a model that decodes its own tokens; what it finds likeliest, of the given ones."""
    prompt, tokens = given_tokens(settings)
    nbytes, cpu_start, start = read_nbytes(), time.process_time(), time.perf_counter()
    _, times = model.decode(prompt, len(tokens))
    n, seconds = len(times) - 2, times[-1] - times[1]
    return {
        "time_to_first_token_s": times[0] - start,
        "first_step_s": times[1] - times[0],
        "decode_tokens_per_s": n / seconds,
        "bytes_from_disk_per_token": (read_nbytes() - nbytes) / len(times),
        "bytes_from_disk_per_s": (read_nbytes() - nbytes) / (times[-1] - start),
        "cpu_s_per_token": (time.process_time() - cpu_start) / len(times),
        "step_s": [after - before for before, after in itertools.pairwise(times)],
        "likeliest": model.likeliest(prompt + tokens, len(prompt) - 1),
        "own_tokens": True,
    }


def dense_nbytes_per_token(config: dict[str, Any], nbytes_per_weight: float) -> int:
    """Bytes of weights that a dense model reads for a token: all matrices; of the embedding tables a row."""
    hidden, ffn = config["hidden_size"], config["ffn_dim"]
    projected = config.get("word_embed_proj_dim") or hidden
    of_layers = config["num_hidden_layers"] * (4 * hidden * hidden + 2 * hidden * ffn)
    of_ends = config["vocab_size"] * projected + (2 * projected * hidden if projected != hidden else 0)
    return int((of_layers + of_ends) * nbytes_per_weight)


def sparse_report(model: Any) -> dict[str, Any]:
    """What only SparseFlow can say."""
    from dataclasses import asdict

    counts = model.stats.decode
    return {
        "fidelity": model.fidelity,
        "active_share": counts.active_share,
        "candidate_share": counts.candidate_share,
        "found_share": None if counts.fetches is None else counts.fetches.hit_rate,
        "bytes_touched_per_token": model.bytes_touched_per_token(),
        "source": asdict(model.source.status()),
        "counts": asdict(counts),
    }


def run_case(settings: Settings) -> dict[str, Any]:
    """Load and decode."""
    start = time.perf_counter()
    config = json.loads((Path(settings["checkpoint"]) / "config.json").read_bytes())
    dtype = config.get("dtype") or config.get("torch_dtype") or "float32"
    settings = settings | {"vocab_size": config["vocab_size"], "checkpoint_dtype": dtype}
    width = {"float32": 4, "float16": 2, "bfloat16": 2}[settings.get("dtype") or dtype]
    report: dict[str, Any] = {}
    if settings["peer"] == "ctranslate2":
        model = CTranslate2Model(
            Path(settings["converted"]["ctranslate2"]), settings["options"]["compute"], settings["threads"]
        )
        report |= {"load_s": time.perf_counter() - start, "compute": model.compute}
        report |= decode_own(model, settings)
        width = 1 if "int8" in model.compute else {"float32": 4}.get(model.compute, 2)
    else:
        import torch

        torch.set_num_threads(settings["threads"])
        loaded = LOADERS[settings["peer"]](settings, **settings["options"])
        report |= {"load_s": time.perf_counter() - start}
        report |= decode_given(loaded, settings)
        if settings["peer"] == "sparseflow":
            report |= sparse_report(loaded.model)
        if settings["peer"] == "onnxruntime":
            width = 4  # as it was exported
    report.setdefault("bytes_touched_per_token", dense_nbytes_per_token(config, width))
    return report | {"versions": versions(settings["peer"])}


def versions(peer: str) -> dict[str, str]:
    """Of the packages that compute."""
    packages = {"ctranslate2": ["ctranslate2"], "onnxruntime": ["onnxruntime", "optimum-onnx", "transformers"]}
    names = packages.get(peer, ["torch", "transformers", *{"airllm": ["airllm"]}.get(peer, [])])
    return {name: importlib.metadata.version(name) for name in names}


def measure_machine(settings: Settings) -> dict[str, Any]:
    """How fast torch's threads read memory."""
    import torch

    torch.set_num_threads(settings["threads"])
    block = torch.ones(2**25, dtype=torch.int64)
    times_s = []
    for _ in range(5):
        start = time.perf_counter()
        block.sum()
        times_s.append(time.perf_counter() - start)
    return {"memory_bytes_per_s": block.nbytes / min(times_s)}


def mapped_files() -> Iterator[str]:
    """Files that this process has mapped: libraries among them."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        if match := re.search(r" (/\S.*)$", line):
            yield match[1]


def main() -> None:
    """Print what one case took as JSON, on the last line. Whatever libraries print goes to stderr."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # do not outlive a parent that was killed
    settings = json.loads(sys.argv[1])
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as parent:
        os.dup2(2, 1)
        if settings["peer"] == "machine":
            report = measure_machine(settings)
        elif settings.get("convert"):
            CONVERTERS[settings["peer"]](Path(settings["checkpoint"]), Path(settings["converted"][settings["peer"]]))
            report = {}
        else:
            report = run_case(settings) | memory_now()
        print(json.dumps(report | {"mapped_files": sorted(set(mapped_files()))}), file=parent, flush=True)


if __name__ == "__main__":
    main()
