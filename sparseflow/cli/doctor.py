"""Look for what is wrong here, and say what to do.

Installation, memory, disk, GPU, servers, and a store if one is named. What can be tried is tried: kernels, reads from
the disk, memory shared between processes, and all that a GPU is used for; what may crash or hang, in a process of its
own. Nothing is left behind. The exit code is 1 where something is called a problem, else 0.
"""

import argparse
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sparseflow
from sparseflow.cli.arguments import add_quiet
from sparseflow.errors import BadRequest
from sparseflow.utils.parsing import number

if TYPE_CHECKING:
    from sparseflow.doctor.finding import Finding, Found, Group

EXAMPLES = """\
examples:
  sparseflow doctor
  sparseflow doctor STORE --full
  sparseflow doctor --json | python -m json.tool
"""
_OF_THE_HOST = (
    *("kernel", "memory_nbytes", "free_nbytes", "memlock_nbytes", "shm", "disk", "disk_total_nbytes"),
    *("disk_free_nbytes", "direct_io", "disk_speed"),
)
_VERDICT_WIDTH, _NAME_WIDTH = 8, 20
_BAR = "{desc} {bar} {n}/{total}"

# Of a group, what was found.
Sections = Sequence[tuple[str, "list[Finding]"]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """STORE --full --device --quiet"""
    parser.add_argument("store", nargs="?", type=Path, metavar="STORE", help="look at this store too")
    parser.add_argument("--full", action="store_true", help="compare every byte of STORE with its checksum")
    parser.add_argument(
        "--device", type=_gpu, default=0, metavar="DEVICE", help="which GPU, of those visible: its number, or cuda:N"
    )
    add_quiet(parser)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """A line for each finding. Not ok where one is a problem.

    Raises:
        BadRequest: there are GPUs, but none of that number; `--full` of no store.
    """
    from sparseflow.doctor import computing, disk, environment, gpu, memory, servers, stores

    if arguments.full and arguments.store is None:
        raise BadRequest("--full: name the store whose bytes shall be compared: sparseflow doctor STORE --full")
    first = gpu.first_look(arguments.device)
    groups = [environment.group(sparseflow.__version__), computing.group(), memory.group(), disk.group()]
    groups += [gpu.group(arguments.device, first), servers.group(sparseflow.__version__)]
    if arguments.store is not None:
        groups.append(stores.group(arguments.store, full=arguments.full, quiet=arguments.quiet))
    sections, facts = examined(groups, quiet=arguments.quiet)
    if not arguments.json:
        print(page(sections))
    of_a_device = {name: facts.get(name) for name in ("reason", *gpu.OF_A_DEVICE)}
    return {
        "ok": all(finding.verdict != "problem" for _, found in sections for finding in found),
        **of_a_device,
        "host": {name: facts.get(name) for name in _OF_THE_HOST},
        "findings": [{"group": title} | asdict(finding) for title, found in sections for finding in found],
    }


def _gpu(text: str) -> float:
    """The number of a GPU, which elsewhere is called `cuda:N`, or `cuda` where it is the first."""
    return number(int, 0)("0" if text == "cuda" else text.removeprefix("cuda:"))


def examined(groups: "Sequence[Group]", *, quiet: bool) -> tuple[Sections, dict[str, Any]]:
    """What all checks find, by group, and their facts by name."""
    from sparseflow.utils.progress import DELAY_S, progress

    sections: list[tuple[str, list[Finding]]] = []
    facts: dict[str, Any] = {}
    shown_from_s = time.monotonic() + DELAY_S
    n_checks = sum(len(group.checks) for group in groups)
    with progress(quiet=quiet, total=n_checks, bar_format=_BAR, leave=False) as bar:
        for group in groups:
            sections.append((group.title, []))
            for check in group.checks:
                bar.set_description(check.name, refresh=time.monotonic() > shown_from_s)
                found: Found = check.found()
                sections[-1][1].extend(found.findings)
                facts |= found.facts
                bar.update()
    return sections, facts


def page(sections: Sections) -> str:
    """All of it for people: under a finding that is not ok, what to do."""
    from sparseflow.doctor.finding import summary
    from sparseflow.store.checks import in_one_line

    lines = []
    for title, found in sections:
        lines.append(title)
        for finding in found:
            name = f"{finding.name:{_NAME_WIDTH}}"
            lines.append(in_one_line(f"  {finding.verdict:{_VERDICT_WIDTH}} {name} {finding.text}"))
            if finding.remedy:
                lines.append(in_one_line(f"{' ' * (_VERDICT_WIDTH + _NAME_WIDTH + 4)}-> {finding.remedy}"))
    return "\n".join([*lines, f"doctor: {summary(finding for _, found in sections for finding in found)}"])
