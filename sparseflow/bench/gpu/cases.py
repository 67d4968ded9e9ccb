"""What the GPU benchmark runs: programs on models of published shapes, each with so much of the GPU's memory."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

GB = 10**9
LEAST_CAP, SMALL_CAP, LARGE_CAP = 5_300_000_000, 8_700_000_000, 13_500_000_000
SMALLER, LARGER = "opt-6.7b", "opt-13b"

COARSE = "calibrated:0.99:coarse"  # leaves the fine plane of the codes off the device, whose room neurons take
SPARSEFLOW, TRANSFORMERS, CPU_OFFLOAD, DEVICE_MAP = "sparseflow", "transformers", "cpu_offload", "device_map"


@dataclass(frozen=True, slots=True)
class GPUCase:
    """One program and how it is run.

    fidelity: of SparseFlow.
    cap_nbytes: the most of the GPU's memory that each process may take, its context included; None: all there is.
    n_served: processes that share one weight server and run at once; 0: one with weights of its own.
    hints: of SparseFlow, `OffloadStrategy.device_hints`.
    """

    program: str
    model: str = SMALLER
    fidelity: str = ""
    cap_nbytes: int | None = None
    n_served: int = 0
    hints: bool = False

    @property
    def label(self) -> str:
        """As in `opt-6.7b sparseflow:exact 8.7GB served to 2`."""
        words = [self.model, f"{self.program}:{self.fidelity}" if self.fidelity else self.program]
        if self.cap_nbytes is not None:
            words.append(f"{self.cap_nbytes / GB:g}GB")
        if self.hints:
            words.append("hints")
        if self.n_served:
            words.append(f"served to {self.n_served}")
        return " ".join(words)

    @property
    def n_processes(self) -> int:
        """How many decode at once."""
        return max(1, self.n_served)

    @property
    def is_dense(self) -> bool:
        """Whether every weight is used for every token."""
        return self.program != SPARSEFLOW or self.fidelity == "dense"


def all_cases() -> list[GPUCase]:
    """What says most comes first: time may end before the last."""
    return [
        GPUCase(TRANSFORMERS),
        *(GPUCase(SPARSEFLOW, SMALLER, fidelity, SMALL_CAP) for fidelity in ("exact", COARSE, "dense")),
        GPUCase(SPARSEFLOW, SMALLER, "exact", SMALL_CAP, hints=True),
        GPUCase(DEVICE_MAP, SMALLER, "", SMALL_CAP),
        GPUCase(CPU_OFFLOAD, SMALLER, "", SMALL_CAP),
        GPUCase(SPARSEFLOW, SMALLER, "dense"),
        *(GPUCase(SPARSEFLOW, SMALLER, "exact", SMALL_CAP, n_served) for n_served in (1, 2)),
        *(GPUCase(SPARSEFLOW, SMALLER, fidelity, LARGE_CAP) for fidelity in ("exact", COARSE)),
        GPUCase(SPARSEFLOW, LARGER, COARSE, LARGE_CAP),
        GPUCase(SPARSEFLOW, SMALLER, "exact", LEAST_CAP),
        GPUCase(SPARSEFLOW, SMALLER, "calibrated", SMALL_CAP),
    ]


def quick_cases() -> list[GPUCase]:
    """To see that it works."""
    return [GPUCase(SPARSEFLOW, SMALLER, fidelity, SMALL_CAP) for fidelity in ("exact", "calibrated")]


def matching(cases: Sequence[GPUCase], pattern: str) -> list[GPUCase]:
    """Those whose label has it, as `re.search` finds it."""
    return [case for case in cases if re.search(pattern, case.label)]
