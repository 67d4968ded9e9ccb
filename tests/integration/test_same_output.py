"""Any number of processes on one server write what the dense model writes."""

from collections.abc import Callable
from pathlib import Path

import opt_family
import pytest
import torch
from dense_reference import DenseIds, greedy_ids
from processes import Host
from transformers import AutoTokenizer, OPTForCausalLM

N_TOKENS = 40
PROMPTS = [
    "HAMLET.\nTo be, or not to be,",
    "In the beginning",
    "Blessed are they that",
    "Enter the King",
    "And the Lord said unto Moses,",
    "ROMEO.\nBut soft, what light",
    "The quality of mercy",
    "And it came to pass",
]

GENERATE = """
from telling import generate, given, hear, open_model, tell

model = open_model(given.get("model"))
tell("open")
hear()
ids = generate(model, given["prompt"], given["n_tokens"])
tell({"ids": ids, "messages": model.source.counts().messages, "dense": model.stats.decode.dense_layer_share})
hear()
model.close()
"""

two, many = (pytest.param(n, marks=pytest.mark.slow) for n in (2, 8))


@pytest.fixture(scope="module")
def prompts(demo_model: Path) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    return [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]


def generate_at_once(host: Host, prompts: list[list[int]]) -> list[dict]:
    """What a process for each prompt tells; all generate at the same time."""
    clients = [host.client(GENERATE, name="s", prompt=prompt, n_tokens=N_TOKENS) for prompt in prompts]
    for client in clients:
        assert client.hear() == "open"
    assert len(host.servers[0].status()["sessions"]) == len(clients)
    for client in clients:
        client.say()
    told = [client.hear() for client in clients]
    for client in clients:
        client.say()
        client.finish()
    return told


@pytest.mark.parametrize("n_clients", [two, 4, many])
def test_clients_of_a_small_arena_write_what_the_dense_model_writes(
    n_clients: int, host: Host, demo_store: Path, prompts: list[list[int]], dense_ids: DenseIds
) -> None:
    server = host.serve(demo_store, cpu_cache_ratio=0.2, max_sessions=8)
    told = generate_at_once(host, prompts[:n_clients])
    assert [each["ids"] for each in told] == [dense_ids(prompt, N_TOKENS) for prompt in prompts[:n_clients]]
    assert all(each["dense"] == 0 for each in told)
    status = server.status()
    assert status["evictions"] > 0
    assert status["disk"]["bytes"] > 0


@pytest.mark.parametrize("n_clients", [2, many])
def test_clients_of_a_whole_model_write_what_the_dense_model_writes_without_a_message(
    n_clients: int, host: Host, demo_store: Path, prompts: list[list[int]], dense_ids: DenseIds
) -> None:
    server = host.serve(demo_store)
    told = generate_at_once(host, prompts[:n_clients])
    assert [each["ids"] for each in told] == [dense_ids(prompt, N_TOKENS) for prompt in prompts[:n_clients]]
    assert [each["messages"] for each in told] == [0] * n_clients
    status = server.status()
    assert status["models"][0]["is_resident"]
    assert status["evictions"] == 0


def test_two_models_of_one_server_are_told_apart_by_name(
    host: Host,
    demo_store: Path,
    prompts: list[list[int]],
    dense_ids: DenseIds,
    family_store: Callable[[str], Path],
    family_checkpoint: Callable[[str], Path],
) -> None:
    host.serve(demo_store, family_store("post_norm"), cpu_cache_ratio=0.3)
    other = OPTForCausalLM.from_pretrained(family_checkpoint("post_norm"), dtype=torch.float32).eval()
    prompt = opt_family.random_ids(other.config, 1, 4)[0].tolist()
    clients = [
        host.client(GENERATE, name="s", model="demo_model", prompt=prompts[0], n_tokens=40),
        host.client(GENERATE, name="s", model="post_norm", prompt=prompt, n_tokens=40),
    ]
    for client in clients:
        assert client.hear() == "open"
        client.say()
    assert [client.hear()["ids"] for client in clients] == [dense_ids(prompts[0], 40), greedy_ids(other, prompt, 40)]
    assert {session["model"] for session in host.servers[0].status()["sessions"]} == {"demo_model", "post_norm"}
