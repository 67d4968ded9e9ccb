"""Print what this installation runs on, and what a model looks like."""

import argparse
import os
import platform
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from sparseflow.cli.arguments import MODEL_HELP, add_named_model, add_slots_ratio, take_named_model
from sparseflow.core.config import OffloadStrategy
from sparseflow.utils.sizes import format_size

if TYPE_CHECKING:
    from sparseflow.store.manifest import Manifest

LOADS = "torch"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """MODEL --gpu-cache-ratio"""
    add_named_model(parser, MODEL_HELP)
    add_slots_ratio(parser, "of all neurons, that have a slot on the GPU")


check = take_named_model


def run(arguments: argparse.Namespace) -> dict[str, object]:
    """One fact a line."""
    facts = _machine_facts()
    if arguments.model:
        facts |= _model_facts(arguments.model, OffloadStrategy(gpu_cache_ratio=arguments.gpu_cache_ratio))
    if not arguments.json:
        print("\n".join(page(facts)))
    return facts


def page(facts: dict[str, Any]) -> list[str]:
    """A line a fact, sizes with their unit; nothing of what is not known."""
    lines = []
    for name, value in facts.items():
        if name.endswith("_nbytes") and value is not None:
            lines.append(f"{name.removesuffix('_nbytes'):24} {format_size(value)}")
        elif value not in (None, []):
            lines.append(f"{name:24} {', '.join(value) if isinstance(value, list) else value}")
    return lines


def _machine_facts() -> dict[str, Any]:
    import numba
    import torch
    import transformers

    import sparseflow
    from sparseflow.utils.home import sparseflow_home

    n_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return {
        "sparseflow": sparseflow.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numba": numba.__version__,
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "device": "cuda" if n_gpus else "cpu",
        "gpus": [torch.cuda.get_device_name(number) for number in range(n_gpus)],
        "home": str(sparseflow_home()),
    }


def _model_facts(name: str, strategy: OffloadStrategy) -> dict[str, Any]:
    from sparseflow.core.checkpoint import Checkpoint, locate, model_name
    from sparseflow.core.config import SparseFlowConfig, profile_of
    from sparseflow.store.manifest import Manifest, is_store

    folder = locate(name)
    memory: dict[str, int] = {}
    if is_store(folder):
        manifest = Manifest.load(folder)
        profile, memory = manifest.profile, memory_facts(manifest)
    else:
        checkpoint = Checkpoint(folder, model_name(name))
        profile = profile_of(checkpoint.config, checkpoint.dtype(), checkpoint.name)
    return {
        **asdict(profile),
        "gpu_neurons_per_layer": SparseFlowConfig(profile, strategy).get_gpu_neuron_count(),
        "bundle_nbytes": profile.bundle_nbytes,
        "neurons_nbytes": profile.neurons_nbytes,
        **memory,
    }


def memory_facts(manifest: "Manifest") -> dict[str, int]:
    """Bytes: always in memory, all of it in memory, and the least that it runs in."""
    from sparseflow.engine.memory_plan import fixed_nbytes, least_nbytes

    fixed = fixed_nbytes(manifest)
    return {
        "codes_nbytes": manifest.nbytes_under("predictors/"),
        "always_in_memory_nbytes": fixed,
        "all_in_memory_nbytes": fixed + manifest.nbytes_under("neurons/"),
        "least_memory_nbytes": least_nbytes(manifest),
    }
