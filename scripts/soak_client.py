"""One inference process of `soak.py`: generates and fetches at random, and compares all that it gets.

    python scripts/soak_client.py '{"server": ..., "store": ..., "expected": ..., "seed": ...}'

`expected` names a JSON list of {"prompt": [ids], "ids": [prompt and what the dense model goes on with]}. Each line on
stdout is a JSON object of what was done. It ends when its standard input does.
"""

import argparse
import json
import os
import random
import select
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from transformers.generation.streamers import BaseStreamer

from sparseflow import SparseOPTForCausalLM
from sparseflow.engine.resident import ResidentShards
from sparseflow.errors import DiskError, Draining, ServerNotRunning
from sparseflow.store.manifest import Manifest

WAIT_S = 60.0
RETRY_S = 0.2
HELD_S = 2.0  # a lease is held for as long at most
SLOW_S = 0.5  # between two tokens of a slow generation


class SlowReader(BaseStreamer):
    """Takes its time over some tokens, with whatever the model holds meanwhile."""

    def __init__(self, choice: random.Random) -> None:
        self._choice = choice

    def put(self, value: torch.Tensor) -> None:
        """As transformers calls it with each token."""
        if self._choice.random() < 0.1:
            time.sleep(self._choice.uniform(0, SLOW_S))

    def end(self) -> None:
        """Nothing is left to do."""


class Client:
    """A served model, what it must give, and the files that its bundles must equal."""

    def __init__(self, given: dict[str, Any]) -> None:
        torch.set_num_threads(1)
        self.model = attached(given["server"])
        self.expected = json.loads(Path(given["expected"]).read_text(encoding="utf-8"))
        self.files = ResidentShards(Path(given["store"]), Manifest.load(Path(given["store"])))
        self.choice = random.Random(given["seed"])

    def generate(self, streamer: BaseStreamer | None = None) -> dict[str, Any]:
        """What the model writes, compared with what the dense one does."""
        wanted = self.choice.choice(self.expected)
        n_tokens = len(wanted["ids"]) - len(wanted["prompt"])
        prompt = torch.tensor([wanted["prompt"]])
        ids = self.model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=n_tokens,
            min_new_tokens=n_tokens,
            do_sample=False,
            streamer=streamer,
        )[0].tolist()
        return {"did": "generated", "tokens": n_tokens, "wrong": ids != wanted["ids"]}

    def generate_slowly(self) -> dict[str, Any]:
        """As above, pausing between tokens."""
        return self.generate(SlowReader(self.choice))

    def hold(self) -> dict[str, Any]:
        """Lease some bundles for a while: they must be those of the files, when they come and before they go."""
        source, profile = self.model.source, self.model.source.profile
        layer = self.choice.randrange(profile.num_layers)
        most = min(source.fetch_limit, profile.ffn_dimension)
        neurons = sorted(self.choice.sample(range(profile.ffn_dimension), self.choice.randint(1, most)))
        ids = np.array(neurons, np.uint32)
        wanted = np.asarray(self.files.layer(layer)).view(np.uint8).reshape(-1, profile.bundle_nbytes)[ids]
        with source.fetch(layer, ids) as fetch:
            bundles = fetch.wait(WAIT_S)
            raw = bundles.base.view(torch.uint8).reshape(-1, profile.bundle_nbytes).numpy()
            is_right = [np.array_equal(raw[bundles.slots], wanted)]
            time.sleep(self.choice.uniform(0, HELD_S))
            is_right.append(np.array_equal(raw[bundles.slots], wanted))
        return {"did": "held", "bundles": len(ids), "wrong": not all(is_right)}

    def next(self) -> dict[str, Any]:
        """Do something; what became of it."""
        deeds: list[Callable[[], dict[str, Any]]] = [self.generate, self.generate_slowly, self.hold]
        deed = self.choice.choices(deeds, (7, 1, 2))[0]
        try:
            told = deed()
        except DiskError as error:  # a read that went wrong, by its name; all others end this process
            told = {"did": "refused", "error": type(error).__name__, "text": str(error)}
        process = psutil.Process()
        return told | {"fds": process.num_fds(), "threads": process.num_threads()}


def attached(server: str) -> SparseOPTForCausalLM:
    """The served model; asked for again where the server ends, or is gone, just then."""
    deadline = time.monotonic() + WAIT_S
    while True:
        try:
            return SparseOPTForCausalLM.from_server(server, reconnect_timeout_s=WAIT_S)
        except (Draining, ServerNotRunning) as error:
            tell({"did": "turned away", "error": type(error).__name__})
            if time.monotonic() > deadline:
                raise
            time.sleep(RETRY_S)


def wants_us() -> bool:
    """Whether standard input is still open."""
    ready, _, _ = select.select([sys.stdin], [], [], 0)
    return not ready or bool(os.read(sys.stdin.fileno(), 1))


def tell(what: dict[str, Any]) -> None:
    """A line for whoever started this."""
    print(json.dumps(what), flush=True)


def main() -> None:
    """Work until nobody wants us."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("given", type=json.loads, help="a JSON object, as above")
    client = Client(parser.parse_args().given)
    tell({"did": "attached"})
    while wants_us():
        tell(client.next())
    client.model.close()


if __name__ == "__main__":
    main()
