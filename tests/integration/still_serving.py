"""What is asked of a server in trouble: whether it still serves, says why not, and has refused what it was told."""

import re

import numpy as np
import pytest
from numpy.typing import NDArray
from processes import ServerProcess
from raw_peers import Connection
from served_shards import ServedShards

from sparseflow.client.weight_client import WeightClient
from sparseflow.core.weight_source import HostBundles
from sparseflow.errors import DiskError
from sparseflow.protocol.messages import ErrorReply

SHARE = 12  # of a session


def assert_serves(server: ServerProcess, shards: ServedShards) -> None:
    """Somebody else attaches, fetches, and gets what is asked for; and nothing is amiss."""
    ids = np.arange(3, 3 + SHARE, dtype=np.uint32)
    with WeightClient("s") as client, client.fetch(1, ids) as fetch:
        assert np.array_equal(content(fetch.wait(10)), shards.content(1, ids))
    status = server.status()
    assert (status["state"], status["reasons"]) == ("ready", [])


def assert_degraded(server: ServerProcess, *parts: str) -> None:
    """It lives, says why its first model is not served, says the same to whoever attaches, and ends well."""
    status = server.wait_for("degraded")
    (reason,), model = status["reasons"], status["models"][0]
    for part in parts:
        assert part in reason
    assert (model["state"], model["error"]) == ("failed", reason)
    with pytest.raises(DiskError, match=re.escape(reason)):
        WeightClient("s", model["name"])
    assert server.end() == 0


def content(bundles: HostBundles) -> NDArray[np.uint8]:
    """(n, bundle_nbytes): what the bundles hold."""
    base = bundles.base.view(len(bundles.base), -1).numpy().view(np.uint8)
    found: NDArray[np.uint8] = base[bundles.slots]
    return found


def neurons(*ids: int) -> bytes:
    """As they travel."""
    return np.array(ids, "<u4").tobytes()


def refused(peer: Connection, *codes: str, request_id: int = 0) -> ErrorReply:
    """The next reply, which is an error."""
    refusal = peer.receive()
    assert isinstance(refusal, ErrorReply), refusal
    assert refusal.code in codes, refusal
    assert refusal.request_id == request_id
    assert refusal.text
    return refusal
