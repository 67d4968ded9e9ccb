"""Running a model for a person: streamed text, times, and the result fields that every command reports alike."""

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from transformers import TextStreamer

from sparseflow.models.opt_sparse import SparseOPTForCausalLM
from sparseflow.utils.process_memory import process_memory
from sparseflow.utils.tensor_ops import read_bandwidth

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass
class Run:
    """One finished generation. Times in seconds since `generate` was called; the first token's is the first entry."""

    prompt_tokens: int
    token_ids: list[int]
    text: str
    token_times_s: list[float] = field(default_factory=list)

    @property
    def time_to_first_token_s(self) -> float | None:
        """None where no token was made."""
        return self.token_times_s[0] if self.token_times_s else None

    @property
    def decode_tokens_per_s(self) -> float | None:
        """Tokens after the first over the time they took; None where there are none."""
        times = self.token_times_s
        return (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else None


class _Clock(TextStreamer):
    """Notes when each token came, and prints the text where asked to."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", prints: bool) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._prints = prints
        self._prompt_seen = False
        self.start = time.perf_counter()
        self.times_s: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        if self._prompt_seen:
            self.times_s.append(time.perf_counter() - self.start)
        self._prompt_seen = True
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if self._prints:
            print(text, end="\n" if stream_end else "", flush=True)


def generate(
    model: Any, tokenizer: "PreTrainedTokenizerBase", prompt: str, *, max_new_tokens: int, stream: bool, **sampling: Any
) -> Run:
    """Generate after one prompt, with any transformers model.

    Args:
        stream: print the text to stdout as it comes.
        sampling: passed to `model.generate`.
    """
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    clock = _Clock(tokenizer, stream)
    with torch.inference_mode():
        output = model.generate(
            inputs.input_ids,
            attention_mask=inputs.attention_mask,
            max_new_tokens=max_new_tokens,
            streamer=clock,
            **sampling,
        )
    n_prompt = inputs.input_ids.shape[1]
    ids = output[0, n_prompt:].tolist()
    return Run(n_prompt, ids, tokenizer.decode(ids, skip_special_tokens=True), clock.times_s)


def result_fields(model: SparseOPTForCausalLM, run: Run, load_s: float) -> dict[str, Any]:
    """The result of a run, under the names that every command uses; SI units, None for what this version has not."""
    counts, fetches = model.stats.decode, model.stats.fetches
    memory, on_device = process_memory(), counts.device
    touched = model.bytes_touched_per_token()
    return {
        "text": run.text,
        "token_ids": run.token_ids,
        "prompt_tokens": run.prompt_tokens,
        "fidelity": model.fidelity,
        "decode_tokens_per_s": run.decode_tokens_per_s,
        "time_to_first_token_s": run.time_to_first_token_s,
        "load_s": load_s,
        "active_share": counts.active_share,
        "candidate_share": counts.candidate_share,
        "dense_layer_share": counts.dense_layer_share,
        "hit_rate": counts.fetches.hit_rate if counts.fetches else None,
        "evictions": fetches.evictions if fetches else None,
        "bytes_from_disk": fetches.bytes_from_disk if fetches else None,
        "bytes_to_device": on_device.nbytes_moved if on_device else None,
        "device_hit_rate": on_device.hit_rate if on_device else None,
        "bytes_touched_per_token": touched,
        "limit_tokens_per_s": _limit_tokens_per_s(model, touched),
        "messages_per_token": _per_token(model, counts.fetches.messages) if counts.fetches else None,
        "recall": model.stats.recall,
        "recall_error": model.stats.recall_error,
        "recall_samples": model.stats.recall_samples or None,
        "memory": {
            "private": memory.private,
            "shared": memory.shared,
            "pinned": _pinned_nbytes(model),
            "page_cache": None,
            "device": torch.cuda.max_memory_reserved(model.device) if model.device.type == "cuda" else None,
        },
    }


def _limit_tokens_per_s(model: SparseOPTForCausalLM, bytes_touched: int) -> float | None:
    """What memory, or the disk if that is slower, would allow at full speed; None for a GPU."""
    if model.device.type != "cpu":
        return None
    limits = [read_bandwidth() / bytes_touched] if bytes_touched else []
    disk_bytes_per_s, fetches = model.source.status().disk_bytes_per_s, model.stats.decode.fetches
    if disk_bytes_per_s and fetches and fetches.bytes_from_disk:
        limits.append(disk_bytes_per_s / (_per_token(model, fetches.bytes_from_disk) or 1))
    return min(limits, default=None)


def _pinned_nbytes(model: SparseOPTForCausalLM) -> int | None:
    memory = model.source.host_memory()
    return memory.nbytes if memory and model.device_report().get("transport") == "pull" else None


def _per_token(model: SparseOPTForCausalLM, n: int) -> float | None:
    n_steps = model.stats.decode.layer_steps
    return n * model.source.profile.num_layers / n_steps if n_steps else None
