#!/usr/bin/env python3
"""Make an OPT of a published shape with random weights whose neurons fire as unevenly as trained ones.

    python scripts/make_synthetic_opt.py --preset opt-6.7b --out /tmp/opt-6.7b --store

writes a store; without --store, a transformers folder. In each layer the neuron of rank r fires for a share
min(0.95, c/r) of random tokens. Ranks are dealt at random, and c makes the layer's mean what it shall be: 1 % in the
first layer, 10 % in the last, the same factor from each layer to the next. What held-out tokens then show is printed:
per layer the share of neurons active, and the overlap: of those active for a token, the share that was active for the
token before.

Every matrix is drawn from its name and the seed when it is asked for, so that no more than a layer of the model is ever
in memory, nothing but the result on disk, and a store goes on after a kill. The same arguments give the same bytes on
the same machine with as many threads; elsewhere the biases may differ in their last bits.

    python scripts/make_synthetic_opt.py --preset opt-6.7b --out /dev/shm/opt-6.7b --store --device cuda --calibrate

draws, calibrates and codes on a GPU and writes several files at once: seconds instead of many minutes. Matrices then
come from the GPU's own random numbers, which are others than the CPU's, and may be others on another kind of GPU: the
model is another one with the same statistics. In memory are a few layers.

--calibrate gives the store a profile.json, for `calibrated` fidelity: cuts on its codes, as `sparseflow calibrate
--codes-only` fits them, from tokens that no bias was set by, and statistics of all tokens that passed. These texts are
short; calibrate on a text for texts of hundreds of tokens. A kill after the store is whole leaves it without.
"""

import argparse
import hashlib
import json
import math
import os
import resource
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from tqdm import tqdm
from transformers import GenerationConfig, OPTConfig, OPTModel, PreTrainedTokenizerFast
from transformers.models.opt.modeling_opt import OPTDecoderLayer

from sparseflow.calibration.calibrate import DEFAULT_RECALL, install
from sparseflow.calibration.cuts import RECALLS
from sparseflow.calibration.tensor_records import PlaneScores, code_records, layer_statistics
from sparseflow.core import torch_codes
from sparseflow.core.checkpoint import Checkpoint
from sparseflow.core.config import profile_of
from sparseflow.core.converter import convert
from sparseflow.core.exclusive import exclusive
from sparseflow.errors import BadRequest, DiskError, NotEnoughDisk, SparseFlowError
from sparseflow.kernels.bounds import CodedRows
from sparseflow.orchestration.neuron_predictor import failure_probability
from sparseflow.store import calibration as stored
from sparseflow.store.codes import layer_dither
from sparseflow.store.profile import DTYPE_NBYTES
from sparseflow.store.shard_format import DTYPE_CODES, TensorFileWriter, TensorSpec, file_nbytes
from sparseflow.utils.sizes import format_size

RECIPE_VERSION = 2  # a store half made by another version starts again
FIRST_LAYER_SHARE, LAST_LAYER_SHARE = 0.01, 0.1
HIGHEST_FREQUENCY = 0.95
SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>")
FIRST_ORDINARY_ID = len(SPECIAL_TOKENS)

# Standard deviations and variances, the embedding of a token being 1. What a layer reads is normalised, so each matrix
# that reads it has 1 / sqrt(hidden), which gives queries, keys, values and pre-activations of 1. The residual stream
# ends at about 2.5 however deep the model. More attention makes the tokens of a text more alike: with 8, neighbours
# correlate by 0 in the first layer and by half in the last, and neurons overlap more than by their frequencies alone
# (opt-125m: 0.25 instead of 0.24 in the first layer, 0.54 instead of 0.39 in the last).
POSITION_STD = 0.25  # small: a neuron that fires by position would be another one beyond the calibrated positions
ATTENTION_VARIANCE = 8.0  # of all attention outputs together, if each token attended to one token only
MLP_VARIANCE = 2.0  # of all MLP outputs together
LOGIT_STD = 3.0

SHARD_NBYTES = 5 * 10**9
DRAWN_AT_ONCE = {"cpu": 1 << 20, "cuda": 1 << 24}  # elements: float32 exists for this many only
MOST_WRITERS = 8  # files that a GPU fills at once; each has its bytes of a tensor or two in host memory


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of an OPT with norms before its blocks, a tied head and embeddings as wide as the rest."""

    hidden: int
    ffn: int
    layers: int
    heads: int
    vocab: int = 50272
    positions: int = 2048


PRESETS: Mapping[str, Shape] = {  # as published
    "opt-125m": Shape(768, 3072, 12, 12),
    "opt-1.3b": Shape(2048, 8192, 24, 32),
    "opt-6.7b": Shape(4096, 16384, 32, 32),
    "opt-13b": Shape(5120, 20480, 40, 40),
    "tiny": Shape(128, 512, 4, 4, vocab=2048, positions=256),
}
SHORT_NAMES = {name.removeprefix("opt-"): name for name in PRESETS}


@dataclass(frozen=True, slots=True)
class Recipe:
    """All that decides the weights."""

    shape: Shape
    seed: int = 0
    dtype: str = "float16"
    n_calibration_texts: int = 128  # many: what attention adds is common to a text
    n_heldout_texts: int = 32
    n_text_tokens: int = 32
    device: str = "cpu"  # whose random numbers the matrices are: `cpu` or `cuda`

    @property
    def n_calibration_tokens(self) -> int:
        """Tokens whose pre-activations set the biases; they come before the held-out ones."""
        return self.n_calibration_texts * self.n_text_tokens

    def generator(self, purpose: str, device: str = "cpu") -> torch.Generator:
        """Random numbers that depend on nothing but the seed, what they are for, and the device."""
        digest = hashlib.blake2b(f"{self.seed}/{purpose}".encode(), digest_size=8).digest()
        return torch.Generator(device).manual_seed(int.from_bytes(digest, "little"))

    def token_ids(self) -> Tensor:
        """(texts, tokens) int64: the calibration texts, then the held-out ones."""
        size = (self.n_calibration_texts + self.n_heldout_texts, self.n_text_tokens)
        return torch.randint(FIRST_ORDINARY_ID, self.shape.vocab, size, generator=self.generator("texts"))


@dataclass(frozen=True, slots=True)
class LayerActivity:
    """What one layer was to do, and what held-out tokens show. Shares from 0 to 1."""

    target_share: float
    active_share: float
    overlap: float  # of the neurons active for a token, those also active for the one before


@dataclass(frozen=True, slots=True)
class Calibration:
    """The biases by name, in the model's dtype, and each layer's activity with them.

    records: of each layer, for profile.json; empty unless asked for.
    """

    biases: Mapping[str, Tensor]
    layers: list[LayerActivity]
    records: list[stored.LayerRecord]


def target_share(shape: Shape, layer: int) -> float:
    """Mean share of neurons that a layer's tokens shall activate: a geometric rise from first layer to last."""
    depth = layer / max(1, shape.layers - 1)
    return FIRST_LAYER_SHARE * (LAST_LAYER_SHARE / FIRST_LAYER_SHARE) ** depth


def ranked_frequencies(ffn: int, mean: float) -> Tensor:
    """min(0.95, c/r) for ranks r = 1 ... ffn, with the c that gives this mean. Returns (ffn,) float64."""
    ranks = torch.arange(1, ffn + 1, dtype=torch.float64)
    low, high = 0.0, float(ffn)
    for _ in range(60):  # halved until float64 has no more digits
        c = (low + high) / 2
        low, high = (c, high) if (c / ranks).clamp(max=HIGHEST_FREQUENCY).mean() < mean else (low, c)
    return (low / ranks).clamp(max=HIGHEST_FREQUENCY)


def frequencies(recipe: Recipe, layer: int) -> Tensor:
    """How often each neuron shall fire, in the order of the neurons. Returns (ffn,) float64."""
    ranked = ranked_frequencies(recipe.shape.ffn, target_share(recipe.shape, layer))
    return ranked[torch.randperm(recipe.shape.ffn, generator=recipe.generator(f"ranks of layer {layer}"))]


def activation_variance(firing: Tensor) -> float:
    """Sum over neurons of the variance of ReLU(z - t), z standard normal, t such that it fires as often as `firing`."""
    t = -torch.special.ndtri(firing)
    density = torch.exp(-t * t / 2) / math.sqrt(2 * math.pi)
    mean, square = density - t * firing, (1 + t * t) * firing - t * density
    return float((square - mean * mean).sum())


def matrix_std(shape: Shape, name: str) -> float:
    """Standard deviation of a matrix's elements; the constants above say why."""
    if "embed_" in name:
        return POSITION_STD if "positions" in name else 1.0
    if name.endswith("out_proj.weight"):
        return math.sqrt(ATTENTION_VARIANCE / shape.layers / shape.hidden)
    if name.endswith("fc2.weight"):
        firing = ranked_frequencies(shape.ffn, target_share(shape, int(name.split(".")[2])))
        return math.sqrt(MLP_VARIANCE / shape.layers / activation_variance(firing))
    return 1 / math.sqrt(shape.hidden)


def draw(recipe: Recipe, name: str, size: torch.Size) -> Tensor:
    """A tensor as it is before calibration: norms do nothing, biases are zero, matrices random, on the device."""
    dtype = getattr(torch, recipe.dtype)
    if name.endswith(".bias"):
        return torch.zeros(size, dtype=dtype)
    if name == "decoder.final_layer_norm.weight":
        # Without the signs the head, being tied, would find the current token likeliest at every step.
        signs = torch.randint(0, 2, size, generator=recipe.generator(name)) * 2 - 1
        return (signs * (LOGIT_STD / math.sqrt(recipe.shape.hidden))).to(dtype)
    if "layer_norm" in name:
        return torch.ones(size, dtype=dtype)
    matrix, std = torch.empty(size, dtype=dtype, device=recipe.device), matrix_std(recipe.shape, name)
    generator = recipe.generator(name, recipe.device)
    for rows in matrix.split(max(1, DRAWN_AT_ONCE[recipe.device] // size[1])):
        rows.copy_(torch.randn(rows.shape, generator=generator, device=recipe.device).mul_(std))
    return matrix


def opt_config(shape: Shape, dtype: str) -> OPTConfig:
    """As the hub's checkpoints have it."""
    return OPTConfig(
        architectures=["OPTForCausalLM"],
        hidden_size=shape.hidden,
        word_embed_proj_dim=shape.hidden,
        ffn_dim=shape.ffn,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        vocab_size=shape.vocab,
        max_position_embeddings=shape.positions,
        dtype=dtype,
    )


class CalibratedLayer:
    """transformers' own decoder layer, which gets its MLP biases from the tokens that pass through it.

    It computes in float32 on the values as stored. One object serves all layers in turn.
    """

    def __init__(self, recipe: Recipe, *, records: bool = False) -> None:
        """records: keep what profile.json has of each layer."""
        self.recipe = recipe
        config = opt_config(recipe.shape, recipe.dtype)
        config._attn_implementation = "sdpa"  # causal without a mask
        with torch.device("meta"):
            layer = OPTDecoderLayer(config, layer_idx=0)
        self.layer = layer.to_empty(device=recipe.device).float().eval()
        self.layer.fc1.register_forward_hook(self._make_sparse)
        self.layer.fc2.register_forward_hook(self._centre)
        self.index = 0
        self.activity: LayerActivity | None = None
        self.records: list[stored.LayerRecord] | None = [] if records else None

    def forward(self, index: int, hidden: Tensor) -> Tensor:
        """Become layer `index`, find its biases, and apply it. hidden and result: (texts, tokens, hidden) float32."""
        self.index = index
        for name, parameter in self.layer.named_parameters():
            parameter.copy_(draw(self.recipe, f"decoder.layers.{index}.{name}", parameter.shape))
        return self.layer(hidden)

    def biases(self) -> dict[str, Tensor]:
        """The two found last, by their names in the model, in its dtype."""
        dtype = getattr(torch, self.recipe.dtype)
        parts = {"fc1": self.layer.fc1.bias, "fc2": self.layer.fc2.bias}
        return {f"decoder.layers.{self.index}.{part}.bias": bias.to("cpu", dtype) for part, bias in parts.items()}

    def _make_sparse(self, fc1: torch.nn.Linear, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        """Shift each neuron's pre-activations so that it fires as often as it shall; output: (texts * tokens, ffn).

        The quantile is that of a normal distribution with the mean and deviation measured: a random row's products
        with many inputs have it. Held-out tokens agree within 2 %; by the sample's own quantile, neurons that are
        to fire for less than 0.5 % of them do so 5 to 10 % too often.
        """
        quantile = torch.special.ndtri(frequencies(self.recipe, self.index)).to(output.device)
        variance, mean = torch.var_mean(output[: self.recipe.n_calibration_tokens], dim=0)
        shifted = self._add_bias(fc1, output, (variance.sqrt() * quantile - mean).float())
        self._measure(shifted[self.recipe.n_calibration_tokens :] > 0)
        if self.records is not None:
            self.records.append(self._record(fc1, inputs[0], shifted > 0))
        return shifted

    def _record(self, fc1: torch.nn.Linear, x: Tensor, active: Tensor) -> stored.LayerRecord:
        """What profile.json has of this layer. x: (texts * tokens, hidden), what fc1 reads; active: (the same, ffn)."""
        dither = torch.from_numpy(layer_dither(self.recipe.shape.hidden, self.index)).to(x.device)
        codes = torch_codes.code_layer(fc1.weight, dither)
        rows = CodedRows(dither, bias=fc1.bias, **codes._asdict())
        profile = profile_of(opt_config(self.recipe.shape, self.recipe.dtype), self.recipe.dtype, "synthetic")
        heldout = slice(self.recipe.n_calibration_tokens, None)
        scores = PlaneScores.of(rows, x[heldout], failure_probability(profile))
        statistics = layer_statistics(active, self.recipe.n_text_tokens)
        return stored.LayerRecord(**statistics, predictors=code_records(rows, scores, active[heldout]), lookahead=[])

    def _centre(self, fc2: torch.nn.Linear, _inputs: Any, output: Tensor) -> Tensor:
        """Take away what the MLP adds to every token alike; it would grow to the most of all hidden states."""
        return self._add_bias(fc2, output, -output[: self.recipe.n_calibration_tokens].mean(dim=0))

    def _add_bias(self, linear: torch.nn.Linear, output: Tensor, bias: Tensor) -> Tensor:
        linear.bias.copy_(bias.to(getattr(torch, self.recipe.dtype)))  # float32 again, but as it will be stored
        return output.add_(linear.bias)

    def _measure(self, active: Tensor) -> None:
        """active: (held-out texts * tokens, ffn) bool."""
        active = active.unflatten(0, (-1, self.recipe.n_text_tokens))
        n_again, n_followed = (active[:, 1:] & active[:, :-1]).sum(), active[:, 1:].sum()
        target = target_share(self.recipe.shape, self.index)
        self.activity = LayerActivity(target, float(active.sum() / active.numel()), float(n_again / n_followed))


def own_stream(device: str) -> AbstractContextManager[Any]:
    """Where a GPU is used, so that what is computed here does not wait for what other threads compute."""
    return torch.cuda.stream(torch.cuda.Stream()) if device == "cuda" else nullcontext()


@torch.inference_mode()
def calibrate(recipe: Recipe, sizes: Mapping[str, torch.Size], *, records: bool = False) -> Calibration:
    """Pass random texts through the layers, one after the other, and find the biases of each.

    records: also what profile.json has of each layer.
    """
    with own_stream(recipe.device):
        return _calibrate(recipe, sizes, records=records)


def _calibrate(recipe: Recipe, sizes: Mapping[str, torch.Size], *, records: bool) -> Calibration:
    names = ("decoder.embed_tokens.weight", "decoder.embed_positions.weight")
    rows = recipe.token_ids(), torch.arange(recipe.n_text_tokens) + 2  # OPT's positions begin at 2
    tokens, positions = (draw(recipe, name, sizes[name])[ids].float() for name, ids in zip(names, rows, strict=True))
    hidden = tokens + positions  # (texts, tokens, hidden)
    layer = CalibratedLayer(recipe, records=records)
    biases: dict[str, Tensor] = {}
    activities: list[LayerActivity] = []
    for index in tqdm(range(recipe.shape.layers), desc="calibrate", unit="layer"):
        hidden = layer.forward(index, hidden)
        assert layer.activity is not None
        activities.append(layer.activity)
        biases |= layer.biases()
    return Calibration(biases, activities, layer.records or [])


def made_up_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """A word for each id, so that what reads text can be given some."""
    names = [*SPECIAL_TOKENS, *map(word, range(FIRST_ORDINARY_ID, vocab_size))]
    tokenizer = Tokenizer(WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="</s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    )


def word(token: int) -> str:
    """What an ordinary token is called."""
    return f"token{token}"


def write_text(path: Path, vocab_size: int, n_tokens: int, seed: int) -> None:
    """Random words."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(FIRST_ORDINARY_ID, vocab_size, (n_tokens,), generator=generator)
    path.write_text(" ".join(map(word, ids.tolist())), encoding="utf-8")


class SyntheticCheckpoint(Checkpoint):
    """A checkpoint that is computed tensor by tensor. Its folder holds configuration and tokenizer only."""

    def __init__(self, recipe: Recipe, folder: Path, name: str, *, records: bool = False) -> None:
        """records: its calibration has what profile.json has of each layer."""
        self.recipe, self.folder, self.name = recipe, folder, name
        self._calibrating = threading.Lock()
        self._calibration: Calibration | None = None
        self._records = records
        self.config = opt_config(recipe.shape, recipe.dtype)
        with torch.device("meta"):
            model = OPTModel(self.config)
        self.sizes = {name: parameter.shape for name, parameter in model.named_parameters()}
        self.config.save_pretrained(folder)
        GenerationConfig.from_model_config(self.config).save_pretrained(folder)
        made_up_tokenizer(self.config.vocab_size).save_pretrained(folder)

    @property
    def calibration(self) -> Calibration:
        """Computed when the first bias is asked for."""
        with self._calibrating:
            if self._calibration is None:
                self._calibration = calibrate(self.recipe, self.sizes, records=self._records)
            return self._calibration

    def files(self) -> list[Path]:
        """None: no weights are on a disk."""
        return []

    def __contains__(self, name: str) -> bool:
        return name.removeprefix("model.") in self.sizes

    def dtype(self) -> str:
        """That of the recipe."""
        return self.recipe.dtype

    def tensor(self, name: str) -> Tensor:
        """One tensor, drawn anew each time.

        Raises:
            DiskError: the model has no such tensor.
        """
        name = name.removeprefix("model.")
        if name not in self.sizes:
            raise DiskError(f"{self.name}: tensor {name!r} is none of its {len(self.sizes)}")
        if name.endswith((".fc1.bias", ".fc2.bias")):
            return self.calibration.biases[name]
        return draw(self.recipe, name, self.sizes[name])

    def identity(self) -> list[list[str | int]]:
        """The recipe, and what random numbers depend on besides."""
        recipe = asdict(self.recipe)
        facts = {"recipe version": RECIPE_VERSION, "torch": torch.__version__} | recipe.pop("shape") | recipe
        if self.recipe.device == "cuda":
            facts["GPU"] = torch.cuda.get_device_name()
        return [[name, value] for name, value in facts.items()]


def plan_shards(specs: Iterable[TensorSpec]) -> list[list[TensorSpec]]:
    """Tensors in order, as many to a shard as fit into `SHARD_NBYTES`."""
    shards: list[list[TensorSpec]] = []
    for spec in specs:
        if not shards or sum(each.nbytes for each in shards[-1]) + spec.nbytes > SHARD_NBYTES:
            shards.append([])
        shards[-1].append(spec)
    return shards


def write_weights(source: SyntheticCheckpoint, folder: Path) -> None:
    """model.safetensors, or shards and their index where one file does not take all; named as transformers does."""
    code = DTYPE_CODES[source.recipe.dtype]
    specs = [TensorSpec(f"model.{name}", code, tuple(size)) for name, size in source.sizes.items()]
    shards = plan_shards(specs)
    names = [f"model-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = ["model.safetensors"]
    total, free = sum(map(file_nbytes, shards)), shutil.disk_usage(folder).free
    if total > free:
        raise NotEnoughDisk(f"{folder}: needs {format_size(total)}, {format_size(free)} are free; free some")
    with tqdm(total=total, unit="B", unit_scale=True, desc="write") as bar:
        for name, shard in zip(names, shards, strict=True):
            with TensorFileWriter(folder / name, shard) as writer:
                for spec in shard:
                    writer.write(source.tensor(spec.name).cpu().view(torch.uint8).numpy())
                    bar.update(spec.nbytes)
                writer.finish()
            _forget_pages(folder / name)
    if len(shards) > 1:
        facts = {
            "total_parameters": sum(math.prod(spec.shape) for spec in specs),
            "total_size": sum(spec.nbytes for spec in specs),
        }
        weight_map = {spec.name: name for name, shard in zip(names, shards, strict=True) for spec in shard}
        index = json.dumps({"metadata": facts, "weight_map": weight_map}, indent=2, sort_keys=True)
        (folder / "model.safetensors.index.json").write_text(index + "\n", encoding="utf-8")


def _forget_pages(path: Path) -> None:
    """A file that is on disk need not stay in the page cache as well."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def make_folder(recipe: Recipe, out: Path, name: str) -> Calibration:
    """A transformers folder. It has its name only when it is whole; an unfinished one is begun anew."""
    unfinished = out.with_name(out.name + ".partial")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        unfinished.mkdir(parents=True)
        source = SyntheticCheckpoint(recipe, unfinished, name)
        write_weights(source, unfinished)
        os.replace(unfinished, out)
    except BaseException as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        if isinstance(error, OSError) and not isinstance(error, DiskError):
            raise DiskError(f"{out}: writing failed ({error.strerror}); mend that or choose another place") from error
        raise
    return source.calibration


def make_store(recipe: Recipe, out: Path, name: str, *, is_calibrated: bool = False) -> Calibration:
    """A SparseFlow store; what an interrupted run has finished is kept.

    is_calibrated: with a profile.json.
    """
    with tempfile.TemporaryDirectory() as folder:
        source = SyntheticCheckpoint(recipe, Path(folder), name, records=is_calibrated)
        if recipe.device == "cpu":
            convert(source, out)
        else:
            with ThreadPoolExecutor(1) as early:  # biases are found while matrices are written
                early.submit(lambda: source.calibration)
                convert(source, out, n_threads=min(MOST_WRITERS, os.cpu_count() or 1))
    if is_calibrated:
        add_profile(out, source.calibration, recipe)
    return source.calibration


def add_profile(store: Path, calibration: Calibration, recipe: Recipe) -> None:
    """Put what was found of the layers into the store, as `sparseflow calibrate --codes-only` does."""
    n_tokens = (recipe.n_calibration_texts + recipe.n_heldout_texts) * recipe.n_text_tokens
    profile = stored.Calibration(DEFAULT_RECALL, n_tokens, RECALLS, calibration.records)
    with exclusive(store.with_name(store.name + ".calibration"), "calibrating") as folder:
        for layer in range(recipe.shape.layers):
            path = folder / stored.calibrated_name(layer)
            path.parent.mkdir(exist_ok=True)
            with TensorFileWriter(path, []) as writer:  # nothing of low rank
                writer.finish()
        install(store, folder, profile)
        shutil.rmtree(folder)


def summary(calibration: Calibration) -> dict[str, Any]:
    """Means over the layers, and the layers."""
    means = {
        field: sum(getattr(layer, field) for layer in calibration.layers) / len(calibration.layers)
        for field in ("target_share", "active_share", "overlap")
    }
    return means | {"layers": [asdict(layer) for layer in calibration.layers]}


def table(result: Mapping[str, Any]) -> str:
    """The same as text."""
    rows = [*enumerate(result["layers"]), ("mean", result)]
    lines = [
        f"{layer!s:>5}  {row['target_share']:7.2%}  {row['active_share']:7.2%}  {row['overlap']:7.1%}"
        for layer, row in rows
    ]
    return "\n".join(["layer   target   active  overlap", *lines])


def run(arguments: argparse.Namespace) -> None:
    """Make what was asked for and print what it does."""
    started_s = time.monotonic()
    preset, out = SHORT_NAMES.get(arguments.preset, arguments.preset), arguments.out.absolute()
    if out.exists():
        raise BadRequest(f"--out {out}: exists already; remove it, or name another place")
    if arguments.calibrate and not arguments.store:
        raise BadRequest("--calibrate: a transformers folder has no profile.json; give --store as well")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise BadRequest("--device cuda: torch finds no GPU here; leave the option out")
    recipe = Recipe(PRESETS[preset], arguments.seed, arguments.dtype, device=arguments.device)
    make = partial(make_store, is_calibrated=arguments.calibrate) if arguments.store else make_folder
    result = summary(make(recipe, out, f"synthetic-{preset}"))
    if arguments.text:
        write_text(out.with_name(out.name + ".txt"), recipe.shape.vocab, arguments.text, recipe.seed)
    costs = {
        "seconds": time.monotonic() - started_s,
        "peak_memory_nbytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    if arguments.json:
        facts = {"preset": preset, "seed": recipe.seed, "dtype": recipe.dtype, "store": arguments.store}
        facts |= {"device": recipe.device, "calibrated": arguments.calibrate}
        print(json.dumps(facts | {"out": str(out)} | costs | result))
    else:
        print(table(result))
        print(f"{out}: made in {costs['seconds']:.0f} s, peak memory {format_size(costs['peak_memory_nbytes'])}")


def main(argv: list[str]) -> int:
    """Read the command line. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--preset", required=True, choices=[*PRESETS, *SHORT_NAMES], metavar="NAME", help=str([*PRESETS])
    )
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="must not exist")
    parser.add_argument("--store", action="store_true", help="write a SparseFlow store, not a transformers folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--device",
        choices=DRAWN_AT_ONCE,
        default=Recipe.__dataclass_fields__["device"].default,
        help="where it is made",
    )
    parser.add_argument("--calibrate", action="store_true", help="with --store: add a profile.json")
    parser.add_argument("--dtype", choices=DTYPE_NBYTES, default="float16")
    parser.add_argument(
        "--text", type=int, metavar="TOKENS", help="write so many random words to DIR.txt, to calibrate on"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    try:
        run(parser.parse_args(argv))
    except SparseFlowError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, BadRequest) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
