"""Messages to bytes and back, and what is made of bytes that are no message of ours."""

import ast
import dataclasses
import time
import tracemalloc
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
from message_fields import ALL, NO_INT, OF_OTHER_TYPE, fields_of

from sparseflow.errors import BadRequest, ProtocolMismatch
from sparseflow.protocol import codec, device_messages, messages
from sparseflow.protocol.codec import MOST_NBYTES, Undecodable, decode, encode
from sparseflow.protocol.device_messages import (
    BorrowDense,
    BundlesCopied,
    BundlesRecorded,
    ChildReady,
    CloseSlab,
    CopyBundles,
    LoadRegions,
    OpenSlab,
    PushNeurons,
    RegionsLoaded,
    RegisterDevice,
    ReturnDense,
    SlabClosed,
    SlabOpened,
    UnregisterDevice,
)
from sparseflow.protocol.messages import (
    PROTOCOL_VERSION,
    AcquireNeurons,
    Attach,
    Detach,
    ErrorReply,
    HintNeurons,
    Join,
    ReleaseLeases,
    StatusRequest,
)

each_message = pytest.mark.parametrize("cls", ALL, ids=lambda cls: cls.__name__)

MOST_INT = 2**64 - 1


def parts_of(cls: type[Any]) -> list[Any]:
    """Version, kind and fields of a message, to be spoiled."""
    sample = {int: 7, float: 1.5, bool: True, str: "x", bytes: b"abcd", list[int]: [1], dict[str, Any]: {"a": 1}}
    sample[list[dict[str, Any]]] = [{"name": "a"}]
    return [PROTOCOL_VERSION, cls.KIND, *(sample[hint] for hint in fields_of(cls).values())]


def refused(content: bytes) -> BadRequest | ProtocolMismatch:
    """The error that bytes are refused with, which comes at once."""
    begin = time.monotonic()
    with pytest.raises((BadRequest, ProtocolMismatch)) as caught:
        decode(content)
    assert time.monotonic() - begin < 2
    return caught.value


# --- there and back


@each_message
def test_every_message_comes_back_as_it_was(cls: type[Any]) -> None:
    content = msgpack.packb(parts_of(cls))
    message = decode(content)
    assert type(message) is cls
    assert encode(message) == content


def test_largest_layer_comes_back(rng: np.random.Generator) -> None:
    """All neurons of 65,536 are asked for, and many leases released beside them."""
    ids = np.arange(1 << 16, dtype="<u4").tobytes()
    request = AcquireNeurons(MOST_INT, MOST_INT, 95, ids, rng.integers(0, 2**63, 10_000).tolist(), 60.0, True)
    assert decode(encode(request)) == request


# --- the bytes themselves

# kind: name, fields. A change of one is another PROTOCOL_VERSION; a new kind is refused by peers that do not know it.
WIRE = {
    1: ("Attach", "pid model expected"),
    2: ("Detach", ""),
    3: ("AcquireNeurons", "request_id epoch layer ids released timeout_s keep"),
    4: ("HintNeurons", "epoch layer ids"),
    5: ("ReleaseLeases", "epoch released"),
    6: ("StatusRequest", "request_id"),
    7: ("Join", "epoch session"),
    8: ("RegisterDevice", "request_id epoch slab"),
    9: ("UnregisterDevice", "request_id epoch"),
    10: ("PushNeurons", "request_id epoch layer ids places released timeout_s"),
    11: ("BorrowDense", "request_id epoch device_uuid"),
    12: ("ReturnDense", "request_id epoch"),
    17: (
        "Welcome",
        "epoch session server_pid model profile identity regions is_resident n_slots fetch_limit layer_s scattered_s "
        "io disk_bytes_per_s strategy",
    ),
    18: ("Detached", "epoch"),
    19: ("NeuronsReady", "request_id epoch slots counts"),
    20: ("StatusReply", "request_id epoch content"),
    21: ("ErrorReply", "request_id epoch code text"),
    22: ("NeuronsLeased", "request_id epoch slots missing counts"),
    23: ("DeviceRegistered", "request_id epoch event"),
    24: ("DeviceUnregistered", "request_id epoch"),
    25: ("NeuronsPushed", "request_id epoch counts"),
    26: ("DenseLent", "request_id epoch slab offsets"),
    27: ("DenseReturned", "request_id epoch"),
    28: ("ServerEnds", "epoch"),
    32: ("OpenSlab", "request_id slab ticket model n_slots slot_nbytes"),
    33: ("CopyBundles", "request_id slab slots places"),
    34: ("CloseSlab", "request_id slab"),
    35: ("LoadRegions", "request_id model regions"),
    48: ("ChildReady", "device_name device_uuid"),
    49: ("SlabOpened", "request_id event"),
    50: ("BundlesRecorded", "request_id"),
    51: ("BundlesCopied", "request_id"),
    52: ("SlabClosed", "request_id"),
    53: ("RegionsLoaded", "request_id slab offsets"),
}


def test_kinds_and_fields_of_version_2_are_these() -> None:
    assert PROTOCOL_VERSION == 2
    assert {cls.KIND: (cls.__name__, " ".join(fields_of(cls))) for cls in ALL} == WIRE


def test_bytes_of_a_request_are_these() -> None:
    request = AcquireNeurons(
        request_id=300,
        epoch=2**63,
        layer=5,
        ids=np.array([1, 258], "<u4").tobytes(),
        released=[299, 7],
        timeout_s=1.5,
        keep=False,
    )
    assert encode(request) == bytes.fromhex(
        "99"  # nine parts
        "02 03"  # version, kind
        "cd012c"  # request_id
        "cf8000000000000000"  # epoch
        "05"  # layer
        "c408 01000000 02010000"  # ids
        "92 cd012b 07"  # released
        "cb3ff8000000000000"  # timeout_s
        "c2"  # keep
    )


def test_bytes_of_a_reply_are_these() -> None:
    assert encode(ErrorReply(1, 2, "resync", "é")) == bytes.fromhex("96 02 15 01 02 a6") + b"resync" + b"\xa2\xc3\xa9"
    assert encode(Detach()) == bytes.fromhex("920202")


# --- the registry


def test_every_message_of_the_module_is_in_the_union() -> None:
    names = vars(messages) | vars(device_messages)
    defined = {cls for cls in names.values() if dataclasses.is_dataclass(cls)}
    assert defined == set(ALL)


def test_kinds_are_unique_and_tell_who_receives_them() -> None:
    kinds = [cls.KIND for cls in ALL]
    assert len(set(kinds)) == len(kinds)
    to_server = {Attach, Detach, Join, AcquireNeurons, HintNeurons, ReleaseLeases, StatusRequest}
    to_server |= {RegisterDevice, UnregisterDevice, PushNeurons, BorrowDense, ReturnDense}
    assert {cls for cls in ALL if cls.KIND < 16} == to_server
    assert {cls for cls in ALL if 32 <= cls.KIND < 48} == {OpenSlab, CopyBundles, CloseSlab, LoadRegions}
    of_child = {ChildReady, SlabOpened, BundlesRecorded, BundlesCopied, SlabClosed, RegionsLoaded}
    assert {cls for cls in ALL if cls.KIND >= 48} == of_child


@each_message
def test_message_is_documented_frozen_and_slotted(cls: type[Any]) -> None:
    written = cls.__doc__ or ""
    assert written
    assert not written.startswith(f"{cls.__name__}("), "the docstring that dataclass makes up"
    assert cls.__dataclass_params__.frozen
    assert not hasattr(decode(msgpack.packb(parts_of(cls))), "__dict__")


@each_message
def test_request_id_comes_first_where_there_is_one(cls: type[Any]) -> None:
    """So that it can be read of a message whose other fields cannot."""
    names = list(fields_of(cls))
    assert "request_id" not in names[1:]


# --- what is no message


@each_message
def test_message_that_ends_early_or_late_is_refused(cls: type[Any]) -> None:
    whole = msgpack.packb(parts_of(cls))
    for n in range(len(whole)):
        assert isinstance(refused(whole[:n]), Undecodable)
    assert isinstance(refused(whole + b"\0"), Undecodable)
    assert isinstance(refused(whole + whole), Undecodable)


@each_message
def test_message_with_too_few_or_too_many_fields_is_refused(cls: type[Any]) -> None:
    parts = parts_of(cls)
    for wrong in (parts[:-1], [*parts, 1], [*parts, *parts]):
        if len(wrong) >= 2:
            error = refused(msgpack.packb(wrong))
            assert isinstance(error, Undecodable)
            assert cls.__name__ in str(error)


@pytest.mark.parametrize(
    ("cls", "name"),
    [(cls, name) for cls in ALL for name in fields_of(cls)],
    ids=lambda each: getattr(each, "__name__", each),
)
def test_field_of_another_type_is_refused_and_named(cls: type[Any], name: str) -> None:
    position = 2 + list(fields_of(cls)).index(name)
    for value in OF_OTHER_TYPE[fields_of(cls)[name]]:
        parts = parts_of(cls)
        parts[position] = value
        error = refused(msgpack.packb(parts))
        assert isinstance(error, Undecodable), value
        assert f"{cls.__name__}.{name}" in str(error)


def test_integer_beyond_64_bits_is_refused() -> None:
    """MessagePack has no form for it, so it comes as something else; ours never send it."""
    for value in (float(2**64), 1.8e308, "18446744073709551616"):
        assert isinstance(refused(msgpack.packb([PROTOCOL_VERSION, StatusRequest.KIND, value])), Undecodable)
    with pytest.raises(OverflowError):
        encode(StatusRequest(2**64))


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"\0", b"junk", b"\xff" * 40, b"\xc0", b"\xc1", b"\x80", b"\x90", b"\x91\x02", b"\x93\x02\x01"),
        msgpack.packb({"version": 1, "kind": 2}),
        msgpack.packb([PROTOCOL_VERSION]),
        *(
            msgpack.packb([PROTOCOL_VERSION, kind])
            for kind in (0, 15, 16, 99, -1, 2**63, 2.0, True, "2", b"", None, [2])
        ),
    ],
    ids=lambda content: content.hex() or "nothing",
)
def test_junk_is_refused(content: bytes) -> None:
    assert isinstance(refused(content), Undecodable)


@pytest.mark.parametrize(
    "extension",
    [
        msgpack.packb(msgpack.ExtType(5, b"abc")),
        msgpack.packb(msgpack.Timestamp(1)),
        msgpack.packb(msgpack.Timestamp(1, 5)),
        b"\xd4\x01\x00",  # fixext 1
        b"\xc7\x00\x05",  # ext 8 of nothing
        b"\xc7\x00\xff",  # a timestamp of nothing
        b"\xc9\xff\xff\xff\xff\x05",  # ext 32 that says it is 4 GiB
    ],
    ids=bytes.hex,
)
def test_extension_types_are_refused_wherever_they_stand(extension: bytes) -> None:
    assert isinstance(refused(extension), Undecodable)
    assert isinstance(refused(b"\x92\x02" + extension), Undecodable)
    assert isinstance(refused(b"\x93\x02\x06" + extension), Undecodable)
    assert isinstance(refused(b"\x95\x02\x01\x01\xa1m\x81\xa1a" + extension), Undecodable), "inside a field of Attach"


@pytest.mark.parametrize(
    "field",
    [
        b"\x81\x01\x02",  # keys that are numbers
        b"\x81\x90\x02",  # or lists
        b"\x81\xc0\x02",
        b"\x81\xc4\x01a\x02",  # or bytes
        b"\x81\xa1\xff\x02",  # not UTF-8
        b"\x81\xa3\xed\xa0\x80\x02",  # half of a surrogate pair
    ],
    ids=bytes.hex,
)
def test_key_that_is_no_text_is_refused(field: bytes) -> None:
    assert isinstance(refused(b"\x95\x02\x01\x01\xa1m" + field), Undecodable)


@pytest.mark.parametrize("header", ["ddffffffff", "dfffffffff", "c6ffffffff", "dbffffffff", "dd00010001", "df00010001"])
def test_header_that_promises_more_than_may_come_is_refused_before_memory_is_taken(header: str) -> None:
    """Array, map, bytes, text; also inside a message."""
    for before in ("", "9202", "930206", "95020101a16d81a161"):
        content = bytes.fromhex(before + header)
        tracemalloc.start()
        try:
            assert isinstance(refused(content), Undecodable)
            assert tracemalloc.get_traced_memory()[1] < 1 << 20
        finally:
            tracemalloc.stop()


@pytest.mark.parametrize("header", ["dcffff", "deffff", "dd00010000"])
def test_headers_in_headers_take_little_memory(header: str) -> None:
    """Each promises 65,535 items, and the first of them is the next header."""
    content = bytes.fromhex(header) * 1024
    tracemalloc.start()
    try:
        assert isinstance(refused(content), Undecodable)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 32 << 20, f"{len(content)} bytes took {peak / 2**20:.0f} MiB"


NESTED = {
    "lists": (b"\x91", b"\x90"),
    "maps": (b"\x81\xa1a", b"\x90"),
}
AROUND = {  # what stands before and after; nothing of it is a message
    "version": (b"\x92", b"\x01"),
    "kind": (b"\x92\x02", b""),
    "first field": (b"\x93\x02\x06", b""),
    "later field": (b"\x95\x02\x04\x01\x01", b""),
    "inside a field": (b"\x95\x02\x01\xc0\xa1m\x81\xa1a", b""),
    "field too many": (b"\x93\x02\x02", b""),
    "fields missing": (b"\x93\x02\x03", b""),
}


@pytest.mark.parametrize("nested", NESTED.values(), ids=NESTED)
@pytest.mark.parametrize("around", AROUND.values(), ids=AROUND)
def test_lists_and_maps_in_each_other_are_refused_however_deep(
    around: tuple[bytes, bytes], nested: tuple[bytes, bytes]
) -> None:
    for depth in (10, 100, 500, *range(900, 1030, 10), 1021, 1022, 1023, 1100, 5000, 100_000):
        refused(around[0] + nested[0] * depth + nested[1] + around[1])


@pytest.mark.parametrize("version", [0, 1, PROTOCOL_VERSION + 1, 2**64 - 1, -1, 1.5, "1", b"\x01", None, [], [1], {}])
def test_other_version_is_a_mismatch_whatever_follows(version: Any) -> None:
    for rest in ([2], [999, "anything"], [None], [[], {}, b""]):
        error = refused(msgpack.packb([version, *rest]))
        assert isinstance(error, ProtocolMismatch)
        assert repr(version) in str(error)
        assert f"{PROTOCOL_VERSION} here" in str(error)


@pytest.mark.parametrize("version", [float(PROTOCOL_VERSION)])
def test_version_that_only_equals_ours_is_refused(version: Any) -> None:
    refused(msgpack.packb([version, Detach.KIND]))


def test_message_that_is_too_large_is_refused_before_it_is_read() -> None:
    request = HintNeurons(1, 2, bytes(MOST_NBYTES))
    content = encode(request)
    error = refused(content)
    assert isinstance(error, Undecodable)
    assert str(MOST_NBYTES) in str(error)
    fits = HintNeurons(1, 2, bytes(MOST_NBYTES - (len(content) - MOST_NBYTES)))
    assert len(encode(fits)) == MOST_NBYTES
    assert decode(encode(fits)) == fits


@pytest.mark.parametrize("filler", [b"\0" * 1_000_000, "x" * 1_000_000, ["x" * 100] * 9_000, {"x" * 500_000: 1}])
def test_error_is_short_however_long_what_is_wrong(filler: Any) -> None:
    """It is sent back as a reply, which must be taken."""
    for parts in (
        [filler, 2],
        [PROTOCOL_VERSION, filler],
        [PROTOCOL_VERSION, 6, filler],
        [PROTOCOL_VERSION, 21, 1, filler, "", ""],
    ):
        error = refused(msgpack.packb(parts))
        reply = encode(ErrorReply(0, 1, "bad_request", str(error)))
        assert len(reply) < 2000


# --- whose request it was


def test_request_id_of_a_spoiled_request_is_kept() -> None:
    whole = [PROTOCOL_VERSION, AcquireNeurons.KIND, 4711, 1, 2, b"", [], 1.0, True]
    for position in range(3, len(whole)):
        error = refused(msgpack.packb([*whole[:position], None, *whole[position + 1 :]]))
        assert isinstance(error, Undecodable)
        assert error.request_id == 4711
    for wrong in (whole[:3], whole[:-1], [*whole, 1]):
        error = refused(msgpack.packb(wrong))
        assert isinstance(error, Undecodable)
        assert error.request_id == 4711


@pytest.mark.parametrize(
    "parts",
    [
        [PROTOCOL_VERSION, AcquireNeurons.KIND],
        *([PROTOCOL_VERSION, AcquireNeurons.KIND, first, 1] for first in NO_INT),
        [PROTOCOL_VERSION, HintNeurons.KIND, 4711],  # its first field is the epoch
        [PROTOCOL_VERSION, ReleaseLeases.KIND, 4711],
        [PROTOCOL_VERSION, Attach.KIND, 4711, 0],
        [PROTOCOL_VERSION, 99, 4711],
        4711,
    ],
    ids=repr,
)
def test_request_id_is_0_where_none_can_be_read(parts: Any) -> None:
    error = refused(msgpack.packb(parts))
    assert isinstance(error, Undecodable)
    assert error.request_id == 0


# --- what it is made of


def test_codec_takes_nothing_but_the_standard_library_and_msgpack() -> None:
    for module in (codec, messages, device_messages):
        tree = ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8"))
        names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        names |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        allowed = {"collections", "dataclasses", "math", "typing", "msgpack", "sparseflow"}
        assert {name.split(".")[0] for name in names} <= allowed
