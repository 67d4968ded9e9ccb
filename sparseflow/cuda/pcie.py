"""The link between host and GPU, as the kernel or nvidia-smi tells it."""

import subprocess
from dataclasses import dataclass
from pathlib import Path

_GENERATIONS = {2.5: 1, 5.0: 2, 8.0: 3, 16.0: 4, 32.0: 5, 64.0: 6}  # by GT/s of a lane
_DEVICES = Path("/sys/bus/pci/devices")
_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class PcieLink:
    """Generation and lanes that the link can have. None: not told. An idle GPU's link may be slower than that."""

    generation: int | None
    width: int | None


def pcie_link(bus_id: str, devices: Path = _DEVICES) -> PcieLink:
    """bus_id: domain:bus:device.function."""
    domain, _, rest = bus_id.lower().partition(":")
    try:
        folder = devices / f"{int(domain, 16):04x}:{rest}"
        speed = float((folder / "max_link_speed").read_text().split()[0])  # such as "32.0 GT/s PCIe"
        width = int((folder / "max_link_width").read_text())
        return PcieLink(_GENERATIONS.get(speed), width if 0 < width < 255 else None)
    except (OSError, ValueError, IndexError):
        return _asked_of_nvidia_smi(bus_id)


def _asked_of_nvidia_smi(bus_id: str) -> PcieLink:
    command = ["nvidia-smi", "--query-gpu=pcie.link.gen.max,pcie.link.width.max", "--format=csv,noheader", "-i", bus_id]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=True)
        generation, width = map(int, result.stdout.split(","))
    except (OSError, ValueError, subprocess.SubprocessError):
        return PcieLink(None, None)
    return PcieLink(generation, width)
