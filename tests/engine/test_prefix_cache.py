"""What is known of prompts: found by those who may, held while it is needed, gone when its place is wanted."""

from __future__ import annotations

import gc

from tests.engine.reference import CPU
from tests.engine.test_kv_pages import CONFIG, make_pages
from tuft.engine.kv_pages import KvPages
from tuft.engine.prefix_cache import CHUNK_TOKENS, Chunk, PrefixCache
from tuft.models.lora import Adapter
from tuft.types import LoraSpec

FULL = CHUNK_TOKENS // 16
"""Pages of a whole chunk."""


def tokens(seed: int, count: int = CHUNK_TOKENS) -> tuple[int, ...]:
    return tuple(range(seed, seed + count))


def make_cache(num_pages: int = 4 * FULL) -> tuple[PrefixCache, KvPages]:
    pages = make_pages(num_pages)
    return PrefixCache(pages), pages


def add(cache: PrefixCache, *seeds: int, scope: str = "a", adapter: Adapter | None = None) -> list[Chunk]:
    """Chunks behind each other, each held once: as a request that computes its prompt."""
    chunks: list[Chunk] = []
    for seed in seeds:
        known = cache.known(scope, adapter, chunks, tokens(seed))
        if known is not None:
            cache.hold(known)
            chunks.append(known)
        else:
            chunks.append(cache.add(scope, adapter, chunks, tokens(seed)))
    return chunks


def known(cache: PrefixCache, *seeds: int, scope: str = "a", adapter: Adapter | None = None) -> int:
    chunks: list[Chunk] = []
    for seed in seeds:
        chunk = cache.known(scope, adapter, chunks, tokens(seed))
        if chunk is None:
            break
        chunks.append(chunk)
    return len(chunks)


def make_adapter() -> Adapter:
    return Adapter(CONFIG.linear_shapes(), LoraSpec(rank=1), CPU, trainable=False)


def test_a_beginning_is_known_as_far_as_it_is_the_same() -> None:
    cache, _ = make_cache()
    add(cache, 1, 2)
    assert known(cache, 1, 2, 3) == 2
    assert known(cache, 1, 3) == 1
    assert known(cache, 2) == 0
    assert cache.known("a", None, [], tokens(1, 40)) is None  # a shorter chunk is another one


def test_what_one_scope_or_adapter_computed_is_not_known_to_another() -> None:
    cache, _ = make_cache()
    first, second = make_adapter(), make_adapter()
    add(cache, 1, scope="a", adapter=first)
    assert known(cache, 1, scope="a", adapter=first) == 1
    assert known(cache, 1, scope="b", adapter=first) == 0
    assert known(cache, 1, scope="a", adapter=second) == 0
    assert known(cache, 1, scope="a") == 0


def test_what_is_held_stays_and_the_longest_idle_leaves_first() -> None:
    cache, pages = make_cache(4 * FULL)
    held, old, young = add(cache, 1), add(cache, 2), add(cache, 3, 4)
    cache.let_go(old)
    cache.let_go(young)
    assert pages.num_free == 0
    assert cache.num_takeable == 3 * FULL
    taken = cache.take(FULL)
    assert (known(cache, 1), known(cache, 2), known(cache, 3, 4)) == (1, 0, 2)
    taken += cache.take(1)
    assert (known(cache, 1), known(cache, 3, 4)) == (1, 1)  # the end of a prompt leaves before its beginning
    cache.give_back(taken)
    cache.let_go(held)
    assert cache.num_takeable == 4 * FULL


def test_a_beginning_that_others_hold_outlives_the_request_that_computed_it() -> None:
    cache, _ = make_cache(4 * FULL)
    first, second = add(cache, 1, 2), add(cache, 1, 3)
    cache.let_go(first)
    assert cache.num_takeable == 2 * FULL  # one free, and the end of the first prompt
    cache.take(2 * FULL)
    assert known(cache, 1, 3) == 2
    assert known(cache, 1, 2) == 1
    assert second[0].num_holders == 1


def test_a_chunk_that_is_computed_twice_is_known_once() -> None:
    cache, pages = make_cache()
    shared = add(cache, 1)
    own = [cache.add("a", None, [], tokens(1))]
    own.append(cache.add("a", None, own, tokens(2)))
    assert known(cache, 1, 2) == 1
    cache.let_go(own)
    assert pages.num_free == 3 * FULL
    cache.let_go(shared)
    assert cache.num_takeable == 4 * FULL


def test_what_an_adapter_computed_goes_with_it() -> None:
    cache, pages = make_cache()
    adapter = make_adapter()
    cache.let_go(add(cache, 1, 2, adapter=adapter))
    cache.let_go(add(cache, 3))
    del adapter
    gc.collect()
    cache.take(1)
    assert pages.num_free == 3 * FULL - 1
    assert known(cache, 3) == 1


def test_when_all_is_forgotten_what_is_held_is_freed_later() -> None:
    cache, _ = make_cache()
    held = add(cache, 1, 2)
    cache.let_go(add(cache, 3))
    cache.forget_all()
    assert (known(cache, 1), known(cache, 3)) == (0, 0)
    assert cache.num_takeable == 2 * FULL
    cache.let_go(held)
    assert cache.num_takeable == 4 * FULL
    assert len(cache.take(4 * FULL)) == 4 * FULL
