"""The tables of the pages about store, protocol and memory say what the code says."""

import dataclasses
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
from pages import PROTOCOL, STORE, TUNING, blocks, column, names, prose_of, rows, text_of
from sparseflow_daemon import admission, leasing, lines, served_model
from sparseflow_daemon.config import ServerConfig
from sparseflow_daemon.gpu import pushing

from sparseflow import errors
from sparseflow.client import attachment, device_push, lent_dense, line, weight_client
from sparseflow.core import weight_source
from sparseflow.core.config import profile_of
from sparseflow.core.dense_layout import dense_tensors
from sparseflow.engine import memory_plan, shared_memory
from sparseflow.orchestration.device import slots
from sparseflow.protocol import codec, packets, run_directory
from sparseflow.protocol.inquiry import ask_status
from sparseflow.protocol.messages import LAYOUT_VERSION, PROTOCOL_VERSION, TOLD_COUNTS, Message
from sparseflow.protocol.session_counters import COUNTERS_NBYTES
from sparseflow.store import calibration, codes, manifest, shard_format, stored_files
from sparseflow.store.profile import ModelProfile
from sparseflow.utils.sizes import format_size


def fields(cls: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(cls)]


# --- the store


@pytest.fixture(scope="module")
def stored(calibrated_demo_store: Path) -> dict[str, Any]:
    """A manifest."""
    found: dict[str, Any] = json.loads((calibrated_demo_store / "manifest.json").read_bytes())
    return found


def test_every_field_of_the_manifest_is_explained(stored: dict[str, Any]) -> None:
    assert set(column(STORE, "| field | |")) - set(fields(calibration.Calibration)) == set(stored) - {"version"}
    assert (
        set(column(STORE, "| field of `profile` |")) - {"profile"}
        == set(fields(ModelProfile))
        == set(stored["profile"])
    )
    in_text = {row[0]: names(row[1]) for row in rows(STORE, "| field | |")}
    assert set(in_text["`files`"]) == set(fields(shard_format.FileEntry))
    assert set(in_text["`source`"]) == set(stored["source"])
    assert set(in_text["`fingerprint`"]) == set(stored["fingerprint"])


def test_every_field_of_a_calibration_is_explained(calibrated_demo_store: Path) -> None:
    explained = column(STORE, "| field | |")
    assert set(fields(calibration.Calibration)) <= set(explained)
    assert column(STORE, "| field of a layer |") == fields(calibration.LayerRecord)
    assert column(STORE, "| field of a predictor |") == fields(calibration.PredictorRecord)
    in_text = {row[0]: names(row[1]) for row in rows(STORE, "| field of a layer |")}
    assert in_text["`predictors`"] == [*calibration.KINDS]
    assert in_text["`lookahead`"] == fields(calibration.LookaheadRecord)
    places = shard_format.read_places(calibrated_demo_store / calibration.calibrated_name(2))
    fitted = {name: place.spec.dtype for name, place in places.items()}
    kinds = {"svd": ["spread"], "trained": ["spread"], "lookahead0": [], "lookahead1": [], "lookahead2": []}
    dtypes = {"down": "F16", "up": "F16", "bias": "F32", "spread": "F32"}
    assert fitted == {f"{kind}.{part}": dtypes[part] for kind in kinds for part in ("down", "up", "bias", *kinds[kind])}


def test_every_file_of_a_store_has_its_line(stored: dict[str, Any]) -> None:
    told = " ".join(column(STORE, "| path |"))
    for name in stored["files"]:
        assert re.sub(r"-\d{3}\.", "-NNN.", name) in told or name.startswith("tokenizer"), name


def test_codes_are_listed_in_their_order_and_types() -> None:
    shown = [(names(row[0])[0], row[1]) for row in rows(STORE, "| tensor |")]
    assert shown == [(spec.name, spec.dtype) for spec in codes.code_specs(3072, 768)]


def test_byte_maps_are_those_of_the_demo_model(calibrated_demo_store: Path) -> None:
    path = calibrated_demo_store / manifest.shard_name(3)
    places = shard_format.read_places(path)
    (drawn,) = [block.code for block in blocks(STORE, "text") if "bundle id" in block.code]
    assert f"4096 + {places['bundles'].spec.nbytes}" in drawn
    assert places["bundles"].offset == 4096
    assert f" {path.stat().st_size}\n" in drawn


def test_limits_of_the_format_are_as_said() -> None:
    page = " ".join(prose_of(STORE).split())
    assert f"`format_version` is {manifest.FORMAT_VERSION}:" in page
    assert {"`format_version`": str(manifest.FORMAT_VERSION)}.items() <= {
        r[0]: r[1] for r in rows(STORE, "| field |")
    }.items()
    assert f"at most {manifest._MANIFEST_LIMIT_NBYTES >> 20} MiB" in page
    assert f"at most {shard_format.HEADER_LIMIT_NBYTES >> 20} MiB" in page
    assert f"at most {shard_format._MOST_DIMENSIONS} dimensions" in page
    assert f"multiple of {shard_format.ALIGNMENT_NBYTES}" in page
    assert f"One of {stored_files._HOLES_FROM_NBYTES >> 20} MiB or more" in page
    assert stored_files._HOLES_SHARE == 16  # "less than a sixteenth"
    assert f"over {codes.STEP_LIMIT}" in page
    assert codes.GROUP == 128


# --- the protocol


def test_every_message_is_listed_with_its_kind_and_fields() -> None:
    heads = ("| kind | message | fields | answered by |", "| kind | message | fields | |")
    shown = {names(row[1])[0]: (int(row[0]), names(row[2])) for head in heads for row in rows(PROTOCOL, head)}
    assert shown == {cls.__name__: (cls.KIND, fields(cls)) for cls in get_args(Message)}


def test_answers_to_requests_are_those_that_their_docstrings_name() -> None:
    for row in rows(PROTOCOL, "| kind | message | fields | answered by |"):
        (cls,) = [cls for cls in get_args(Message) if cls.__name__ == names(row[1])[0]]
        for answer in re.findall(r"[A-Z]\w+", row[3]):
            assert answer in cls.__doc__, cls


def test_every_wire_code_has_its_line() -> None:
    assert set(column(PROTOCOL, "| code |")) == {cls.wire_code for cls in errors._OF_WIRE_CODE.values()}


def test_versions_and_limits_of_the_protocol_are_as_said() -> None:
    shown = [row[0] for row in rows(PROTOCOL, "| limit |")]
    assert shown == [
        f"{codec.MOST_NBYTES >> 20} MiB",
        f"{packets.PACKET_NBYTES >> 10} KiB",
        f"{packets._MOST_DESCRIPTORS}",
        f"{codec._MOST_ITEMS:,}",
        f"{served_model._MOST_IDS:,}",
        f"{lines._MOST_LINES}",
        f"{leasing._MOST_WAITING}",
    ]
    assert pushing._MOST_PUSHES == leasing._MOST_WAITING
    page = " ".join(text_of(PROTOCOL).split())
    assert f"The protocol is version {PROTOCOL_VERSION}, the layout of memory version {LAYOUT_VERSION}" in page
    assert ", ".join(TOLD_COUNTS) in page
    assert f"at most {run_directory._LONGEST_SOCKET_PATH} bytes" in page
    (drawn,) = [block.code for block in blocks(PROTOCOL, "text") if block.code.startswith("counters")]
    assert f" {COUNTERS_NBYTES}\n" in drawn
    assert shared_memory._F_SEAL_FUTURE_WRITE == 0x10  # what "sealed against writing by anybody else" means


def test_deadlines_are_those_of_the_code() -> None:
    default = ServerConfig(stores=(Path(),))
    shown = [float(row[1]) for row in rows(PROTOCOL, "| wait |")]
    assert ask_status.__defaults__ is not None
    assert shown == [
        weight_client.LOAD_TIMEOUT_S,
        ask_status.__defaults__[0],
        line._SEND_TIMEOUT_S,
        weight_source.FETCH_TIMEOUT_S,
        weight_client.RECONNECT_TIMEOUT_S,
        attachment._DETACH_TIMEOUT_S,
        admission._GREETING_TIMEOUT_S,
        default.drain_timeout_s,
        default.gpu_timeout_s,
        device_push.PUSH_TIMEOUT_S,
        lent_dense.BORROW_TIMEOUT_S,
    ]
    assert device_push.REGISTER_TIMEOUT_S == device_push.PUSH_TIMEOUT_S


# --- memory

# hidden, ffn_dim, layers, heads, width of the embeddings: as published (Zhang et al. 2022, the checkpoints' configs)
OPT = {
    "OPT-125M": (768, 3072, 12, 12, 768),
    "OPT-350M": (1024, 4096, 24, 16, 512),
    "OPT-1.3B": (2048, 8192, 24, 32, 2048),
    "OPT-2.7B": (2560, 10240, 32, 32, 2560),
    "OPT-6.7B": (4096, 16384, 32, 32, 4096),
    "OPT-13B": (5120, 20480, 40, 40, 5120),
    "OPT-30B": (7168, 28672, 48, 56, 7168),
    "OPT-66B": (9216, 36864, 64, 72, 9216),
}


@pytest.mark.parametrize("name", OPT)
def test_memory_of_a_published_size_is_what_the_plan_asks_for(name: str) -> None:
    from transformers import OPTConfig

    hidden, ffn, n_layers, heads, embedding = OPT[name]
    config = OPTConfig(hidden_size=hidden, ffn_dim=ffn, num_hidden_layers=n_layers, num_attention_heads=heads,
                       word_embed_proj_dim=embedding, vocab_size=50272, max_position_embeddings=2048,
                       do_layer_norm_before=name != "OPT-350M")  # fmt: skip
    profile = profile_of(config, "float16", name)
    checkpoint: Any = type("Checkpoint", (SimpleNamespace,), {"__contains__": lambda self, name: False})(config=config)
    dense = shard_format.file_nbytes([tensor.spec for tensor in dense_tensors(checkpoint, profile)])
    coded = shard_format.file_nbytes(codes.code_specs(ffn, hidden))
    shard = shard_format.file_nbytes(shard_format.shard_specs(ffn, hidden, "float16"))
    files = {"dense.safetensors": shard_format.FileEntry(dense, "")}
    for layer in range(n_layers):
        files[manifest.predictor_name(layer)] = shard_format.FileEntry(coded, "")
        files[manifest.shard_name(layer)] = shard_format.FileEntry(shard, "")
    of_store = manifest.Manifest(profile, files, {})
    all_in_memory = memory_plan.fixed_nbytes(of_store) + n_layers * shard
    n_bundles = n_layers * ffn
    slot = profile.bundle_nbytes + memory_plan._SLOT_TABLES_NBYTES
    plan = memory_plan.plan_memory(Path(name), of_store, all_in_memory, cpu_cache_ratio=0.2)
    base = memory_plan.fixed_nbytes(of_store) + plan.buffers_nbytes
    least = base + math.ceil(memory_plan.LEAST_SHARE * n_bundles) * slot
    assert memory_plan.plan_memory(Path(name), of_store, least).n_slots is not None
    with pytest.raises(errors.NotEnoughMemory):
        memory_plan.plan_memory(Path(name), of_store, least - 1)
    (shown,) = [row[1:] for row in rows(TUNING, "| | bundle, bytes |") if row[0] == name]
    sizes = [dense, n_layers * coded, profile.neurons_nbytes, all_in_memory, least, base + int(0.2 * n_bundles) * slot]
    context = 2 * n_layers * profile.part_nbytes
    assert shown == [str(profile.bundle_nbytes), *map(format_size, sizes), format_size(context)]


def test_memory_of_a_device_is_divided_as_said() -> None:
    (drawn,) = [" ".join(block.code.split()) for block in blocks(TUNING, "text") if "device memory =" in block.code]
    assert f"{slots.CONTEXT_NBYTES >> 20} MiB context" in drawn
    assert f"{slots.KEPT_TOKENS} tokens of keys and values" in drawn
    assert f"{slots.ACTIVATIONS_NBYTES >> 20} MiB activations" in drawn
    assert f"{2 * slots.DENSE_PART_NBYTES >> 20} MiB parts" in drawn
    assert f"less than 1/{1 / slots.LEAST_SHARE:g} of the neurons" in " ".join(text_of(TUNING).split())
