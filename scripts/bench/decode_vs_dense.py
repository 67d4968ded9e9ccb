"""Decode speed beside transformers' dense model: same weights, same process, token by token in turn.

    python scripts/bench/decode_vs_dense.py --folder /tmp/opt-1.3b --preset 1.3b

makes a checkpoint of the published shape in FOLDER (random weights, fc1 biases shifted so that each neuron fires for
about 5 % of the tokens), converts it, and times decode steps of both models in turn, both fed the same random tokens
(what a random model would choose for itself soon repeats, and other neurons fire than were calibrated). Only the ratio
means much on a shared machine; the memory bandwidth of the moment stands beside it.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, OPTConfig, OPTForCausalLM

from sparseflow import SparseFlowConfig, SparseOPTForCausalLM
from sparseflow.core.weight_manager import DiskWeightStore
from sparseflow.utils.tensor_ops import read_bandwidth

PRESETS = {  # hidden, ffn, layers, heads, vocabulary, as published
    "tiny": (256, 1024, 4, 4, 4096),
    "125m": (768, 3072, 12, 12, 50272),
    "1.3b": (2048, 8192, 24, 32, 50272),
    "2.7b": (2560, 10240, 32, 32, 50272),
}


def make_checkpoint(folder: Path, preset: str, active_share: float, seed: int) -> None:
    """A float16 checkpoint whose neurons each fire for `active_share` of random tokens."""
    hidden, ffn, layers, heads, vocabulary = PRESETS[preset]
    config = OPTConfig(
        hidden_size=hidden, word_embed_proj_dim=hidden, ffn_dim=ffn, num_hidden_layers=layers,
        num_attention_heads=heads, vocab_size=vocabulary, max_position_embeddings=2048, dtype="float16",
    )  # fmt: skip
    torch.manual_seed(seed)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float16)
    model = OPTForCausalLM(config).eval()
    torch.set_default_dtype(default)

    def shift_bias(module: torch.nn.Linear, inputs: tuple[torch.Tensor, ...]) -> None:
        before = torch.nn.functional.linear(inputs[0], module.weight).flatten(0, -2)  # (n_tokens, ffn)
        module.bias.data = -before.float().quantile(1 - active_share, dim=0).half()

    hooks = [layer.fc1.register_forward_pre_hook(shift_bias) for layer in model.model.decoder.layers]
    with torch.inference_mode():
        model(torch.randint(4, vocabulary, (48, 32)))  # many contexts: what attention adds is common to one context
    for hook in hooks:
        hook.remove()
    model.save_pretrained(folder)


class Decoder:
    """One model in the middle of a text."""

    def __init__(self, model: Any, prompt: torch.Tensor) -> None:
        self.model = model
        self.cache = DynamicCache(config=model.config)
        self.step_s: list[float] = []
        self.next_token = self._forward(prompt)

    def _forward(self, ids: torch.Tensor) -> torch.Tensor:
        logits = self.model(ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1).logits
        return logits[:, -1:].argmax(-1)

    def step(self, token: torch.Tensor) -> None:
        """Decode one token and note how long it took."""
        start = time.perf_counter()
        self.next_token = self._forward(token)
        self.step_s.append(time.perf_counter() - start)


def compare(dense: Any, sparse: Any, prompt: torch.Tensor, n_tokens: int) -> dict[str, Any]:
    """Decode the same tokens with both, in turn."""
    with torch.inference_mode():
        rivals = {"dense": Decoder(dense, prompt), "sparse": Decoder(sparse, prompt)}
        sparse.reset_stats()
        agreed = 0
        for token in torch.randint(4, dense.config.vocab_size, (n_tokens, 1, 1)):
            for rival in rivals.values():
                rival.step(token)
            agreed += int(torch.equal(rivals["dense"].next_token, rivals["sparse"].next_token))
    dense_s, sparse_s = (rivals[name].step_s for name in ("dense", "sparse"))
    ratios = sorted(d / s for d, s in zip(dense_s, sparse_s, strict=True))
    counts = sparse.stats.decode
    return {
        "fidelity": sparse.fidelity,
        "dense_tokens_per_s": 1 / statistics.median(dense_s),
        "decode_tokens_per_s": 1 / statistics.median(sparse_s),
        "ratio_median": statistics.median(ratios),
        "ratio_quartiles": [ratios[len(ratios) // 4], ratios[3 * len(ratios) // 4]],
        "top1_agreement": agreed / n_tokens,
        "active_share": counts.active_share,
        "candidate_share": counts.candidate_share,
        "dense_layer_share": counts.dense_layer_share,
        "bytes_touched_per_token": sparse.bytes_touched_per_token(),
    }


def main() -> None:
    """One JSON line for each fidelity."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where checkpoint and store are, or shall be made")
    parser.add_argument("--preset", choices=PRESETS, default="1.3b")
    parser.add_argument("--active-share", type=float, default=0.05, help="target, per neuron")
    parser.add_argument("--tokens", type=int, default=64, help="decode steps of each model, for each fidelity")
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--fidelity", nargs="+", default=["exact", "certified"])
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    checkpoint, stores = arguments.folder / "checkpoint", arguments.folder / "stores"
    if not (checkpoint / "config.json").exists():
        make_checkpoint(checkpoint, arguments.preset, arguments.active_share, arguments.seed)
    store = DiskWeightStore(checkpoint, stores, quiet=False).initialize_from_pretrained()
    dense = OPTForCausalLM.from_pretrained(checkpoint, dtype="auto").eval()
    torch.manual_seed(arguments.seed + 1)
    prompt = torch.randint(4, store.profile.vocab_size, (1, arguments.prompt_tokens))
    config = SparseFlowConfig(store.profile)
    for fidelity in arguments.fidelity:
        sparse = SparseOPTForCausalLM(config, store, fidelity=fidelity)
        result = compare(dense, sparse, prompt, arguments.tokens)
        bandwidth = read_bandwidth()
        result |= {
            "preset": arguments.preset,
            "threads": torch.get_num_threads(),
            "read_bandwidth_gb_per_s": bandwidth / 1e9,
            "limit_tokens_per_s": bandwidth / result["bytes_touched_per_token"],
        }
        print(json.dumps(result))


if __name__ == "__main__":
    main()
