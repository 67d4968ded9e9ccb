#!/usr/bin/env python3
"""Train a small ReLU OPT model with sparse activations from plain text files, as the demo model was trained.

The output folder holds what transformers loads (config, fp16 weights, tokenizer), `heldout.txt`, `calibration.txt` and
`RECIPE.md`, which records the flags and the sparsity that came out. The same flags, texts, libraries and thread count
(`OMP_NUM_THREADS`) give the same run, interrupted or not; another machine gives a similar model, not the same bytes.
"""

import argparse
import hashlib
import math
import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>")  # ids 0-3
PAD_ID, END_ID = 1, 2  # OPT opens texts with the token that ends them
PARAGRAPHS_PER_GROUP = 20
HELDOUT_EVERY = 50  # the last of every fifty groups is held out
CALIBRATION_CHARS = 200_000  # about: whole groups are taken
FINAL_RATE_SHARE = 0.02
FREQUENT_SHARE = 0.3
REPORT_INTERVAL_S = 10.0
TIMED_STEPS = 8


class UsageError(Exception):
    """What was asked for cannot be done; the message names the value and the remedy."""


def _flag(default: Any, text: str, *, lowest: float = 1, compare: bool = True) -> Any:
    return field(default=default, metadata={"help": text, "lowest": lowest}, compare=compare)


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything besides the text that decides the model. Equality leaves out what does not."""

    layers: int = _flag(8, "decoder layers")
    hidden: int = _flag(256, "width of the residual stream")
    ffn: int = _flag(1024, "neurons per layer")
    heads: int = _flag(4, "attention heads per layer")
    positions: int = _flag(512, "longest context of the model, tokens")
    vocab: int = _flag(4096, "byte-level BPE vocabulary, tokens: 4 special ones, 256 bytes, merges", lowest=260)
    sequence: int = _flag(256, "training and evaluation window, tokens", lowest=2)
    batch: int = _flag(16, "windows per step")
    steps: int = _flag(4000, "optimizer steps; the rate follows a cosine over them")
    learning_rate: float = _flag(1.5e-3, "peak rate of AdamW, per step", lowest=0)
    weight_decay: float = _flag(0.1, "weight decay of matrices, as a multiple of the rate", lowest=0)
    warmup: int = _flag(100, "steps of linear warm-up", lowest=0)
    l1: float = _flag(0.05, "weight of the sum over layers of the mean ReLU activation, once half is done", lowest=0)
    seed: int = _flag(0, "seed of the initial weights and of the windows drawn", lowest=0)
    checkpoint_steps: int = _flag(100, "steps between checkpoints", compare=False)

    def __post_init__(self) -> None:
        for f in fields(self):
            value, lowest = getattr(self, f.name), f.metadata["lowest"]
            if not lowest <= value < 2**31:
                raise UsageError(f"{_dashed(f.name)} {value}: must be at least {lowest} and under 2**31")
        if self.hidden % self.heads:
            raise UsageError(f"--hidden {self.hidden} is no multiple of --heads {self.heads}: change either")
        if self.sequence > self.positions:
            raise UsageError(f"--sequence {self.sequence} exceeds --positions {self.positions}: change either")
        if self.warmup >= self.steps:
            raise UsageError(f"--warmup {self.warmup}: the run has {self.steps} steps; lower it or train longer")


DEFAULTS = Recipe()


def _dashed(name: str) -> str:
    return "--" + name.replace("_", "-")


@dataclass(frozen=True, slots=True)
class Corpus:
    """Prepared text. `training` has one entry per file; `calibration` is part of it, `heldout` is not."""

    training: tuple[str, ...]
    calibration: str
    heldout: str


def read_paragraphs(path: Path) -> list[str]:
    """Split one UTF-8 file at blank lines, runs of blanks folded to one."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        raise UsageError(f"{path}: {exc}; give readable UTF-8 text files (iconv converts others)") from exc
    paragraphs = re.split(r"\n\s*\n", re.sub(r"[^\S\n]+", " ", text))
    return [stripped for paragraph in paragraphs if (stripped := paragraph.strip())]


def prepare_corpus(paths: list[Path]) -> Corpus:
    """Group the paragraphs of all files in order and hold out the last of every fifty groups."""
    tagged = [(n, paragraph) for n, path in enumerate(paths) for paragraph in read_paragraphs(path)]
    groups = [tagged[i : i + PARAGRAPHS_PER_GROUP] for i in range(0, len(tagged), PARAGRAPHS_PER_GROUP)]
    heldout = groups[HELDOUT_EVERY - 1 :: HELDOUT_EVERY]
    if not heldout:
        n_needed = PARAGRAPHS_PER_GROUP * (HELDOUT_EVERY - 1) + 1
        raise UsageError(f"{len(tagged)} paragraphs: {n_needed} are needed before any is held out; give more text")
    kept = [group for i, group in enumerate(groups) if (i + 1) % HELDOUT_EVERY]
    stride = math.ceil(sum(len(paragraph) for group in kept for _, paragraph in group) / CALIBRATION_CHARS)
    by_file = [[paragraph for group in kept for n, paragraph in group if n == wanted] for wanted in range(len(paths))]
    return Corpus(
        training=tuple("\n\n".join(paragraphs) for paragraphs in by_file if paragraphs),
        calibration="\n\n".join(paragraph for group in kept[::stride] for _, paragraph in group),
        heldout="\n\n".join(paragraph for group in heldout for _, paragraph in group),
    )


def train_tokenizer(corpus: Corpus, recipe: Recipe) -> PreTrainedTokenizerFast:
    """Byte-level BPE over the training text, `</s>` put before every text. Small texts fill less than --vocab."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocab,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(corpus.training, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="</s> $A", pair="</s> $A $B", special_tokens=[("</s>", END_ID)]
    )
    names = {"bos_token": "</s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=recipe.positions, **names)


def build_model(recipe: Recipe) -> OPTForCausalLM:
    """A freshly initialised float32 OPT with pre-layer-norm and a tied head."""
    torch.manual_seed(recipe.seed)
    config = OPTConfig(
        vocab_size=recipe.vocab,
        hidden_size=recipe.hidden,
        word_embed_proj_dim=recipe.hidden,
        ffn_dim=recipe.ffn,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        max_position_embeddings=recipe.positions,
        activation_function="relu",
        dropout=0.0,
        attention_dropout=0.0,
        pad_token_id=PAD_ID,
        bos_token_id=END_ID,
        eos_token_id=END_ID,
    )
    return OPTForCausalLM(config)


@contextmanager
def tapped_activations(model: OPTForCausalLM) -> Iterator[list[torch.Tensor]]:
    """Yield a list that a forward pass extends by its ReLU outputs, layer by layer: (batch * sequence, ffn) each."""
    outputs: list[torch.Tensor] = []
    layers = model.model.decoder.layers
    handles = [layer.activation_fn.register_forward_hook(lambda _m, _i, out: outputs.append(out)) for layer in layers]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


class Trainer:
    """A model, its optimizer and the number of steps done. `stream` is (n_tokens,) int64."""

    def __init__(self, recipe: Recipe, stream: torch.Tensor) -> None:
        self.recipe, self.stream, self.step = recipe, stream, 0
        self.model = build_model(recipe)
        matrices = [p for p in self.model.parameters() if p.dim() > 1]
        vectors = [p for p in self.model.parameters() if p.dim() == 1]
        groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.95))

    def rate(self) -> float:
        """Learning rate of the coming step: linear warm-up, then a cosine from the peak to 2 % of it."""
        recipe = self.recipe
        if self.step < recipe.warmup:
            return recipe.learning_rate * (self.step + 1) / recipe.warmup
        progress = (self.step - recipe.warmup) / max(1, recipe.steps - 1 - recipe.warmup)
        cosine = 0.5 * (1 + math.cos(math.pi * progress))
        return recipe.learning_rate * (FINAL_RATE_SHARE + (1 - FINAL_RATE_SHARE) * cosine)

    def draw_windows(self) -> torch.Tensor:
        """(batch, sequence) int64 at random places. Seed and step alone decide them, so a resume draws the same."""
        recipe = self.recipe
        generator = torch.Generator().manual_seed(recipe.seed * 2**32 + self.step)
        starts = torch.randint(len(self.stream) - recipe.sequence + 1, (recipe.batch, 1), generator=generator)
        return self.stream[starts + torch.arange(recipe.sequence)]

    def advance(self) -> tuple[float, float]:
        """Do one step. Returns the cross entropy, nats per token, and the sum over layers of the mean activation."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate()
        windows = self.draw_windows()
        with tapped_activations(self.model) as activations:
            cross_entropy = self.model(input_ids=windows, labels=windows, use_cache=False).loss
        activity = torch.stack([activation.mean() for activation in activations]).sum()
        l1_weight = self.recipe.l1 * min(1.0, 2 * self.step / self.recipe.steps)
        (cross_entropy + l1_weight * activity).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        return cross_entropy.item(), activity.item()

    def identity(self) -> dict[str, Any]:
        """What a run to resume must share, by the name of the flag or argument that decides it."""
        flags = {_dashed(f.name): getattr(self.recipe, f.name) for f in fields(Recipe) if f.compare}
        return flags | {"SHA-256 of training tokens": hashlib.sha256(self.stream.numpy().tobytes()).hexdigest()}

    def save(self, path: Path) -> None:
        """Write a checkpoint whole or not at all: a kill while writing leaves the one before it."""
        state = {"identity": self.identity(), "step": self.step}
        state |= {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        partial = path.with_name(path.name + ".partial")
        torch.save(state, partial)
        os.replace(partial, path)

    def restore(self, path: Path) -> None:
        """Go on from a checkpoint; refuse one of another recipe or text."""
        state = torch.load(path, weights_only=True)
        if other := dict(state["identity"].items() - self.identity().items()):
            started_with = ", ".join(f"{name} {value}" for name, value in sorted(other.items()))
            raise UsageError(f"{path}: the run to resume had {started_with}; give the same flags and texts")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]


def train(trainer: Trainer, checkpoint: Path) -> bool:
    """Run the steps that remain, with checkpoints. False if SIGINT or SIGTERM stopped it, the checkpoint written."""
    recipe, first_step, stopping = trainer.recipe, trainer.step, False

    def stop(signum: int, _frame: Any) -> None:
        nonlocal stopping
        stopping = True
        signal.signal(signum, signal.SIG_DFL)  # a second one ends the process at once

    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, stop)
    started_s = reported_s = time.monotonic()
    while trainer.step < recipe.steps and not stopping:
        cross_entropy, activity = trainer.advance()
        now_s, last = time.monotonic(), stopping or trainer.step == recipe.steps
        if last or now_s - reported_s >= REPORT_INTERVAL_S:
            reported_s, step_s = now_s, (now_s - started_s) / (trainer.step - first_step)
            report(
                f"step {trainer.step}/{recipe.steps}  cross entropy {cross_entropy:.3f}  activity {activity:.3f}  "
                f"{recipe.batch * recipe.sequence / step_s:,.0f} tokens/s  "
                f"eta {(recipe.steps - trainer.step) * step_s / 60:.1f} min"
            )
        if last or trainer.step % recipe.checkpoint_steps == 0:
            trainer.save(checkpoint)
    return trainer.step == recipe.steps


def steps_that_fit(minutes: float, recipe: Recipe, stream: torch.Tensor) -> int:
    """Time a few steps of a throw-away model and say how many fit into `minutes`."""
    trainer = Trainer(recipe, stream)
    trainer.advance()  # the first step also allocates
    started_s = time.monotonic()
    for _ in range(TIMED_STEPS):
        trainer.advance()
    return max(1, int(minutes * 60 * TIMED_STEPS / (time.monotonic() - started_s)))


def measure(model: OPTForCausalLM, heldout_ids: torch.Tensor, recipe: Recipe) -> tuple[float, list[tuple[float, ...]]]:
    """Cross entropy, nats per token, and sparsity over the whole windows of `heldout_ids`, (n_tokens,) int64.

    Per layer four shares from 0 to 1, a neuron being active where its ReLU is above zero: active; of those, active at
    the next token too; of all activity (times active), that of the 30 % most frequent neurons; neurons never active.
    """
    windows = heldout_ids[: len(heldout_ids) // recipe.sequence * recipe.sequence].view(-1, recipe.sequence)
    times_active = torch.zeros(recipe.layers, recipe.ffn, dtype=torch.int64)
    n_followed, n_again, loss_sum = [0] * recipe.layers, [0] * recipe.layers, 0.0
    for batch in torch.split(windows, recipe.batch):
        with torch.inference_mode(), tapped_activations(model) as activations:
            loss_sum += model(input_ids=batch, labels=batch, use_cache=False).loss.item() * len(batch)
        for layer, activation in enumerate(activations):
            active = (activation > 0).view(len(batch), recipe.sequence, recipe.ffn)
            times_active[layer] += active.sum(dim=(0, 1))
            n_followed[layer] += int(active[:, :-1].sum())
            n_again[layer] += int((active[:, :-1] & active[:, 1:]).sum())
    shares: list[tuple[float, ...]] = []
    for layer, counts in enumerate(times_active.sort(descending=True).values):
        n_active, n_frequent = int(counts.sum()), int(counts[: round(FREQUENT_SHARE * recipe.ffn)].sum())
        again = n_again[layer] / max(1, n_followed[layer])
        never = int((counts == 0).sum()) / recipe.ffn
        shares.append((n_active / (windows.numel() * recipe.ffn), again, n_frequent / max(1, n_active), never))
    return loss_sum / len(windows), shares


def results_text(cross_entropy: float, shares: list[tuple[float, ...]], recipe: Recipe) -> str:
    """What came out, in Markdown."""
    lines = [
        f"Held-out cross entropy {cross_entropy:.3f} nats per token (windows of {recipe.sequence}). Per layer:\n",
        "| layer | active | active again at the next token | activity of the 30 % most frequent | never active |",
        "|---|---|---|---|---|",
    ]
    rows = (" | ".join(f"{100 * share:.1f} %" for share in row) for row in shares)
    return "\n".join(lines + [f"| {layer} | {row} |" for layer, row in enumerate(rows)])


def recipe_page(trainer: Trainer, paths: list[Path], corpus: Corpus, results: str) -> str:
    """The text of RECIPE.md. Files by name only: folders differ between machines."""
    *flags, (what, sha256) = trainer.identity().items()
    arguments = " ".join([*(path.name for path in paths), "--out DIR", *(f"{name} {value}" for name, value in flags)])
    return f"""# Recipe

`scripts/train_demo_model.py {arguments}`
with torch {torch.__version__}, transformers {transformers.__version__}, tokenizers {tokenizers.__version__}.

Text: {sum(map(len, corpus.training)):,} characters to train on, {len(corpus.heldout):,} held out (`heldout.txt`);
`calibration.txt` is an even sample of the first. {what}: {sha256}.

{results}
"""


def claim_folder(out: Path, checkpoint: Path, *, resume: bool) -> None:
    """Make the output folder, new or empty, or find the checkpoint to resume from."""
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out {out}: not a folder; name a new one")
    if resume and not checkpoint.exists():
        raise UsageError(f"--out {out}: no checkpoint to resume from; start without --resume in a new or empty folder")
    if not resume and out.exists() and any(out.iterdir()):
        raise UsageError(f"--out {out}: the folder is not empty; name a new one, or add --resume to go on with a run")
    out.mkdir(parents=True, exist_ok=True)


def report(line: str) -> None:
    """One line of progress, on stderr."""
    print(line, file=sys.stderr, flush=True)


def run(arguments: argparse.Namespace) -> bool:
    """Prepare the text, train, save, measure. False if a signal stopped the training."""
    recipe = Recipe(**{f.name: getattr(arguments, f.name) for f in fields(Recipe)})
    out, minutes, checkpoint = arguments.out, arguments.minutes, arguments.out / ".training.pt"
    if minutes is not None and not 0 < minutes < math.inf:
        raise UsageError(f"--minutes {minutes}: must be more than zero")
    claim_folder(out, checkpoint, resume=arguments.resume)
    corpus = prepare_corpus(arguments.texts)
    tokenizer = train_tokenizer(corpus, recipe)
    encode = tokenizer.backend_tokenizer.encode
    stream = torch.tensor([token_id for text in corpus.training for token_id in encode(text).ids])
    heldout_ids = torch.tensor(encode(corpus.heldout, add_special_tokens=False).ids)
    if (n_tokens := min(len(stream), len(heldout_ids))) < recipe.sequence:
        raise UsageError(f"--sequence {recipe.sequence}: only {n_tokens} tokens of text; lower it or give more text")
    if minutes is not None and not arguments.resume:
        recipe = replace(recipe, steps=steps_that_fit(minutes, recipe, stream))
    trainer = Trainer(recipe, stream)
    if arguments.resume:
        trainer.restore(checkpoint)
    report(f"{len(stream):,} tokens to train on, {len(heldout_ids):,} held out; step {trainer.step} of {recipe.steps}")
    trainer.save(checkpoint)
    if not train(trainer, checkpoint):
        report(f"stopped, checkpoint written; --resume --steps {recipe.steps} with the other flags and texts goes on")
        return False
    (out / "heldout.txt").write_text(corpus.heldout, encoding="utf-8")
    (out / "calibration.txt").write_text(corpus.calibration, encoding="utf-8")
    tokenizer.save_pretrained(out)
    trainer.model.half().save_pretrained(out)
    results = results_text(*measure(trainer.model.float(), heldout_ids, recipe), recipe)
    (out / "RECIPE.md").write_text(recipe_page(trainer, arguments.texts, corpus, results), encoding="utf-8")
    checkpoint.unlink()
    print(results)
    return True


def main(argv: list[str]) -> int:
    """Read the command line and train. Returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("texts", metavar="TEXT", nargs="+", type=Path, help="plain text files, UTF-8")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="output folder, new or empty")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in DIR (same flags and texts)")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, metavar="X", help="set --steps to what fits into X minutes here")
    for f in fields(Recipe):
        default = getattr(DEFAULTS, f.name)
        target, metavar = (length if f.name == "steps" else parser), ("N" if isinstance(default, int) else "X")
        text = f"{f.metadata['help']} (default: {default})"
        target.add_argument(_dashed(f.name), type=type(default), default=default, metavar=metavar, help=text)
    try:
        return 0 if run(parser.parse_args(argv)) else 130
    except UsageError as exc:
        report(f"{parser.prog}: error: {exc}")
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
