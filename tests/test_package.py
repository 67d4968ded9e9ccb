"""The public names, and what every error carries."""

import inspect
import tomllib
from pathlib import Path

import pytest
from child_process import run_python

import sparseflow
from sparseflow import errors

PUBLIC_NAMES = {
    "DiskWeightStore",
    "ModelProfile",
    "NeuronTransferPlan",
    "OffloadStrategy",
    "SparseFlowConfig",
    "SparseOPTForCausalLM",
    "WeightCache",
    "__version__",
    "measure_memory_usage",
    "reset_memory_stats",
}

# What peers may meet on the wire, by class of error. A new code is a decision: it breaks peers that do not know it.
WIRE_CODES = {
    "bad_request",
    "protocol_mismatch",
    "fingerprint_mismatch",
    "resync",
    "arena_busy",
    "shard_corrupt",
    "disk_error",
    "draining",
    "no_such_model",
    "not_permitted",
    "internal",
}

ERRORS = [cls for _, cls in inspect.getmembers(errors, inspect.isclass) if issubclass(cls, BaseException)]

# --- names


def test_public_names_are_these() -> None:
    assert set(sparseflow.__all__) == PUBLIC_NAMES
    assert len(sparseflow.__all__) == len(PUBLIC_NAMES)


@pytest.mark.parametrize("name", sorted(PUBLIC_NAMES))
def test_public_name_resolves_to_what_it_names(name: str) -> None:
    value = getattr(sparseflow, name)
    if name != "__version__":
        assert value.__name__ == name
        assert value.__doc__


def test_star_import_gives_exactly_the_public_names() -> None:
    namespace: dict[str, object] = {}
    exec("from sparseflow import *", namespace)
    assert set(namespace) - {"__builtins__"} == PUBLIC_NAMES


def test_dir_lists_the_public_names() -> None:
    assert dir(sparseflow) == sorted(PUBLIC_NAMES)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Neuron'"):
        sparseflow.Neuron  # noqa: B018
    with pytest.raises(ImportError):
        exec("from sparseflow import Neuron")


def test_version_is_that_of_the_project_file() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))
    assert sparseflow.__version__ == project["project"]["version"]


def test_importing_the_package_loads_none_of_its_parts() -> None:
    code = "import sys, sparseflow; print([name for name in sys.modules if name.startswith('sparseflow.')])"
    assert run_python(code) == "[]\n"


# --- errors


def test_all_errors_of_the_module_are_of_one_tree() -> None:
    assert errors.SparseFlowError in ERRORS
    assert all(issubclass(cls, errors.SparseFlowError) for cls in ERRORS)


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: error.__name__)
def test_error_has_a_known_wire_code_and_a_docstring_of_its_own(error: type[errors.SparseFlowError]) -> None:
    assert error.wire_code in WIRE_CODES
    assert vars(error).get("__doc__")


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: error.__name__)
def test_error_stands_in_the_modules_tree_with_its_code(error: type[errors.SparseFlowError]) -> None:
    if error is errors.SparseFlowError:
        return
    lines = [line for line in errors.__doc__.splitlines() if f"── {error.__name__} " in line]
    assert len(lines) == 1
    assert error.wire_code in lines[0].split()


@pytest.mark.parametrize(
    ("error", "standard"),
    [
        (errors.BadRequest, ValueError),
        (errors.UnsupportedModel, ValueError),
        (errors.DiskError, OSError),
        (errors.ShardCorrupt, OSError),
        (errors.NotEnoughDisk, OSError),
        (errors.NotEnoughMemory, MemoryError),
    ],
)
def test_error_is_caught_by_who_knows_only_the_standard_library(error: type, standard: type) -> None:
    assert issubclass(error, standard)


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: error.__name__)
def test_message_is_all_that_an_error_shows(error: type[errors.SparseFlowError]) -> None:
    assert str(error("capacity=0: raise it")) == "capacity=0: raise it"
