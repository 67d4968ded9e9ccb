"""Runs compiled kernels on torch's own OpenMP threads.

A second thread pool (numba ships its own threading layers, and its OpenMP layer loads another libgomp) would spin
against torch's on the same cores. So kernels are plain C functions, `void kernel(int64 *args)`, and the OpenMP runtime
that torch has loaded starts one team of threads for each call: the same threads that compute torch's products.

Kernels have no barrier of their own: on a busy machine each wait for a thread that lost its core costs a time slice
(three barriers a call made calls 18 times longer beside one other process). What threads found apart is joined after.
"""

import ctypes
import os
from functools import cache
from typing import Any

import llvmlite.binding as llvm
import numpy as np
import torch
from numba import cfunc, types
from numba.core.typing.templates import Signature

from sparseflow.errors import DiskError

_SYMBOLS = ("GOMP_parallel", "omp_get_thread_num")

# A kernel's one argument: the address of its int64 argument block.
KERNEL_SIGNATURE: Signature = types.void(types.intp)

# From within a kernel: call another, by its address, on so many threads and wait for all: (kernel, args, n_threads, 0).
run_team = types.ExternalFunction("GOMP_parallel", types.void(types.intp, types.intp, types.uint32, types.uint32))
team_rank = types.ExternalFunction("omp_get_thread_num", types.intc())


def _loaded_openmp_runtimes() -> list[str]:
    """Paths of OpenMP runtimes mapped into this process, torch's own folder first."""
    torch_folder = os.path.dirname(torch.__file__)
    with open("/proc/self/maps", encoding="utf-8") as maps:
        paths = {line.rstrip("\n").split(maxsplit=5)[-1] for line in maps if "/lib" in line}
    names = ("libgomp", "libiomp5", "libomp")
    found = [path for path in paths if os.path.basename(path).startswith(names)]
    return sorted(found, key=lambda path: (not path.startswith(torch_folder), path))


@cache
def openmp() -> ctypes.CDLL:
    """The OpenMP runtime that torch runs on; its symbols are made known to compiled kernels.

    Raises:
        RuntimeError: torch has loaded no runtime with the GNU entry points.
    """
    for path in _loaded_openmp_runtimes():
        library = ctypes.CDLL(path)
        if all(hasattr(library, name) for name in _SYMBOLS):
            for name in _SYMBOLS:
                address = ctypes.cast(getattr(library, name), ctypes.c_void_p).value
                llvm.add_symbol(name, address)
            library.GOMP_parallel.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
            library.GOMP_parallel.restype = None
            return library
    raise RuntimeError(
        "torch runs on no OpenMP runtime with GNU entry points (libgomp, libiomp5 or libomp); "
        "install a torch build that uses OpenMP, such as the wheels on PyPI"
    )


def compile_kernel(function: Any) -> Any:
    """Compile `function(args)` for `run`; numba keeps the result on disk.

    numba compiles again when the function's own file or the values it closes over change. Kernels close over
    `intrinsics.DIGEST`, so that a change in that file is seen too.

    Raises:
        DiskError: there is no folder to keep it in.
    """
    try:
        return cfunc(KERNEL_SIGNATURE, cache=True)(function)
    except RuntimeError as error:
        if "locator" not in str(error):
            raise
        raise DiskError(
            f"compiled kernels can be kept neither in {os.path.dirname(__file__)} nor in the user's cache directory; "
            "set NUMBA_CACHE_DIR to a folder that can be written"
        ) from error


def address_of(array: np.ndarray) -> int:
    """Of an array's memory: what `array.ctypes.data` is, in a third of the time. The array: writable, not empty."""
    return ctypes.addressof(ctypes.c_char.from_buffer(array))  # type: ignore[arg-type]


def run_serial(kernel: Any, args: np.ndarray) -> None:
    """Call a compiled kernel once, on this thread. It may call others by `run_team`.

    args: as for `run`.
    """
    _function(kernel.address)(address_of(args))


@cache
def _function(address: int) -> Any:
    return ctypes.CFUNCTYPE(None, ctypes.c_int64)(address)


def run(kernel: Any, args: np.ndarray, n_threads: int) -> None:
    """Call a compiled kernel once on each of `n_threads` threads and wait for all.

    Args:
        kernel: a numba `cfunc` of `KERNEL_SIGNATURE`. Its threads take one part of the work after the other
            from a counter.
        args: (n,) int64, the kernel's argument block: sizes and addresses; whatever they point to must stay alive.
        n_threads: threads asked for; the runtime may give fewer.
    """
    openmp().GOMP_parallel(kernel.address, address_of(args), n_threads, 0)


openmp()
