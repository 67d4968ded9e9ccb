"""Whether torch loads and kernels compute what they should, tried in a process of its own: both may end theirs."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparseflow.doctor.finding import Check, Finding, Found, Group
from sparseflow.doctor.trial import call, tried

_TIMEOUT_S = 120.0  # where the kernel was never compiled, and torch comes from a slow disk
_N_TOKENS, _N_IN, _N_OUT = 3, 256, 1024
_TOLERANCE = 1e-3  # of sums of 256 products in float32


def group() -> Group:
    """torch, and a kernel on its threads."""
    return Group("Computing", [Check("torch", look, deadline_s=None)])


def look() -> Found:
    """What a process finds that computes."""
    outcome = tried(call("sparseflow.doctor.computing.kernel_trial"), _TIMEOUT_S)
    if outcome.found is None:
        remedy = "install torch, numba and SparseFlow again, in an environment of their own"
        return Found([Finding("torch", "problem", f"nothing can be computed: {outcome.reason}", remedy)])
    return Found(findings(outcome.found))


def kernel_trial() -> None:
    """A product of half precision by our kernel, on all of torch's threads; what was used is printed as JSON."""
    import numba
    import torch

    from sparseflow.kernels.linear import linear, linear_ref
    from sparseflow.kernels.threads import openmp

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(_N_TOKENS, _N_IN, generator=generator)
    weight = torch.randn(_N_OUT, _N_IN, generator=generator).half()
    error = float((linear(x, weight).double() - linear_ref(x, weight)).abs().max())
    if not error <= _TOLERANCE:
        print(json.dumps({"error": f"a kernel's product is wrong by {error:g}"}))
        return
    print(
        json.dumps(
            {
                "torch": torch.__version__,
                "cuda": torch.version.cuda,
                "numba": numba.__version__,
                "threads": torch.get_num_threads(),
                "openmp": Path(openmp()._name).name,
            }
        )
    )


def findings(facts: Mapping[str, Any]) -> list[Finding]:
    """facts: as `kernel_trial` prints them."""
    build = f"for CUDA {facts['cuda']}" if facts["cuda"] else "for the CPU alone"
    threads = f"on torch's own threads ({facts['threads']}, of {facts['openmp']}), not on a layer of numba's"
    return [
        Finding("torch", "ok", f"{facts['torch']}, built {build}"),
        Finding("kernels", "ok", f"compiled by numba {facts['numba']}, and right; they run {threads}"),
    ]
