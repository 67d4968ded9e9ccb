"""How the memory that is given is divided: what must be resident, and how many bundles the arena may hold.

allowed = dense weights + codes + widened biases + tables of the engine + buffers + arena
"""

import math
import os
from dataclasses import dataclass
from pathlib import Path

import psutil

from sparseflow.errors import NotEnoughMemory
from sparseflow.store.manifest import Manifest
from sparseflow.store.profile import ModelProfile
from sparseflow.utils.sizes import format_size, parse_size

# Of what is free, `auto` leaves a tenth to the KV cache, activations and whoever comes later.
AUTO_SHARE = 0.9

# With fewer bundles than this share of all in the arena, nothing is found again there.
LEAST_SHARE = 0.01

# Bytes of bundles that a dense step copies together for its matrix products; two such parts are in the arena at once.
DENSE_PART_NBYTES = 16 << 20

_SLOT_TABLES_NBYTES = 64  # per slot: state in residency, groups of the eviction
_BUNDLE_TABLES_NBYTES = 20  # per bundle of the store: its slot, its checksum, how often it was used
_READ_BUFFERS_NBYTES = 8 << 20  # scrap, cells for spans that are not aligned, rows of reads, threads


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """buffers_nbytes: what the engine takes beside the arena. n_slots: of the arena; None: all bundles are mapped."""

    buffers_nbytes: int
    n_slots: int | None


def plan_memory(
    store: Path,
    manifest: Manifest,
    memory: str | int,
    *,
    cpu_cache_ratio: float = 1.0,
    aggressive_offload: bool = False,
) -> MemoryPlan:
    """Divide `memory`: a size, or `auto` for what is free to this process, limits of containers counted.

    Args:
        cpu_cache_ratio: the most of all bundles that the arena may hold.
        aggressive_offload: the arena holds one layer at most.

    Raises:
        NotEnoughMemory: less than what must be resident and a hundredth of the bundles.
    """
    is_auto = memory == "auto"
    allowed = int(free_memory() * AUTO_SHARE) if is_auto else parse_size(memory)
    profile = manifest.profile
    n_bundles = profile.num_layers * profile.ffn_dimension
    fixed = fixed_nbytes(manifest)
    keeps_all = cpu_cache_ratio == 1 and not aggressive_offload
    if keeps_all and fixed + manifest.nbytes_under("neurons/") <= allowed:
        return MemoryPlan(0, None)
    wanted = max(2, math.ceil(cpu_cache_ratio * n_bundles))
    if aggressive_offload:
        wanted = min(wanted, profile.ffn_dimension)
    buffers, slot_nbytes = _buffers_nbytes(profile), _slot_nbytes(profile)
    fixed += buffers
    n_slots = min(wanted, (allowed - fixed) // slot_nbytes)
    least = min(wanted, _least_slots(profile))
    if n_slots < least:
        what, remedy = ("free are", "free some") if is_auto else ("allowed are", "allow more")
        raise NotEnoughMemory(
            f"{store}: {format_size(fixed)} must be resident and {format_size(least * slot_nbytes)} are the least for "
            f"neurons, {what} {format_size(allowed)}; {remedy}, or use a smaller model"
        )
    return MemoryPlan(buffers, n_slots)


def require_memory(memory: str | int) -> None:
    """
    Raises:
        BadRequest: neither a size nor `auto`.
    """
    if memory != "auto":
        parse_size(memory)


def fixed_nbytes(manifest: Manifest) -> int:
    """Bytes that are resident whatever the memory: dense weights, codes, and biases in float32 as kernels read them."""
    profile = manifest.profile
    widened = 8 * profile.num_layers * (profile.ffn_dimension + profile.hidden_dimension)
    return manifest.nbytes_under("") - manifest.nbytes_under("neurons/") + widened


def least_nbytes(manifest: Manifest) -> int:
    """The least memory that `plan_memory` takes, with a strategy that would keep all."""
    profile, fixed = manifest.profile, fixed_nbytes(manifest)
    in_part = _buffers_nbytes(profile) + _least_slots(profile) * _slot_nbytes(profile)
    return fixed + min(in_part, manifest.nbytes_under("neurons/"))


def _buffers_nbytes(profile: ModelProfile) -> int:
    dense_part = min(DENSE_PART_NBYTES, profile.ffn_dimension * profile.bundle_nbytes)
    return profile.num_layers * profile.ffn_dimension * _BUNDLE_TABLES_NBYTES + _READ_BUFFERS_NBYTES + dense_part


def _slot_nbytes(profile: ModelProfile) -> int:
    return profile.bundle_nbytes + _SLOT_TABLES_NBYTES


def _least_slots(profile: ModelProfile) -> int:
    return max(2, math.ceil(LEAST_SHARE * profile.num_layers * profile.ffn_dimension))


def free_memory() -> int:
    """Bytes that this process can take: what the machine has free, or less where a cgroup limits it."""
    return min([psutil.virtual_memory().available, *(room for _, room in _cgroups())])


def total_memory() -> int:
    """Bytes that this process could ever take: the machine's memory, or less where a cgroup limits it."""
    return min([psutil.virtual_memory().total, *(limit for limit, _ in _cgroups())])


def _cgroups() -> list[tuple[int, int]]:
    """Of each memory cgroup that this process is in, its limit, and what that leaves.

    Page cache that can be reclaimed counts as free.
    """
    try:
        lines = os.fsdecode(Path("/proc/self/cgroup").read_bytes()).splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, names = Path("/sys/fs/cgroup"), ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            root, names = Path("/sys/fs/cgroup/memory"), _V1_NAMES
        else:
            continue
        folder = root / path.lstrip("/")
        while folder.is_relative_to(root):
            found += _limit_and_room(folder, *names)
            folder = folder.parent
    return found


_V1_NAMES = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def _limit_and_room(folder: Path, limit_name: str, usage_name: str, reclaimable_name: str) -> list[tuple[int, int]]:
    try:
        limit = int((folder / limit_name).read_text(encoding="ascii"))  # "max" is no number: no limit
        usage = int((folder / usage_name).read_text(encoding="ascii"))
        stat = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="ascii").splitlines())
        return [(limit, limit - usage + int(stat.get(reclaimable_name, 0)))]
    except (OSError, ValueError):
        return []
