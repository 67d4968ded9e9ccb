"""The tokenizer that travels with a model."""

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sparseflow.errors import BadRequest, DiskError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase


def tokenizer_of(model_files: Mapping[str, bytes]) -> "PreTrainedTokenizerBase":
    """Build the tokenizer from a source's `model_files`.

    Raises:
        DiskError: the model came without one, or with files that make none.
    """
    from transformers import AutoTokenizer

    if not {"tokenizer.json", "vocab.json"} & set(model_files):
        raise DiskError(
            "the model came without a tokenizer (no tokenizer.json or vocab.json); put one into the checkpoint folder "
            "and convert again, or tokenize yourself and call model.generate"
        )
    with tempfile.TemporaryDirectory() as folder:
        for name, content in model_files.items():
            if Path(name).name == name:
                (Path(folder) / name).write_bytes(content)
        try:  # whatever the files say, no code of theirs is run, and nobody is asked whether it shall be
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                folder, trust_remote_code=False, local_files_only=True
            )
        except Exception as error:  # each class of tokenizers refuses in its own way
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
            raise DiskError(
                f"the model's tokenizer files make no tokenizer ({reason}); put those of the checkpoint into the "
                "checkpoint folder and convert again"
            ) from error
    return tokenizer


def require_texts(files: Sequence[Path]) -> None:
    """What can be said of files of text before any is read.

    Raises:
        DiskError: one cannot be read.
    """
    for path in files:
        if path.is_dir() or not os.access(path, os.R_OK):
            reason = "is a folder" if path.is_dir() else "may not be read" if path.exists() else "no such file"
            raise DiskError(f"{path}: cannot be read as text ({reason}); give a file in UTF-8")


def token_windows(
    tokenizer: "PreTrainedTokenizerBase", files: Sequence[Path], window: int, n_tokens: int | None = None
) -> "Tensor":
    """Texts as windows of tokens, (n_windows, window) int64, one file after the other; a file's rest is left out.

    Args:
        n_tokens: at most so many; None: all.

    Raises:
        DiskError: a file cannot be read. BadRequest: the texts do not fill a window.
    """
    import torch

    windows = []
    for path in files:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DiskError(f"{path}: cannot be read as text ({error}); give a file in UTF-8") from error
        ids = torch.tensor(tokenizer(text, verbose=False).input_ids, dtype=torch.int64)
        windows.append(ids[: len(ids) // window * window].view(-1, window))
    found = torch.cat(windows) if windows else torch.empty(0, window, dtype=torch.int64)
    if n_tokens is not None:
        found = found[: max(1, n_tokens // window)]
    if not len(found):
        raise BadRequest(f"{len(files)} files hold less than one window of {window} tokens; give more text")
    return found
