"""Generate with a small model that comes with SparseFlow, and compare with the dense model.

Without MODEL: the demo model, in float32, where the same ids can be expected to the last token.
"""

import argparse
import time
from typing import TYPE_CHECKING

from sparseflow.assets import DEMO_MODEL
from sparseflow.cli.arguments import add_named_model, add_quiet, add_slots_ratio, take_named_model
from sparseflow.core.config import OffloadStrategy
from sparseflow.utils.parsing import number
from sparseflow.utils.progress import waiting

if TYPE_CHECKING:
    from sparseflow.cli.running import Run
    from sparseflow.models.opt_sparse import SparseOPTForCausalLM

LOADS = "sparseflow.cli.running"
PROMPT = "And it came to pass in those days, that"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """MODEL --gpu-cache-ratio --prompt --max-new-tokens"""
    add_named_model(parser, "a transformers checkpoint folder or a hub id; without, the demo model")
    add_slots_ratio(parser, "of all neurons, that have a slot on the GPU; without effect on a CPU")
    parser.add_argument("--prompt", default=PROMPT, metavar="TEXT", help="the text to continue")
    parser.add_argument("--max-new-tokens", type=number(int, 1), default=200, metavar="N", help="tokens, at most")
    parser.add_argument(
        "--temperature", type=number(float, 0), default=0.7, metavar="FACTOR", help="0: always the likeliest token"
    )
    parser.add_argument(
        "--seed",
        type=number(int, 0, 2**63 - 1),
        default=7,
        metavar="N",
        help="of the sampling, the same for both models",
    )
    add_quiet(parser)


check = take_named_model


def run(arguments: argparse.Namespace) -> dict[str, object]:
    """Stream the sparse model's text, run the dense model, print a table. Not ok if the ids differ."""
    strategy = OffloadStrategy(gpu_cache_ratio=arguments.gpu_cache_ratio)
    import torch
    from transformers import OPTForCausalLM
    from transformers.utils import logging

    from sparseflow.cli import running
    from sparseflow.core.checkpoint import locate
    from sparseflow.errors import BadRequest
    from sparseflow.models.opt_sparse import SparseOPTForCausalLM
    from sparseflow.store.manifest import MANIFEST_NAME
    from sparseflow.utils.tokenizer import tokenizer_of

    logging.disable_progress_bar()
    folder = locate(arguments.model or str(DEMO_MODEL))
    if (folder / MANIFEST_NAME).exists():
        raise BadRequest(f"{folder}: is a store; give the checkpoint it was made from, to compare with")
    start = time.perf_counter()
    with waiting(f"opening {folder}", quiet=arguments.quiet):
        model = SparseOPTForCausalLM.from_pretrained(
            folder, strategy=strategy, dtype=None if arguments.model else "float32", quiet=arguments.quiet
        )
    load_s = time.perf_counter() - start
    tokenizer = tokenizer_of(model.source.model_files)
    with waiting("warming up, and the dense model beside it", quiet=arguments.quiet):
        dense = OPTForCausalLM.from_pretrained(folder, dtype=model.dtype).eval()
        for warm in (model, dense):  # kernels are compiled, pages read
            running.generate(warm, tokenizer, arguments.prompt, max_new_tokens=4, stream=False, do_sample=False)
    model.reset_stats()
    if not arguments.json:
        print(arguments.prompt, end="", flush=True)
    sampling = {"do_sample": True, "temperature": arguments.temperature} if arguments.temperature > 0 else {}
    runs = []
    for contestant, stream in ((model, not arguments.json), (dense, False)):
        torch.manual_seed(arguments.seed)
        runs.append(
            running.generate(
                contestant,
                tokenizer,
                arguments.prompt,
                max_new_tokens=arguments.max_new_tokens,
                stream=stream,
                **sampling,
            )
        )
    sparse_run, dense_run = runs
    result = running.result_fields(model, sparse_run, load_s) | {
        "ids_equal_dense": sparse_run.token_ids == dense_run.token_ids,
        "dense_tokens_per_s": dense_run.decode_tokens_per_s,
    }
    if not arguments.json:
        _print_table(model, sparse_run, dense_run, result)
    return result | {"ok": result["ids_equal_dense"]}


def _print_table(model: "SparseOPTForCausalLM", sparse: "Run", dense: "Run", result: dict[str, object]) -> None:
    counts = model.stats.decode
    memory = result["memory"]
    assert isinstance(memory, dict)
    rows = {
        "fidelity": model.fidelity,
        "tokens/s": f"{sparse.decode_tokens_per_s or 0:.1f}  (transformers dense {dense.decode_tokens_per_s or 0:.1f})",
        "neurons active": f"{counts.active_share or 0:.1%}",
        "neurons computed": f"{counts.candidate_share or 0:.1%}",
        "memory": f"{memory['private'] / 2**20:.0f} MiB private, {memory['shared'] / 2**20:.0f} MiB shared "
        "(Python, torch and the dense model included)",
        "ids equal dense": "yes" if result["ids_equal_dense"] else "no",
    }
    print()
    for name, value in rows.items():
        print(f"  {name:18} {value}")
