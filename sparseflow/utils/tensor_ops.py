"""How much memory is in use, and how fast it is read."""

import time

import torch

from sparseflow.utils.process_memory import status_bytes

GIB = 2**30


def measure_memory_usage() -> tuple[float, float]:
    """Memory in use now, and its peak since `reset_memory_stats`, in GiB.

    On a machine with a GPU what torch has allocated there; without one, this process's resident memory (whose peak is
    since the last `reset_memory_stats` where the kernel allows that, else since its start).
    """
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated() / GIB, torch.cuda.max_memory_allocated() / GIB
    status = status_bytes()
    return status["VmRSS"] / GIB, max(status["VmRSS"], status["VmHWM"]) / GIB


def reset_memory_stats() -> None:
    """Start a new peak for `measure_memory_usage`; on a GPU, also give torch's unused memory back."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.empty_cache()
        return
    try:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as clear:
            clear.write("5")  # resets VmHWM
    except PermissionError:
        pass


def read_bandwidth() -> float:
    """Bytes per second at which torch's threads read memory now: the best of three sums over 256 MiB."""
    block = torch.ones(2**25, dtype=torch.int64)
    best_s = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        block.sum()
        best_s = min(best_s, time.perf_counter() - start)
    return block.nbytes / best_s
