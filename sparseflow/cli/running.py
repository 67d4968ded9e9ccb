"""Running a model for a person: streamed text, times, and the result fields that every command reports alike."""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from sparseflow.errors import BadRequest
from sparseflow.models.opt_sparse import SparseOPTForCausalLM
from sparseflow.utils.process_memory import process_memory
from sparseflow.utils.progress import waiting
from sparseflow.utils.stop_filter import StopFilter
from sparseflow.utils.tensor_ops import read_bandwidth
from sparseflow.utils.token_text import TokenText

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Show = Callable[[str], None]


@dataclass
class Run:
    """One finished generation. Times in seconds since `generate` was called; the first token's is the first entry.

    token_ids: all that were made, those of a stop text too. text: without it. finish_reason: `stop` (the model's end of
    text, or a stop text), `length`, or `interrupted`.
    """

    prompt_tokens: int
    token_ids: list[int]
    text: str
    token_times_s: list[float] = field(default_factory=list)
    finish_reason: str = "length"

    @property
    def time_to_first_token_s(self) -> float | None:
        """None where no token was made."""
        return self.token_times_s[0] if self.token_times_s else None

    @property
    def decode_tokens_per_s(self) -> float | None:
        """Tokens after the first over the time they took; None where there are none."""
        times = self.token_times_s
        return (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else None


class _Watcher(BaseStreamer):
    """Notes when each token came, and shows of the text what is certain."""

    def __init__(self, text: TokenText, show: Show, stops: Sequence[str], quiet: bool) -> None:
        self._prompt = ExitStack()
        self._prompt.enter_context(waiting("reading the prompt", quiet=quiet))
        self._new_text = text
        self.stop = StopFilter(stops)
        self._show = show
        self._prompt_seen = False
        self._start = time.perf_counter()
        self.times_s: list[float] = []
        self.text = ""

    def put(self, value: Tensor) -> None:
        if self._prompt_seen:
            self.times_s.append(time.perf_counter() - self._start)
            self.close()
            self._add(self.stop.push(self._new_text.push(int(value))))
        self._prompt_seen = True

    def end(self) -> None:
        self._add(self.stop.push(self._new_text.rest()))
        self._add(self.stop.rest())

    def close(self) -> None:
        """The prompt is read, or will not be. May be called twice."""
        self._prompt.close()

    def _add(self, text: str) -> None:
        if text:
            self.text += text
            self._show(text)


class _Until(StoppingCriteria):
    """Ends a generation of one sequence between two tokens."""

    def __init__(self, is_over: Callable[[], bool]) -> None:
        self._is_over = is_over

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.tensor([self._is_over()], device=input_ids.device)


def generate(
    model: Any,
    tokenizer: "PreTrainedTokenizerBase",
    prompt: str,
    *,
    stream: bool,
    stops: Sequence[str] = (),
    quiet: bool = True,
    **generating: Any,
) -> Run:
    """Generate after one prompt, with any transformers model.

    Args:
        stream: print the text to stdout as it comes.
        stops: texts at whose first one the text ends.
        quiet: no word of a prompt that takes long.
        generating: passed to `model.generate`.

    Raises:
        BadRequest: the prompt has no tokens.
    """
    ids = tokenizer(prompt).input_ids
    if not ids:
        raise BadRequest("the prompt is empty; give some text (--prompt)")
    show = show_at_once if stream else _ignore
    run = continue_ids(model, tokenizer, ids, show=show, stops=stops, quiet=quiet, **generating)
    if stream:
        print(flush=True)
    return run


def continue_ids(
    model: Any,
    tokenizer: "PreTrainedTokenizerBase",
    ids: Sequence[int],
    *,
    show: Show,
    stops: Sequence[str] = (),
    is_interrupted: Callable[[], bool] = lambda: False,
    quiet: bool = True,
    **generating: Any,
) -> Run:
    """Generate after tokens.

    Args:
        show: called with each piece of the text.
        stops, quiet: as of `generate`.
        is_interrupted: asked after each token, whether that was the last one.
        generating: passed to `model.generate`.
    """
    watcher = _Watcher(TokenText(tokenizer, ids), show, stops, quiet)
    inputs = torch.tensor([[*ids]], device=model.device)
    with closing(watcher), torch.inference_mode():
        output = model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            streamer=watcher,
            stopping_criteria=StoppingCriteriaList([_Until(lambda: watcher.stop.is_found or is_interrupted())]),
            **generating,
        )
    new_ids = output[0, len(ids) :].tolist()
    is_at_end = watcher.stop.is_found or (bool(new_ids) and new_ids[-1] in ends_of_text(model))
    reason = "stop" if is_at_end else "interrupted" if is_interrupted() else "length"
    return Run(len(ids), new_ids, watcher.text, watcher.times_s, reason)


def ends_of_text(model: Any) -> list[int]:
    """Tokens with which the model ends."""
    ends = model.generation_config.eos_token_id
    return [] if ends is None else [ends] if isinstance(ends, int) else [*ends]


def show_at_once(text: str) -> None:
    """Print a piece of text."""
    print(text, end="", flush=True)


def _ignore(text: str) -> None:
    pass


def result_fields(model: SparseOPTForCausalLM, run: Run, load_s: float) -> dict[str, Any]:
    """The result of a run, under the names that every command uses; SI units, None for what this version has not."""
    counts, fetches = model.stats.decode, model.stats.fetches
    memory, on_device = process_memory(), counts.device
    touched = model.bytes_touched_per_token()
    return {
        "text": run.text,
        "token_ids": run.token_ids,
        "prompt_tokens": run.prompt_tokens,
        "finish_reason": run.finish_reason,
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
            "pinned": pinned_nbytes(model),
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


def pinned_nbytes(model: SparseOPTForCausalLM) -> int | None:
    """Bytes of host memory that are page-locked; None where there is nothing of that."""
    memory = model.source.host_memory()
    return memory.nbytes if memory and model.device_report().get("transport") == "pull" else None


def _per_token(model: SparseOPTForCausalLM, n: int) -> float | None:
    n_steps = model.stats.decode.layer_steps
    return n * model.source.profile.num_layers / n_steps if n_steps else None
