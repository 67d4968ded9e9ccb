"""SparseFlow: large ReLU language models in little memory, by moving only the neurons that fire.

The names below are loaded when they are first used, so that importing one of the torch-free sub-packages stays quick.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparseflow.core.config import ModelProfile, OffloadStrategy, SparseFlowConfig
    from sparseflow.core.weight_manager import DiskWeightStore, WeightCache
    from sparseflow.models.opt_sparse import SparseOPTForCausalLM
    from sparseflow.orchestration.transfer_coordinator import NeuronTransferPlan
    from sparseflow.utils.tensor_ops import measure_memory_usage, reset_memory_stats

__version__ = "0.1.0"
"""Of this package."""

_HOME_OF = {
    "DiskWeightStore": "sparseflow.core.weight_manager",
    "ModelProfile": "sparseflow.core.config",
    "NeuronTransferPlan": "sparseflow.orchestration.transfer_coordinator",
    "OffloadStrategy": "sparseflow.core.config",
    "SparseFlowConfig": "sparseflow.core.config",
    "SparseOPTForCausalLM": "sparseflow.models.opt_sparse",
    "WeightCache": "sparseflow.core.weight_manager",
    "measure_memory_usage": "sparseflow.utils.tensor_ops",
    "reset_memory_stats": "sparseflow.utils.tensor_ops",
}

__all__ = [
    "DiskWeightStore",
    "ModelProfile",
    "NeuronTransferPlan",
    "OffloadStrategy",
    "SparseFlowConfig",
    "SparseOPTForCausalLM",
    "WeightCache",
    "__version__",
    "measure_memory_usage",
    "reset_memory_stats",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
