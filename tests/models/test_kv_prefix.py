"""What is kept of keys and values between two texts: the logits are those of the whole text computed at once."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import OPTForCausalLM

from sparseflow.models.kv_prefix import KVPrefix

FIRST = [5, 6, 7, 8, 9]


@pytest.fixture(scope="module")
def model(family_checkpoint: Callable[..., Path]) -> OPTForCausalLM:
    return OPTForCausalLM.from_pretrained(family_checkpoint("base"), dtype=torch.float32).eval()


def logits_of(model: OPTForCausalLM, ids: list[int], prefix: KVPrefix | None = None, n_known: int = 0) -> torch.Tensor:
    """Of the token after the last one."""
    with torch.inference_mode():
        cache = prefix.cache if prefix else None
        found: torch.Tensor = model(torch.tensor([ids[n_known:]]), past_key_values=cache).logits[0, -1]
    return found


@pytest.mark.parametrize(
    ("second", "n_kept"),
    [
        ([*FIRST, 10], 5),
        (FIRST, 4),  # the last token is computed
        ([5, 6, 1], 2),
        ([5, 6], 1),
        ([1, 6, 7, 8, 9], 0),
        ([5], 0),
    ],
)
def test_what_two_texts_begin_with_is_kept(model: OPTForCausalLM, second: list[int], n_kept: int) -> None:
    prefix = KVPrefix(model.config)
    logits_of(model, FIRST, prefix)
    prefix.note([*FIRST, 11])  # the last token was chosen, not computed
    assert prefix.ids == FIRST
    assert prefix.keep(second) == n_kept == prefix.cache.get_seq_length()
    torch.testing.assert_close(logits_of(model, second, prefix, n_kept), logits_of(model, second))


def test_forgotten_is_as_new(model: OPTForCausalLM) -> None:
    prefix = KVPrefix(model.config)
    logits_of(model, FIRST, prefix)
    prefix.note(FIRST)
    prefix.forget()
    assert prefix.keep([*FIRST, 10]) == prefix.cache.get_seq_length() == 0
