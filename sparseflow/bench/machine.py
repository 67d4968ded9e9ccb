"""The limits of the machine, measured while a benchmark runs: how fast it reads memory, and the disk."""

import importlib.metadata
import json
import mmap
import os
import platform
import statistics
from pathlib import Path
from typing import Any

from sparseflow.bench.cases import Case
from sparseflow.bench.memory_cgroup import NoColdReadError, disk_bandwidth
from sparseflow.bench.runs import Bench

LARGE_BLOCK_NBYTES = 1 << 20


class Machine:
    """Measured whenever asked; medians of all that was found so far."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        store = bench.conditions.store
        stride_nbytes = json.loads((store / "manifest.json").read_bytes())["stride_nbytes"]
        self.block_nbytes = -(-stride_nbytes // mmap.PAGESIZE) * mmap.PAGESIZE  # O_DIRECT reads blocks
        self._shards = sorted((store / "neurons").iterdir())
        self._memory: list[float] = []
        self._random: list[float] = []
        self._large: list[float] = []
        self._how = ""

    def measure(self) -> None:
        """Memory, and the disk by bundles from random places and by large blocks."""
        report = self._bench.run(Case("machine"))
        self._memory.append(report["memory_bytes_per_s"])
        try:
            rate, self._how = disk_bandwidth(self._shards, self.block_nbytes)
            self._random.append(rate)
            self._large.append(disk_bandwidth(self._shards, LARGE_BLOCK_NBYTES)[0])
        except NoColdReadError as error:
            self._how = str(error)

    @property
    def memory_bytes_per_s(self) -> float:
        """Of reads by all threads."""
        return statistics.median(self._memory)

    @property
    def random_bytes_per_s(self) -> float | None:
        """Of direct reads of one bundle each at the best queue depth; None where the file system has none."""
        return statistics.median(self._random) if self._random else None

    def environment(self) -> dict[str, Any]:
        """What kind of machine it is."""
        lines = (line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line)
        cpu = {name.strip(): value.strip() for name, value in lines}
        vectors = [name for name in ("avx2", "avx512f", "avx512_vnni", "amx_tile") if name in cpu["flags"].split()]
        memory_nbytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return {
            "sparseflow": importlib.metadata.version("sparseflow"),
            "python": platform.python_version(),
            "kernel": platform.release().split("-")[0],
            "cpu": cpu["model name"],
            "vectors": vectors,
            "cpus": len(os.sched_getaffinity(0)),
            "memory_nbytes": memory_nbytes,
        }

    def report(self) -> dict[str, Any]:
        """All that was measured."""
        return {
            "memory_bytes_per_s": self._memory,
            "random_block_nbytes": self.block_nbytes,
            "random_bytes_per_s": self._random,
            "large_block_nbytes": LARGE_BLOCK_NBYTES,
            "large_bytes_per_s": self._large,
            "disk": self._how,
        }
