"""Ways to divide a launch of `sparse_decode` beside the planned one (`decode_anatomy`)."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.attention_layer import BLOCK, WINDOW
from kernels._args import FEW_ITEMS, DecodePlan
from kernels.decode_grid import BALANCED, DEVICE_CHOICE, DecodeGrid

WINDOW_BLOCKS = WINDOW // BLOCK + 2  # and one for sinks, one that the window's edge cuts


def grids(plan: DecodePlan, rows: int, tiles: int, blocks: int) -> dict[str, DecodeGrid]:
    """By name: each CTA for itself, clusters of every size, fewer of them, other pieces and shares
    for lists; of contexts of so many blocks."""
    planned = DecodeGrid.of(plan, rows, tiles, BLOCK, blocks)
    alone = DecodeGrid.of(DecodePlan(ctas=plan.ctas), rows, tiles, BLOCK, blocks)
    found = {"as planned": planned, "each CTA for itself": alone}
    if rows * tiles > FEW_ITEMS:
        return found
    for cluster, count in ((16, plan.clusters_of_16), (8, plan.clusters_of_8)):
        if count == 0:
            continue
        for pieces in (1, 2, 4, 8):
            window = -(-WINDOW_BLOCKS // pieces)
            found[f"clusters of {cluster}, a window in {pieces}"] = DecodeGrid(
                cluster * count, cluster, count // 3, window, 4 * cluster
            )
        usual = found[f"clusters of {cluster}, a window in 1"]
        for name, placement in (
            ("placed by the device", DEVICE_CHOICE),
            ("placed by load", BALANCED),
        ):
            found[f"clusters of {cluster}, {name}"] = replace(usual, placement=placement)
        for share in (2, 3):
            fewer = max(1, count * share // 4)
            found[f"clusters of {cluster}, {share} in 4 of them, two thirds for lists"] = replace(
                usual, ctas=cluster * fewer, held_back=fewer * 2 // 3
            )
        for part in (2, 4, 6):
            found[f"clusters of {cluster}, 1 in {part} for lists alone"] = replace(
                usual, held_back=count // part
            )
        for blocks in (2, 8):
            found[f"clusters of {cluster}, {blocks} blocks of a list a CTA"] = replace(
                usual, least_listed=blocks * cluster
            )
    for cluster in (2, 4):
        count = plan.ctas // cluster
        found[f"clusters of {cluster}"] = DecodeGrid(
            cluster * count, cluster, count // 3, max(5, 4 * cluster), max(2, 2 * cluster)
        )
    return found
