"""Serve a model over HTTP, as OpenAI's API has it: text and chat completions, models, health, metrics.

Workers are processes of their own that share one weight server: that of --server, or else one that is started for STORE
and ended with this command.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from sparseflow.cli.arguments import MODEL_HELP, add_cache_ratio, add_device, add_fidelity, add_memory, model_path
from sparseflow.engine.engine import DEFAULT_EVICTION, EVICTIONS
from sparseflow.engine.reading import IO_MODES
from sparseflow.errors import BadRequest
from sparseflow.serving.config import ServeConfig
from sparseflow.utils.parsing import number

LOG_LEVEL = "INFO"
_OF_WEIGHT_SERVERS = {"memory": "auto", "cpu_cache_ratio": 1.0, "io": "auto", "eviction": DEFAULT_EVICTION}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """STORE or --server, workers, port, and how the model is opened."""
    default = ServeConfig(store="")
    parser.add_argument("store", nargs="?", metavar="STORE", type=model_path, help=MODEL_HELP)
    parser.add_argument("--server", metavar="NAME", help="use this weight server instead of a store")
    parser.add_argument("--model", metavar="NAME", help="with --server: which of its models; without, its only one")
    group = parser.add_argument_group("HTTP")
    group.add_argument("--host", default=default.host, metavar="ADDRESS", help="where to listen; 0.0.0.0: everywhere")
    group.add_argument(
        "--port", type=number(int, 0, 65535), default=default.port, metavar="PORT", help="0: any that is free"
    )
    group.add_argument(
        "--api-key-file", type=Path, metavar="FILE", help="ask for one of these keys, one a line; without, for none"
    )
    group.add_argument("--served-model-name", metavar="NAME", help="what clients call it; without, its own name")
    group = parser.add_argument_group("workers", "Each generates one text at a time.")
    group.add_argument(
        "--workers", type=number(int, 1), default=default.workers, metavar="N", help="processes that generate"
    )
    group.add_argument(
        "--threads", type=number(int, 1), metavar="N", help="of each worker; without, its share of the processors"
    )
    group.add_argument(
        "--queue", type=number(int, 0), default=default.queue, metavar="N", help="requests that may wait; then 429"
    )
    for name, of_what in (
        ("queue", "for a worker; then 503"),
        ("step", "for a token, or 512 of a prompt; then the worker is replaced"),
        ("load", "for weight server and workers to start, conversion included"),
        ("drain", "for texts being made when the server is to end"),
    ):
        group.add_argument(
            f"--{name}-timeout",
            type=number(float, 0),
            default=getattr(default, f"{name}_timeout_s"),
            metavar="SECONDS",
            help=of_what,
        )
    add_fidelity(parser)
    _add_weight_server(parser)
    add_device(parser)


def _add_weight_server(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("memory", "Of the weight server that is started for STORE.")
    add_memory(group)
    add_cache_ratio(group)
    group.add_argument(
        "--eviction", choices=tuple(EVICTIONS), default=DEFAULT_EVICTION, help="which neuron goes when a new one comes"
    )
    group.add_argument(
        "--io",
        choices=IO_MODES,
        default="auto",
        help="how what is on disk is read; auto: direct where that is possible",
    )


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Serve until Ctrl-C or TERM. One line on stderr, or with --json one object on stdout, says when it is ready."""
    config = _config(arguments)
    from sparseflow.serving.serve import serve

    def tell(facts: dict[str, Any]) -> None:
        if arguments.json:
            print(json.dumps(facts), flush=True)
            return
        n_workers = len(facts["workers"])
        print(
            f"{facts['model']} ({facts['fidelity']}) at {facts['url']}: {n_workers} "
            f"worker{'s' * (n_workers > 1)}, weight server {facts['server']}",
            file=sys.stderr,
            flush=True,
        )

    serve(config, tell)
    return {"ok": True}


def _config(arguments: argparse.Namespace) -> ServeConfig:
    if arguments.server is not None:
        _refuse_options_of_weight_servers(arguments)
    elif arguments.model is not None:
        raise BadRequest(f"--model {arguments.model}: goes with --server; a STORE has one model")
    names = ("store", "server", "host", "port", "api_key_file", "served_model_name", "workers", "queue", "log_format")
    timeouts = ("queue", "step", "load", "drain")
    return ServeConfig(
        **{name: getattr(arguments, name) for name in names},
        **{f"{name}_timeout_s": getattr(arguments, f"{name}_timeout") for name in timeouts},
        weight_server_options=_weight_server_options(arguments),
        worker={
            "model": arguments.model,
            "fidelity": arguments.fidelity,
            "device": arguments.device,
            "device_memory": arguments.device_memory,
            "gpu_cache_ratio": arguments.gpu_cache_ratio,
            "device_hints": arguments.device_hints,
            "borrows_dense": arguments.borrow_dense,
            "load_timeout_s": arguments.load_timeout,
            "threads": arguments.threads or max(1, len(os.sched_getaffinity(0)) // arguments.workers),
        },
    )


def _weight_server_options(arguments: argparse.Namespace) -> tuple[str, ...]:
    options = {name: getattr(arguments, name) for name in _OF_WEIGHT_SERVERS} | {
        "max_sessions": arguments.workers,
        "log_format": arguments.log_format,
    }
    if arguments.borrow_dense:
        options["share_dense_gpu"] = arguments.device.partition(":")[2] or 0
    return tuple(word for name, value in options.items() for word in ("--" + name.replace("_", "-"), str(value)))


def _refuse_options_of_weight_servers(arguments: argparse.Namespace) -> None:
    for name, default in _OF_WEIGHT_SERVERS.items():
        if (value := getattr(arguments, name)) != default:
            option = "--" + name.replace("_", "-")
            raise BadRequest(f"{option} {value}: the server decides that; leave it out with --server")
