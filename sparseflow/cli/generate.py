"""Continue a prompt."""

import argparse
import sys
import time

from sparseflow.cli.arguments import add_model, number, strategy_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """STORE --prompt and how to sample."""
    parser.add_argument("store", help="a store, a transformers checkpoint folder, or a hub id")
    parser.add_argument("--prompt", help="the text to continue; - or nothing: standard input")
    parser.add_argument("--max-new-tokens", type=number(int, 1), default=100, help="tokens")
    parser.add_argument("--temperature", type=number(float, 0), default=0.0, help="0: always the likeliest token")
    parser.add_argument(
        "--top-p", type=number(float, 0, 1), default=1.0, help="sample from the likeliest tokens of this probability"
    )
    parser.add_argument("--seed", type=number(int, 0, 2**63 - 1), help="of the sampling")
    parser.add_argument(
        "--audit", type=number(int, 0), default=0, metavar="N", help="measure recall in every Nth layer step"
    )
    add_model(parser)


def run(arguments: argparse.Namespace) -> dict[str, object]:
    """Stream the text to stdout, or collect it for --json."""
    strategy = strategy_of(arguments)  # a bad value is told before the imports take their seconds
    import torch

    from sparseflow.cli import running
    from sparseflow.models.opt_sparse import SparseOPTForCausalLM
    from sparseflow.utils.tokenizer import tokenizer_of

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    start = time.perf_counter()
    model = SparseOPTForCausalLM.from_pretrained(
        arguments.store,
        strategy=strategy,
        memory=arguments.memory,
        io=arguments.io,
        fidelity=arguments.fidelity,
        dtype=arguments.dtype,
        quiet=False,
    )
    load_s = time.perf_counter() - start
    model.coordinator.audit_every = arguments.audit
    prompt = sys.stdin.read() if arguments.prompt in (None, "-") else arguments.prompt
    sampling = {"do_sample": False}
    if arguments.temperature > 0:
        sampling = {"do_sample": True, "temperature": arguments.temperature, "top_p": arguments.top_p}
    if arguments.seed is not None:
        torch.manual_seed(arguments.seed)
    finished = running.generate(
        model,
        tokenizer_of(model.source.model_files),
        prompt,
        max_new_tokens=arguments.max_new_tokens,
        stream=not arguments.json,
        **sampling,
    )
    return running.result_fields(model, finished, load_s) if arguments.json else {}
