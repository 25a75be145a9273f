"""Pages of one KV pool: who holds them, and which hold content that can be found again."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence


class BlockPool:
    """Page ids 1 to `num_pages`; page 0 is the null page and never handed out.

    Every page is in exactly one of three states:

        free    holds nothing of use
        used    one or more owners (its reference count)
        cached  no owner, but its content has a digest: evicted, least recently used first, only
                when no page is free; pages released as `spare` go before all others
    """

    def __init__(self, num_pages: int) -> None:
        self.total = num_pages
        self._free = list(range(num_pages, 0, -1))
        self._owners: Counter[int] = Counter()
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._spare: OrderedDict[int, None] = OrderedDict()  # cached, but evicted first
        self._page_of: dict[bytes, int] = {}
        self._digest_of: dict[int, bytes] = {}

    @property
    def available(self) -> int:
        """Pages that `allocate` can hand out, cached ones included."""
        return len(self._free) + self.cached

    @property
    def used(self) -> int:
        return len(self._owners)

    @property
    def cached(self) -> int:
        return len(self._cached) + len(self._spare)

    def allocate(self) -> int:
        """A page with one owner and unknown content. The caller has looked at `available`."""
        if self._free:
            page = self._free.pop()
        else:
            page, _ = (self._spare or self._cached).popitem(last=False)
            del self._page_of[self._digest_of.pop(page)]
        self._owners[page] = 1
        return page

    def share(self, page: int) -> None:
        """Add an owner to a used or cached page."""
        assert page in self._owners or page in self._digest_of, f"page {page} is free"
        self._cached.pop(page, None)
        self._spare.pop(page, None)
        self._owners[page] += 1

    def release(self, page: int, *, spare: bool = False) -> None:
        """Take one owner away; without owners a page is cached if it has a digest, else free.

        Args:
            spare: its content is unlikely to be asked for: evict it before other cached pages.
        """
        assert self._owners[page] > 0, f"page {page} has no owner"
        self._owners[page] -= 1
        if self._owners[page]:
            return
        del self._owners[page]
        if page in self._digest_of:
            (self._spare if spare else self._cached)[page] = None
        else:
            self._free.append(page)

    def register(self, page: int, digest: bytes) -> None:
        """Make a used page findable. The first page of a digest stays the one that is found."""
        assert page in self._owners, f"page {page} is not in use"
        if page not in self._digest_of and digest not in self._page_of:
            self._page_of[digest] = page
            self._digest_of[page] = digest

    def lookup(self, digest: bytes) -> int | None:
        """The page with this content; it is neither shared nor protected by being looked up."""
        return self._page_of.get(digest)

    def leading(self, digests: Sequence[bytes]) -> int:
        """How many of the first digests have a page, up to the first one that has none."""
        for count, digest in enumerate(digests):
            if digest not in self._page_of:
                return count
        return len(digests)

    def in_use(self, digests: Iterable[bytes]) -> int:
        """How many of the contents lie on pages that have an owner."""
        return sum(self._page_of.get(digest) in self._owners for digest in digests)

    def check_integrity(self, owned: Iterable[int]) -> None:
        """Assert that the books balance; `owned` lists every page once per owner."""
        assert Counter(owned) == self._owners, "reference counts are not the owners"
        states = [*self._free, *self._owners, *self._cached, *self._spare]
        assert len(states) == len(set(states)) == self.total, "free + used + cached is not total"
        assert all(0 < page <= self.total for page in states), "a page id is out of range"
        assert {page: digest for digest, page in self._page_of.items()} == self._digest_of
        cached = {*self._cached, *self._spare}
        assert cached <= set(self._digest_of), "a cached page has no digest"
        assert not set(self._free) & set(self._digest_of), "a free page has a digest"
