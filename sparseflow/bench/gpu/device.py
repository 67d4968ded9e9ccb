"""What the driver says of a GPU while others use it, how full it gets, and how fast bytes move to it and within it."""

import ctypes
import statistics
import subprocess
import threading
import time
from contextlib import suppress
from types import TracebackType
from typing import Any, NamedTuple, Protocol, Self

SAMPLED_EVERY_S = 0.05
_LIBRARIES = ("libnvidia-ml.so.1", "/usr/local/nvidia/lib64/libnvidia-ml.so.1")


class Device(Protocol):
    """A GPU as it is seen from outside the processes that use it."""

    def used_nbytes(self) -> int:
        """Bytes taken by all processes together, and by the driver."""
        ...

    def busy_percent(self) -> int | None:
        """Of the last moments, in how many a kernel ran; None where nobody says."""
        ...

    def driver(self) -> str:
        """Its version."""
        ...


class _Memory(ctypes.Structure):
    _fields_ = [(name, ctypes.c_ulonglong) for name in ("total", "free", "used")]


class _Utilization(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint) for name in ("gpu", "memory")]


class Nvml:
    """Asks the driver's management library, which stays open: a question takes microseconds."""

    def __init__(self, number: int = 0) -> None:
        """
        Raises:
            OSError: there is no such library, or it knows no such GPU.
        """
        self._library = _management_library()
        self._require("nvmlInit_v2")
        self._handle = ctypes.c_void_p()
        self._require("nvmlDeviceGetHandleByIndex_v2", number, ctypes.byref(self._handle))

    def used_nbytes(self) -> int:
        """As `Device.used_nbytes`."""
        memory = _Memory()
        self._require("nvmlDeviceGetMemoryInfo", self._handle, ctypes.byref(memory))
        return int(memory.used)

    def busy_percent(self) -> int | None:
        """As `Device.busy_percent`."""
        found = _Utilization()
        with suppress(OSError):
            self._require("nvmlDeviceGetUtilizationRates", self._handle, ctypes.byref(found))
            return int(found.gpu)
        return None

    def driver(self) -> str:
        """As `Device.driver`."""
        text = ctypes.create_string_buffer(96)
        self._require("nvmlSystemGetDriverVersion", text, len(text))
        return text.value.decode()

    def _require(self, name: str, *arguments: Any) -> None:
        if code := getattr(self._library, name)(*arguments):
            raise OSError(f"{name} failed with {code}")


def _management_library() -> ctypes.CDLL:
    for path in _LIBRARIES[:-1]:
        with suppress(OSError):
            return ctypes.CDLL(path)
    return ctypes.CDLL(_LIBRARIES[-1])


class Smi:
    """The same of `nvidia-smi`, where the library cannot be had; a question takes a good part of a second."""

    def __init__(self, number: int = 0) -> None:
        """
        Raises:
            OSError: there is no such program, or it knows no such GPU.
        """
        self._number = number
        self.used_nbytes()

    def used_nbytes(self) -> int:
        """As `Device.used_nbytes`."""
        return int(self._ask("memory.used")) << 20

    def busy_percent(self) -> int | None:
        """As `Device.busy_percent`."""
        text = self._ask("utilization.gpu")
        return int(text) if text.isdecimal() else None

    def driver(self) -> str:
        """As `Device.driver`."""
        return self._ask("driver_version")

    def _ask(self, field: str) -> str:
        command = ["nvidia-smi", f"--id={self._number}", f"--query-gpu={field}", "--format=csv,noheader,nounits"]
        try:
            return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
        except subprocess.SubprocessError as error:
            raise OSError(f"nvidia-smi: {error}") from error


def find_device(number: int = 0) -> Device | None:
    """By what can be asked here; None: by nothing."""
    for kind in (Nvml, Smi):
        with suppress(OSError):
            return kind(number)
    return None


class DeviceUse(NamedTuple):
    """What samples showed. peak_nbytes: beyond what was taken before. busy_share: mean over the measured time."""

    peak_nbytes: int | None
    busy_share: float | None
    n_samples: int


class Sampler:
    """Looks at a device again and again, in a thread, until it is left. Without a device it sees nothing."""

    def __init__(self, device: Device | None, every_s: float = SAMPLED_EVERY_S) -> None:
        self._device, self._every_s = device, every_s
        self._before = 0 if device is None else device.used_nbytes()
        self._peak, self._busy, self._n_samples = 0, list[int](), 0
        self._is_measuring = False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def measure(self, is_measuring: bool) -> None:
        """From now on it counts (or no more) how busy the device is."""
        self._is_measuring = is_measuring

    def use(self) -> DeviceUse:
        """What was seen so far."""
        if self._device is None or not self._n_samples:
            return DeviceUse(None, None, 0)
        busy = statistics.mean(self._busy) / 100 if self._busy else None
        return DeviceUse(max(0, self._peak - self._before), busy, self._n_samples)

    def _watch(self) -> None:
        device = self._device
        while device is not None and not self._ended.wait(self._every_s):
            try:
                self._peak = max(self._peak, device.used_nbytes())
                busy = device.busy_percent() if self._is_measuring else None
            except OSError:
                continue  # the next may be answered
            self._n_samples += 1
            if busy is not None:
                self._busy.append(busy)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join(30)


def wait_until_free(device: Device | None, at_most_nbytes: int, timeout_s: float = 5.0) -> int:
    """Wait until a process that has ended is gone from the device as well. Returns the bytes then taken."""
    if device is None:
        return 0
    deadline = time.monotonic() + timeout_s
    while (used := device.used_nbytes()) > at_most_nbytes and time.monotonic() < deadline:
        time.sleep(0.1)
    return used


def measure_device() -> dict[str, Any]:
    """Name and abilities of the first GPU; bytes per second within its memory, and to it from host memory.

    Raises:
        DeviceError: there is none, or a copy fails.
    """
    from sparseflow.cuda.bandwidth import measure_bandwidth
    from sparseflow.cuda.driver import CudaDriver
    from sparseflow.cuda.trials import device_facts

    with CudaDriver() as driver:
        facts = device_facts(driver)
        copies = measure_bandwidth(driver)
    return facts | {
        "memory_bytes_per_s": copy_bytes_per_s("cuda"),
        "pinned_bytes_per_s": copies.pinned_bytes_per_s,
        "pageable_bytes_per_s": copies.pageable_bytes_per_s,
        "pcie_copy_nbytes": copies.nbytes,
    }


def copy_bytes_per_s(device: str, nbytes: int = 1 << 30, n_copies: int = 10) -> float:
    """Of a copy within a device's memory, which reads and writes each byte: median."""
    import torch

    source = torch.ones(nbytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def wait() -> None:
        if source.is_cuda:
            torch.cuda.synchronize()

    rates = []
    for _ in range(1 + n_copies):
        wait()
        start = time.perf_counter()
        target.copy_(source)
        wait()
        rates.append(2 * nbytes / (time.perf_counter() - start))
    return statistics.median(rates[1:])
