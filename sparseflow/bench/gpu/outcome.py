"""What steps of `scripts/gpu_check.sh` came to: `python -m sparseflow.bench.gpu.outcome PART FOLDER`.

FOLDER holds PART.steps, a line a step: its name, exit code and seconds, by tabs; of a step of pytest NAME.xml, as its
`--junitxml` writes; of one of compute-sanitizer NAME.sanitizer.txt as well. Writes FOLDER/PART.json, prints a line a
step and what failed, and exits with 0 if all is right.
"""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

TIMED_OUT = (124, 137)  # exit codes of `timeout`
_SUMMARY = re.compile(r"=+ (?:ERROR|RACECHECK) SUMMARY: (\d+)")
_MOST_LINES = 40


def outcome(part: str, folder: Path) -> dict[str, Any]:
    """All steps, and whether all is right: at least one, each with exit code 0, tests that ran, and no finding."""
    steps = []
    for line in (folder / f"{part}.steps").read_text(encoding="utf-8").splitlines():
        name, code, seconds = line.split("\t")
        steps.append(_step(folder, name, int(code), float(seconds)))
    return {"part": part, "ok": bool(steps) and all(step["ok"] for step in steps), "steps": steps}


def _step(folder: Path, name: str, exit_code: int, seconds: float) -> dict[str, Any]:
    step: dict[str, Any] = {"name": name, "ok": exit_code == 0, "exit_code": exit_code, "seconds": seconds}
    if exit_code in TIMED_OUT:
        step["why"] = "it was stopped at its limit of time"
    junit, found = folder / f"{name}.xml", folder / f"{name}.sanitizer.txt"
    if junit.exists():
        step |= tests_in(junit.read_text(encoding="utf-8"))
        step["ok"] = step["ok"] and step["n_passed"] > 0
    if found.exists():
        step |= findings_in(found.read_text(encoding="utf-8", errors="replace"))
        step["ok"] = step["ok"] and step["n_findings"] == 0
    return step


def tests_in(junit: str) -> dict[str, Any]:
    """Numbers of tests, and the first line of what each failed one says."""
    cases = list(ElementTree.fromstring(junit).iter("testcase"))
    failed = {
        f"{case.get('classname')}::{case.get('name')}": (problem.get("message") or "").splitlines()[:1]
        for case in cases
        for problem in case
        if problem.tag in ("failure", "error")
    }
    n_skipped = sum(case.find("skipped") is not None for case in cases)
    return {
        "n_passed": len(cases) - len(failed) - n_skipped,
        "n_failed": len(failed),
        "n_skipped": n_skipped,
        "failures": {name: "".join(message) for name, message in failed.items()},
    }


def findings_in(text: str) -> dict[str, Any]:
    """How many problems compute-sanitizer counts, and its first lines of them. None: it never came to count."""
    counts = [int(count) for count in _SUMMARY.findall(text)]
    lines = [line for line in text.splitlines() if line.startswith("=========") and line.strip("= ")]
    return {"n_findings": sum(counts) if counts else None, "findings": lines[:_MOST_LINES] if sum(counts) else []}


def main(words: Sequence[str] | None = None) -> int:
    """Write and print. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part")
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args(words)
    result = outcome(arguments.part, arguments.folder)
    path = arguments.folder / f"{arguments.part}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for step in result["steps"]:
        about = [f"{step[key]} {key[2:]}" for key in ("n_passed", "n_failed", "n_skipped", "n_findings") if key in step]
        why = [step["why"]] if "why" in step else []
        words_of_step = ", ".join([f"exit code {step['exit_code']}", *about, f"{step['seconds']:.0f} s", *why])
        print(f"{'ok    ' if step['ok'] else 'FAILED'} {step['name']}: {words_of_step}")
        for name, message in step.get("failures", {}).items():
            print(f"       {name}: {message}")
    return 0 if result["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
