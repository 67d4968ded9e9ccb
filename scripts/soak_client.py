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
from numpy.typing import NDArray
from transformers.generation.streamers import BaseStreamer

from sparseflow import SparseOPTForCausalLM
from sparseflow.core.weight_source import HostBundles
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
        layer, ids = self._some_layer(), self._neurons()
        ids = np.sort(self.choice.sample(ids.tolist(), self.choice.randint(1, self._most()))).astype(np.uint32)
        with self.model.source.fetch(layer, ids) as fetch:
            is_right = [self._are_those_of_files(fetch.wait(WAIT_S), layer, ids)]
            time.sleep(self.choice.uniform(0, HELD_S))
            is_right.append(self._are_those_of_files(fetch.wait(WAIT_S), layer, ids))
        return {"did": "held", "bundles": len(ids), "wrong": not all(is_right)}

    def look_through(self) -> dict[str, Any]:
        """All bundles of a layer, those in the arena and those on disk, beside the files."""
        layer, is_right = self._some_layer(), []
        for first in range(0, len(self._neurons()), self._most()):
            ids = self._neurons()[first : first + self._most()]
            with self.model.source.fetch(layer, ids, keep=False) as fetch:
                is_right.append(self._are_those_of_files(fetch.wait(WAIT_S), layer, ids))
        return {"did": "looked through", "bundles": len(self._neurons()), "wrong": not all(is_right)}

    def _some_layer(self) -> int:
        return self.choice.randrange(self.model.source.profile.num_layers)

    def _neurons(self) -> NDArray[np.uint32]:
        return np.arange(self.model.source.profile.ffn_dimension, dtype=np.uint32)

    def _most(self) -> int:
        return min(self.model.source.fetch_limit, self.model.source.profile.ffn_dimension)

    def _are_those_of_files(self, bundles: HostBundles, layer: int, ids: NDArray[np.uint32]) -> bool:
        nbytes = self.model.source.profile.bundle_nbytes
        raw = bundles.base.view(torch.uint8).reshape(-1, nbytes).numpy()
        return bool(np.array_equal(raw[bundles.slots], self.files.layer(layer)[ids]))

    def next(self) -> dict[str, Any]:
        """Do something; what became of it."""
        deeds: list[Callable[[], dict[str, Any]]]
        deeds = [self.generate, self.generate_slowly, self.hold, self.look_through]
        deed = self.choice.choices(deeds, (6, 1, 2, 4))[0]
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
