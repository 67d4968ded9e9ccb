"""A worker: a process that attaches to the weight server, takes jobs from a socket that it was born with, and answers.

    python -m sparseflow.serving.worker FD ARGUMENTS

FD is one end of a socket pair, ARGUMENTS are `SparseOPTForCausalLM.from_server`'s as JSON, with `threads` beside them.
The worker ends when the other end is closed.
"""

import json
import logging
import os
import queue
import signal
import socket
import sys
import threading
from typing import Any

from sparseflow.errors import PromptTooLong, SparseFlowError
from sparseflow.serving.messages import Cancel, Cancelled, Done, Failed, Job, Message, Ready, pack, unpack, unpacker
from sparseflow.utils.logs import start_logging

_log = logging.getLogger(__name__)
_READ_NBYTES = 1 << 16
_LAST_STEP_S = 5.0  # how long a step may go on after the front has gone

_STATUS_OF_CODE = {"bad_request": 400, "arena_busy": 503, "draining": 503, "not_permitted": 403}


class JobSocket:
    """The worker's side of the socket: a thread that reads, so that a cancellation is heard during a job."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._jobs: queue.Queue[Job | None] = queue.Queue()
        self._cancelled: set[int] = set()
        self._is_gone = False
        threading.Thread(target=self._read, name="front", daemon=True).start()

    def next_job(self) -> Job | None:
        """Wait for a job; None once the front has gone. No deadline: a front that dies closes the socket."""
        return self._jobs.get()

    def is_cancelled(self, job_id: int) -> bool:
        """Whether nobody waits for this job."""
        return self._is_gone or job_id in self._cancelled

    def tell(self, message: Message) -> None:
        """Send a message; nothing where the front has gone."""
        try:
            self._sock.sendall(pack(message))
        except OSError:
            self._is_gone = True

    def _read(self) -> None:
        messages = unpacker()
        while not self._is_gone:
            try:
                received = self._sock.recv(_READ_NBYTES)
            except OSError:
                received = b""
            if not received:
                break
            messages.feed(received)
            for packed in messages:
                match unpack(packed):
                    case Cancel(id=job_id):
                        self._cancelled.add(job_id)
                    case Job() as job:
                        self._cancelled = {job_id for job_id in self._cancelled if job_id >= job.id}
                        self._jobs.put(job)
        self._is_gone = True
        self._jobs.put(None)
        timer = threading.Timer(_LAST_STEP_S, os._exit, [1])
        timer.daemon = True
        timer.start()


def serve_jobs(front: JobSocket, generator: Any) -> None:
    """Run jobs until the front goes. Each ends with exactly one Done or Failed.

    Args:
        generator: has `run` as `Generator` has.
    """
    while (job := front.next_job()) is not None:
        job_id = job.id
        try:
            generator.run(job, front.tell, lambda job_id=job_id: front.is_cancelled(job_id))
        except Cancelled:
            front.tell(Done(job_id))
        except SparseFlowError as error:
            front.tell(failure(job_id, error))
        except Exception as error:
            _log.exception("job %d failed", job_id)
            front.tell(Failed(job_id, 500, "internal", f"{type(error).__name__}: {error}; see the log"))
        else:
            front.tell(Done(job_id))


def failure(job_id: int, error: SparseFlowError) -> Failed:
    """What is told of an error."""
    code = "context_length_exceeded" if isinstance(error, PromptTooLong) else error.wire_code
    return Failed(job_id, _STATUS_OF_CODE.get(error.wire_code, 500), code, str(error))


def main() -> int:
    """Returns 0, or 1 where the model cannot be opened, of which one line on stderr tells."""
    for number in (signal.SIGINT, signal.SIGTERM):  # a terminal's or a service manager's: the front acts upon them
        signal.signal(number, signal.SIG_IGN)
    sock, arguments = socket.socket(fileno=int(sys.argv[1])), json.loads(sys.argv[2])
    start_logging("WARNING", arguments.pop("log_format"))
    import torch

    from sparseflow.models.opt_sparse import SparseOPTForCausalLM
    from sparseflow.serving.generation import Generator
    from sparseflow.utils.tokenizer import tokenizer_of

    if threads := arguments.pop("threads"):
        torch.set_num_threads(threads)
    try:
        model = SparseOPTForCausalLM.from_server(**arguments)
        tokenizer = tokenizer_of(model.source.model_files)
    except SparseFlowError as error:
        print(f"sparseflow: error: worker {os.getpid()}: {error}", file=sys.stderr)
        return 1
    generator = Generator(model, tokenizer)
    generator.run(Job(0, prompt=[0, 0], max_tokens=1), lambda message: None, lambda: False)  # kernels are compiled
    front = JobSocket(sock)
    front.tell(
        Ready(
            os.getpid(),
            arguments["model"] or model.source.profile.model_identifier,
            model.fidelity,
            model.config.max_position_embeddings,
            max(map(len, tokenizer.get_vocab())),
            tokenizer.chat_template is not None,
        )
    )
    serve_jobs(front, generator)
    model.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
