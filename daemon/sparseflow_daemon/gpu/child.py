"""`python -m sparseflow_daemon.gpu.child`: the server's process on one GPU. It lives and dies with the server.

Whatever a driver does, it does it here: the server waits for this process with deadlines, and ends it if it must.
"""

import argparse
import ctypes
import logging
import os
import select
import signal
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress

from sparseflow.cuda.devices import device_of_uuid
from sparseflow.cuda.driver import CudaDriver
from sparseflow.cuda.library import LIBRARY, Library
from sparseflow.errors import ServerError, SparseFlowError
from sparseflow.protocol.device_messages import ChildReady
from sparseflow.protocol.messages import ErrorReply, Message
from sparseflow.protocol.packets import receive_packet, send_packet
from sparseflow.utils.logs import LOG_FORMATS, start_logging
from sparseflow_daemon.gpu.work import GpuWork

EXIT_OK, EXIT_FAILED = 0, 1
_PR_SET_PDEATHSIG = 1
_POLL_S, _IDLE_S = 0.0002, 10.0  # while the GPU copies, and while it does not
_log = logging.getLogger("sparseflow_daemon.gpu.child")  # where it is the program, `__name__` is not


def main(argv: Sequence[str] | None = None) -> int:
    """Serve on a socket until it ends. Returns 0, or 1 where the GPU cannot be used, or not any longer."""
    parser = argparse.ArgumentParser(prog="python -m sparseflow_daemon.gpu.child", description=__doc__)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--uuid", type=bytes.fromhex, help="of the GPU")
    which.add_argument("--device", type=int, help="the GPU's number among those that are visible")
    parser.add_argument("--socket", type=int, required=True, help="a descriptor that was inherited")
    parser.add_argument("--library", default=LIBRARY, help="the driver's")
    parser.add_argument("--log-format", choices=LOG_FORMATS, default="text")
    arguments = parser.parse_args(argv)
    _end_with_parent()
    _start_logging(arguments.log_format)
    with socket.socket(fileno=arguments.socket) as sock:
        sock.set_inheritable(False)
        try:
            library = Library(arguments.library)
            number = device_of_uuid(arguments.uuid, library) if arguments.uuid else arguments.device
            _serve_on(sock, number, library)
        except (ServerError, OSError) as error:  # the server is gone
            _log.debug("%s", error)
        except SparseFlowError as error:
            _log.error("%s", error)
            with suppress(OSError):
                send_packet(sock, ErrorReply(0, 0, error.wire_code, str(error)))
            sock.close()
            os._exit(EXIT_FAILED)  # giving back what is broken may never end
    return EXIT_OK


def _start_logging(log_format: str) -> None:
    """Lines that are told from the server's, in the same log."""
    if log_format != "text":
        start_logging("INFO", log_format)
        return
    logging.basicConfig(
        level=os.environ.get("SPARSEFLOW_LOG", "INFO").upper(),
        format=f"%(asctime)s %(levelname)s gpu_child {os.getpid()}: %(message)s",
    )


def _serve_on(sock: socket.socket, number: int, library: Library) -> None:
    with CudaDriver(number, library) as driver:
        send_packet(sock, ChildReady(driver.device_name(), driver.device_uuid()))
        work = GpuWork(driver)
        try:
            serve(sock, work)
        except (ServerError, OSError):  # the server is gone
            work.close()
            raise


def serve(sock: socket.socket, work: GpuWork) -> None:
    """Do what the server says.

    Raises:
        ServerNotRunning, OSError: it is gone. GpuBroken: the GPU fails.
    """
    while True:
        if select.select([sock], [], [], _POLL_S if work.is_copying else _IDLE_S)[0]:
            _send(sock, work.handle(*receive_packet(sock)))
        _send(sock, work.copied())


def _send(sock: socket.socket, messages: list[Message]) -> None:
    for message in messages:
        send_packet(sock, message)


def _end_with_parent() -> None:
    """However the server ends, this does too; and nothing else ends it but that, or SIGKILL."""
    for number in (signal.SIGINT, signal.SIGTERM):  # a terminal's or a service manager's, for the server to act upon
        signal.signal(number, signal.SIG_IGN)
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    # where the server ended before this, its end of the socket is closed


if __name__ == "__main__":
    sys.exit(main())
