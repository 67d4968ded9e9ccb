"""How much memory this process uses. Without torch."""

from typing import NamedTuple


class ProcessMemory(NamedTuple):
    """Resident bytes of this process. private: its own pages. shared: pages that other processes can use too."""

    private: int
    shared: int


def process_memory() -> ProcessMemory:
    """Memory in use now, as the kernel counts it."""
    status = status_bytes()
    return ProcessMemory(status["RssAnon"], status["RssFile"] + status["RssShmem"])


def status_bytes() -> dict[str, int]:
    """The fields of /proc/self/status that are sizes, in bytes."""
    with open("/proc/self/status", encoding="ascii", errors="replace") as status:
        lines = [line.split() for line in status]
    return {line[0].rstrip(":"): int(line[1]) * 1024 for line in lines if line[-1:] == ["kB"]}
