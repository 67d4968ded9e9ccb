"""Where converted stores are kept, and how one is found there or made."""

import hashlib
import json
from pathlib import Path

from sparseflow.core.checkpoint import Checkpoint, locate, model_name
from sparseflow.core.converter import convert
from sparseflow.errors import BadRequest
from sparseflow.store.manifest import FORMAT_VERSION, Manifest, is_store
from sparseflow.utils.home import sparseflow_home


def find_or_convert(
    name: str, cache_dir: str | Path | None = None, *, dtype: str | None = None, quiet: bool = True
) -> Path:
    """The store of a name: that folder itself, or the one that was or now is made of a checkpoint.

    Args:
        name: a store, a transformers checkpoint folder, or a hub id.
        cache_dir: where stores are kept; None: `sparseflow_home()`.
        dtype: of the weights; None: as the checkpoint has them. A store has what it has.

    Raises:
        DiskError, UnsupportedModel, BadRequest: as their texts say.
    """
    folder = locate(name)
    if is_store(folder):
        if dtype is not None and dtype != (stored := Manifest.load(folder).profile.dtype):
            raise BadRequest(
                f"{folder}: holds {stored}, {dtype} is asked for; convert the checkpoint again with --dtype {dtype}"
            )
        return folder
    checkpoint = Checkpoint(folder, model_name(name))
    identity = json.dumps([str(folder), checkpoint.identity(), dtype or checkpoint.dtype(), FORMAT_VERSION])
    digest = hashlib.blake2s(identity.encode(), digest_size=6).hexdigest()
    stores = Path(cache_dir).expanduser() if cache_dir else sparseflow_home() / "stores"
    path = stores / f"{checkpoint.name}-{digest}"
    if not path.exists():
        try:
            convert(checkpoint, path, dtype=dtype, quiet=quiet)
        except BadRequest:
            if not path.exists():  # else another process was faster
                raise
    return path
