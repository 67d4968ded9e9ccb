"""How much memory is in use, by whom."""

from typing import NamedTuple

import psutil
import torch

GIB = 2**30


class ProcessMemory(NamedTuple):
    """Bytes of this process: pages of its own, and pages of files that other processes can share."""

    private: int
    shared: int


def process_memory() -> ProcessMemory:
    """Resident memory of this process as the kernel counts it."""
    memory = psutil.Process().memory_full_info()
    return ProcessMemory(memory.uss, memory.rss - memory.uss)


def measure_memory_usage() -> tuple[float, float]:
    """Memory in use now, and its peak since `reset_memory_stats`, in GiB.

    On a machine with a GPU what torch has allocated there; without one, this process's resident memory (whose peak is
    since the last `reset_memory_stats` where the kernel allows that, else since its start).
    """
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated() / GIB, torch.cuda.max_memory_allocated() / GIB
    fields = {}
    with open("/proc/self/status", encoding="ascii") as status:
        for line in status:
            name, _, value = line.partition(":")
            fields[name] = value
    now, peak = (int(fields[name].split()[0]) * 1024 / GIB for name in ("VmRSS", "VmHWM"))
    return now, max(now, peak)


def reset_memory_stats() -> None:
    """Start a new peak."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.empty_cache()
        return
    try:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as clear:
            clear.write("5")  # resets VmHWM
    except PermissionError:
        pass
