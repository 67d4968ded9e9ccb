"""Which model a client gets, and that whatever it expects is answered with an error that fits into a packet."""

import os
from types import SimpleNamespace
from typing import Any

import msgpack
import pytest
from sparseflow_daemon.admission import model_for, require_own

from sparseflow.errors import (
    BadRequest,
    FingerprintMismatch,
    NoSuchModel,
    NotPermitted,
    ProtocolMismatch,
    SparseFlowError,
)
from sparseflow.protocol.codec import decode, encode
from sparseflow.protocol.messages import LAYOUT_VERSION, PROTOCOL_VERSION, Attach, ErrorReply
from sparseflow.protocol.packets import PACKET_NBYTES

IDENTITY = {"protocol": PROTOCOL_VERSION, "layout": LAYOUT_VERSION, "weights": "abc", "dtype": "float16"}


def served(*names: str) -> dict[str, Any]:
    """Models, as far as they are looked at here."""
    return {name: SimpleNamespace(name=name, identity=IDENTITY) for name in names}


def attach(model: str = "", **expected: Any) -> Attach:
    return Attach(1, model, expected)


def test_only_model_needs_no_name() -> None:
    models = served("one")
    assert model_for(attach(), models) is models["one"]
    assert model_for(attach("one"), models) is models["one"]


def test_one_of_several_is_asked_for_by_name() -> None:
    models = served("one", "two")
    assert model_for(attach("two"), models) is models["two"]
    with pytest.raises(NoSuchModel, match="several models are served here; name one of: one, two"):
        model_for(attach(), models)


def test_model_that_is_not_served_is_refused_naming_those_that_are() -> None:
    with pytest.raises(NoSuchModel, match="'three' is not served here; name one of: one, two"):
        model_for(attach("three"), served("two", "one"))


def test_what_is_expected_and_so_is_no_error() -> None:
    assert model_for(attach(**IDENTITY), served("one"))


def test_each_field_that_differs_is_named() -> None:
    with pytest.raises(FingerprintMismatch) as caught:
        model_for(attach(weights="xyz", dtype="float32", layout=LAYOUT_VERSION), served("one"))
    assert "dtype: 'float32' there, 'float16' here; weights: 'xyz' there, 'abc' here" in str(caught.value)
    assert "layout" not in str(caught.value)


def test_field_that_is_not_known_here_differs() -> None:
    with pytest.raises(FingerprintMismatch, match="colour: 'red' there, None here"):
        model_for(attach(colour="red"), served("one"))


@pytest.mark.parametrize("name", ["protocol", "layout"])
def test_other_version_is_a_mismatch_of_protocols(name: str) -> None:
    with pytest.raises(ProtocolMismatch, match=rf"{name}: 99 there, \d here.*install the same SparseFlow"):
        model_for(attach(**{name: 99}, weights="xyz"), served("one"))


EXPECTED: dict[str, bytes] = {
    "long text": msgpack.packb({"dtype": "x" * 150_000}),
    "long bytes": msgpack.packb({"dtype": bytes(100_000)}),
    "long name": msgpack.packb({"x" * 150_000: 1}),
    "many fields": msgpack.packb({f"field {n}": n for n in range(8_000)}),
    "many items": msgpack.packb({"dtype": list(range(40_000))}),
    "lists in lists": b"\x81\xa5dtype" + b"\x91" * 1010 + b"\x90",
    "maps in maps": b"\x81\xa5dtype" + b"\x81\xa1a" * 1010 + b"\x90",
}


@pytest.mark.parametrize("expected", EXPECTED.values(), ids=EXPECTED)
def test_whatever_is_expected_is_refused_with_an_error_that_fits_into_a_packet(expected: bytes) -> None:
    """One that does not, or that cannot be made, would end the server's turn instead of the client's."""
    content = b"\x95\x02\x01\x01\xa0" + expected
    assert len(content) < PACKET_NBYTES
    with pytest.raises((BadRequest, FingerprintMismatch)) as caught:
        model_for(as_attach(content), served("one"))
    assert isinstance(caught.value, SparseFlowError)
    assert len(encode(ErrorReply(0, 1, caught.value.wire_code, str(caught.value)))) <= PACKET_NBYTES


def test_model_with_a_long_name_is_refused_with_an_error_that_fits_into_a_packet() -> None:
    with pytest.raises(NoSuchModel) as caught:
        model_for(attach("\0" * 100_000), served("one"))
    assert len(encode(ErrorReply(0, 1, "no_such_model", str(caught.value)))) <= PACKET_NBYTES


def as_attach(content: bytes) -> Attach:
    message = decode(content)
    assert isinstance(message, Attach)
    return message


def test_own_user_and_root_are_let_in_and_nobody_else() -> None:
    require_own(os.getuid())
    require_own(0)
    other = os.getuid() + 1
    with pytest.raises(NotPermitted, match=f"user {other} may not talk to a server of user {os.getuid()}"):
        require_own(other)
