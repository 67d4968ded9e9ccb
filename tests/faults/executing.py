"""Ways in which Python runs what it reads, as they stand in a source; and a payload that shows when one is taken."""

import ast
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "shelve", "marshal", "joblib", "multiprocessing"}
_NAMES = {"recv_pyobj", "send_pyobj", "recv_serialized", "unsafe_load", "read_pickle", "os.system", "os.popen"}
_BUILTINS = {"eval", "exec", "compile", "__import__"}
_LOADERS = {"yaml.load", "yaml.full_load", "runpy.run_path"}
_KEYWORDS = {"shell", "trust_remote_code", "allow_pickle"}  # harmless only as False


def executes(source: str) -> Iterator[str]:
    """Everything in a source that could run what was read, by name and line."""
    for node in ast.walk(ast.parse(source)):
        for what in _found_in(node):
            yield f"{what} (line {getattr(node, 'lineno', '?')})"


def _found_in(node: ast.AST) -> Iterator[str]:
    match node:
        case ast.Import(names=names):
            yield from (alias.name for alias in names if alias.name.split(".")[0] in _MODULES)
        case ast.ImportFrom(module=str(module), names=names):
            if module.split(".")[0] in _MODULES:
                yield module
            yield from (f"{module}.{alias.name}" for alias in names if _is_loader(f"{module}.{alias.name}"))
        case ast.Name(id=name) if name in _BUILTINS:
            yield name
        case ast.Attribute(attr=name) if name in _NAMES or ast.unparse(node) in _NAMES | _LOADERS:
            yield name
        case ast.Attribute(attr=name, value=ast.Name(id="builtins")) if name in _BUILTINS:
            yield name
        case ast.Call(func=function, keywords=keywords) if ast.unparse(function) == "torch.load":
            if not any(word.arg == "weights_only" and _is(word.value, True) for word in keywords):
                yield "torch.load"
        case ast.keyword(arg=str(name), value=value) if name in _KEYWORDS and not _is(value, False):
            yield name


def _is_loader(name: str) -> bool:
    """Whether a name of other modules is brought in under which nobody would look for it."""
    return name in {"torch.load", *_LOADERS, *_NAMES}


def _is(node: ast.expr, value: bool) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


class Canary:
    """Creates a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.path), "w")

    @property
    def payload(self) -> bytes:
        """Itself, pickled."""
        return pickle.dumps(self)
