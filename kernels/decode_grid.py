"""How a launch of `sparse_decode` is divided: CTAs, clusters of them, and what each takes at least.

Figures behind the numbers: benchmarks/NOTES.md, "Decode at short contexts".
"""

from __future__ import annotations

from dataclasses import dataclass

from kernels._args import FEW_ITEMS, DecodePlan

SEVERAL_ROWS = 4  # whose selected blocks take as long as their windows
FEW_ROWS = 3  # whose bytes take less time than the loads that wait for each other
WINDOW_TOKENS, LISTED_TOKENS = 576, 256  # for each CTA of a cluster, at least
DEVICE_CHOICE, SPREAD, BALANCED = 0, 1, 2  # of CUDA's cluster scheduling policies
LEAST_BLOCKS, LEAST_LISTED = 5, 2  # for a CTA without a cluster


@dataclass(frozen=True, slots=True)
class DecodeGrid:
    """Numbers of one launch, named as in `DecodeArgs`; workers are clusters, or CTAs without any.

    ctas: of the launch.
    cluster: CTAs of a cluster; 0: each CTA works for itself.
    held_back: workers that take items with lists only. Neither role waits for the other, and either
        part alone moves memory as fast as all: a third, or half where several rows have lists.
    least_blocks, least_listed: blocks of a piece at least, without and with a list. A merge of more
        pieces takes longer than their blocks.
    placement: where CTAs of a cluster go, so that more multiprocessors read at the same time.
    """

    ctas: int
    cluster: int
    held_back: int
    least_blocks: int
    least_listed: int
    placement: int = SPREAD

    @classmethod
    def of(
        cls, plan: DecodePlan, rows: int, tiles: int, block_tokens: int, *, has_lists: bool = True
    ) -> DecodeGrid:
        """For `rows` of `tiles` each, on the device of the plan."""
        few = rows <= FEW_ROWS and rows * tiles <= FEW_ITEMS
        cluster = plan.cluster if few else 0
        if cluster == 0:
            held = plan.ctas // (2 if rows >= SEVERAL_ROWS else 3) if has_lists else 0
            return cls(plan.ctas, 0, held, LEAST_BLOCKS, LEAST_LISTED)
        clusters = plan.clusters_of_16 if cluster == 16 else plan.clusters_of_8
        held = clusters // 3 if has_lists else 0
        window, listed = (
            max(1, cluster * tokens // block_tokens) for tokens in (WINDOW_TOKENS, LISTED_TOKENS)
        )
        return cls(cluster * clusters, cluster, held, window, listed)
