"""The two pools of pages and what a request holds of them: growth, window, prefix hits, release.

Block lists of a request are indexed by logical block:

    full_blocks    [page, page, page, page, page, ...]   every block so far
    window_blocks  [page,    0,    0, page, page, ...]   sinks, then the blocks a query can see

A model without windowed heads has no window pool, one without retrieval heads no full pool; the
list of an absent pool stays empty.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from engine.block_digest import extend_digests
from engine.block_pool import BlockPool
from engine.request import Request


class KvPools:
    """Hands pages of both pools to requests. Counts only; the worker owns the memory."""

    def __init__(
        self,
        *,
        full_pages: int,
        window_pages: int,
        block_tokens: int,
        window_tokens: int = 0,
        sink_tokens: int = 0,
        prefix_caching: bool = True,
        cache_generated: bool = False,
    ) -> None:
        """
        Args:
            full_pages, window_pages: usable pages, the null page not counted; 0: no such pool.
            block_tokens: tokens per page.
            window_tokens, sink_tokens: the window rule; unread without a window pool.
            prefix_caching: keep prompt pages findable.
            cache_generated: also those of generated tokens.
        """
        self.full = BlockPool(full_pages)
        self.window = BlockPool(window_pages)
        self.block_tokens = block_tokens
        self.window_tokens = window_tokens
        self.sink_tokens = sink_tokens
        self.prefix_caching = prefix_caching
        self.cache_generated = cache_generated

    @property
    def has_full(self) -> bool:
        return self.full.total > 0

    @property
    def has_window(self) -> bool:
        return self.window.total > 0

    def blocks(self, tokens: int) -> int:
        """Blocks that hold `tokens` tokens."""
        return -(-tokens // self.block_tokens)

    def needed(self, tokens: int, chunk: int = 1) -> tuple[int, int]:
        """Most pages (full, window) that a sequence grown to `tokens` in chunks holds at once.

        With single tokens it is the least that lets a sequence get on: chunks are cut to fit.
        """
        blocks = self.blocks(tokens)
        live = self.blocks(self.window_tokens + chunk) + 2  # a partial block at each end, and sinks
        return blocks * self.has_full, min(blocks, live) * self.has_window

    @property
    def free_tokens(self) -> int:
        """Tokens of context that still fit, cached pages included.

        The window pool bounds them only where another window does not fit: a sequence that has its
        window may grow for ever in there.
        """
        window = self.window.available * self.block_tokens
        if not self.has_full:
            return window
        full = self.full.available * self.block_tokens
        live = self.blocks(self.window_tokens + 1) + 2  # as in `needed`
        bounded = self.has_window and self.window.available < live
        return min(full, window) if bounded else full

    def missing(self, request: Request, tokens: int) -> tuple[int, int]:
        """Those of the `needed` pages that the request does not hold yet."""
        full, window = self.needed(tokens)
        held = len(request.window_blocks) - request.window_start + (request.window_start > 0)
        return max(full - len(request.full_blocks), 0), max(window - held, 0)

    def reachable(self, request: Request) -> int:
        """How many tokens of the request the pages that can be had now would hold."""
        limit, block = request.total, self.block_tokens
        if self.has_full and len(request.full_blocks) * block < limit:
            limit = min(limit, (len(request.full_blocks) + self.full.available) * block)
        if self.has_window and len(request.window_blocks) * block < limit:
            limit = min(limit, (len(request.window_blocks) + self.window.available) * block)
        return limit

    def grow(self, request: Request, tokens: int) -> None:
        """Allocate pages for the first `tokens` positions; the caller asked `reachable`."""
        blocks = self.blocks(tokens)
        if self.has_full:
            _grow(self.full, request.full_blocks, blocks)
        if self.has_window:
            _grow(self.window, request.window_blocks, blocks)

    def match(self, request: Request) -> int:
        """Tokens of the longest usable cached prefix; at least one token stays to compute.

        A prefix of h tokens is usable if all its full pages are there, and the window pages of the
        sinks and of every position that the query at h sees.
        """
        digests = self.sharable(request)
        if self.has_full:
            digests = digests[: self.full.leading(digests)]
        return self._window_match(digests) * self.block_tokens

    def sharable(self, request: Request) -> list[bytes]:
        """Digests of the blocks that the request could take over from others if they were there."""
        if not self.prefix_caching or request.params.prompt_logprobs is not None:
            return []
        self._digest(request)
        return request.digests[: (request.total - 1) // self.block_tokens]

    def in_use(self, request: Request, tokens: int) -> int:
        """Full pages of a prefix that `match` found which others hold: sharing them is free."""
        return self.full.in_use(request.digests[: tokens // self.block_tokens])

    def is_cached(self, digest: bytes) -> bool:
        """Whether the block with this digest need not be computed again."""
        return (self.full if self.has_full else self.window).lookup(digest) is not None

    def take(self, request: Request, tokens: int) -> None:
        """Share the pages of a prefix that `match` found with a request that holds none."""
        assert not request.full_blocks
        assert not request.window_blocks
        blocks = tokens // self.block_tokens
        digests = request.digests[:blocks]
        if self.has_full:
            request.full_blocks.extend(_share(self.full, digests))
        if self.has_window:
            start = self._first_visible(tokens)
            keeps_sinks = blocks > 0 and self.sink_tokens > 0 and start > 0
            request.window_blocks.extend([0] * start)
            request.window_blocks.extend(_share(self.window, digests[start:]))
            if keeps_sinks:
                request.window_blocks[0] = next(_share(self.window, digests[:1]))
            request.window_start = start
        request.registered = blocks
        request.cached = request.computed = tokens

    def commit(self, request: Request) -> None:
        """After a step: make full blocks findable and give back what left the window."""
        if self.prefix_caching:
            self._register(request)
        if self.has_window:
            self._slide(request)

    def release(self, request: Request) -> None:
        """Give everything back. Tails first, so that they are evicted before what leads to them."""
        for pool, pages in ((self.full, request.full_blocks), (self.window, request.window_blocks)):
            for page in reversed(pages):
                if page:
                    pool.release(page)
            pages.clear()
        request.window_start = 0
        request.registered = 0

    def check_integrity(self, requests: Iterable[Request]) -> None:
        """Assert that the pages of the given requests are exactly the used ones."""
        requests = list(requests)
        self.full.check_integrity(page for r in requests for page in r.full_blocks)
        self.window.check_integrity(page for r in requests for page in r.window_blocks if page)
        for request in requests:
            blocks = self.blocks(request.computed)
            assert not self.has_full or len(request.full_blocks) >= blocks
            assert not self.has_window or len(request.window_blocks) >= blocks
            live = request.window_blocks[self._first_visible(request.computed) : blocks]
            assert all(live), "a page inside the window is gone"

    def _first_visible(self, position: int) -> int:
        """The first block with a token that the query at `position` sees through its window."""
        return max(position - self.window_tokens + 1, 0) // self.block_tokens

    def _window_match(self, digests: list[bytes]) -> int:
        """The most leading blocks whose visible window pages, and sinks, are there."""
        blocks = len(digests)
        if not self.has_window or not blocks:
            return blocks
        if self.sink_tokens and self.window.lookup(digests[0]) is None:
            return 0
        block = blocks - 1
        while block >= self._first_visible(blocks * self.block_tokens):
            if self.window.lookup(digests[block]) is None:
                blocks = block
            block -= 1
        return blocks

    def _digest(self, request: Request) -> None:
        """Bring the digests of a request up to date: of its prompt, or of all its tokens."""
        stop = request.total if self.cache_generated else request.prompt_len
        if stop // self.block_tokens > len(request.digests):
            tokens = request.tokens(len(request.digests) * self.block_tokens, stop)
            extend_digests(request.digests, tokens, self.block_tokens)

    def _register(self, request: Request) -> None:
        sharable = request.computed if self.cache_generated else request.prompt_len
        blocks = min(request.computed, sharable) // self.block_tokens
        if request.registered < blocks:
            self._digest(request)
        for block in range(request.registered, blocks):
            if self.has_full:
                self.full.register(request.full_blocks[block], request.digests[block])
            if self.has_window and request.window_blocks[block]:
                self.window.register(request.window_blocks[block], request.digests[block])
        request.registered = max(request.registered, blocks)

    def _slide(self, request: Request) -> None:
        """Release the blocks before the first visible one, except the one of the sinks.

        A prompt that ends as this one does needs only the window of its end: what slid out before
        is spare, else every long prompt would push the windows of all others out of the cache.
        """
        start = self._first_visible(request.computed)
        longest_hit = (request.prompt_len - 1) // self.block_tokens * self.block_tokens
        tail = self._first_visible(longest_hit)
        first = 1 if self.sink_tokens else 0
        for block in range(max(request.window_start, first), start):
            if request.window_blocks[block]:
                self.window.release(request.window_blocks[block], spare=block < tail)
                request.window_blocks[block] = 0
        request.window_start = max(request.window_start, start)


def _grow(pool: BlockPool, pages: list[int], blocks: int) -> None:
    while len(pages) < blocks:
        pages.append(pool.allocate())


def _share(pool: BlockPool, digests: list[bytes]) -> Iterator[int]:
    for digest in digests:
        page = pool.lookup(digest)
        assert page is not None, "match has seen it"
        pool.share(page)
        yield page
