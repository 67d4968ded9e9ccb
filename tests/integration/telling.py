"""The client's side of a test: what it was given, talk with the test line by line, and a model to talk about."""

import faulthandler
import json
import signal
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparseflow import SparseOPTForCausalLM

given: dict[str, Any] = json.loads(sys.argv[1])
faulthandler.register(signal.SIGUSR1)  # where are you?


def tell(what: Any = None) -> None:
    """Tell the test."""
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


def hear() -> Any:
    """Wait until the test says to go on; when it is gone, so are we."""
    line = sys.stdin.readline()
    if not line:
        sys.exit("nobody is there to say go on")
    return json.loads(line)


def open_model(model: str | None = None, **settings: Any) -> "SparseOPTForCausalLM":
    """Attach to the server `given["name"]`; one compute thread."""
    import torch

    from sparseflow import SparseOPTForCausalLM

    torch.set_num_threads(1)
    return SparseOPTForCausalLM.from_server(given["name"], model, **settings)


def generate(
    model: Any, prompt: list[int], n_tokens: int, *, tell_at: int | None = None, stop_at: int | None = None
) -> list[int]:
    """Prompt and greedy continuation of exactly `n_tokens`.

    Args:
        tell_at: say so when as many tokens are there.
        stop_at: say so, and wait until the test says to go on.
    """
    import torch
    from transformers.generation.streamers import BaseStreamer

    class Pace(BaseStreamer):
        n_seen = -1  # the prompt comes first

        def put(self, value: torch.Tensor) -> None:
            self.n_seen += 1
            if self.n_seen in (tell_at, stop_at):
                tell(f"{self.n_seen} tokens")
            if self.n_seen == stop_at:
                hear()

        def end(self) -> None:
            pass

    ids = torch.tensor([prompt])
    settings = {"max_new_tokens": n_tokens, "min_new_tokens": n_tokens, "do_sample": False}
    output = model.generate(ids, attention_mask=torch.ones_like(ids), streamer=Pace(), **settings)
    result: list[int] = output[0].tolist()
    return result
