"""Weights, codes and settings by somebody hostile: refused where a kernel would read elsewhere, or skip wrongly.

What no check can find: weights, or codes of finite numbers, that say something else than a model was trained to.
"""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forged_stores import edit_json, forge, overwrite, relist
from opt_family import random_ids
from transformers import OPTConfig

from sparseflow import DiskWeightStore, SparseOPTForCausalLM
from sparseflow.core.tensor_views import predictor_specs, predictors_by_layer, view_tensors
from sparseflow.errors import ShardCorrupt, SparseFlowError
from sparseflow.store.manifest import DENSE_NAME, Manifest, predictor_name, shard_name
from sparseflow.store.shard_format import ELEMENT_NBYTES, TensorFileWriter, TensorPlace, TensorSpec, read_places

BIAS = "model.decoder.layers.1.fc1.bias"
GENERATION = "generation_config.json"
NAN, INF = float("nan"), float("inf")


@pytest.fixture
def store(family_store: Callable[..., Path], tmp_path: Path) -> Path:
    """A store to be changed, in a folder of its own."""
    return Path(shutil.copytree(family_store("base"), tmp_path / "store"))


def opened(store: Path, **how: Any) -> SparseOPTForCausalLM:
    return SparseOPTForCausalLM.from_pretrained(store, **how)


def refusal(store: Path, *, remedy: str = "convert the model again", **how: Any) -> str:
    with pytest.raises(SparseFlowError) as caught:
        opened(store, **how).close()
    assert remedy in str(caught.value)
    assert len(str(caught.value)) < 2000
    return str(caught.value)


# --- codes

WRONG_CODES = [
    *[(part, value) for part in ("scales", "norms", "dither") for value in (NAN, -INF)],
    *[(f"{plane}_error_norms", value) for plane in ("coarse", "fine") for value in (NAN, -INF, -1.0)],
    ("scales", INF),
    ("scales", -1e-30),
    ("norms", -1.0),
    ("dither", INF),
    ("dither", 8.0),
    ("dither", -8.1),
]


@pytest.mark.parametrize(("part", "value"), WRONG_CODES)
@pytest.mark.parametrize("index", [0, 63])
def test_code_in_which_no_bound_holds_is_named(part: str, value: float, index: int, store: Path) -> None:
    overwrite(store, predictor_name(1), part, index, np.float32(value))
    for fidelity in ("exact", "certified"):
        assert f"{predictor_name(1)}: {part} from" in refusal(store, fidelity=fidelity)


@pytest.mark.parametrize(("part", "value"), WRONG_CODES[::4])
def test_client_looks_at_the_codes_that_a_server_has_loaded(part: str, value: float, store: Path) -> None:
    overwrite(store, predictor_name(1), part, 3, np.float32(value))
    manifest = Manifest.load(store)

    def served(name: str, *expected: Any) -> dict[str, torch.Tensor]:
        return view_tensors(bytearray((store / name).read_bytes()), Path(name), *expected)

    with pytest.raises(ShardCorrupt, match=f"{predictor_name(1)}: {part} from"):
        predictors_by_layer(manifest.profile, manifest.files, served)


@pytest.mark.parametrize("fidelity", ["exact", "certified"])
def test_infinite_norms_cost_time_and_no_neuron(fidelity: str, store: Path, family_store: Callable[..., Path]) -> None:
    """They are where float32 ends: a bound that rests on one is infinite or NaN, and its neuron a candidate."""
    parts = ("norms", "coarse_error_norms", "fine_error_norms")
    for part in parts:
        for neuron in range(0, 256, 3):
            overwrite(store, predictor_name(0), part, neuron, np.float32(INF))
    logits = []
    for path in (store, family_store("base")):
        model = opened(path, fidelity=fidelity)
        model.coordinator.audit_every = 1
        with torch.no_grad():
            logits.append(model(random_ids(model.config, 1, 12)).logits)
        assert model.stats.prefill.missed == 0
        model.close()
    assert torch.allclose(*logits, atol=1e-5)


def test_dither_may_be_all_that_is_drawn(store: Path) -> None:
    for index, value in enumerate((-8.0, 8.0 - 2.0**-20, 0.0)):
        overwrite(store, predictor_name(0), "dither", index, np.float32(value))
    with DiskWeightStore(store).initialize_from_pretrained() as source:
        source.predictor_tensors()


# --- layouts


def rewritten(store: Path, name: str, change: Callable[[list[TensorSpec]], list[TensorSpec]]) -> None:
    """Write a file anew with other tensors, zeros where there were none."""
    old: dict[str, TensorPlace] = read_places(store / name)
    content = (store / name).read_bytes()
    specs = change([place.spec for place in old.values()])
    with TensorFileWriter(store / name, specs) as writer:
        for spec in specs:
            place = old.get(spec.name)
            kept = b"" if place is None else content[place.offset : place.offset + place.spec.nbytes]
            writer.write(np.frombuffer(kept.ljust(spec.nbytes, b"\0")[: spec.nbytes], np.uint8))
        writer.finish()
    relist(store, name)


def with_tensor(name: str, **changes: Any) -> Callable[[list[TensorSpec]], list[TensorSpec]]:
    def change(specs: list[TensorSpec]) -> list[TensorSpec]:
        return [
            TensorSpec(name, changes.get("dtype", spec.dtype), changes.get("shape", spec.shape))
            if spec.name == name
            else spec
            for spec in specs
        ]

    return change


@pytest.mark.parametrize("shape", [(255,), (1,), (0,), (512,), (256, 1), ()])
def test_bias_of_another_shape_is_refused(shape: tuple[int, ...], store: Path) -> None:
    rewritten(store, DENSE_NAME, with_tensor(BIAS, shape=shape))
    with pytest.raises(SparseFlowError, match=re.escape("fc1.bias")):
        opened(store).close()


@pytest.mark.parametrize("dtype", [dtype for dtype in ELEMENT_NBYTES if dtype != "F32"])
@pytest.mark.parametrize("name", [BIAS, "model.decoder.layers.0.self_attn.qkv_weight"])
def test_dense_weight_of_another_dtype_is_refused(name: str, dtype: str, store: Path) -> None:
    rewritten(store, DENSE_NAME, with_tensor(name, dtype=dtype))
    assert name in refusal(store, remedy="")


def test_dense_weight_that_is_missing_or_too_much_is_refused(store: Path) -> None:
    rewritten(store, DENSE_NAME, lambda specs: [spec for spec in specs if spec.name != BIAS])
    assert BIAS in refusal(store, remedy="convert it again")
    rewritten(store, DENSE_NAME, lambda specs: [*specs, TensorSpec("model.more", "F32", (3,))])
    assert "model.more" in refusal(store, remedy="convert it again")


@pytest.mark.parametrize("part", ["scales", "coarse"])
def test_codes_of_a_layout_of_the_same_size_are_refused(part: str, store: Path) -> None:
    place = read_places(store / predictor_name(0))[part]
    rewritten(store, predictor_name(0), with_tensor(part, shape=place.spec.shape[::-1]))
    assert f"{predictor_name(0)}: not laid out" in refusal(store)


def test_shard_of_a_layout_of_the_same_size_is_refused(store: Path) -> None:
    rewritten(store, shard_name(0), with_tensor("bundles", shape=(256, 64, 2)))
    assert shard_name(0) in refusal(store)


def test_shard_with_another_header_before_its_data_is_refused(store: Path) -> None:
    """Bundles would be read from where those of other layers begin."""
    content = (store / shard_name(0)).read_bytes()
    length = int.from_bytes(content[:8], "little")
    longer = (length + 4096).to_bytes(8, "little") + content[8 : 8 + length] + b" " * 4096 + content[8 + length :]
    (store / shard_name(0)).write_bytes(longer)
    relist(store, shard_name(0))
    assert shard_name(0) in refusal(store)


# --- settings


CONFIGURATIONS: dict[str, tuple[dict[str, Any], str]] = {
    "fewer neurons": ({"ffn_dim": 100}, "of other sizes"),
    "more neurons": ({"ffn_dim": 2**40}, "ffn_dim is"),
    "wider": ({"hidden_size": 128}, "of other sizes"),
    "many layers": ({"num_hidden_layers": 10**5}, "of other sizes"),
    "a vocabulary out of all reason": ({"vocab_size": 2**60}, "vocab_size is"),
    "positions out of all reason": ({"max_position_embeddings": 2**60}, "max_position_embeddings is"),
    "layers are true": ({"num_hidden_layers": True}, "num_hidden_layers"),
    "neurons are a text": ({"ffn_dim": "256"}, "ffn_dim"),
    "another network": ({"model_type": "llama"}, "model_type"),
    "another activation": ({"activation_function": "gelu"}, "activation_function"),
    "a projection out of all reason": ({"word_embed_proj_dim": 2**60}, "word_embed_proj_dim"),
    "padding by no token": ({"pad_token_id": 10**6}, "pad_token_id is 1000000"),
    "padding by a list": ({"pad_token_id": [1]}, "pad_token_id"),
}


@pytest.mark.parametrize(("change", "named"), CONFIGURATIONS.values(), ids=CONFIGURATIONS)
def test_configuration_of_another_network_is_refused(change: dict[str, Any], named: str, store: Path) -> None:
    edit_json(store, "config.json", lambda content: content.update(change))
    assert named in refusal(store, remedy="")


@pytest.mark.parametrize(
    "change",
    [
        {"num_labels": 10**5, "id2label": None},
        {"attn_implementation": "somebody/kernels"},
        {"_attn_implementation": "somebody/kernels", "_attn_implementation_internal": "somebody/kernels"},
        {"auto_map": {"AutoConfig": "x.Config", "AutoModelForCausalLM": "x.Model"}},
        {"to_dict": 1, "quantization_config": {"quant_method": "gptq"}, "is_decoder": [], "x" * 10**5: 1},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_configures_no_network_has_no_effect(change: dict[str, Any], store: Path) -> None:
    edit_json(store, "config.json", lambda content: content.update(change))
    model = opened(store)
    assert model.config.get_text_config()._attn_implementation == "sdpa"
    assert len(model.config.id2label or {}) <= 2
    model.close()


NO_JSON = [b"", b"null", b"[]", b"\xff", b"{", b"[" * 100_000, b'"config"', b"NaN"]


@pytest.mark.parametrize("content", NO_JSON, ids=lambda content: repr(content[:9]))
@pytest.mark.parametrize("name", ["config.json", GENERATION])
def test_settings_that_are_none_are_named(name: str, content: bytes, store: Path) -> None:
    (store / name).write_bytes(content)
    relist(store, name)
    assert name in refusal(store)


@pytest.mark.parametrize("content", NO_JSON, ids=lambda content: repr(content[:9]))
def test_settings_that_are_none_cannot_be_compared_with_those_given(content: bytes, store: Path) -> None:
    (store / "config.json").write_bytes(content)
    relist(store, "config.json")
    with pytest.raises(ShardCorrupt, match=re.escape("config.json")):
        DiskWeightStore(store).initialize_from_pretrained(OPTConfig())


@pytest.mark.parametrize(
    "change",
    [{"max_new_tokens": "many"}, {"max_new_tokens": -1}, {"cache_implementation": [1]}, {"watermarking_config": 7}],
    ids=str,
)
def test_generation_settings_that_cannot_be_are_named(change: dict[str, Any], store: Path) -> None:
    edit_json(store, GENERATION, lambda content: content.update(change))
    assert GENERATION in refusal(store)


@pytest.mark.parametrize("most", ["many", -1])
def test_generation_settings_of_the_configuration_are_named_where_they_are_all(most: object, store: Path) -> None:
    forge(store, lambda content: content["files"].pop(GENERATION))
    edit_json(store, "config.json", lambda content: content.update(max_new_tokens=most))
    refusal(store, remedy="config.json: ")


def test_specs_of_codes_are_those_of_the_profile(store: Path) -> None:
    profile = Manifest.load(store).profile
    assert [place.spec for place in read_places(store / predictor_name(0)).values()] == predictor_specs(profile)
    assert json.loads((store / "config.json").read_bytes())["ffn_dim"] == profile.ffn_dimension
