"""A worker without a model: what it does with a job, the prompt says. Takes what `sparseflow.serving.worker` takes."""

import json
import os
import socket
import sys
import time
from collections.abc import Callable

from sparseflow.errors import BadRequest
from sparseflow.serving.messages import Begun, Cancelled, Finished, Job, Message, Piece, Ready
from sparseflow.serving.worker import JobSocket, serve_jobs


class Scripted:
    """`say WORDS`, `wait` (until it is cancelled), `hang` (whatever comes), `die`, `refuse`, `fail`."""

    def run(self, job: Job, tell: Callable[[Message], None], is_cancelled: Callable[[], bool]) -> None:
        what, _, words = str(job.prompt).partition(" ")
        tell(Begun(job.id, 1, 0))
        match what:
            case "wait":
                while not is_cancelled():
                    time.sleep(0.01)
                raise Cancelled
            case "hang":
                time.sleep(1000)
            case "die":
                os._exit(9)
            case "refuse":
                raise BadRequest("not with me")
            case "fail":
                raise ZeroDivisionError("division by zero")
        for word in words.split():
            tell(Piece(job.id, word, []))
        tell(Finished(job.id, "length", len(words.split())))


def main() -> None:
    arguments = json.loads(sys.argv[2])
    if arguments.get("begins") is False:
        sys.exit(3)
    if arguments.get("begins") == "late":
        time.sleep(1000)
    front = JobSocket(socket.socket(fileno=int(sys.argv[1])))
    front.tell(Ready(os.getpid(), "scripted", "exact", 100, 9, False))
    serve_jobs(front, Scripted())


if __name__ == "__main__":
    main()
