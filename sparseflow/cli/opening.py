"""The model that `generate` and `chat` run: of a store or of a weight server, as the arguments say."""

import argparse
import time
from typing import TYPE_CHECKING

from sparseflow.cli.arguments import MODEL_HELP, add_device, add_model, model_path, require_model_path, strategy_of
from sparseflow.errors import BadRequest
from sparseflow.utils.progress import waiting

if TYPE_CHECKING:
    from sparseflow.models.opt_sparse import SparseOPTForCausalLM

_SERVERS = ("dtype", "memory", "io", "cpu_cache_ratio", "aggressive_offload", "eviction")


def add_opening(parser: argparse.ArgumentParser) -> None:
    """STORE or --server, and all that says how it is opened."""
    parser.add_argument("store", nargs="?", type=model_path, metavar="STORE", help=MODEL_HELP)
    parser.add_argument("--server", metavar="NAME", help="use the weights of this server instead of a store")
    parser.add_argument("--model", metavar="NAME", help="with --server: which of its models; without, its only one")
    add_model(parser)
    add_device(parser)


def require_opening(arguments: argparse.Namespace) -> None:
    """
    Raises:
        BadRequest: what the arguments of `add_opening` say cannot be. DiskError: STORE is no folder and no hub id.
    """
    strategy_of(arguments)
    if arguments.store is None and arguments.server is None and arguments.model is not None:
        raise BadRequest(
            f"{arguments.command}: --model {arguments.model} is one of a server's; name that with --server, or give a "
            "store or a checkpoint without --model"
        )
    if (arguments.store is None) == (arguments.server is None):
        raise BadRequest(f"{arguments.command}: name either a STORE or a --server")
    if arguments.server is None:
        if arguments.borrow_dense:
            raise BadRequest("--borrow-dense: only a server lends weights; name one with --server")
        if arguments.model is not None:
            raise BadRequest(f"--model {arguments.model}: is of a server; name that with --server, or leave it out")
        require_model_path(arguments.store)
        return
    for name in _SERVERS:
        if name in arguments.given:
            option, value = "--" + name.replace("_", "-"), getattr(arguments, name)
            shown = "" if value is True else f" {value}"
            raise BadRequest(f"{option}{shown}: the server decides that; leave it out with --server")


def open_model(arguments: argparse.Namespace) -> "tuple[SparseOPTForCausalLM, float]":
    """The model, and the seconds that it took to open it.

    Raises:
        SparseFlowError: as its text says.
    """
    import torch

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    start = time.perf_counter()
    model = _of_store(arguments) if arguments.server is None else _of_server(arguments)
    return model, time.perf_counter() - start


def _of_store(arguments: argparse.Namespace) -> "SparseOPTForCausalLM":
    from sparseflow.models.opt_sparse import SparseOPTForCausalLM

    with waiting(f"opening {arguments.store}", quiet=arguments.quiet):
        return SparseOPTForCausalLM.from_pretrained(
            arguments.store,
            strategy=strategy_of(arguments),
            memory=arguments.memory,
            io=arguments.io,
            fidelity=arguments.fidelity,
            dtype=arguments.dtype,
            device=arguments.device,
            device_memory=arguments.device_memory,
            quiet=arguments.quiet,
        )


def _of_server(arguments: argparse.Namespace) -> "SparseOPTForCausalLM":
    from sparseflow.models.opt_sparse import SparseOPTForCausalLM

    with waiting(f"waiting for server {arguments.server}", quiet=arguments.quiet):
        return SparseOPTForCausalLM.from_server(
            arguments.server,
            arguments.model,
            fidelity=arguments.fidelity,
            activation_threshold=arguments.activation_threshold,
            gpu_cache_ratio=arguments.gpu_cache_ratio,
            device_hints=arguments.device_hints,
            borrows_dense=arguments.borrow_dense,
            device=arguments.device,
            device_memory=arguments.device_memory,
        )
