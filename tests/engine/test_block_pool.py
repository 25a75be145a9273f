"""One pool: free, used and cached pages, and the names of contents."""

from __future__ import annotations

import hashlib

import pytest

from engine.block_digest import common_blocks, extend_digests
from engine.block_pool import BlockPool

A, B, C = (letter * 32 for letter in (b"a", b"b", b"c"))


def cached_pool(pages: int, digests: list[bytes]) -> tuple[BlockPool, dict[bytes, int]]:
    """A pool whose pages of the given contents have no owner, released in this order."""
    pool = BlockPool(pages)
    page_of = {digest: pool.allocate() for digest in digests}
    for digest, page in page_of.items():
        pool.register(page, digest)
    for page in page_of.values():
        pool.release(page)
    return pool, page_of


def test_hands_out_every_page_once_and_never_the_null_page() -> None:
    pool = BlockPool(5)
    pages = [pool.allocate() for _ in range(5)]
    assert sorted(pages) == [1, 2, 3, 4, 5]
    assert (pool.available, pool.used) == (0, 5)
    pool.check_integrity(pages)


def test_an_absent_pool_has_no_pages() -> None:
    pool = BlockPool(0)
    assert (pool.total, pool.available, pool.used, pool.cached) == (0, 0, 0, 0)
    pool.check_integrity([])


def test_a_shared_page_is_used_until_its_last_owner_leaves() -> None:
    pool = BlockPool(1)
    page = pool.allocate()
    pool.share(page)
    pool.release(page)
    assert pool.available == 0
    pool.check_integrity([page])
    pool.release(page)
    assert pool.available == 1
    pool.check_integrity([])


def test_a_page_without_content_to_find_is_free_and_not_cached() -> None:
    pool = BlockPool(1)
    pool.release(pool.allocate())
    assert (pool.available, pool.cached) == (1, 0)


def test_a_cached_page_is_found_and_brought_back() -> None:
    pool, page_of = cached_pool(2, [A])
    assert pool.cached == 1
    page = pool.lookup(A)
    assert page == page_of[A]
    pool.share(page)
    assert (pool.cached, pool.used) == (0, 1)
    pool.check_integrity([page])


def test_free_pages_go_before_cached_ones() -> None:
    pool, page_of = cached_pool(3, [A])
    taken = {pool.allocate(), pool.allocate()}
    assert page_of[A] not in taken
    assert pool.lookup(A) == page_of[A]


def test_spare_pages_go_before_other_cached_ones_oldest_first() -> None:
    pool, page_of = cached_pool(3, [A])
    for digest in (B, C):
        page = pool.allocate()
        pool.register(page, digest)
        pool.release(page, spare=True)
    assert pool.cached == pool.available == 3
    pool.check_integrity([])
    taken = [pool.allocate() for _ in range(2)]
    assert [pool.lookup(digest) for digest in (A, B, C)] == [page_of[A], None, None]
    pool.check_integrity(taken)


def test_a_spare_page_is_found_and_brought_back() -> None:
    pool = BlockPool(1)
    page = pool.allocate()
    pool.register(page, A)
    pool.release(page, spare=True)
    pool.share(page)
    assert (pool.cached, pool.used) == (0, 1)
    pool.check_integrity([page])


def test_evicts_the_page_that_was_released_longest_ago() -> None:
    pool, page_of = cached_pool(3, [A, B, C])
    pool.share(page_of[A])
    pool.release(page_of[A])
    assert pool.allocate() == page_of[B]
    assert [pool.lookup(digest) is None for digest in (A, B, C)] == [False, True, False]


def test_the_first_page_of_a_content_stays_the_one_that_is_found() -> None:
    pool = BlockPool(2)
    first, second = pool.allocate(), pool.allocate()
    pool.register(first, A)
    pool.register(second, A)
    assert pool.lookup(A) == first
    pool.release(second)
    assert pool.cached == 0, "the copy cannot be found, so it is free"
    pool.check_integrity([first])


def test_leading_stops_at_the_first_content_that_is_missing() -> None:
    pool, _ = cached_pool(3, [A, C])
    assert pool.leading([A, B, C]) == 1
    assert pool.leading([A, C]) == 2
    assert pool.leading([B]) == pool.leading([]) == 0


def test_in_use_counts_neither_cached_nor_unknown_contents() -> None:
    pool, page_of = cached_pool(3, [A, B])
    pool.share(page_of[B])
    assert pool.in_use([A, B, C]) == 1


def test_releasing_twice_is_caught() -> None:
    pool = BlockPool(1)
    page = pool.allocate()
    pool.release(page)
    with pytest.raises(AssertionError, match="has no owner"):
        pool.release(page)


def test_sharing_a_free_page_is_caught() -> None:
    pool = BlockPool(1)
    with pytest.raises(AssertionError, match="is free"):
        pool.share(1)


@pytest.mark.parametrize("owned", [[], [1, 1], [2]], ids=["lost", "twice", "another"])
def test_integrity_compares_reference_counts_with_owners(owned: list[int]) -> None:
    pool = BlockPool(2)
    assert pool.allocate() == 1
    with pytest.raises(AssertionError, match="reference counts"):
        pool.check_integrity(owned)


def test_digests_are_chained_sha256_over_int32_little_endian() -> None:
    """V33: a strong hash, and a block's name depends on everything before it."""
    digests: list[bytes] = []
    extend_digests(digests, [1, 2, 3, 4, 5], 2)
    assert len(digests) == 2, "the last block is not full"
    tail = (3).to_bytes(4, "little") + (4).to_bytes(4, "little")
    assert digests[1] == hashlib.sha256(digests[0] + tail).digest()
    other: list[bytes] = []
    extend_digests(other, [9, 2, 3, 4], 2)
    assert digests[1] != other[1]


def test_digests_grow_as_if_made_at_once() -> None:
    grown: list[bytes] = []
    extend_digests(grown, [1, 2, 3], 2)
    extend_digests(grown, [3, 4, 5, 6, 7], 2)
    whole: list[bytes] = []
    extend_digests(whole, [1, 2, 3, 4, 5, 6, 7], 2)
    assert grown == whole


@pytest.mark.parametrize("common", range(6))
def test_common_blocks_are_counted_exactly(common: int) -> None:
    first = [bytes([i]) for i in range(5)]
    second = [*first[:common], *(bytes([100 + i]) for i in range(7 - common))]
    assert common_blocks(first, second) == common_blocks(second, first) == common
