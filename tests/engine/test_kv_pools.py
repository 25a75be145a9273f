"""What a request holds of both pools: growth, sliding window, prefix hits."""

from __future__ import annotations

import pytest

from engine.kv_pools import KvPools
from engine.request import Request, SamplingParams

BLOCK = 4


def make_pools(full: int = 50, window: int = 50, tokens: int = 6, sinks: int = 2) -> KvPools:
    return KvPools(
        full_pages=full,
        window_pages=window,
        block_tokens=BLOCK,
        window_tokens=tokens,
        sink_tokens=sinks,
    )


def make_request(prompt: list[int], prompt_logprobs: int | None = None) -> Request:
    return Request(0, prompt, SamplingParams(prompt_logprobs=prompt_logprobs))


def compute(pools: KvPools, request: Request, stop: int, chunk: int = 1000) -> None:
    """What a scheduler and a worker do with positions up to `stop`."""
    while request.computed < stop:
        reach = min(request.computed + chunk, stop)
        pools.grow(request, reach)
        request.computed = reach
        pools.commit(request)


def finished(pools: KvPools, prompt: list[int]) -> None:
    """Leave the pages of a prompt behind, cached."""
    request = make_request(prompt)
    pools.match(request)
    compute(pools, request, len(prompt))
    pools.release(request)


PROMPT = list(range(40))


def test_window_pages_slide_out_and_sinks_stay() -> None:
    pools = make_pools()
    request = make_request(PROMPT)
    compute(pools, request, 30)
    # The next query, at 30, sees [25, 30] and the sinks in block 0.
    assert [bool(page) for page in request.window_blocks] == [True] + [False] * 5 + [True] * 2
    assert all(request.full_blocks)
    assert pools.window.used == 3


def test_without_sinks_the_first_block_slides_out_too() -> None:
    pools = make_pools(sinks=0)
    request = make_request(PROMPT)
    compute(pools, request, 30)
    assert request.window_blocks[0] == 0
    assert pools.window.used == 2


@pytest.mark.parametrize("position", range(12, 20))
def test_a_page_leaves_with_its_last_visible_token(position: int) -> None:
    """Not a step too early: block 2 (tokens 8 to 11) is seen up to position 11 + window - 1."""
    pools = make_pools(tokens=6)
    request = make_request(PROMPT)
    compute(pools, request, position)
    assert bool(request.window_blocks[2]) == (position <= 11 + 6 - 1)


@pytest.mark.parametrize("chunk", [1, 3, 4, 7])
@pytest.mark.parametrize("tokens", [1, 4, 6, 9])
def test_needed_is_never_exceeded(chunk: int, tokens: int) -> None:
    pools = make_pools(tokens=tokens)
    request = make_request(PROMPT)
    most = 0
    while request.computed < len(PROMPT):
        reach = min(request.computed + chunk, len(PROMPT))
        pools.grow(request, reach)
        most = max(most, pools.window.used)
        request.computed = reach
        pools.commit(request)
    assert most <= pools.needed(len(PROMPT), chunk)[1]


@pytest.mark.parametrize(("full", "window"), [(50, 0), (0, 50)], ids=["no window", "no full"])
def test_an_absent_pool_costs_and_limits_nothing(full: int, window: int) -> None:
    pools = make_pools(full=full, window=window)
    request = make_request(PROMPT)
    compute(pools, request, 40)
    assert bool(request.full_blocks) == bool(full)
    assert bool(request.window_blocks) == bool(window)
    assert pools.missing(make_request(PROMPT), 40)[0 if window else 1] == 0
    pools.release(request)
    assert pools.match(make_request(PROMPT)) == 36


@pytest.mark.parametrize(("length", "hit"), [(40, 36), (41, 40), (3, 0), (4, 0), (5, 4)])
def test_a_hit_leaves_at_least_one_token_to_compute(length: int, hit: int) -> None:
    pools = make_pools()
    prompt = [*PROMPT, 99, 98][:length]
    finished(pools, prompt)
    assert pools.match(make_request(prompt)) == hit


def test_a_hit_shares_the_pages_and_needs_no_others() -> None:
    pools = make_pools()
    first, second = make_request(PROMPT), make_request([*PROMPT, 1])
    pools.match(first)
    compute(pools, first, 40)
    used = pools.full.used, pools.window.used
    pools.take(second, pools.match(second))
    assert second.computed == second.cached == 40
    assert second.full_blocks == first.full_blocks
    assert second.window_blocks == first.window_blocks
    assert (pools.full.used, pools.window.used) == used
    pools.check_integrity([first, second])


def test_a_different_prefix_is_no_hit_although_later_blocks_are_equal() -> None:
    pools = make_pools()
    finished(pools, PROMPT)
    assert pools.match(make_request([77, *PROMPT[1:]])) == 0


def test_a_longer_prompt_hits_up_to_where_it_differs() -> None:
    pools = make_pools()
    finished(pools, PROMPT)
    assert pools.match(make_request([*PROMPT[:22], 5, 5, 5])) == 20


def test_requests_for_prompt_logprobs_take_no_hit() -> None:
    pools = make_pools()
    finished(pools, PROMPT)
    assert pools.match(make_request(PROMPT, prompt_logprobs=0)) == 0


@pytest.mark.parametrize(
    ("gone", "hit"),
    [
        (set(), 40),  # the query at 40 sees [35, 40]: blocks 8 and 9
        ({9}, 36),  # at 36: [31, 36], blocks 7 and 8
        ({8}, 32),  # at 32: [27, 32], blocks 6 and 7
        ({9, 7}, 28),  # at 28: [23, 28], blocks 5 and 6
        ({1, 2, 3, 4}, 40),
        ({1, 3, 5, 7, 9}, 4),  # at 4: [0, 4], block 0
        ({0}, 0),  # the sinks
        (set(range(1, 10)), 4),
    ],
    ids=str,
)
def test_a_hit_is_as_long_as_its_window_pages_allow(gone: set[int], hit: int) -> None:
    """The full pool has every block of the prompt, the window pool all but some."""
    pools = make_pools()
    probe = make_request([*PROMPT, 1])
    digests = pools.sharable(probe)
    for pool, missing in ((pools.full, set()), (pools.window, gone)):
        for block in set(range(10)) - missing:
            page = pool.allocate()
            pool.register(page, digests[block])
            pool.release(page)
    assert pools.match(probe) == hit
    pools.take(probe, hit)
    pools.check_integrity([probe])
    assert bool(probe.window_blocks[:1] and probe.window_blocks[0]) == (hit > 0)


def test_generated_tokens_are_shared_only_if_asked_for() -> None:
    """The rule follows the token's origin: a prompt does not lie on generated pages."""
    hits = []
    for cache_generated in (False, True):
        pools = KvPools(full_pages=50, window_pages=0, block_tokens=BLOCK)
        pools.cache_generated = cache_generated
        request = Request(0, PROMPT[:6], SamplingParams(), output=PROMPT[6:])
        pools.match(request)
        compute(pools, request, 40)
        pools.release(request)
        hits.append(pools.match(make_request([*PROMPT, 1])))
    assert hits == [4, 40]


def test_generated_blocks_are_named_like_a_prompt_of_the_same_tokens() -> None:
    """Digests grow with the output, block by block, and must not depend on when they were made."""
    pools = KvPools(full_pages=50, window_pages=0, block_tokens=BLOCK, cache_generated=True)
    request = Request(0, PROMPT[:6], SamplingParams())
    compute(pools, request, 6)
    for token in PROMPT[6:]:
        request.output.append(token)
        compute(pools, request, request.total)
    assert request.digests == pools.sharable(make_request([*PROMPT, 1]))


def test_release_evicts_tails_before_what_leads_to_them() -> None:
    pools = make_pools(full=10, window=0)
    finished(pools, PROMPT)
    for _ in range(3):
        pools.full.allocate()
    assert pools.match(make_request([*PROMPT, 1])) == 28


def test_long_prompts_leave_the_cached_windows_of_others_alone() -> None:
    """The window pages that a long prompt slid past used to evict the ends of all other prompts,
    so that of several cached prompts only the last one was ever found again."""
    pools = make_pools(full=100, window=18)  # an end takes 4 pages, a chunk under way 5
    prompts = [[number] * 40 for number in range(4)]
    for prompt in prompts:
        request = make_request(prompt)
        pools.match(request)
        compute(pools, request, len(prompt), chunk=8)
        pools.release(request)
    assert [pools.match(make_request(prompt)) for prompt in prompts] == [36] * 4


def test_the_window_of_a_prompts_end_outlives_a_long_answer() -> None:
    pools = make_pools(full=100, window=12)
    request = make_request(PROMPT)
    pools.match(request)
    compute(pools, request, len(PROMPT), chunk=8)
    for token in range(40):
        request.output.append(token)
        compute(pools, request, request.total)
    pools.release(request)
    assert pools.match(make_request(PROMPT)) == 36
