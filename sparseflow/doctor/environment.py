"""What is installed and set: Python, packages against what is asked for, system, processor, variables."""

import importlib.metadata
import os
import platform
import re
import sys
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from sparseflow.doctor.finding import Check, Finding, Found, Group

_SHOWN = ("torch", "transformers", "numba", "pyzmq")
_ONLY_FOR = {  # all else runs without
    "fastapi": "`sparseflow serve`",
    "uvicorn": "`sparseflow serve`",
    "prometheus-client": "metrics",
    "python-json-logger": "`--log-format json`",
    "shtab": "completion by the shell",
}
_VECTORS = ("avx2", "fma", "f16c")  # what kernels are made of: products, and weights of 16 bits that become 32
_MORE_VECTORS = ("avx512f", "avx512_vnni", "avx512_bf16", "amx_tile")
_KNOWN_VARIABLES = {
    *("SPARSEFLOW_HOME", "SPARSEFLOW_RUNTIME_DIR", "SPARSEFLOW_LOG", "SPARSEFLOW_FAULT"),
    *("SPARSEFLOW_TORCH", "SPARSEFLOW_VENV", "SPARSEFLOW_PYTHON", "SPARSEFLOW_STORES", "SPARSEFLOW_OPTIONS"),
}
_SHOWN_VARIABLES = re.compile(r"(SPARSEFLOW|HF|HUGGING_FACE)_.*|CUDA_VISIBLE_DEVICES|OMP_NUM_THREADS|NUMBA_CACHE_DIR")
_SECRET = re.compile(r"TOKEN|KEY|SECRET|PASSWORD")
_CPUINFO = Path("/proc/cpuinfo")
_PACKAGE = Path(__file__).parents[1]


class Asked(NamedTuple):
    """What this version of SparseFlow needs, as packaging writes it."""

    python: str
    packages: Sequence[str]


def group(version: str) -> Group:
    """All that takes no process of its own. version: of SparseFlow."""
    checks: dict[str, Callable[[], Finding | Found]] = {
        "SparseFlow": lambda: Finding("SparseFlow", "ok", f"{version} in {_PACKAGE}"),
        "Python": python,
        "packages": packages,
        "system": system,
        "processor": processor,
        "variables": variables,
    }
    return Group("Environment", [Check(name, find) for name, find in checks.items()])


def python() -> Finding:
    """Whether this Python is one that SparseFlow is made for."""
    from packaging.specifiers import SpecifierSet

    text, wanted = f"{platform.python_version()} ({sys.executable})", asked().python
    if SpecifierSet(wanted).contains(platform.python_version(), prereleases=True):
        return Finding("Python", "ok", text)
    remedy = "make an environment with such a Python: scripts/test.sh does, as does `python3.12 -m venv`"
    return Finding("Python", "warning", f"{text}; asked for is {wanted}", remedy)


def packages(wanted: Sequence[str] | None = None) -> Found:
    """A finding for each package that is not there or of another version, and one for the others.

    wanted: requirements; None: SparseFlow's own.
    """
    from packaging.requirements import Requirement

    found: dict[str, str] = {}
    findings = []
    for text in asked().packages if wanted is None else wanted:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        name = requirement.name
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            findings.append(_missing(name, str(requirement)))
            continue
        if not requirement.specifier.contains(found[name], prereleases=True):
            told = f"{found[name]} is installed, {requirement.specifier} is asked for"
            findings.append(Finding(name, "warning", told, f"pip install '{requirement}'"))
    n_right = len(found) - sum(finding.name in found for finding in findings)
    shown = ", ".join(f"{name} {found[name]}" for name in _SHOWN if name in found)
    whole = f"{n_right} are there in versions that fit{f': {shown}' if shown else ''}"
    return Found([Finding("packages", "ok", whole), *findings])


def asked() -> Asked:
    """From pyproject.toml where this is a checkout, which may be newer than what was installed; else as installed."""
    pyproject = _PACKAGE.parent / "pyproject.toml"
    if pyproject.is_file():
        project = tomllib.loads(pyproject.read_text(encoding="utf-8")).get("project", {})
        if project.get("name") == "sparseflow":
            return Asked(project["requires-python"], project["dependencies"])
    metadata = importlib.metadata.metadata("sparseflow")
    return Asked(metadata["Requires-Python"], importlib.metadata.requires("sparseflow") or [])


def system() -> Finding:
    """The kernel, and whether it tells when a process has ended, by which servers see that a client has."""
    text = f"{platform.system()} {platform.release()} on {platform.machine()}"
    try:
        os.close(os.pidfd_open(os.getpid()))
    except (AttributeError, OSError) as error:
        remedy = "run servers on Linux 5.3 or later itself, not on a sandbox's own kernel"
        return Finding("system", "problem", f"{text}; no pidfd ({error}), so that no server can run", remedy)
    if platform.machine() != "x86_64":
        return Finding("system", "warning", f"{text}; tried is x86_64 only", "use a machine of x86-64")
    return Finding("system", "ok", text)


def processor(cpuinfo: Path = _CPUINFO) -> Finding:
    """What kernels use of it."""
    lines = (line.split(":", 1) for line in cpuinfo.read_text(encoding="utf-8").splitlines() if ":" in line)
    cpu = {name.strip(): value.strip() for name, value in lines}
    flags = cpu.get("flags", "").split()
    vectors = [name for name in (*_VECTORS, *_MORE_VECTORS) if name in flags]
    cpus = f"{len(os.sched_getaffinity(0))} of {os.cpu_count()} CPUs usable"
    text = f"{cpu.get('model name', 'unknown')}, {cpus}; {', '.join(vectors) or 'no vectors that are of use'}"
    if missing := [name for name in _VECTORS if name not in flags]:
        remedy = "use a processor that has them (x86-64-v3); of a virtual machine, pass the host's on (cpu host)"
        return Finding("processor", "warning", f"{text}; kernels are slow without {', '.join(missing)}", remedy)
    return Finding("processor", "ok", text)


def variables(environment: Mapping[str, str] = os.environ) -> Found:
    """Those of ours, and of others that change what we do."""
    mine = {name: value for name, value in sorted(environment.items()) if _SHOWN_VARIABLES.fullmatch(name)}
    shown = ", ".join(f"{name}={'(set)' if _SECRET.search(name) else value}" for name, value in mine.items())
    findings = [Finding("variables", "ok", shown or "none is set that changes anything")]
    if unknown := [name for name in mine if name.startswith("SPARSEFLOW_") and name not in _KNOWN_VARIABLES]:
        remedy = f"look for a slip of the pen; known are {', '.join(sorted(_KNOWN_VARIABLES))}"
        findings.append(Finding("variables", "warning", f"{', '.join(unknown)}: nothing reads that", remedy))
    if mine.get("SPARSEFLOW_FAULT"):
        findings.append(Finding("variables", "warning", "reads go wrong on purpose", "unset SPARSEFLOW_FAULT"))
    return Found(findings)


def _missing(name: str, requirement: str) -> Finding:
    remedy = f"pip install '{requirement}'"
    if name in _ONLY_FOR:
        return Finding(name, "warning", f"is not installed; only {_ONLY_FOR[name]} needs it", remedy)
    return Finding(name, "problem", "is not installed", remedy)
