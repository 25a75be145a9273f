"""A projection of a layer with everything that `store_qkv` takes, random; NaN where it writes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kernels import cuda_store, layer_reference
from kernels._launch import KernelLibrary
from kernels.layer_inputs import HeadNorm, IndexProjections, StoredPool, StoredQkv
from kernels.paged_kv import store_index_keys

# Row of each KV head in the full pool, or -1 - row in the window pool; query heads of selecting
# retrieval heads. Groups are of three query heads.
HEAD_MAPS: dict[str, tuple[list[int], list[int]]] = {
    "mixed": ([0, -1, 1, -2], [2, 7, 6]),
    "all-full": ([0, 1], [0, 1, 2, 3, 4, 5]),
    "all-windowed": ([-1, -2], []),
    "one-head": ([0], [1]),
    "rows-in-another-order": ([1, -2, 0, -1], [0, 8]),
}
GROUP = 3


@dataclass(frozen=True, slots=True)
class StoreCase:
    """Arguments of `store_qkv`, on one device in one dtype."""

    projected_TRD: Tensor
    heads: int
    norm: HeadNorm | None
    cos_TF: Tensor
    sin_TF: Tensor
    kv_row_N: Tensor
    full: StoredPool | None
    window: StoredPool | None
    index: IndexProjections | None

    @classmethod
    def make(
        cls,
        tokens: int,
        head_map: str = "mixed",
        *,
        dtype: torch.dtype = torch.float32,
        dim: int = 64,
        block: int = 16,
        index_dim: int = 16,
        normed: bool = True,
        stored_index: bool = True,
        query_tokens: int | None = None,
        device: str = "cpu",
        seed: int = 0,
    ) -> StoreCase:
        """`query_tokens` None: all of them have index queries."""
        generator = torch.Generator(device).manual_seed(seed)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device).to(dtype)

        kv_rows, selecting = HEAD_MAPS[head_map]
        heads = GROUP * len(kv_rows)
        pages = -(-tokens // block) + 3
        angles_TF = 20 * torch.rand((tokens, dim // 2), generator=generator, device=device)

        def pool(rows: int) -> StoredPool | None:
            if not rows:
                return None
            shape = (pages, rows, block, dim)
            k_cache = torch.full(shape, torch.nan, dtype=dtype, device=device)
            # Page 0 is nobody's.
            slots = torch.randperm((pages - 1) * block, generator=generator, device=device)
            return StoredPool(k_cache, k_cache.clone(), slots[:tokens] + block)

        full_kv = [kv for kv, row in enumerate(kv_rows) if row >= 0]
        index = None
        if selecting:
            index = IndexProjections(
                k_proj_XID=random(len(selecting), index_dim, dim) * 0.1,
                k_head_X=torch.tensor([head // GROUP for head in selecting], device=device),
                q_proj_SID=random(len(selecting), index_dim, dim) * 0.1,
                q_head_S=torch.tensor(selecting, device=device),
                index_cache=torch.full(
                    (pages, len(selecting), block, index_dim),
                    torch.nan,
                    dtype=dtype,
                    device=device,
                )
                if stored_index
                else None,
                query_tokens=tokens if query_tokens is None else query_tokens,
            )
        return cls(
            projected_TRD=random(tokens, heads + 2 * len(kv_rows), dim),
            heads=heads,
            norm=HeadNorm(1 + 0.3 * random(2 * dim), 1e-6) if normed else None,
            cos_TF=angles_TF.cos(),
            sin_TF=angles_TF.sin(),
            kv_row_N=torch.tensor(kv_rows, dtype=torch.int32, device=device),
            full=pool(len(full_kv)),
            window=pool(len(kv_rows) - len(full_kv)),
            index=index,
        )

    def copied(self, device: str = "cpu", dtype: torch.dtype | None = None) -> StoreCase:
        """The same with memory of its own, for the specification: on the CPU, in another dtype."""

        def numbers(tensor: Tensor) -> Tensor:
            return tensor.to(device, dtype or tensor.dtype, copy=True)

        def pool(given: StoredPool | None) -> StoredPool | None:
            if given is None:
                return None
            return StoredPool(
                numbers(given.k_cache), numbers(given.v_cache), given.slots_T.to(device)
            )

        index = self.index
        if index is not None:
            index = replace(
                index,
                k_proj_XID=numbers(index.k_proj_XID),
                q_proj_SID=numbers(index.q_proj_SID),
                k_head_X=index.k_head_X.to(device),
                q_head_S=index.q_head_S.to(device),
                index_cache=None if index.index_cache is None else numbers(index.index_cache),
            )
        return replace(
            self,
            projected_TRD=numbers(self.projected_TRD),
            norm=self.norm and HeadNorm(numbers(self.norm.weight_2D), self.norm.eps),
            cos_TF=self.cos_TF.to(device),
            sin_TF=self.sin_TF.to(device),
            kv_row_N=self.kv_row_N.to(device),
            full=pool(self.full),
            window=pool(self.window),
            index=index,
        )

    def with_int8_index(self) -> StoreCase:
        """The same with a cache of index keys in 8 bits; NaN and 99 where nothing is written."""
        assert self.index is not None
        assert self.full is not None
        pages, _, block, _ = self.full.k_cache.shape
        rows, dim, _ = self.index.k_proj_XID.shape
        device = self.projected_TRD.device
        steps = torch.full((pages, rows, block, dim), 99, dtype=torch.int8, device=device)
        scales = torch.full(steps.shape[:3], torch.nan, dtype=torch.bfloat16, device=device)
        return replace(self, index=replace(self.index, index_cache=steps, index_scales=scales))

    def arguments(self) -> tuple[object, ...]:
        """In the order of `store_qkv`."""
        return tuple(getattr(self, name) for name in self.__slots__)

    def run(self, library: KernelLibrary) -> dict[str, Tensor]:
        """What the kernel writes, by name."""
        return self._written(lambda *given: cuda_store.store_qkv(library, *given))

    def specified(self) -> dict[str, Tensor]:
        """What the specification writes."""
        return self._written(layer_reference.store_qkv)

    def _written(self, store: Callable[..., StoredQkv]) -> dict[str, Tensor]:
        return store(*self.arguments()).by_name(self.full, self.window, self.index)


def check_int8_store(case: StoreCase, library: KernelLibrary) -> None:
    """What the kernel stores in 8 bits is what it hands back otherwise, quantised: bit for bit.

    `case` is one that hands them back.
    """
    keys_TXI = case.run(library)["ki_TXI"]
    stored = case.with_int8_index()
    got = stored.run(library)
    want = stored.with_int8_index().index
    assert stored.full is not None
    assert want is not None
    assert want.index_cache is not None
    store_index_keys(keys_TXI, want.index_cache, stored.full.slots_T, want.index_scales)
    assert torch.equal(got["index keys"], want.index_cache)
    exact: dict[str, Any] = {"rtol": 0, "atol": 0, "equal_nan": True}
    torch.testing.assert_close(got["index scales"], want.index_scales, **exact)


def check_store(case: StoreCase, library: KernelLibrary) -> None:
    """The kernel against the specification: the same places, and no more than rounding between.

    In bfloat16 the truth is the specification in float32, and the largest error may be twice that
    of the specification in bfloat16.
    """
    truth = case.copied(dtype=torch.float32).specified()
    twin = case.copied().specified()
    got = {name: value.cpu() for name, value in case.run(library).items()}
    assert got.keys() == truth.keys()
    for name, value in got.items():
        exact, spec = truth[name], twin[name].float()
        assert value.shape == exact.shape, name
        assert torch.equal(value.isnan(), exact.isnan()), f"{name}: other places"
        if value.dtype == torch.float32:
            torch.testing.assert_close(value, exact, rtol=1e-5, atol=1e-5, equal_nan=True, msg=name)
        elif value.numel():
            allowed = 2 * float((spec - exact).nan_to_num().abs().max()) + 1e-6
            worst = float((value.float() - exact).nan_to_num().abs().max())
            assert worst <= allowed, f"{name}: error {worst:.2e}, twice the twin's is {allowed:.2e}"
