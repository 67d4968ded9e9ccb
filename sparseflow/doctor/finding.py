"""A finding, and the checks that make them: none raises, and none takes longer than it may."""

import logging
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

_log = logging.getLogger(__name__)

Verdict = Literal["ok", "note", "warning", "problem"]
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)
DEADLINE_S = 10.0  # of a check that reads some files; one that waits for a dead file server waits for ever


@dataclass(frozen=True, slots=True)
class Finding:
    """What was looked at, how it is, and what to do.

    verdict: `ok`; `note`: good to know, all works; `warning`: something may fail or be slow; `problem`: it does.
    remedy: of all that is not ok.
    """

    name: str
    verdict: Verdict
    text: str
    remedy: str = ""

    def __post_init__(self) -> None:
        assert (self.verdict == "ok") == (self.remedy == ""), self


def of_error(name: str, verdict: Verdict, error: Exception) -> Finding:
    """What one of our errors says; its remedy stands behind the last semicolon."""
    text, _, remedy = str(error).rpartition("; ")
    return Finding(name, verdict, text or remedy, remedy if text else "see what this names")


@dataclass(frozen=True, slots=True)
class Found:
    """Findings, and facts by name that `--json` gives beside them."""

    findings: Sequence[Finding]
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Check:
    """One thing to look at. deadline_s: None where `find` keeps one itself, or was asked for by name."""

    name: str
    find: Callable[[], Finding | Found]
    deadline_s: float | None = DEADLINE_S

    def found(self) -> Found:
        """What it finds; that it failed or hung is a finding too."""
        if self.deadline_s is None:
            return self._guarded()
        answers: list[Found] = []
        thread = threading.Thread(
            target=lambda: answers.append(self._guarded()), name=f"doctor: {self.name}", daemon=True
        )
        thread.start()
        thread.join(self.deadline_s)
        if answers:
            return answers[0]
        remedy = "look for a disk or a network file system that does not answer"
        return Found([Finding(self.name, "problem", f"no answer within {self.deadline_s:g} s", remedy)])

    def _guarded(self) -> Found:
        try:
            found = self.find()
        except Exception as error:
            _log.debug("check %s failed", self.name, exc_info=True)
            text = f"could not be looked at ({type(error).__name__}: {error})"
            return Found([Finding(self.name, "warning", text, "SPARSEFLOW_LOG=DEBUG shows where that happens")])
        return Found([found]) if isinstance(found, Finding) else found


@dataclass(frozen=True, slots=True)
class Group:
    """Checks of one subject, under one heading."""

    title: str
    checks: Sequence[Check]


def summary(findings: Iterable[Finding]) -> str:
    """How many there are of each kind that is not ok, as a sentence."""
    verdicts = [finding.verdict for finding in findings]
    counts = {verdict: verdicts.count(verdict) for verdict in VERDICTS}
    parts = [_counted(counts["problem"], "problem") if counts["problem"] else "no problem"]
    parts += [_counted(counts[verdict], verdict) for verdict in ("warning", "note") if counts[verdict]]
    return ", ".join(parts)


def _counted(n: int, word: str) -> str:
    return f"{n} {word}{'' if n == 1 else 's'}"
