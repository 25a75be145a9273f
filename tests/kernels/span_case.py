"""Random prefill spans for kernel tests: some heads of a layer, pages shuffled, NaN elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from kernels.span_inputs import SpanInputs
from tests.kernels.paged_case import PagedCase, random_tensor

# (context length, query tokens) of each span; pages hold 16 tokens
SPANS = {
    "one-token": [(1, 1)],
    "whole": [(50, 50)],
    "chunk": [(70, 13)],
    "page-edge": [(64, 32)],
    "last-token": [(65, 1)],
    "ragged": [(8, 8), (17, 1), (90, 37), (33, 33)],
}
WINDOWS = [(1, 0), (8, 4), (33, 20), (1000, 4)]
TwinArguments = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class SpanCase:
    """Queries of a layer of four heads, two of which, out of order, are of the call."""

    q_THD: Tensor
    heads_G: Tensor
    kv_row_G: Tensor
    pages: PagedCase
    starts: Tensor

    @classmethod
    def make(
        cls,
        spans: Sequence[tuple[int, int]],
        *,
        window: int | None = None,
        sinks: int = 0,
        heads: Sequence[int] = (3, 0),
        kv_rows: Sequence[int] = (1, 0),
        layer_heads: int = 4,
        kv_heads: int = 2,
        block: int = 16,
        dim: int = 16,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
    ) -> SpanCase:
        """Pages that `window` and `sinks` leave to nobody are gone: 0 in the table."""
        pages = PagedCase.make(
            [n for n, _ in spans], kv_heads=kv_heads, block=block, dim=dim, seed=len(spans)
        )
        if window is not None:
            for row, (context, queries) in enumerate(spans):
                gone = max(0, context - queries - window + 1) // block
                pages.tables_SB[row, -(-sinks // block) : gone] = 0
        counts = torch.tensor([0] + [queries for _, queries in spans])
        case = cls(
            q_THD=random_tensor(int(counts.sum()), layer_heads, dim),
            heads_G=torch.tensor(heads),
            kv_row_G=torch.tensor(kv_rows),
            pages=pages,
            starts=counts.cumsum(0),
        )
        return case.to(dtype, device)

    def to(self, dtype: torch.dtype, device: str | None = None, clean: bool = False) -> SpanCase:
        """The same in another dtype or place; `clean` has 0 for NaN."""

        def moved(x: Tensor) -> Tensor:
            if not x.is_floating_point():
                return x.to(device)
            return (x.nan_to_num() if clean else x).to(device, dtype)

        pages = {field.name: moved(getattr(self.pages, field.name)) for field in fields(PagedCase)}
        return SpanCase(
            q_THD=moved(self.q_THD),
            heads_G=moved(self.heads_G),
            kv_row_G=moved(self.kv_row_G),
            pages=PagedCase(**pages),
            starts=moved(self.starts),
        )

    def poisoned(self) -> Tensor:
        """An output of NaN."""
        return torch.full_like(self.q_THD, torch.nan)

    def inputs(self, out_THD: Tensor) -> SpanInputs:
        """As the kernels take them."""
        case = self.pages
        heads = (self.q_THD, out_THD, self.heads_G, self.kv_row_G)
        caches = (case.k_cache, case.v_cache, case.tables_SB)
        return SpanInputs(*heads, *caches, self.starts, case.lens_S)

    @property
    def twin_arguments(self) -> TwinArguments:
        """The same for the specification, which knows only the heads of the call."""
        case = self.pages
        caches = (case.k_cache, case.v_cache, case.tables_SB)
        return self.q_THD[:, self.heads_G], self.kv_row_G, *caches, self.starts, case.lens_S

    def check_heads(self, out_THD: Tensor, expected_TGD: Tensor) -> None:
        """The heads of the call are right; the others are as they were."""
        torch.testing.assert_close(out_THD[:, self.heads_G], expected_TGD)
        others = torch.ones(out_THD.shape[1], dtype=torch.bool)
        others[self.heads_G] = False
        assert out_THD[:, others].isnan().all()
