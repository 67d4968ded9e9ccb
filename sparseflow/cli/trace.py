"""Record which neurons a decode asks for, and replay that through arenas of other sizes and evictions."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparseflow.cli.arguments import (
    MODEL_HELP,
    add_cache_ratio,
    add_common,
    add_dtype,
    add_fidelity,
    add_memory,
    add_quiet,
    add_threads,
    model_path,
    require_model_path,
    require_place,
)
from sparseflow.core.config import OffloadStrategy
from sparseflow.utils.parsing import number
from sparseflow.utils.progress import progress, waiting
from sparseflow.utils.tokenizer import require_texts

if TYPE_CHECKING:
    from torch import Tensor

    from sparseflow.models.opt_sparse import SparseOPTForCausalLM

_DEFAULT_RATIOS = (0.05, 0.1, 0.2, 0.3)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """record STORE --out FILE, replay TRACE"""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    text = "Decode a text one token at a time, as if each token had been generated, and note what is asked for."
    record = actions.add_parser("record", help="decode a text and note it", description=text)
    record.add_argument("store", type=model_path, metavar="STORE", help=MODEL_HELP)
    record.add_argument("--text", type=Path, nargs="+", metavar="FILE", help="files of text; without, random tokens")
    record.add_argument("--seed", type=number(int, 0, 2**63 - 1), default=0, metavar="N", help="of the random tokens")
    record.add_argument("--tokens", type=number(int, 1), default=1000, metavar="N", help="so many are decoded")
    record.add_argument("--out", type=Path, required=True, metavar="FILE", help="the trace")
    record.set_defaults(loads="sparseflow.evaluation.trace_run")
    for add in (add_fidelity, add_memory, add_cache_ratio, add_threads, add_dtype, add_quiet):
        add(record)
    text = "Say what each eviction would have found. The first tenth of the tokens fills the arena and is not counted."
    replay = actions.add_parser("replay", help="compare evictions", description=text)
    replay.add_argument("trace", type=Path, metavar="TRACE", help="what record has written")
    replay.add_argument(
        "--slots-ratio",
        type=number(float, 0, 1),
        nargs="+",
        default=list(_DEFAULT_RATIOS),
        metavar="SHARE",
        help="slots of the arena, of all neurons; several at once",
    )
    replay.add_argument("--policies", nargs="+", metavar="POLICY", help="some only; without, all that are known")
    replay.add_argument(
        "--budgets",
        action="store_true",
        help="compare slots divided among layers, by what the first half of the trace shows, on the second half",
    )
    add_quiet(replay)
    for action in (record, replay):
        add_common(action, repeated=True)  # what stands before the action must not be overwritten by a default here


def check(arguments: argparse.Namespace) -> None:
    """Refuse paths that cannot be."""
    if arguments.action == "record":
        require_place(arguments.out)
        require_texts(arguments.text or ())
        require_model_path(arguments.store)


def run(arguments: argparse.Namespace) -> dict[str, object]:
    """One of the two."""
    return _record(arguments) if arguments.action == "record" else _replay(arguments)


def _record(arguments: argparse.Namespace) -> dict[str, object]:
    import torch

    from sparseflow.core.store_home import find_or_convert
    from sparseflow.evaluation.trace_run import record_trace
    from sparseflow.models.opt_sparse import SparseOPTForCausalLM
    from sparseflow.store.manifest import Manifest

    strategy = OffloadStrategy(cpu_cache_ratio=arguments.cpu_cache_ratio)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    store = find_or_convert(arguments.store, dtype=arguments.dtype, quiet=arguments.quiet)
    fingerprint = Manifest.load(store).weights_fingerprint
    with waiting(f"opening {store}", quiet=arguments.quiet):
        model = SparseOPTForCausalLM.from_pretrained(
            store, strategy=strategy, fidelity=arguments.fidelity, memory=arguments.memory, quiet=arguments.quiet
        )
    try:
        trace = record_trace(model, fingerprint, _windows(arguments, model), arguments.tokens, quiet=arguments.quiet)
    finally:
        model.close()
    trace.save(arguments.out)
    share = len(trace.ids) / (trace.n_steps * trace.ffn_dim)
    if not arguments.json:
        print(f"{arguments.out}: {trace.n_tokens} tokens, {trace.n_steps} layer steps, {share:.1%} of the neurons each")
    return {
        "trace": str(arguments.out),
        "tokens": trace.n_tokens,
        "layer_steps": trace.n_steps,
        "candidate_share": share,
    }


def _windows(arguments: argparse.Namespace, model: "SparseOPTForCausalLM") -> "Tensor":
    """Windows that hold the tokens asked for: of the text, or random ones."""
    import torch

    from sparseflow.utils.tokenizer import token_windows, tokenizer_of

    window = max(2, min(model.config.max_position_embeddings, arguments.tokens + 1))
    n_windows = -(-arguments.tokens // (window - 1))
    if arguments.text:
        return token_windows(tokenizer_of(model.source.model_files), arguments.text, window, n_windows * window)
    generator = torch.Generator().manual_seed(arguments.seed)
    return torch.randint(model.config.vocab_size, (n_windows, window), generator=generator)


def _replay(arguments: argparse.Namespace) -> dict[str, object]:
    from sparseflow.engine.replay import POLICIES, replay
    from sparseflow.engine.replay_budgets import DIVISIONS, replay_budgets
    from sparseflow.engine.trace import Trace

    names = arguments.policies or list(DIVISIONS if arguments.budgets else POLICIES)
    compare = replay_budgets if arguments.budgets else replay
    trace = Trace.load(arguments.trace)
    quarter = max(1, trace.n_layers // 4)
    rows: list[dict[str, Any]] = []
    pairs = [(name, ratio) for name in names for ratio in arguments.slots_ratio]
    for name, ratio in progress(pairs, "replay", quiet=arguments.quiet, unit="arena"):
        n_slots = int(ratio * trace.n_layers * trace.ffn_dim)
        found = compare(trace, n_slots, name)
        rows.append(
            {
                "policy": name,
                "slots_ratio": ratio,
                "slots": n_slots,
                "hit_rate": found.hit_rate,
                "first_quarter_hit_rate": found.hit_rate_of(slice(quarter)),
                "last_quarter_hit_rate": found.hit_rate_of(slice(-quarter, None)),
                "misses_per_token": found.misses_per_token,
                "bytes_from_disk_per_token": found.misses_per_token * trace.bundle_nbytes,
            }
        )
    if not arguments.json:
        print(_table(names, arguments.slots_ratio, rows))
    return {"trace": str(arguments.trace), "tokens": trace.n_tokens, "counted_tokens": found.n_tokens, "rows": rows}


def _table(names: list[str], ratios: list[float], rows: list[dict[str, Any]]) -> str:
    """A line a policy; for each size the share found, that of the first and last quarter of layers, misses a token."""
    width = max(map(len, names))
    lines = [f"{'slots':{width}}" + "".join(f"{ratio:>34.1%}" for ratio in ratios)]
    lines.append(" " * width + "".join(f"{'found':>9}{'first':>8}{'last':>8}{'misses':>9}" for _ in ratios))
    for n, name in enumerate(names):
        own = rows[n * len(ratios) : (n + 1) * len(ratios)]
        cells = "".join(
            f"{row['hit_rate']:9.1%}{row['first_quarter_hit_rate']:8.1%}{row['last_quarter_hit_rate']:8.1%}"
            f"{row['misses_per_token']:9.1f}"
            for row in own
        )
        lines.append(f"{name:{width}}{cells}")
    return "\n".join(lines)
