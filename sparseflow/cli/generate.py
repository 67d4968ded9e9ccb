"""Continue a prompt."""

import argparse
import sys
import time

from sparseflow.cli.arguments import add_device, add_model, number, strategy_of
from sparseflow.errors import BadRequest


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """STORE or --server, --prompt and how to sample."""
    parser.add_argument("store", nargs="?", help="a store, a transformers checkpoint folder, or a hub id")
    parser.add_argument("--server", metavar="NAME", help="use the weights of this server instead of a store")
    parser.add_argument("--model", help="with --server: which of its models; else its only one")
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
    add_device(parser)


def run(arguments: argparse.Namespace) -> dict[str, object]:
    """Stream the text to stdout, or collect it for --json."""
    strategy = strategy_of(arguments)  # a bad value is told before the imports take their seconds
    if (arguments.store is None) == (arguments.server is None):
        raise BadRequest("generate: name either a STORE or a --server")
    if arguments.server is not None:
        _refuse_options_of_stores(arguments)
    elif arguments.borrow_dense:
        raise BadRequest("--borrow-dense: only a server lends weights; name one with --server")
    import torch

    from sparseflow.cli import running
    from sparseflow.models.opt_sparse import SparseOPTForCausalLM
    from sparseflow.utils.tokenizer import tokenizer_of

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    start = time.perf_counter()
    where = {"device": arguments.device, "device_memory": arguments.device_memory}
    if arguments.server is not None:
        model = SparseOPTForCausalLM.from_server(
            arguments.server,
            arguments.model,
            fidelity=arguments.fidelity,
            activation_threshold=arguments.activation_threshold,
            gpu_cache_ratio=arguments.gpu_cache_ratio,
            device_hints=arguments.device_hints,
            borrows_dense=arguments.borrow_dense,
            **where,
        )
    else:
        model = SparseOPTForCausalLM.from_pretrained(
            arguments.store,
            strategy=strategy,
            memory=arguments.memory,
            io=arguments.io,
            fidelity=arguments.fidelity,
            dtype=arguments.dtype,
            quiet=False,
            **where,
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
    result = running.result_fields(model, finished, load_s) if arguments.json else {}
    model.close()
    return result


def _refuse_options_of_stores(arguments: argparse.Namespace) -> None:
    """
    Raises:
        BadRequest: something is given that the server was started with.
    """
    parser = argparse.ArgumentParser()
    add_model(parser)
    default = vars(parser.parse_args([]))
    for name in ("dtype", "memory", "io", "cpu_cache_ratio", "aggressive_offload", "eviction"):
        if getattr(arguments, name) != default[name]:
            option = "--" + name.replace("_", "-")
            raise BadRequest(
                f"{option} {getattr(arguments, name)}: the server decides that; leave it out with --server"
            )
