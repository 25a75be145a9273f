"""Tries out the kernels around attention on a few tokens, in a model's sizes: `qkv_store`,
`add_norm`, `silu_mul`, and `route_experts` and `expert_products` of a mixture.

Shapes as in `kernels.layer_inputs`; X experts, k of them for each token. Twins run on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kernels import cuda_experts, cuda_layer, cuda_store, layer_reference
from kernels._launch import KernelLibrary
from kernels.layer_inputs import HeadNorm, IndexProjections, StoredPool, StoredQkv
from kernels.paged_kv import store_index_keys
from kernels.trial import check_close, check_equal, random_numbers
from kernels.trial_layer import DecodeKind

TOKENS = 5
PRODUCTS = 64  # outputs of an expert that are computed; sums are of the model's length
EPS = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerKind:
    """The layers of a model.

    attention: of their KV heads some are kept in the window pool if it has local heads.
    is_normed: queries and keys have a norm.
    inner_sizes: of MLPs; of experts the last one.
    experts, chosen: X and k; 0 without a mixture.
    """

    attention: DecodeKind
    is_normed: bool
    hidden_size: int
    inner_sizes: tuple[int, ...]
    experts: int = 0
    chosen: int = 0
    normalise: bool = False


def try_layers(library: KernelLibrary, kind: LayerKind, device: torch.device) -> None:
    """
    Raises:
        TrialError: a kernel gives something else than its twin.
        KernelError: a launch failed.
    """
    _try_store(library, kind, device)
    _try_rows(library, kind, device)
    if cuda_experts.takes_experts(1, kind.experts, kind.chosen) and kind.experts:
        _try_experts(library, kind, device)


def _try_store(library: KernelLibrary, kind: LayerKind, device: torch.device) -> None:
    def store(*given: Any) -> StoredQkv:
        return cuda_store.store_qkv(library, *given)

    own, cpu = kind.attention, torch.device("cpu")
    in_int8 = own.index_dtype == torch.int8
    found = _Store(kind, device, own.dtype, stored=not in_int8).written(store)
    exact = _Store(kind, cpu, torch.float32, stored=not in_int8).written(layer_reference.store_qkv)
    twin = _Store(kind, cpu, own.dtype, stored=not in_int8).written(layer_reference.store_qkv)
    for name, numbers in exact.items():
        check_close("qkv_store", found[name], numbers, twin[name])
    if own.index_dim is None or not in_int8:
        return
    # A last digit may round a key to other steps: those of the kernel's own keys are exact.
    written = _Store(kind, device, own.dtype, stored=True).written(store)
    want = _Store(kind, cpu, own.dtype, stored=True)
    keys_TXI, index = found["ki_TXI"].cpu(), want.index
    assert index is not None
    assert index.index_cache is not None
    assert index.index_scales is not None
    store_index_keys(keys_TXI, index.index_cache, want.full.slots_T, index.index_scales)
    check_equal("qkv_store", written["index keys"], index.index_cache)
    check_equal("qkv_store", written["index scales"], index.index_scales)


def _with_cache(index: IndexProjections, full: StoredPool, is_int8: bool) -> IndexProjections:
    """Keys go to pages of the full pool; NaN, or 99 in 8 bits, where nothing is written."""
    rows, dim, _ = index.k_proj_XID.shape
    pages, _, block, _ = full.k_cache.shape
    cache = torch.full_like(full.k_cache[:1, :1, :1, :1], torch.nan).repeat(pages, rows, block, dim)
    if not is_int8:
        return replace(index, index_cache=cache)
    steps = torch.full_like(cache, 99, dtype=torch.int8)
    return replace(index, index_cache=steps, index_scales=cache[..., 0].bfloat16().contiguous())


def _try_rows(library: KernelLibrary, kind: LayerKind, device: torch.device) -> None:
    """`add_norm` with and without a branch, `silu_mul` of every size."""
    random = random_numbers(kind.attention.dtype, seed=5)
    x_TE, branch_TE = (random(TOKENS, kind.hidden_size) for _ in range(2))
    weight_E = 1 + random(kind.hidden_size) / 4
    for branch in (branch_TE, None):
        given = (x_TE.to(device), None if branch is None else branch.to(device))
        found = cuda_layer.add_norm(library, *given, weight_E.to(device), EPS)
        twin = layer_reference.add_norm(x_TE, branch, weight_E, EPS)
        check_equal("add_norm", found[0], twin[0])
        exact = layer_reference.add_norm(twin[0].float(), None, weight_E.float(), EPS)
        check_close("add_norm", found[1], exact[1], twin[1])
    for size in kind.inner_sizes:
        gate_up_TF = 3 * random(TOKENS, 2 * size)
        gated_TF = cuda_layer.silu_mul(library, gate_up_TF.to(device))
        twin_TF = layer_reference.silu_mul(gate_up_TF)
        check_close("silu_mul", gated_TF, layer_reference.silu_mul(gate_up_TF.float()), twin_TF)


def _try_experts(library: KernelLibrary, kind: LayerKind, device: torch.device) -> None:
    """The choice among all experts; products of some, by pair (1 token) and by expert."""
    random, chosen = random_numbers(kind.attention.dtype, seed=6), kind.chosen
    logits_TX = 2 * random(TOKENS, kind.experts)
    found = cuda_experts.route_experts(library, logits_TX.to(device), chosen, kind.normalise)
    twin = layer_reference.route_experts(logits_TX, chosen, kind.normalise)
    exact = layer_reference.route_experts(logits_TX.float(), chosen, kind.normalise)
    check_equal("route_experts", found[1], twin[1])
    check_close("route_experts", found[0], exact[0], twin[0])
    hidden, inner = kind.hidden_size, kind.inner_sizes[-1]
    some, outputs = min(kind.experts, chosen + 1), min(PRODUCTS, 2 * inner, hidden)
    gate_up_XGE = random(some, outputs, hidden) / hidden**0.5
    down_XEF = random(some, outputs, inner) / inner**0.5
    for tokens in (1, TOKENS):
        choice = [[(first + i) % some for i in range(chosen)] for first in range(tokens)]
        experts_Tk = torch.tensor(choice, dtype=torch.int32)
        x_TE, inner_JF = random(tokens, hidden), random(tokens * chosen, inner)
        for product, twin_product, rows, weights in (
            (cuda_experts.gate_experts, layer_reference.gate_experts, x_TE, gate_up_XGE),
            (cuda_experts.project_experts, layer_reference.project_experts, inner_JF, down_XEF),
        ):
            given = (rows.to(device), experts_Tk.to(device), weights.to(device))
            check_close(
                "expert_products",
                product(library, *given),
                twin_product(rows.float(), experts_Tk, weights.float()),
                twin_product(rows, experts_Tk, weights),
            )


class _Store:
    """Arguments of `store_qkv`, the same numbers in any dtype; NaN where it writes."""

    def __init__(
        self, kind: LayerKind, device: torch.device, dtype: torch.dtype, *, stored: bool
    ) -> None:
        """`stored`: index keys go to a cache, of int8 if the kind says so."""
        own = kind.attention
        random, dim = random_numbers(own.dtype, seed=3), own.head_dim

        def numbers(*shape: int) -> Tensor:
            return random(*shape).to(device, dtype)

        kv_rows = [1, -1, 0] if own.has_local else [1, 0]
        heads, pages = own.group * len(kv_rows), 3
        slots_T = (torch.arange(TOKENS) * 7 % (2 * own.block_tokens) + own.block_tokens).to(device)
        angles_TF = 5 * random_numbers(torch.float32, seed=4)(TOKENS, dim // 2)

        def pool(rows: int) -> StoredPool:
            shape = (pages, rows, own.block_tokens, dim)
            k_cache, v_cache = (torch.full(shape, torch.nan).to(device, dtype) for _ in "kv")
            return StoredPool(k_cache, v_cache, slots_T)

        self.full = pool(2)
        self.index: IndexProjections | None = None
        window = pool(1) if own.has_local else None
        projected_TRD = numbers(TOKENS, heads + 2 * len(kv_rows), dim)
        norm = HeadNorm(1 + numbers(2 * dim) / 4, EPS) if kind.is_normed else None
        if own.index_dim is not None:
            of_heads = torch.tensor([0, heads - 1])
            self.index = IndexProjections(
                k_proj_XID=numbers(2, own.index_dim, dim) / 8,
                k_head_X=(of_heads // own.group).to(device),
                q_proj_SID=numbers(2, own.index_dim, dim) / 8,
                q_head_S=of_heads.to(device),
                index_cache=None,
                query_tokens=TOKENS - 1,
            )
        if self.index is not None and stored:
            self.index = _with_cache(self.index, self.full, own.index_dtype == torch.int8)
        kv_row_N = torch.tensor(kv_rows, dtype=torch.int32, device=device)
        angles = (angles_TF.cos().to(device), angles_TF.sin().to(device))
        self._window = window
        self._before = (projected_TRD, heads, norm, *angles, kv_row_N)

    def written(self, store: Callable[..., StoredQkv]) -> dict[str, Tensor]:
        """What a call leaves, by name."""
        pages = (self.full, self._window, self.index)
        return store(*self._before, *pages).by_name(*pages)
