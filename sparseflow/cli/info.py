"""Print what this installation runs on, and with --model what a model looks like."""

import argparse
import os
import platform
from dataclasses import asdict

from sparseflow.cli.arguments import MODEL_HELP, model_path
from sparseflow.core.config import OffloadStrategy


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--model --cache-ratio"""
    parser.add_argument("--model", type=model_path, metavar="MODEL", help=MODEL_HELP)
    parser.add_argument(
        "--cache-ratio",
        type=float,
        default=OffloadStrategy().gpu_cache_ratio,
        metavar="SHARE",
        help="of all neurons, that have a slot on the GPU",
    )


def run(arguments: argparse.Namespace) -> dict[str, object]:
    """One fact a line."""
    strategy = OffloadStrategy(gpu_cache_ratio=arguments.cache_ratio)
    import numba
    import torch
    import transformers

    import sparseflow
    from sparseflow.utils.home import sparseflow_home

    facts: dict[str, object] = {
        "sparseflow": sparseflow.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numba": numba.__version__,
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "device": "cpu",
        "home": str(sparseflow_home()),
    }
    if arguments.model:
        facts |= _model_facts(arguments.model, strategy)
    if not arguments.json:
        for name, value in facts.items():
            print(f"{name:22} {value}")
    return facts


def _model_facts(name: str, strategy: OffloadStrategy) -> dict[str, object]:
    from sparseflow.core.checkpoint import Checkpoint, locate, model_name
    from sparseflow.core.config import SparseFlowConfig, profile_of
    from sparseflow.store.manifest import Manifest, is_store

    folder = locate(name)
    if is_store(folder):
        profile = Manifest.load(folder).profile
    else:
        checkpoint = Checkpoint(folder, model_name(name))
        profile = profile_of(checkpoint.config, checkpoint.dtype(), checkpoint.name)
    gpu_neurons = SparseFlowConfig(profile, strategy).get_gpu_neuron_count()
    return asdict(profile) | {
        "bundle_nbytes": profile.bundle_nbytes,
        "neurons_nbytes": profile.neurons_nbytes,
        "gpu_neurons_per_layer": gpu_neurons,
    }
