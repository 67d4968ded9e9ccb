"""A GPU: who it is, and what of it works.

Nothing is taken from the driver's word alone: copies, page-locking, memory shared between processes and CUDA graphs are
tried, each in a process of its own with a deadline. Without a GPU all is well too: then SparseFlow runs on the CPU.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sparseflow.cuda.trials import Outcome
from sparseflow.doctor.finding import Check, Finding, Found, Group
from sparseflow.doctor.trial import call, tried
from sparseflow.errors import BadRequest
from sparseflow.utils.sizes import format_size

OF_A_DEVICE = ("device", "bandwidth", "page_lock", "ipc", "graphs", "pull", "push")

_TIMEOUTS_S = {"device": 60.0, "bandwidth": 60.0, "page-lock-read-only": 90.0, "page-lock-writable": 90.0, "ipc": 90.0}
_GRAPHS_TIMEOUT_S = 240.0
_LEAST_CAPABILITY = 8.0
_LITTLE_NBYTES = 1 << 30  # a context and the dense weights of a small model
_PCI_DEVICES = Path("/sys/bus/pci/devices")
_LOCK_REMEDY = "ulimit -l unlimited, or docker --ulimit memlock=-1; else bundles are staged, or pushed by a server"
_IPC_REMEDY = "run containers with --ipc=host, and server and clients as one user"
_NVIDIA, _DISPLAY = "0x10de", "0x03"  # vendor; class, of which 3D controllers are


@dataclass(frozen=True, slots=True)
class Ability:
    """Whether something works here; and why not, or under which condition."""

    works: bool
    reason: str = ""


def first_look(device: int) -> Outcome:
    """Who a GPU is.

    Raises:
        BadRequest: there are GPUs, but none of that number.
    """
    found = _tried("device", device)
    if found.kind == BadRequest.__name__:
        raise BadRequest(found.reason)
    return found


def group(device: int, first: Outcome) -> Group:
    """first: what `first_look` found."""
    return Group("GPU", [Check("device", lambda: look(device, first), deadline_s=None)])


def look(device: int, first: Outcome) -> Found:
    """Try all of it, or say why there is none. facts: `reason` and `OF_A_DEVICE`."""
    if first.found is None:
        finding = _none(first) if first.kind == "NoDevice" else _broken(first)
        return Found([finding], {"reason": first.reason})
    facts = device_facts(device, first.found)
    return Found(findings(facts), facts)


def device_facts(device: int, told: Mapping[str, Any]) -> dict[str, Any]:
    """What was tried on a GPU, by the names of `OF_A_DEVICE`. told: what it says of itself."""
    bandwidth, read_only, writable, ipc = (
        _tried(name, device) for name in ("bandwidth", "page-lock-read-only", "page-lock-writable", "ipc")
    )
    graphs = tried(call("sparseflow.doctor.gpu.graph_trial", str(device)), _GRAPHS_TIMEOUT_S)
    return {
        "device": {"number": device} | dict(told),
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


def graph_trial(device: str) -> None:
    """Capture a graph, replay it on another input, and print as JSON what it needs."""
    import torch
    import triton

    if not torch.cuda.is_available():
        print(json.dumps({"error": f"torch {torch.__version__} sees no GPU; install torch for CUDA"}))
        return
    torch.cuda.set_device(int(device))
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


def findings(facts: Mapping[str, Any]) -> list[Finding]:
    """One for each thing that was tried. facts: of `device_facts`."""
    device, link = facts["device"], facts["device"]["pcie"]
    page_lock, graphs = facts["page_lock"], facts["graphs"]
    versions = f" (torch {graphs['torch']}, triton {graphs['triton']})" if graphs["works"] else ""
    lanes = f"generation {_known(link['generation'])}, {_known(link['width'])} lanes, {device['pci_bus_id']}"
    return [
        Finding("device", "ok", f"{device['number']}: {device['name']}, {device['uuid']}"),
        _capability(device),
        _device_memory(device),
        Finding("PCIe", "ok", lanes),
        _copies(facts["bandwidth"]),
        _read_only_lock(page_lock["read_only"], told=_tells_of_read_only(device)),
        _of_ability("page-lock writable", page_lock["writable"], _LOCK_REMEDY),
        _of_ability("CUDA IPC", facts["ipc"], _IPC_REMEDY),
        _of_ability("pull", facts["pull"], _LOCK_REMEDY),
        _of_ability("push", facts["push"], _IPC_REMEDY),
        _of_ability("graphs", graphs, "install a torch built for this driver's CUDA, with its Triton", versions),
    ]


def nvidia_devices(folder: Path = _PCI_DEVICES) -> list[str]:
    """Bus ids of NVIDIA's GPUs that the kernel sees, whether there is a driver for them or not."""
    found = []
    for device in sorted(folder.glob("*")):
        try:
            if (device / "vendor").read_text().strip() == _NVIDIA and (device / "class").read_text()[:4] == _DISPLAY:
                found.append(device.name)
        except OSError:
            continue
    return found


def _none(first: Outcome) -> Finding:
    reason, _, way = first.reason.rpartition("; ")
    text = f"none ({reason or way})"
    if bus_ids := nvidia_devices():
        text += f", but there is hardware of NVIDIA's at {', '.join(bus_ids)}"
        return Finding("device", "warning", text, way if reason else "install NVIDIA's driver")
    remedy = "nothing to do: SparseFlow runs on the CPU"
    return Finding("device", "note", text, f"{remedy}; to have a GPU, {way}" if reason else remedy)


def _broken(first: Outcome) -> Finding:
    remedy = "see that nvidia-smi works, and restart the machine or install the driver again; --device cpu works"
    return Finding("device", "problem", f"there is a driver, and it does not work: {first.reason}", remedy)


def _capability(device: Mapping[str, Any]) -> Finding:
    text = f"{device['capability']}, driver for CUDA {device['cuda']}"
    if float(device["capability"]) >= _LEAST_CAPABILITY:
        return Finding("capability", "ok", text)
    remedy = f"use a GPU of compute capability {_LEAST_CAPABILITY} or later, or --device cpu"
    return Finding("capability", "problem", f"{text}; kernels need {_LEAST_CAPABILITY}", remedy)


def _device_memory(device: Mapping[str, Any]) -> Finding:
    text = f"{format_size(device['free_nbytes'])} of {format_size(device['total_nbytes'])} free"
    if device["free_nbytes"] >= _LITTLE_NBYTES:
        return Finding("device memory", "ok", text)
    return Finding("device memory", "warning", text, "end what uses the GPU; nvidia-smi lists it")


def _copies(bandwidth: Mapping[str, Any]) -> Finding:
    if "reason" in bandwidth:
        return Finding("copies to the device", "problem", bandwidth["reason"], "see that nvidia-smi shows no error")
    pinned, pageable = (bandwidth[f"{kind}_bytes_per_s"] / 1e9 for kind in ("pinned", "pageable"))
    text = f"{pinned:.1f} GB/s from page-locked memory, {pageable:.1f} GB/s from other"
    return Finding("copies to the device", "ok", text)


def _read_only_lock(ability: Mapping[str, Any], *, told: bool) -> Finding:
    """A device that says that it cannot is sound."""
    name, text = "page-lock read-only", f"{_answer(ability)}; the device says {_yes(told)}"
    if ability["works"]:
        return Finding(name, "ok", text)
    remedy = "nothing to do alone; neurons of a server's memory are pushed by its process on the GPU"
    return Finding(name, "problem" if told else "note", text, remedy)


def _of_ability(name: str, ability: Mapping[str, Any], remedy: str, more: str = "") -> Finding:
    """A problem where it does not work, a note where it does under a condition."""
    text = _answer(ability) + more
    if not ability["works"]:
        return Finding(name, "problem", text, remedy)
    if ability["reason"]:
        return Finding(name, "note", text, "nothing to do: what cannot be pulled is pushed")
    return Finding(name, "ok", text)


def _pull(read_only: Outcome, writable: Outcome) -> Ability:
    """The GPU reads host memory: this process's own, and a client's view of the arena, which is read-only."""
    if read_only.found is not None:
        return Ability(True)
    if writable.found is not None:
        return Ability(True, f"not from a server's memory, which has to push ({read_only.reason})")
    return Ability(False, writable.reason)


def _tells_of_read_only(device: Mapping[str, Any]) -> bool:
    return bool(device["page_locks_read_only"] or device["uses_host_page_tables"])


def _tried(name: str, device: int) -> Outcome:
    return tried(["-m", "sparseflow.cuda.trials", name, "--device", str(device)], _TIMEOUTS_S[name])


def _ability(outcome: Outcome) -> Ability:
    return Ability(outcome.found is not None, outcome.reason)


def _answer(ability: Mapping[str, Any]) -> str:
    answer = _yes(ability["works"])
    return f"{answer}: {ability['reason']}" if ability["reason"] else answer


def _yes(holds: bool) -> str:
    return "yes" if holds else "no"


def _known(value: int | None) -> str:
    return "n/a" if value is None else str(value)
