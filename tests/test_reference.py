"""The API reference: made without a warning, with every public name and what its docstring says."""

import html
import inspect
import re
from pathlib import Path

import pytest
from child_process import run_python

import sparseflow

WRITE = """
import sys, warnings
sys.path.insert(0, sys.argv[1])
from reference import write_reference
from pathlib import Path
warnings.simplefilter("error", UserWarning)  # pdoc's are
write_reference(Path(sys.argv[2]), sys.argv[3:])
"""
pytestmark = pytest.mark.slow

SCRIPTS = Path(__file__).parents[1] / "scripts"
DOCUMENTED = sorted(name for name in sparseflow.__all__ if not name.startswith("_"))


@pytest.fixture(scope="module")
def front_page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """HTML of the package itself; its parts have pages of their own."""
    folder = tmp_path_factory.mktemp("reference")
    run_python(WRITE, SCRIPTS, folder, "sparseflow", r"!sparseflow\.", timeout_s=120)
    return (folder / "sparseflow.html").read_text(encoding="utf-8")


def section(page: str, name: str) -> str:
    """The text between the anchor of a name and the next one."""
    begin = page.index(f'id="{name}"')
    end = page.find("<section", begin)
    own = re.sub(r"<details.*?</details>", "", page[begin : end if end > 0 else len(page)], flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", "", own)).split())


def first_sentence(text: str) -> str:
    """As a page shows it: without what marks code."""
    return " ".join(re.split(r"(?<=[.:])\s", text.strip())[0].replace("`", "").split())


@pytest.mark.parametrize("name", DOCUMENTED)
def test_public_name_is_on_the_front_page_with_its_docstring(front_page: str, name: str) -> None:
    value = getattr(sparseflow, name)
    assert first_sentence(value.__doc__) in section(front_page, name)


@pytest.mark.parametrize("name", [name for name in DOCUMENTED if isinstance(getattr(sparseflow, name), type)])
def test_methods_of_a_public_class_are_there_with_their_docstrings(front_page: str, name: str) -> None:
    for method, value in vars(getattr(sparseflow, name)).items():
        text = getattr(value, "__doc__", None)
        if not method.startswith("_") and inspect.isfunction(getattr(value, "__func__", value)) and text:
            assert first_sentence(text) in section(front_page, f"{name}.{method}"), method


def test_fields_of_the_settings_are_there_with_what_they_mean(front_page: str) -> None:
    assert "At most this share of all bundles is kept in host memory" in section(
        front_page, "OffloadStrategy.cpu_cache_ratio"
    )
    assert "nine tenths of what is free there" in section(front_page, "SparseFlowConfig.device_memory")


def test_whole_reference_is_made_without_a_warning(tmp_path: Path) -> None:
    run_python(WRITE, SCRIPTS, tmp_path, "sparseflow", "sparseflow_daemon", timeout_s=600)
    pages = {page.relative_to(tmp_path).as_posix() for page in tmp_path.rglob("*.html")}
    assert {
        "index.html",
        "sparseflow.html",
        "sparseflow/core/weight_source.html",
        "sparseflow_daemon/server.html",
    } <= pages
