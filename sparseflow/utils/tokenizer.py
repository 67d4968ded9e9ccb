"""The tokenizer that travels with a model."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from sparseflow.errors import DiskError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def tokenizer_of(model_files: Mapping[str, bytes]) -> "PreTrainedTokenizerBase":
    """Build the tokenizer from a source's `model_files`.

    Raises:
        DiskError: the model came without one.
    """
    from transformers import AutoTokenizer

    if not {"tokenizer.json", "vocab.json"} & set(model_files):
        raise DiskError(
            "the model came without a tokenizer (no tokenizer.json or vocab.json); put one into the checkpoint folder "
            "and convert again, or tokenize yourself and call model.generate"
        )
    with tempfile.TemporaryDirectory() as folder:
        for name, content in model_files.items():
            (Path(folder) / name).write_bytes(content)
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    return tokenizer
