"""How wide the codes of fc1 should be: bytes per token for each width, group and bound.

    demo=sparseflow/assets/demo_model
    python scripts/bench/code_widths.py --model $demo --text $demo/heldout.txt
    python scripts/bench/code_widths.py --model /tmp/opt-1.3b/checkpoint --layers 0 12 23 --tokens 64

Runs the dense model over some tokens (of the text, else random ones), codes fc1 as the converter would at each width,
and counts what one decode step would read: codes, scales and norms, fc1's half of each candidate's bundle, fc2's half
of each active one. The unit is the MLP's own bytes: 1.000 is the dense MLP. The bounds are those of
`kernels/bounds.py`.
"""

import argparse
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer, OPTForCausalLM

from sparseflow.orchestration.neuron_predictor import EXACT_FAILURE_PROBABILITY

WIDTHS, GROUPS = (4, 5, 6, 7, 8), (32, 64, 128)


class Cost(NamedTuple):
    """Shares of the layer's neurons, and bytes as a share of the MLP's."""

    active: float
    candidates: float
    nbytes: float


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


def stochastic_codes(weight: Tensor, width: int, group: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The coded weights, (ffn, hidden) float64, and their steps, (ffn, n_groups), as `store.codes` makes them."""
    padding = -weight.shape[1] % group
    grouped = torch.nn.functional.pad(weight, (0, padding)).unflatten(1, (-1, group))
    steps = grouped.abs().amax(2) / (2 ** (width - 1) - 1)
    ratio = grouped / steps.clamp_min(1e-300)[:, :, None]
    floor = ratio.floor()
    codes = floor + (torch.rand(ratio.shape, generator=generator, dtype=torch.float64) < ratio - floor)
    return (codes * steps[:, :, None]).flatten(1)[:, : weight.shape[1]], steps


def costs(model: OPTForCausalLM, layer: int, x: Tensor, width: int, group: int) -> dict[str, Cost]:
    """One layer, by bound."""
    fc1 = model.model.decoder.layers[layer].fc1
    weight, bias = fc1.weight.double(), fc1.bias.double() if fc1.bias is not None else 0
    ffn, hidden = weight.shape
    coded, steps = stochastic_codes(weight, width, group, torch.Generator().manual_seed(layer))
    score = x @ coded.T + bias
    squares = torch.nn.functional.pad(x, (0, -hidden % group)).unflatten(1, (-1, group)).square().sum(2)
    d = EXACT_FAILURE_PROBABILITY / (len(model.model.decoder.layers) * ffn)
    margins = {
        "certified": (weight - coded).norm(dim=1) * x.norm(dim=1, keepdim=True),
        "exact": torch.sqrt(squares @ steps.square().T * (np.log(1 / d) / 2)),
    }
    active = float((x @ weight.T + bias > 0).double().mean())
    part = hidden * fc1.weight.element_size()
    code_nbytes = hidden * width / 8 + 4 * steps.shape[1] + 8
    result = {}
    for name, margin in margins.items():
        candidates = float((score + margin > 0).double().mean())
        result[name] = Cost(active, candidates, (code_nbytes + part * (candidates + active)) / (2 * part))
    return result


def main() -> None:
    """A table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a transformers checkpoint folder")
    parser.add_argument("--text", type=Path, help="text to run; else random tokens")
    parser.add_argument("--layers", type=int, nargs="+", help="which layers; else all")
    parser.add_argument("--tokens", type=int, default=256, help="how many positions")
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
    inputs = mlp_inputs(model, ids, layers)
    print("| bits | group | active | candidates certified | exact | bytes certified | exact |")
    print("|---|---|---|---|---|---|---|")
    for width in WIDTHS:
        for group in GROUPS:
            found = [costs(model, layer, inputs[layer], width, group) for layer in layers]
            mean = {name: Cost(*np.mean([cost[name] for cost in found], 0)) for name in ("certified", "exact")}
            certified, exact = mean["certified"], mean["exact"]
            print(
                f"| {width} | {group} | {exact.active:.1%} | {certified.candidates:.1%} | {exact.candidates:.1%} "
                f"| {certified.nbytes:.3f} | {exact.nbytes:.3f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
