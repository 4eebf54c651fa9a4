"""The pool of pages: who has which, and that what is written is what is read."""

from __future__ import annotations

import pytest
import torch

from tests.engine.reference import CPU
from tuft.engine.kv_pages import KvPages, num_pages_of, page_rows
from tuft.models.architecture import DecoderConfig

CONFIG = DecoderConfig.from_hf(
    {
        "model_type": "llama",
        "vocab_size": 100,
        "hidden_size": 96,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
    }
)


def make_pages(count: int) -> KvPages:
    pages = KvPages(CONFIG, count, torch.float32, CPU)
    pages.pages.fill_(torch.nan)  # memory that was never written may hold anything
    return pages


@pytest.mark.parametrize(("num_tokens", "expected"), [(0, 0), (1, 1), (16, 1), (17, 2), (512, 32)])
def test_a_page_holds_sixteen_tokens(num_tokens: int, expected: int) -> None:
    assert num_pages_of(num_tokens) == expected


def test_a_page_has_one_owner_at_a_time() -> None:
    pages = make_pages(5)
    first, second = pages.take(2), pages.take(3)
    assert sorted(first + second) == [0, 1, 2, 3, 4]
    assert pages.num_free == 0
    pages.give_back(first)
    assert sorted(pages.take(2)) == sorted(first)


@pytest.mark.parametrize("lengths", [[1], [16], [37], [5, 32, 17]])
def test_what_is_written_is_read_again(lengths: list[int]) -> None:
    pages = make_pages(8)
    k, v = torch.randn(2, sum(lengths), 2, 16).unbind()
    owned = [pages.take(num_pages_of(length)) for length in lengths]
    pages.write(1, torch.tensor([page for own in owned for page in own]), torch.tensor(page_rows(lengths)), k, v)
    start = 0
    for length, own in zip(lengths, owned, strict=True):
        keys, values = pages.read(1, torch.tensor(own))
        assert torch.equal(keys[:length], k[start : start + length])
        assert torch.equal(values[:length], v[start : start + length])
        assert not keys[length:].any()  # no stray NaN
        assert not values[length:].any()
        start += length


def test_a_copy_is_a_page_of_its_own() -> None:
    pages = make_pages(3)
    source, target = pages.take(2)
    pages.pages[source] = 1.0
    pages.copy(source, target)
    pages.clear(source)
    assert pages.pages[target].eq(1.0).all()
    assert pages.pages[source].eq(0.0).all()
