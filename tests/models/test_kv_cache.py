"""Keys and values appended in place are those that transformers' cache would hold."""

import copy

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, OPTConfig, StaticCache

from sparseflow.models import kv_cache
from sparseflow.models.kv_cache import append

CONFIG = OPTConfig(hidden_size=8, num_attention_heads=2, num_hidden_layers=2, ffn_dim=8, max_position_embeddings=400)


@pytest.fixture(params=[True, False], ids=["layers of a config", "layers as they come"])
def caches(request: pytest.FixtureRequest) -> tuple[DynamicCache, DynamicCache]:
    made = [DynamicCache(config=CONFIG) if request.param else DynamicCache() for _ in range(2)]
    return made[0], made[1]


def new(length: int, n_sequences: int = 1) -> tuple[Tensor, Tensor]:
    return torch.randn(n_sequences, 2, length, 4), torch.randn(n_sequences, 2, length, 4)


def assert_same(cache: DynamicCache, twin: DynamicCache) -> None:
    for layer, other in zip(cache.layers, twin.layers, strict=True):
        assert torch.equal(layer.keys, other.keys)
        assert torch.equal(layer.values, other.values)
    assert cache.get_seq_length() == twin.get_seq_length()


def test_any_lengths(caches: tuple[DynamicCache, DynamicCache]) -> None:
    cache, twin = caches
    for length in (5, 1, 1, 70, 1, 3, *[1] * 60):
        for layer in range(2):
            given = new(length)
            found = append(cache, layer, *given)
            expected = twin.update(*given, layer)
            assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert_same(cache, twin)


def test_most_tokens_move_nothing() -> None:
    cache = DynamicCache(config=CONFIG)
    places = [append(cache, 0, *new(1))[0].data_ptr() for _ in range(kv_cache._LEAST_ROOM)]
    assert len(set(places)) == 1


@pytest.mark.parametrize("change", ["crop", "reorder", "repeat", "select", "reset"])
def test_changed_between(caches: tuple[DynamicCache, DynamicCache], change: str) -> None:
    """What holds the cache may crop it (prompt lookup), reorder it (beams), and go on."""
    for given in (new(6, 3), new(6, 3)):
        for _ in range(2):
            for cache, way in zip(caches, (append, lambda cache, layer, *kv: cache.update(*kv, layer)), strict=True):
                for layer in range(2):
                    way(cache, layer, *given)
        for cache in caches:
            match change:
                case "crop":
                    cache.crop(-2)
                case "reorder":
                    cache.reorder_cache(torch.tensor([2, 0, 0]))
                case "repeat":
                    cache.batch_repeat_interleave(2)
                    cache.batch_select_indices(torch.tensor([0, 1, 4]))
                case "select":
                    cache.batch_select_indices(torch.tensor([1, 1, 2]))
                case "reset":
                    cache.reset()
        last = new(1, 3)
        for layer in range(2):
            append(caches[0], layer, *last)
            caches[1].update(*last, layer)
        assert_same(*caches)


def test_branches_do_not_see_each_other() -> None:
    """A prompt's cache, copied or cropped, is continued in two ways."""
    cache = DynamicCache(config=CONFIG)
    append(cache, 0, *new(5))
    seen = cache.layers[0].keys
    before = seen.clone()
    branch = copy.deepcopy(cache)
    mine, theirs = new(1), new(1)
    append(cache, 0, *mine)
    append(branch, 0, *theirs)
    cache.crop(-1)
    after_crop = append(cache, 0, *theirs)[0]
    assert torch.equal(seen, before)
    assert torch.equal(branch.layers[0].keys[:, :, 5:], theirs[0])
    assert torch.equal(after_crop[:, :, 5:], theirs[0])


def test_what_was_handed_out_stays_after_a_crop() -> None:
    cache = DynamicCache(config=CONFIG)
    handed_out = append(cache, 0, *new(5))[0]
    before = handed_out.clone()
    cache.crop(-3)
    append(cache, 0, *new(2))
    assert torch.equal(handed_out, before)


def test_other_caches_keep_their_own_way() -> None:
    cache = StaticCache(config=CONFIG, max_cache_len=10)
    keys, _ = append(cache, 0, *new(3))
    assert keys.shape[2] == 10
