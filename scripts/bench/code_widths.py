"""How fc1 should be coded: bytes per token for each way to split the bits into planes, each group size and bound.

    demo=sparseflow/assets/demo_model
    python scripts/bench/code_widths.py --model $demo --text $demo/heldout.txt
    python scripts/bench/code_widths.py --model /tmp/opt-1.3b --layers 0 12 23 --tokens 32

Runs the dense model over some tokens (of the text, else random ones), codes fc1 in each way, and counts what one decode
step would read: scales, norms and the first plane of all neurons; each further plane of the neurons that the planes
before it have not settled; fc1's half of each candidate's bundle; fc2's half of each active one ("whole": of each
candidate). The unit is the MLP's own bytes: 1.000 is the dense MLP. The bounds are those of `kernels/bounds.py`.

A way is written `8` (one plane), `4+4` (two), and so on; `r` in front: stochastic rounding, with Hoeffding's margin.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer, OPTForCausalLM

from sparseflow.orchestration.neuron_predictor import EXACT_FAILURE_PROBABILITY

WAYS = ("r8", "r6", "8", "6", "5", "4", "3+3", "3+4", "3+5", "4+3", "4+4", "5+3", "6+2", "2+2+4", "4+2+2", "3+2+3")
GROUPS = (64, 128, 256)
BOUNDS = ("certified", "exact")


class Cost(NamedTuple):
    """Shares of the layer's neurons, and bytes as a share of the MLP's.

    fine: neurons whose second plane is read. whole: bytes if a candidate's bundle were read whole.
    """

    active: float
    fine: float
    candidates: float
    nbytes: float
    whole: float


class Plane(NamedTuple):
    """What is known of fc1 when this plane and those before it are read.

    coded: (ffn, hidden). steps: (ffn, n_groups). variance: the sub-Gaussian proxy of an error, in squared steps.
    """

    coded: Tensor
    steps: Tensor
    n_bits: int
    variance: float


def mlp_inputs(model: OPTForCausalLM, ids: Tensor, layers: list[int]) -> dict[int, Tensor]:
    """(n_tokens, hidden) float64 for each layer: what fc1 sees."""
    seen: dict[int, Tensor] = {}
    hooks = [
        model.model.decoder.layers[layer].fc1.register_forward_pre_hook(
            lambda _module, inputs, layer=layer: seen.update({layer: inputs[0].flatten(0, -2).double()})
        )
        for layer in layers
    ]
    model(ids)
    for hook in hooks:
        hook.remove()
    return seen


def rounded(weight: Tensor, n_bits: int, group: int, generator: torch.Generator) -> list[Plane]:
    """Stochastic rounding: the error has mean 0 and a width of one step."""
    grouped = _grouped(weight, group)
    steps = grouped.abs().amax(2) / (2 ** (n_bits - 1) - 1)
    ratio = grouped / steps.clamp_min(1e-300)[:, :, None]
    codes = (ratio + torch.rand(ratio.shape, generator=generator, dtype=torch.float64)).floor()
    coded = (codes * steps[:, :, None]).flatten(1)[:, : weight.shape[1]]
    return [Plane(coded, steps, n_bits, 1 / 4)]


def dithered(weight: Tensor, bits: Sequence[int], group: int, generator: torch.Generator) -> list[Plane]:
    """One code with one dither, as wide as a step of the first plane; a plane is some of its bits, highest first.

    So at every plane the error is uniform in a step of that plane.
    """
    grouped = _grouped(weight, group)
    n_fine = 2 ** (sum(bits) - bits[0])  # steps in a step of the first plane
    steps = grouped.abs().amax(2) / ((2 ** bits[0] - 1) / 2 * n_fine)
    dither = torch.rand(grouped.shape[1:], generator=generator, dtype=torch.float64) * n_fine
    codes = (grouped / steps.clamp_min(1e-300)[:, :, None] + dither).floor()
    planes, width = [], n_fine
    for n_bits, following in zip(bits, [*bits[1:], 0], strict=True):
        coded = ((codes / width).floor() + 0.5) * width - dither
        coded = (coded * steps[:, :, None]).flatten(1)[:, : weight.shape[1]]
        planes.append(Plane(coded, steps * width, n_bits, 1 / 12))
        width //= 2**following
    return planes


def _grouped(weight: Tensor, group: int) -> Tensor:
    return torch.nn.functional.pad(weight, (0, -weight.shape[1] % group)).unflatten(1, (-1, group))


def costs(model: OPTForCausalLM, layer: int, x: Tensor, way: str, group: int) -> list[Cost]:
    """One layer, for each of BOUNDS."""
    fc1 = model.model.decoder.layers[layer].fc1
    weight, bias = fc1.weight.double(), fc1.bias.double() if fc1.bias is not None else 0
    ffn, hidden = weight.shape
    generator = torch.Generator().manual_seed(layer)
    bits = [int(n) for n in way.lstrip("r").split("+")]
    planes = rounded(weight, bits[0], group, generator) if "r" in way else dithered(weight, bits, group, generator)
    squares = _grouped(x, group).square().sum(2)
    d = EXACT_FAILURE_PROBABILITY / (len(model.model.decoder.layers) * ffn) / len(planes)
    active = float((x @ weight.T + bias > 0).double().mean())
    part = hidden * fc1.weight.element_size()
    result = []
    for bound in BOUNDS:
        is_open = torch.ones(len(x), ffn, dtype=torch.bool)
        nbytes, shares = 4.0 * planes[0].steps.shape[1], []
        for plane in planes:
            shares.append(float(is_open.double().mean()))
            nbytes += shares[-1] * (hidden * plane.n_bits / 8 + 8)
            if bound == "certified":
                margin = (weight - plane.coded).norm(dim=1) * x.norm(dim=1, keepdim=True)
            else:
                margin = torch.sqrt(squares @ plane.steps.square().T * (2 * plane.variance * np.log(1 / d)))
            is_open &= x @ plane.coded.T + bias + margin > 0
        found = float(is_open.double().mean())
        fine = shares[1] if len(planes) > 1 else 0.0
        total = nbytes + part * (found + active), nbytes + part * 2 * found
        result.append(Cost(active, fine, found, *(n / (2 * part) for n in total)))
    return result


def print_table(model: OPTForCausalLM, inputs: dict[int, Tensor], ways: Sequence[str], groups: Sequence[int]) -> None:
    """In Markdown; means over the layers."""
    print("| planes | group | active |" + "".join(f" {b}: fine | candidates | bytes | whole |" for b in BOUNDS))
    print("|---|---|---|" + "---|---|---|---|" * len(BOUNDS))
    for way in ways:
        for group in groups:
            means = [Cost(*mean) for mean in np.mean([costs(model, n, x, way, group) for n, x in inputs.items()], 0)]
            cells = [f" {c.fine:.1%} | {c.candidates:.1%} | {c.nbytes:.3f} | {c.whole:.3f} |" for c in means]
            print(f"| {way} | {group} | {means[0].active:.1%} |" + "".join(cells), flush=True)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a transformers checkpoint folder")
    parser.add_argument("--text", type=Path, help="text to run; else random tokens")
    parser.add_argument("--layers", type=int, nargs="+", help="which layers; else all")
    parser.add_argument("--tokens", type=int, default=256, help="how many positions")
    parser.add_argument("--ways", nargs="+", default=WAYS, help="which splits of the bits")
    parser.add_argument("--groups", type=int, nargs="+", default=GROUPS, help="columns that share a step")
    arguments = parser.parse_args()
    torch.set_grad_enabled(False)
    model = OPTForCausalLM.from_pretrained(arguments.model, dtype="auto").eval()
    if arguments.text:
        text = arguments.text.read_text(encoding="utf-8")
        ids = AutoTokenizer.from_pretrained(arguments.model)(text, return_tensors="pt").input_ids[:, : arguments.tokens]
    else:
        ids = torch.randint(
            4, model.config.vocab_size, (1, arguments.tokens), generator=torch.Generator().manual_seed(1)
        )
    layers = arguments.layers or list(range(model.config.num_hidden_layers))
    print_table(model, mlp_inputs(model, ids, layers), arguments.ways, arguments.groups)


if __name__ == "__main__":
    main()
