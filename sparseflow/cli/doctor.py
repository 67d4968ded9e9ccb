"""Say what SparseFlow can use of this machine: its GPU, how weights come to it, and the host's memory and disk.

Nothing is taken from the driver's word alone: copies, page-locking, memory shared between processes and CUDA graphs are
tried, each in a process of its own with a deadline. Without a GPU all is well too: then SparseFlow runs on the CPU.
"""

import argparse
import json
import os
import platform
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sparseflow.cli.arguments import number
from sparseflow.errors import BadRequest
from sparseflow.utils.sizes import format_size

_TIMEOUTS_S = {"device": 60.0, "bandwidth": 60.0, "page-lock-read-only": 90.0, "page-lock-writable": 90.0, "ipc": 90.0}
_GRAPHS_TIMEOUT_S = 240.0
_OF_A_DEVICE = ("device", "bandwidth", "page_lock", "ipc", "graphs", "pull", "push")
_ALIGNMENT = 4096


@dataclass(frozen=True, slots=True)
class Ability:
    """Whether something works here; and why not, or under which condition."""

    works: bool
    reason: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--device"""
    parser.add_argument("--device", type=number(int, 0), default=0, metavar="N", help="which GPU, of those visible")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Print a line for each thing. Not ok where there is a GPU and something of it does not work."""
    result = dict.fromkeys(("ok", "reason", *_OF_A_DEVICE)) | gpu_facts(arguments.device) | {"host": host_facts()}
    if not arguments.json:
        print(page(result))
    return result


def gpu_facts(device: int) -> dict[str, Any]:
    """What was tried on a GPU, and whether all of it works.

    Raises:
        BadRequest: there are GPUs, but none of that number.
    """
    from sparseflow.cuda.trials import Outcome, run_trial

    def tried(name: str) -> Outcome:
        return run_trial(["-m", "sparseflow.cuda.trials", name, "--device", str(device)], _TIMEOUTS_S[name])

    found = tried("device")
    if found.kind == BadRequest.__name__:
        raise BadRequest(found.reason)
    if found.found is None:
        return {"ok": found.kind == "NoDevice", "reason": found.reason}
    facts = found.found
    bandwidth = tried("bandwidth")
    read_only, writable, ipc = map(tried, ("page-lock-read-only", "page-lock-writable", "ipc"))
    program = f"from sparseflow.cli.doctor import graph_trial; graph_trial({device})"
    graphs = run_trial(["-c", program], _GRAPHS_TIMEOUT_S)
    is_as_told = read_only.found is not None or not _tells_of_read_only(facts)
    is_well = all(outcome.found is not None for outcome in (bandwidth, writable, ipc, graphs))
    return {
        "ok": is_well and is_as_told,
        "device": {"number": device} | facts,
        "bandwidth": bandwidth.found or {"reason": bandwidth.reason},
        "page_lock": {
            name: asdict(_ability(outcome)) | (outcome.found or {})
            for name, outcome in (("read_only", read_only), ("writable", writable))
        },
        "ipc": asdict(_ability(ipc)),
        "graphs": asdict(_ability(graphs)) | (graphs.found or {}),
        "pull": asdict(_pull(read_only, writable)),
        "push": asdict(_ability(ipc)),
    }


def graph_trial(device: int) -> None:
    """Capture a graph, replay it on another input, and print as JSON what it needs."""
    import torch
    import triton

    if not torch.cuda.is_available():
        print(json.dumps({"error": f"torch {torch.__version__} sees no GPU; install torch for CUDA"}))
        return
    torch.cuda.set_device(device)
    given = torch.zeros(1 << 16, device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        given * 2 + 1
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = given * 2 + 1
    given.copy_(torch.arange(1 << 16))
    graph.replay()
    torch.cuda.synchronize()
    if not torch.equal(made.cpu(), torch.arange(1 << 16) * 2.0 + 1):
        print(
            json.dumps({"error": "a CUDA graph that is replayed gives wrong numbers; install another torch or driver"})
        )
        return
    print(json.dumps({"torch": torch.__version__, "triton": triton.__version__}))


def host_facts() -> dict[str, Any]:
    """Kernel, memory and disk."""
    import psutil

    from sparseflow.cuda.page_lock import memlock_limit
    from sparseflow.engine.memory_plan import free_memory
    from sparseflow.utils.home import sparseflow_home

    home = sparseflow_home()
    folder = next(folder for folder in (home.absolute(), *home.absolute().parents) if folder.is_dir())
    return {
        "kernel": platform.release(),
        "memory_nbytes": psutil.virtual_memory().total,
        "free_nbytes": free_memory(),
        "memlock_nbytes": memlock_limit(),
        "shm": _shm(),
        "disk": str(folder),
        "direct_io": asdict(_direct_io(folder)),
    }


def page(result: dict[str, Any]) -> str:
    """All of it for people."""
    device, host = result["device"], result["host"]
    shm, direct = host["shm"], host["direct_io"]
    lines = _device_lines(result) if device else [("device", f"none ({result['reason']})")]
    memlock = "unlimited" if host["memlock_nbytes"] is None else format_size(host["memlock_nbytes"])
    lines += [
        (
            "host",
            f"Linux {host['kernel']}, {format_size(host['memory_nbytes'])} of memory, "
            f"{format_size(host['free_nbytes'])} free to this process, {memlock} of it lockable",
        ),
        (
            "/dev/shm",
            f"{format_size(shm['free_nbytes'])} of {format_size(shm['total_nbytes'])} free" if shm else "none",
        ),
        ("direct I/O", f"{_answer(direct)} ({host['disk']})" if direct["works"] else _answer(direct)),
    ]
    return "\n".join(f"{name:22} {text}" for name, text in lines)


def _device_lines(result: dict[str, Any]) -> list[tuple[str, str]]:
    device, bandwidth, page_lock = result["device"], result["bandwidth"], result["page_lock"]
    link = device["pcie"]
    copies = bandwidth.get("reason") or (
        f"{bandwidth['pinned_bytes_per_s'] / 1e9:.1f} GB/s from page-locked memory, "
        f"{bandwidth['pageable_bytes_per_s'] / 1e9:.1f} GB/s from other"
    )
    graphs = result["graphs"]
    versions = f" (torch {graphs['torch']}, triton {graphs['triton']})" if graphs["works"] else ""
    return [
        ("device", f"{device['number']}: {device['name']}, {device['uuid']}"),
        ("capability", f"{device['capability']}, driver for CUDA {device['cuda']}"),
        ("device memory", f"{format_size(device['free_nbytes'])} of {format_size(device['total_nbytes'])} free"),
        ("PCIe", f"generation {_known(link['generation'])}, {_known(link['width'])} lanes, {device['pci_bus_id']}"),
        ("copies to the device", copies),
        (
            "page-lock read-only",
            f"{_answer(page_lock['read_only'])}; the device says {_yes(_tells_of_read_only(device))}",
        ),
        ("page-lock writable", _answer(page_lock["writable"])),
        ("CUDA IPC", _answer(result["ipc"])),
        ("pull", _answer(result["pull"])),
        ("push", _answer(result["push"])),
        ("graphs", _answer(graphs) + versions),
    ]


def _pull(read_only: Any, writable: Any) -> Ability:
    """The GPU reads host memory: this process's own, and a client's view of the arena, which is read-only."""
    if read_only.found is not None:
        return Ability(True)
    if writable.found is not None:
        return Ability(True, f"not from a server's memory, which has to push ({read_only.reason})")
    return Ability(False, writable.reason)


def _tells_of_read_only(device: dict[str, Any]) -> bool:
    return bool(device["page_locks_read_only"] or device["uses_host_page_tables"])


def _ability(outcome: Any) -> Ability:
    return Ability(outcome.found is not None, outcome.reason)


def _shm() -> dict[str, int] | None:
    try:
        found = os.statvfs("/dev/shm")
    except OSError:
        return None
    return {"total_nbytes": found.f_blocks * found.f_frsize, "free_nbytes": found.f_bavail * found.f_frsize}


def _direct_io(folder: Path) -> Ability:
    """Where stores are made: whether a file there is read past the page cache."""
    import mmap

    try:
        with tempfile.NamedTemporaryFile(dir=folder) as file, mmap.mmap(-1, _ALIGNMENT) as memory:
            file.write(bytes(_ALIGNMENT))
            file.flush()
            fd = os.open(file.name, os.O_RDONLY | os.O_DIRECT)
            try:
                os.preadv(fd, [memory], 0)
            finally:
                os.close(fd)
    except OSError as error:
        return Ability(False, f"{folder}: {error.strerror}; stores there are read through the page cache")
    return Ability(True)


def _answer(ability: dict[str, Any]) -> str:
    answer = _yes(ability["works"])
    return f"{answer}: {ability['reason']}" if ability["reason"] else answer


def _yes(holds: bool) -> str:
    return "yes" if holds else "no"


def _known(value: int | None) -> str:
    return "n/a" if value is None else str(value)
