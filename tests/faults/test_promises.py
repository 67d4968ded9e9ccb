"""What the README promises of faults is what these tests hold, each by its name; its soak is the one on record."""

import ast
import json
import re
from pathlib import Path

FOLDER = Path(__file__).parent
README = (FOLDER.parents[1] / "README.md").read_text(encoding="utf-8")
ROW = re.compile(r"^\| (\d\d) \| .*\|([^|]*)\|$", re.MULTILINE)


def numbered_tests() -> dict[str, set[str]]:
    """Fault -> names of its tests."""
    found: dict[str, set[str]] = {}
    for path in FOLDER.glob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and (number := re.match(r"test_(\d\d)_", node.name)):
                found.setdefault(number[1], set()).add(node.name)
    return found


def test_each_promise_names_tests_that_there_are() -> None:
    tests, rows = numbered_tests(), ROW.findall(README)
    assert [number for number, _ in rows] == [f"{n:02}" for n in range(1, 32)]
    for number, cell in rows:
        named = set(re.findall(r"`(\w+)`", cell))
        assert named, number
        assert named <= tests[number], number


def test_each_fault_that_is_tested_is_promised() -> None:
    assert set(numbered_tests()) == {number for number, _ in ROW.findall(README)}


def test_figures_of_the_soak_are_those_on_record() -> None:
    record = json.loads((FOLDER.parents[1] / "scripts" / "soak_result.json").read_text(encoding="utf-8"))
    assert (record["wrong"], record["leaked"], record["failure"]) == (0, 0, None)
    assert record["minutes"] >= 30
    shown = [record[name] for name in ("requests", "generated", "held", "looked through", "refused")]
    shown += [*record["disturbances"].values(), *record["reads_gone_wrong"].values()]
    table = README[README.index("All of it at once") : README.index("scripts/soak.py --minutes")]
    figures = re.findall(r"\d[\d,]*", table)
    assert {str(n) for n in shown} <= set(figures)
    assert {f"{record[name]:,}" for name in ("tokens", "bundles")} <= set(figures)
