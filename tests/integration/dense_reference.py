"""What the dense model writes."""

from collections.abc import Callable
from typing import Any

import torch

DenseIds = Callable[[list[int], int], list[int]]


def greedy_ids(model: Any, prompt: list[int], n_tokens: int) -> list[int]:
    """Prompt and greedy continuation of exactly `n_tokens`. One thread: others may hold the cores."""
    given = torch.tensor([prompt])
    settings = {"max_new_tokens": n_tokens, "min_new_tokens": n_tokens, "do_sample": False}
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        ids: list[int] = model.generate(given, attention_mask=torch.ones_like(given), **settings)[0].tolist()
    finally:
        torch.set_num_threads(n_threads)
    return ids
