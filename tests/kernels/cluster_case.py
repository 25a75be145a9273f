"""The selection of a `LayerCase` of one row: by clusters of CTAs, and by shares as of many rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels._args import SelectPlan
from kernels._launch import KernelLibrary
from kernels.cuda_select import list_blocks
from tests.kernels.layer_case import LayerCase

MANY = 99  # clusters, more than any case asks for


def choice(case: LayerCase, library: KernelLibrary) -> dict[str, Tensor]:
    """What a selection leaves behind, in memory that held something else."""
    workspace = case.workspace(library)
    attended_RS = case.lens_R.new_full((1, len(case.tiles.tile_of_selected_S)), -1)
    for left in (workspace.words, workspace.lists, workspace.list_counts):
        left.fill_(-7)
    assert case.selection is not None
    head = (workspace, case.tiles, case.full, case.lens_R)
    list_blocks(*head, case.rule, case.selection, attended_RS)
    assert not workspace.head_done.any()
    assert not workspace.group_done.any()
    return {
        "words": workspace.words,
        "lists": workspace.lists,
        "counts": workspace.list_counts,
        "attended": attended_RS,
    }


def plan_of(case: LayerCase, library: KernelLibrary) -> SelectPlan:
    assert case.selection is not None
    keys = case.selection.index_cache
    return library.select_plan(keys.device, keys.dtype, keys.shape[3])


def by_clusters(
    case: LayerCase, library: KernelLibrary, monkeypatch: pytest.MonkeyPatch, size: int
) -> dict[str, Tensor]:
    """The choice by clusters of this size, by shares if it is 0."""
    plan = plan_of(case, library)
    with monkeypatch.context() as patch:
        patch.setattr(plan, "clusters_of_8", MANY if size == 8 else 0)
        patch.setattr(plan, "clusters_of_16", MANY if size == 16 else 0)
        assert plan.cluster(MANY, 1) == size
        return choice(case, library)


def check_choice(
    case: LayerCase, library: KernelLibrary, monkeypatch: pytest.MonkeyPatch, size: int
) -> dict[str, Tensor]:
    """The choice by clusters of this size, which is that by shares."""
    want, got = (by_clusters(case, library, monkeypatch, of) for of in (0, size))
    for name, values in want.items():
        assert torch.equal(got[name], values), name
    return got
