"""A transformers OPT checkpoint, read one tensor at a time.

Safetensors or `pytorch_model*.bin` (weights only), single or sharded; a local folder or a hub id.
"""

import json
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparseflow.core.config import dtype_name, opt_config
from sparseflow.errors import BadRequest, DiskError, UnsupportedModel
from sparseflow.store.checks import in_one_line, mapping, shown

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import OPTConfig

# Copied into the store as they are, where the checkpoint has them.
COMPANION_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
_WEIGHT_PATTERNS = (
    ("model*.safetensors", "model*.safetensors.index.json"),
    ("pytorch_model*.bin", "pytorch_model*.bin.index.json"),
)


def local_folder(name: str) -> Path | None:
    """The folder of that name; None where there is none and it may be a hub id.

    Raises:
        DiskError: there is none, and it can be no hub id.
    """
    try:
        folder = Path(name).expanduser()
    except RuntimeError as error:
        raise DiskError(f"{name}: no such folder ({error})") from error
    if folder.is_dir():
        return folder.resolve()
    if folder.exists():
        raise DiskError(f"{name}: is a file; give the checkpoint's folder")
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise DiskError(
            f"{name}: no such folder; give a checkpoint folder, a store or a hub id such as facebook/opt-1.3b"
        )
    return None


def locate(name: str) -> Path:
    """The folder of a checkpoint: `name` itself, or where the hub's cache has it (downloaded if allowed).

    Raises:
        DiskError: there is no such folder, and the hub does not have it or cannot be asked.
    """
    if (local := local_folder(name)) is not None:
        return local
    from huggingface_hub import snapshot_download
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        for weights in _WEIGHT_PATTERNS:  # not both formats of the same weights; none from sub-folders
            patterns = ["config.json", *COMPANION_FILES, *weights]
            folder = Path(snapshot_download(name, allow_patterns=patterns, ignore_patterns=["*/*"]))
            if any(folder.glob(weights[0])):
                break
        return folder
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise DiskError(
            f"{name}: no folder of that name, and not in the hub's cache ({HF_HUB_CACHE}), "
            "while the hub cannot be asked; download it first, or give a local folder"
        ) from error
    except (HFValidationError, HfHubHTTPError, OSError) as error:
        raise DiskError(f"{name}: no folder of that name, and the hub says: {error}") from error


def model_name(name: str) -> str:
    """What people call the model that `locate(name)` finds: the folder's name, or the hub id's last part."""
    folder = Path(name).expanduser()
    return folder.resolve().name if folder.is_dir() else name.split("/")[-1]


class Checkpoint:
    """One checkpoint folder: its configuration, and its tensors by name (`model.` may be left out)."""

    def __init__(self, folder: Path, name: str | None = None) -> None:
        """
        Args:
            name: what people call the model; None: the folder's name.

        Raises:
            DiskError: files are missing. UnsupportedModel: not a ReLU OPT.
        """
        self.folder = folder
        self.name = in_one_line(name or folder.name)
        self.config = _read_config(folder)
        self._file_of = _index(folder)
        self._opened: tuple[str, Mapping[str, Any]] | None = None

    def files(self) -> list[Path]:
        """The files that hold weights."""
        return sorted({self.folder / name for name in self._file_of.values()})

    def __contains__(self, name: str) -> bool:
        return self._key(name) is not None

    def dtype(self) -> str:
        """dtype of the first fc1, which stands for all.

        Raises:
            UnsupportedModel: not float16, bfloat16 or float32.
        """
        return dtype_name(self.tensor("decoder.layers.0.fc1.weight").dtype)

    def tensor(self, name: str) -> "Tensor":
        """One tensor, a view of the file where its format allows. `release` gives its memory back.

        Raises:
            DiskError: missing or unreadable. UnsupportedModel: not float16, bfloat16 or float32.
        """
        key = self._key(name)
        if key is None:
            raise DiskError(f"{self.folder}: tensor {name!r} is in none of {len(self.files())} weight files")
        tensors = self._open(self._file_of[key])
        path = self.folder / self._file_of[key]
        tensor: Tensor | None = tensors.get(key)
        if not hasattr(tensor, "dtype") or tensor is None:
            raise DiskError(f"{path}: holds no tensor {key!r}; is it a whole checkpoint?")
        try:
            dtype_name(tensor.dtype)
        except BadRequest as error:
            raise UnsupportedModel(
                f"{path}: {key!r} is {tensor.dtype}; SparseFlow reads float16, bfloat16 and float32. "
                "Use the checkpoint before it was quantised"
            ) from error
        return tensor

    def shaped(self, name: str, shape: tuple[int, ...]) -> "Tensor":
        """`tensor`, after checking that it is what config.json says.

        Raises:
            DiskError: it has another shape.
        """
        tensor = self.tensor(name)
        if tuple(tensor.shape) != shape:
            raise DiskError(f"{self.folder}: tensor {name!r} is {tuple(tensor.shape)}, config.json says {shape}")
        return tensor

    def identity(self) -> list[list[str | int]]:
        """Name, size and time of every file that a store depends on; another list once any was touched."""
        companions = [path for path in (self.folder / name for name in COMPANION_FILES) if path.is_file()]
        facts = [(path.name, path.stat()) for path in (self.folder / "config.json", *companions, *self.files())]
        return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in facts]

    def release(self) -> None:
        """Close the file that is open, so that its pages no longer count as this process's memory."""
        self._opened = None

    def _key(self, name: str) -> str | None:
        return next((key for key in (f"model.{name}", name) if key in self._file_of), None)

    def _open(self, file_name: str) -> Mapping[str, Any]:
        if self._opened is None or self._opened[0] != file_name:
            self._opened = None
            self._opened = (file_name, _open_weights(self.folder / file_name))
        return self._opened[1]


def _read_config(folder: Path) -> "OPTConfig":
    path = folder / "config.json"
    if path.exists() and not path.is_file():
        raise DiskError(f"{path}: is no file; give a transformers checkpoint folder")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DiskError(f"{folder}: no config.json; give a transformers checkpoint folder") from error
    except (OSError, ValueError, RecursionError) as error:
        raise DiskError(f"{path}: cannot be read ({error})") from error
    if not isinstance(content, dict):
        raise DiskError(f"{path}: holds {type(content).__name__}, not a configuration")
    return opt_config(content, str(path))


def _index(folder: Path) -> dict[str, str]:
    """Tensor name -> file name, safetensors before pickled files, as transformers chooses."""
    for single in ("model.safetensors", "pytorch_model.bin"):
        listing = folder / f"{single}.index.json"
        if (folder / single).is_file():
            return dict.fromkeys(_open_weights(folder / single), single)
        if listing.is_file():
            try:
                weight_map: dict[str, str] = _weight_map(json.loads(listing.read_text(encoding="utf-8")))
            except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
                raise DiskError(f"{listing}: no index of weights ({error}); is the download complete?") from error
            _require_files(folder, weight_map.values())
            return weight_map
    raise DiskError(
        f"{folder}: no model.safetensors or pytorch_model.bin, single or with an index; is it a checkpoint?"
    )


def _weight_map(content: Any) -> dict[str, str]:
    """Of an index: tensor name -> name of a file beside it.

    Raises:
        ValueError, KeyError, TypeError: it is no index, or names files elsewhere.
    """
    weight_map = mapping(content["weight_map"], "weight_map")
    for name in weight_map.values():
        if not isinstance(name, str) or not name or Path(name).name != name:
            raise ValueError(f"{shown(name)} is no name of a file beside it")
    return dict(weight_map)


def _require_files(folder: Path, names: Iterable[str]) -> None:
    missing = sorted({name for name in names if not (folder / name).is_file()})
    if missing:
        raise DiskError(f"{folder}: {len(missing)} of the weight files in its index are missing: {', '.join(missing)}")


class _LazyTensors(Mapping[str, Any]):
    """A safetensors file whose tensors are mapped when they are asked for."""

    def __init__(self, path: Path) -> None:
        from safetensors import safe_open

        self._file: Any = safe_open(path, framework="pt")
        self._names = list(self._file.keys())

    def __getitem__(self, name: str) -> Any:
        if name not in self._names:
            raise KeyError(name)
        return self._file.get_tensor(name)

    def __iter__(self) -> Any:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _open_weights(path: Path) -> Mapping[str, Any]:
    import torch

    try:
        if path.suffix == ".safetensors":
            return _LazyTensors(path)
        # Files older than torch 1.6 are no zip archives and cannot be mapped.
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # whatever a damaged or hostile file makes its parser raise
        reason = (str(error) or type(error).__name__).splitlines()[0].split("(1)")[0].strip()
        raise DiskError(f"{path}: cannot be read as weights ({reason}); is the download complete?") from error
    if not isinstance(content, dict):
        raise DiskError(f"{path}: holds {type(content).__name__}, not tensors by name; is it a checkpoint?")
    return content
