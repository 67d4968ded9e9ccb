"""Whatever a file's first bytes say: its tensors lie in it one after the other to its end, or it is refused by name."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from choices import Choices
from hypothesis import strategies as st
from made_json import some_json
from many import a_million, on_a_share, on_some

from sparseflow.errors import ShardCorrupt
from sparseflow.store.shard_format import ALIGNMENT_NBYTES, ELEMENT_NBYTES, TensorSpec, header_bytes, places_in

PATH = Path("neurons/layer-007.safetensors")
SPECS = [TensorSpec("a", "F16", (2, 3)), TensorSpec("sums", "U64", (2,))]
DATA = bytes(sum(spec.nbytes for spec in SPECS))
FILE = header_bytes(SPECS) + DATA
N_USED = len(FILE[: -len(DATA)].rstrip(b" "))  # the rest of the header is padding
TEXTS = ["a", "b", "__metadata__", "dtype", "shape", "data_offsets", *ELEMENT_NBYTES, "F64"]
N_BYTES = 48
DECISIONS = st.binary(min_size=N_BYTES, max_size=N_BYTES)


def require_telling(refusal: str) -> None:
    assert str(PATH) in refusal
    assert "convert the model again" in refusal
    assert len(refusal) < 2000


def check(content: bytes) -> None:
    """Any file."""
    try:
        places = places_in(np.frombuffer(content, np.uint8), PATH)
    except ShardCorrupt as error:
        require_telling(str(error))
        return
    end = 8 + int.from_bytes(content[:8], "little")
    assert end % ALIGNMENT_NBYTES == 0
    for name, place in places.items():
        assert place.spec.name == name
        assert all(type(n) is int and n >= 0 for n in place.spec.shape)
        assert place.offset == end
        end += math.prod(place.spec.shape) * ELEMENT_NBYTES[place.spec.dtype]
    assert end == len(content)


def flipped(choices: Choices) -> bytes:
    """A good file with some bytes of its header set, cut or with some more."""
    content = bytearray(FILE)
    for _ in range(choices.below(6)):
        content[choices.number(2) % N_USED] = choices.number(1)
    n_more = choices.below(80) - 40 if choices.one_in(3) else 0
    return bytes(content[:n_more] if n_more < 0 else content + bytes(n_more))


def edited(choices: Choices) -> bytes:
    """A good header, with other values in some places."""
    header: Any = json.loads(FILE[8:N_USED])
    for _ in range(1 + choices.below(3)):
        name, field = choices.of(["a", "sums", "b", "__metadata__"]), choices.of(["shape", "data_offsets", "dtype", ""])
        value = some_json(choices, TEXTS) if choices.one_in(3) else fitting(choices, field)
        if field and isinstance(header.get(name, {}), dict):
            header[name] = header.get(name, {}) | {field: value}
        else:
            header[name] = value
    return file_of(choices, header, choices.below(64))


def fitting(choices: Choices, field: str) -> Any:
    """A value of the right type, at least."""
    match field:
        case "dtype":
            return choices.of([*ELEMENT_NBYTES])
        case "shape":
            return [choices.below(7) for _ in range(choices.below(4))]
        case "data_offsets":
            return [choices.below(48), choices.below(48)]
    return {}


def made_up(choices: Choices) -> bytes:
    """Any JSON."""
    header = some_json(choices, TEXTS)
    if choices.one_in(2):
        header = {name: some_json(choices, TEXTS) for name in TEXTS[: choices.below(3)]}
    return file_of(choices, header, choices.below(64))


def file_of(choices: Choices, header: Any, n_data: int) -> bytes:
    """A file with that header, mostly padded as ours are and of the length that it says."""
    text = json.dumps(header).encode()
    text += b" " * (choices.number(2) % 5000 if choices.one_in(8) else -(8 + len(text)) % ALIGNMENT_NBYTES)
    length = choices.number(choices.below(9)) if choices.one_in(8) else len(text)
    return length.to_bytes(8, "little") + text + bytes(n_data)


def check_layout(choices: Choices) -> None:
    """What is laid out well is read as it is, and not with a byte more or less."""
    header, end = {}, 0
    for n in range(choices.below(4)):
        dtype, shape = fitting(choices, "dtype"), fitting(choices, "shape")
        start, end = end, end + math.prod(shape) * ELEMENT_NBYTES[dtype]
        header[f"t{n}"] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    n_more = choices.below(19) - 9 if choices.one_in(3) else 0
    content = file_of(Choices(b""), header, max(0, end + n_more))
    check(content)
    if n_more == 0:
        found = [
            {"dtype": place.spec.dtype, "shape": [*place.spec.shape]}
            for place in places_in(np.frombuffer(content, np.uint8), PATH).values()
        ]
        assert found == [{"dtype": tensor["dtype"], "shape": tensor["shape"]} for tensor in header.values()]


def check_some(decisions: bytes) -> None:
    choices = Choices(decisions)
    match choices.below(8):
        case 0 | 1:
            check_layout(choices)
        case 2 | 3:
            check(flipped(choices))
        case 4 | 5:
            check(edited(choices))
        case 6:
            check(made_up(choices))
        case 7:
            check(choices.take(len(decisions)))


def test_any_first_bytes_give_a_layout_inside_the_file_or_a_refusal() -> None:
    on_some(check_some, DECISIONS, n=400)


@a_million
def test_any_first_bytes_give_a_layout_or_a_refusal_a_million_times(round_: int) -> None:
    on_a_share(check_some, round_, DECISIONS)
