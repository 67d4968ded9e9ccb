"""Converting takes less memory than two layers and the largest tensor of the rest, however many layers there are."""

import json
from collections.abc import Callable
from pathlib import Path

import opt_family
import pytest
import torch
from child_process import run_python
from transformers import OPTConfig

HIDDEN, FFN, LAYERS, VOCAB = 1024, 4096, 6, 8000
LAYER_NBYTES = 2 * (2 * HIDDEN * FFN + 4 * HIDDEN * HIDDEN)
LARGEST_NBYTES = 2 * VOCAB * HIDDEN

CONVERT = """
import json, sys
from pathlib import Path
import transformers
from sparseflow.core.checkpoint import Checkpoint
from sparseflow.core.converter import convert
from sparseflow.store.manifest import Manifest

def status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))

warm_up, checkpoint, folder = map(Path, sys.argv[1:])
convert(Checkpoint(warm_up), folder / "warm-up", quiet=True)
Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
before = status("VmRSS")
convert(Checkpoint(checkpoint), folder / "store", quiet=True)
print(json.dumps({"before": before, "peak": status("VmHWM") - before}))
"""


@pytest.fixture(params=["safetensors", "bin"])
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    config = OPTConfig(
        hidden_size=HIDDEN,
        ffn_dim=FFN,
        num_hidden_layers=LAYERS,
        num_attention_heads=16,
        vocab_size=VOCAB,
        max_position_embeddings=64,
    )
    folder = tmp_path / "checkpoint"
    opt_family.write_wide(folder, config, torch.float16)
    if request.param == "bin":
        torch.save(opt_family.tensors_in(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    return folder


def test_peak_is_under_two_layers_and_the_largest_tensor(
    checkpoint: Path, family_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    measured = json.loads(run_python(CONVERT, family_checkpoint("base", "float16"), checkpoint, tmp_path))
    limit = 2 * LAYER_NBYTES + LARGEST_NBYTES
    whole = sum(path.stat().st_size for path in checkpoint.iterdir())
    facts = measured | {"limit": limit, "checkpoint": whole}
    print({name: f"{nbytes / 2**20:.1f} MiB" for name, nbytes in facts.items()})
    assert whole > 2 * limit, "a converter that holds all of it would pass"
    assert measured["peak"] < limit
