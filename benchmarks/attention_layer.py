"""The layer that the attention benchmarks measure: one of Qwen3-30B-A3B, converted.

32 query heads over 4 KV heads, head_dim 128, bfloat16, pages of 64 tokens, window 8192 and 4 sinks,
five retrieval heads spread over all KV heads.
"""

from __future__ import annotations

HEADS, KV_HEADS, DIM, INDEX_DIM, BLOCK = 32, 4, 128, 16, 64
RETRIEVAL = (0, 8, 16, 24, 25)
WINDOW, SINKS = 8192, 4
TOP_P = 0.9
