"""What may crash or hang is tried in a process of its own."""

from collections.abc import Sequence

from sparseflow.cuda import trials
from sparseflow.cuda.trials import Outcome


def tried(arguments: Sequence[str], timeout_s: float) -> Outcome:
    """As `run_trial`; that no process can be started is an outcome too."""
    try:
        return trials.run_trial(arguments, timeout_s)
    except OSError as error:
        return Outcome(None, f"no process can be started ({error.strerror})")


def call(function: str, *words: str) -> list[str]:
    """Arguments of Python that call a function of texts. function: its dotted name."""
    module, _, name = function.rpartition(".")
    return ["-c", f"import sys; from {module} import {name}; {name}(*sys.argv[1:])", *words]
