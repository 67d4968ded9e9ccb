"""What the front decides by itself: which models, prompts and keys it takes, and how errors look."""

import asyncio
from typing import Any

import pytest
from fastapi.exceptions import RequestValidationError

from sparseflow.errors import BadRequest, DiskError
from sparseflow.serving.api_error import ApiError
from sparseflow.serving.app import _of_validation as wrong_field
from sparseflow.serving.config import ServeConfig
from sparseflow.serving.front import Front
from sparseflow.serving.messages import (
    Alive,
    Begun,
    Done,
    Failed,
    Finished,
    Job,
    Piece,
    Ready,
    ScoredToken,
    TokenName,
    pack,
    unpack,
    unpacker,
)
from sparseflow.serving.middleware import KeyCheck
from sparseflow.serving.pool import Pool


@pytest.fixture
def front() -> Front:
    """Of a model with 100 positions, whose tokens are 9 characters at most."""
    pool = Pool(None, 1, 0, 1.0)  # type: ignore[arg-type] # it is never opened
    pool.ready = Ready(1, "small", "exact", 100, 9, False)
    return Front(pool, "nobody", "small")


def test_other_model_is_not_found(front: Front) -> None:
    front.require_model(None)
    front.require_model("small")
    with pytest.raises(ApiError, match="'big' is not served here; ask for 'small'") as refused:
        front.require_model("big")
    assert (refused.value.status, refused.value.param) == (404, "model")


def test_chat_without_a_template_is_refused_with_the_remedy(front: Front) -> None:
    with pytest.raises(ApiError, match=r"use /v1/completions, or put chat_template\.jinja") as refused:
        front.require_chat_template()
    assert (refused.value.status, refused.value.code) == (400, "no_chat_template")


@pytest.mark.parametrize("prompt", ["a" * 900, [1] * 100])
def test_prompt_that_may_fit_is_taken(front: Front, prompt: Any) -> None:
    assert front.fitting([Job(1, prompt=prompt)]) == [Job(1, prompt=prompt)]


@pytest.mark.parametrize("prompt", ["a" * 901, [1] * 101])
def test_prompt_that_cannot_fit_is_refused_before_a_worker_has_it(front: Front, prompt: Any) -> None:
    with pytest.raises(ApiError, match="100 positions; shorten the prompt") as refused:
        front.fitting([Job(1, prompt=prompt)])
    assert (refused.value.status, refused.value.code) == (400, "context_length_exceeded")


@pytest.mark.parametrize("name", ["beams", "messages"])
def test_unknown_field_is_named_once_also_where_another_route_knows_it(name: str) -> None:
    error = wrong_field(RequestValidationError([{"type": "extra_forbidden", "loc": ("body", name), "msg": ""}]))
    assert error.text == f"{name}: not known here; leave it out"
    assert (error.status, error.code, error.param) == (400, "unknown_field", name)


def test_health_says_who_is_missing(front: Front) -> None:
    health = front.health()
    assert health["status"] == "unavailable"
    assert health["weight_server"] == {"name": "nobody", "state": "ServerNotRunning"}
    assert health["workers"] == {"alive": 0, "busy": 0, "wanted": 1}


@pytest.mark.parametrize(
    ("header", "is_known"),
    [
        (b"Bearer one", True),
        (b"bearer two", True),
        ("Bearer ключ".encode(), True),
        (b"Bearer on", False),
        (b"Bearer one ", False),
        (b"one", False),
        (b"Basic one", False),
        (b"", False),
    ],
)
def test_key_is_asked_for_under_v1_alone(header: bytes, is_known: bool) -> None:
    passed: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        passed.append(scope["path"])

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            assert message["status"] == 401

    check = KeyCheck(app, frozenset({"one", "two", "ключ"}))
    for path in ("/v1/models", "/health"):
        scope = {"type": "http", "path": path, "headers": [(b"authorization", header)]}
        asyncio.run(check(scope, None, send))  # type: ignore[arg-type] # nothing is received
    assert passed == (["/v1/models", "/health"] if is_known else ["/health"])


def test_messages_come_out_as_they_went_in() -> None:
    name = TokenName("é", "é".encode())
    token = ScoredToken(name, -0.5, [(name, -0.5)], 3)
    messages = [
        Job(2**62, 3, prompt=[1, 2], stop=["a"], logit_bias={7: -1.5}, seed=-(2**63)),
        Begun(1, 2, 0),
        Alive(1),
        Piece(1, "é", [token, ScoredToken(name, None, [], 0)], is_prompt=True),
        Finished(1, "stop", 4),
        Done(1),
        Failed(1, 400, "code", "text"),
    ]
    received = unpacker()
    received.feed(b"".join(map(pack, messages)))
    assert list(map(unpack, received)) == messages


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, "either a STORE or a --server"),
        ({"store": "a", "server": "b"}, "either a STORE or a --server"),
        ({"store": "a", "workers": 0}, "workers=0"),
        ({"store": "a", "queue": -1}, "queue=-1"),
        ({"store": "a", "port": 65536}, "port=65536"),
        ({"store": "a", "step_timeout_s": 0}, "step_timeout_s=0"),
        ({"store": "a", "queue_timeout_s": float("nan")}, "queue_timeout_s=nan"),
        ({"store": "a", "drain_timeout_s": float("inf")}, "drain_timeout_s=inf"),
    ],
)
def test_settings_that_cannot_be_are_refused_by_name(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(BadRequest, match=said):
        ServeConfig(**fields)


def test_keys_are_the_lines_of_their_file(tmp_path: Any) -> None:
    file = tmp_path / "keys"
    config = ServeConfig(store="a", api_key_file=file)
    with pytest.raises(DiskError, match="cannot be read"):
        config.api_keys()
    file.write_text(" one \n\ntwo\n")
    assert config.api_keys() == {"one", "two"}
    file.write_text("\n \n")
    with pytest.raises(BadRequest, match="no key in it"):
        config.api_keys()
    assert ServeConfig(store="a").api_keys() == frozenset()
