"""A program to start from: open a model, continue three prompts, print what it cost.

python -m sparseflow.examples.demo_generation [MODEL]
"""

import sys
import time

from transformers import AutoConfig, PreTrainedTokenizerBase

from sparseflow import (
    DiskWeightStore,
    OffloadStrategy,
    SparseFlowConfig,
    SparseOPTForCausalLM,
    measure_memory_usage,
    reset_memory_stats,
)
from sparseflow.assets import DEMO_MODEL
from sparseflow.utils.tokenizer import tokenizer_of

PROMPTS = ("In the beginning", "Enter HAMLET, reading.", "Blessed are they that")


def setup_model(
    model_name: str = str(DEMO_MODEL), gpu_cache_ratio: float = 0.3
) -> tuple[SparseOPTForCausalLM, PreTrainedTokenizerBase, SparseFlowConfig]:
    """Convert once, then open. model_name: a checkpoint folder or a hub id such as facebook/opt-1.3b."""
    hf_config = AutoConfig.from_pretrained(model_name, trust_remote_code=False)
    strategy = OffloadStrategy(gpu_cache_ratio=gpu_cache_ratio)
    config = SparseFlowConfig.from_transformers_config(hf_config, strategy=strategy)
    store = DiskWeightStore(model_name)
    store.initialize_from_pretrained(hf_config)
    return SparseOPTForCausalLM(config, store), tokenizer_of(store.model_files), config


def generate_text(
    model: SparseOPTForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    max_tokens: int = 100,
    temperature: float = 0.9,
) -> str:
    """Continue a prompt by sampling; temperature 0 always takes the likeliest token."""
    inputs = tokenizer(prompt, return_tensors="pt")
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    output = model.generate(**inputs, max_new_tokens=max_tokens, **sampling)
    return str(tokenizer.decode(output[0], skip_special_tokens=True))


def print_performance_stats(model: SparseOPTForCausalLM, sf_config: SparseFlowConfig) -> None:
    """Shares of neurons, and memory."""
    counts = model.stats.decode
    now, peak = measure_memory_usage()
    print(f"model              {sf_config.profile.num_layers} layers of {sf_config.profile.ffn_dimension} neurons")
    print(f"neurons active     {counts.active_share or 0:.1%}")
    print(f"neurons computed   {counts.candidate_share or 0:.1%}")
    print(f"memory             {now:.2f} GiB now, {peak:.2f} GiB at most")


def main() -> None:
    """Three prompts, 80 tokens each."""
    model, tokenizer, config = setup_model(sys.argv[1] if len(sys.argv) > 1 else str(DEMO_MODEL))
    reset_memory_stats()
    for prompt in PROMPTS:
        start = time.perf_counter()
        text = generate_text(model, tokenizer, prompt, max_tokens=80)
        print(f"{text}\n  [{time.perf_counter() - start:.2f} s]\n")
    print_performance_stats(model, config)


if __name__ == "__main__":
    main()
