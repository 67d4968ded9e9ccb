"""Where the weights of an open model lie in the end, and how the rest is read: a few lines for people, or fields."""

import argparse
import logging
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from sparseflow.utils.process_memory import process_memory
from sparseflow.utils.sizes import format_size

if TYPE_CHECKING:
    from sparseflow.models.opt_sparse import SparseOPTForCausalLM


@dataclass(frozen=True)
class Placement:
    """Sizes in bytes, of weights unless it says so; None where there is nothing of that kind."""

    device: int | None
    """On the GPU, slots and buffers included."""
    page_locked: int | None
    """Of host memory below, what the GPU reads by itself."""
    shared: int | None
    """A weight server's memory, mapped here."""
    private: int
    """This process's own: arena and buffers, or copies."""
    mapped: int | None
    """Files of the store, mapped: in the page cache, which other processes use too."""
    disk: int
    """What has no room in memory and is read as it is needed."""
    neurons_in_memory: float
    """Share of all neurons that host memory has room for."""
    io: str
    io_reason: str
    disk_bytes_per_s: float | None
    """Of single neurons from random places; None where nothing is read."""
    fidelity: str
    threads: int
    computes_on: str
    transport: str | None
    """How neurons come to the GPU; None on the CPU."""
    transport_reason: str | None
    process_private: int
    """Of the whole process, Python and torch included."""
    process_shared: int

    @property
    def is_resident(self) -> bool:
        """Whether all neurons are in host memory."""
        return self.neurons_in_memory == 1

    def fields(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def placement_of(model: "SparseOPTForCausalLM", arguments: argparse.Namespace) -> Placement:
    """Asked of the model as it is open now. arguments: what it was opened by (`cli.opening`)."""
    import torch

    from sparseflow.cli.running import pinned_nbytes

    profile, status, report = model.source.profile, model.source.status(), model.device_report()
    is_resident = model.source.resident_bundles(0) is not None
    host = model.source.host_memory()
    room = profile.neurons_nbytes if is_resident or host is None else min(host.nbytes, profile.neurons_nbytes)
    is_served, memory = arguments.server is not None, process_memory()
    return Placement(
        device=sum(report["nbytes"].values()) if report else None,
        page_locked=pinned_nbytes(model),
        shared=status.memory["shared"] if is_served else None,
        private=status.memory["private"],
        mapped=None if is_served else status.memory["shared"],
        disk=profile.neurons_nbytes - room,
        neurons_in_memory=room / profile.neurons_nbytes,
        io=status.io,
        io_reason="; ".join(status.reasons) or _why(status.io, is_resident, is_served, arguments.io),
        disk_bytes_per_s=status.disk_bytes_per_s,
        fidelity=model.fidelity,
        threads=torch.get_num_threads(),
        computes_on=str(model.device),
        transport=report.get("transport"),
        transport_reason=report.get("transport_reason"),
        process_private=memory.private,
        process_shared=memory.shared,
    )


def _why(io: str, is_resident: bool, is_served: bool, asked: str) -> str:
    if is_resident:
        return "all neurons are in memory"
    if is_served:
        return "as the server chose"
    return "the file system allows it" if io == "direct" and asked == "auto" else "as --io says"


def show_placement(placement: Placement, log_format: str = "text") -> None:
    """A few lines on stderr; with `json` one record of the log."""
    if log_format == "json":
        log = logging.getLogger(__name__)
        log.setLevel(logging.INFO)  # it was asked for, whatever else is logged
        log.info("placement", extra={"placement": placement.fields()})
        return
    for line in lines(placement):
        print(line, file=sys.stderr)


def lines(placement: Placement) -> Iterator[str]:
    """For people."""
    p = placement
    parts = {
        f"on {p.computes_on}": p.device,
        "shared with the server": p.shared,
        "mapped through the page cache": p.mapped,
        "private": p.private,
        "left on disk": p.disk,
    }
    sizes = [f"{format_size(nbytes)} {what}" for what, nbytes in parts.items() if nbytes]
    if p.page_locked:
        sizes.append(f"{format_size(p.page_locked)} of host memory page-locked")
    yield f"weights:  {', '.join(sizes)}"
    if p.is_resident:
        yield f"reading:  nothing while it runs: {p.io_reason}"
    else:
        speed = f" at {format_size(int(p.disk_bytes_per_s))}/s" if p.disk_bytes_per_s else ""
        yield f"reading:  {p.io}{speed} ({p.io_reason}); room for {p.neurons_in_memory:.0%} of the neurons in memory"
    if p.transport:
        reason = f" ({p.transport_reason})" if p.transport_reason else ""
        yield f"to {p.computes_on}:  by {p.transport}{reason}"
    yield (
        f"running:  {p.fidelity} on {p.computes_on}, {p.threads} thread{'s' * (p.threads != 1)}; this process has "
        f"{format_size(p.process_private)} private and {format_size(p.process_shared)} shared, with Python and torch"
    )
