"""What tests of findings share."""

from collections.abc import Sequence

from sparseflow.doctor.finding import Finding, Found


def by_name(found: Found | Sequence[Finding]) -> dict[str, Finding]:
    """Each finding by its name; no two have the same."""
    findings = found.findings if isinstance(found, Found) else found
    named = {finding.name: finding for finding in findings}
    assert len(named) == len(findings)
    return named


def verdicts(found: Found | Sequence[Finding]) -> dict[str, str]:
    """Each verdict by the finding's name."""
    return {name: finding.verdict for name, finding in by_name(found).items()}
