"""How a launch of `sparse_decode` is divided: CTAs, clusters of them, and what each takes at least.

Figures behind the numbers: benchmarks/NOTES.md, "Decode at short contexts".
"""

from __future__ import annotations

from dataclasses import dataclass

from kernels._args import FEW_ITEMS, SHORT_BLOCKS, DecodePlan

SEVERAL_ROWS = 4  # whose selected blocks take as long as their windows
FEW_ROWS = 3  # whose bytes take less time than the loads that wait for each other
DEVICE_CHOICE, SPREAD, BALANCED = 0, 1, 2  # of CUDA's cluster scheduling policies
# In tokens: of a window for a cluster, and of a list for each of its CTAs, at least.
WINDOW_TOKENS, LISTED_TOKENS = 9216, 256
LEAST_BLOCKS, LEAST_LISTED = 5, 2  # for a CTA without a cluster


@dataclass(frozen=True, slots=True)
class DecodeGrid:
    """Numbers of one launch, named as in `DecodeArgs`; workers are clusters, or CTAs without any.

    ctas: of the launch.
    cluster: CTAs of a cluster; 0: each CTA works for itself.
    held_back: workers that take items with lists only. Neither role waits for the other, and either
        part alone moves memory as fast as all.
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
        cls, plan: DecodePlan, rows: int, tiles: int, block_tokens: int, listed_blocks: int
    ) -> DecodeGrid:
        """For `rows` of `tiles` each, on the device of the plan.

        Args:
            listed_blocks: the longest context with a list has up to so many; 0: there are no lists.
        """
        has_lists = listed_blocks > 0
        if rows <= FEW_ROWS and rows * tiles <= FEW_ITEMS and plan.cluster:
            if has_lists:
                return cls._beside_selection(plan, rows, tiles, block_tokens, listed_blocks)
            return cls._clustered(plan.cluster, plan.clusters(plan.cluster), 0, block_tokens)
        share = (8, 15) if rows >= SEVERAL_ROWS else (1, 3)
        held = plan.ctas * share[0] // share[1] if has_lists else 0
        return cls(plan.ctas, 0, held, LEAST_BLOCKS, LEAST_LISTED)

    @classmethod
    def _beside_selection(
        cls, plan: DecodePlan, rows: int, tiles: int, block_tokens: int, blocks: int
    ) -> DecodeGrid:
        """A short row waits for its window, of which large clusters read more at once. A long one,
        and several, wait for their lists, and smaller clusters find room earlier.

        Of one row no more start than find room beside a selection by clusters
        (`kernels.cuda_select`): those for lists would start when it ends. Half of the tiles have
        windows, as a rule, and want a cluster each.
        """
        is_short = rows == 1 and blocks <= SHORT_BLOCKS
        cluster = 8 if plan.clusters_of_8 and not is_short else plan.cluster
        ctas = plan.ctas * 4 // 7 if is_short else plan.ctas // 2 if rows == 1 else plan.ctas
        clusters = min(plan.clusters(cluster), max(2, ctas // cluster))
        windows = (rows * tiles + 1) // 2
        held = max(clusters // 3, min(clusters * 2 // 3, clusters - windows))
        return cls._clustered(cluster, clusters, held, block_tokens)

    @classmethod
    def _clustered(cls, cluster: int, clusters: int, held: int, block_tokens: int) -> DecodeGrid:
        window = max(1, WINDOW_TOKENS // block_tokens)
        listed = max(1, cluster * LISTED_TOKENS // block_tokens)
        return cls(cluster * clusters, cluster, held, window, listed)
