"""What prompts begin with, computed once: a tree of chunks with their pages, one tree a tenant and adapter.

A prompt is cut every ``CHUNK_TOKENS`` positions, and a chunk is always computed with the same shapes, whatever was
known before it; so nobody's bits depend on what was found here. A chunk that requests hold stays; of the others the one
that was held longest ago leaves first, once its pages are wanted. What an adapter computed goes with it.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Sequence

from torch import Tensor

from tuft.engine.kv_pages import KvPages, num_pages_of
from tuft.models.lora import Adapter

CHUNK_TOKENS = 128
"""Whole pages; many enough for products to be fast, few enough for decoding to wait for one."""


class Chunk:
    """Up to ``CHUNK_TOKENS`` tokens behind those of ``parent``. ``last_x_1D``: the hidden state of its last token."""

    def __init__(self, tokens: tuple[int, ...], parent: Chunk | None, pages: list[int]) -> None:
        self.tokens = tokens
        self.parent = parent
        self.pages = pages
        self.children: dict[tuple[int, ...], Chunk] = {}
        self.is_known = False
        self.num_holders = 0
        self.last_x_1D: Tensor | None = None


class PrefixCache:
    """Owns the pages of all prompts, and takes for continuations what is left."""

    def __init__(self, pages: KvPages) -> None:
        self._pages = pages
        self._roots: dict[tuple[str, int | None], Chunk] = {}
        self._idle: dict[Chunk, None] = {}  # held by nobody; in the order in which they leave, children before parents
        self._num_idle_pages = 0
        self._dead: deque[tuple[str, int | None]] = deque()

    @property
    def num_takeable(self) -> int:
        """Pages that are free or that nobody holds."""
        return self._pages.num_free + self._num_idle_pages

    def known(
        self, scope: str, adapter: Adapter | None, before: Sequence[Chunk], tokens: tuple[int, ...]
    ) -> Chunk | None:
        """The chunk with ``tokens`` behind those of ``before``, if there is one."""
        parent = before[-1] if before else self._root(scope, adapter)
        return parent.children.get(tokens)

    def add(self, scope: str, adapter: Adapter | None, before: Sequence[Chunk], tokens: tuple[int, ...]) -> Chunk:
        """A new chunk behind those of ``before``, with pages of its own, held once. It is known from now on, unless
        another with the same tokens is."""
        parent = before[-1] if before else self._root(scope, adapter)
        chunk = Chunk(tokens, parent, self.take(num_pages_of(len(tokens))))
        chunk.num_holders = 1
        if chunk.tokens not in parent.children and (parent.is_known or not before):
            parent.children[chunk.tokens] = chunk
            chunk.is_known = True
        return chunk

    def hold(self, chunk: Chunk) -> None:
        if chunk.num_holders == 0:
            del self._idle[chunk]
            self._num_idle_pages -= len(chunk.pages)
        chunk.num_holders += 1

    def let_go(self, chunks: Sequence[Chunk]) -> None:
        """The end of what one request held: ``chunks`` in the order of the prompt."""
        for chunk in reversed(chunks):
            chunk.num_holders -= 1
            if chunk.num_holders == 0:
                if chunk.is_known:
                    self._idle[chunk] = None
                    self._num_idle_pages += len(chunk.pages)
                else:
                    self._pages.give_back(chunk.pages)

    def give_back(self, pages: Sequence[int]) -> None:
        """Pages that were taken."""
        self._pages.give_back(pages)

    def take(self, count: int) -> list[int]:
        """``count`` pages; as many are takeable."""
        self._bury()
        while self._pages.num_free < count:
            self._forget(next(iter(self._idle)))
        return self._pages.take(count)

    def forget_all(self) -> None:
        """Nothing is known any more; what is held stays with its holders."""
        for chunk in list(self._idle):
            self._forget(chunk)
        self._roots.clear()

    def _forget(self, chunk: Chunk) -> None:
        assert not chunk.children, "children leave before their parents"
        del self._idle[chunk]
        self._num_idle_pages -= len(chunk.pages)
        self._pages.give_back(chunk.pages)
        if chunk.parent is not None:
            del chunk.parent.children[chunk.tokens]

    def _root(self, scope: str, adapter: Adapter | None) -> Chunk:
        self._bury()
        key = (scope, None if adapter is None else id(adapter))
        if key not in self._roots:
            self._roots[key] = Chunk((), None, [])
            if adapter is not None:
                weakref.finalize(adapter, self._dead.append, key).atexit = False
        return self._roots[key]

    def _bury(self) -> None:
        """Forget what adapters computed that are gone, before another can have the same id."""
        while self._dead:
            root = self._roots.pop(self._dead.popleft(), None)
            below = [] if root is None else [*root.children.values()]
            for chunk in below:
                below += chunk.children.values()
            for chunk in reversed(below):
                self._forget(chunk)
