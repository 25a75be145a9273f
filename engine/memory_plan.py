"""How much memory goes where: decided once, before anything is allocated, and printed.

All sizes are bytes of what is really allocated, null pages included. Torch-free.
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.errors import ConfigError
from engine.model.byte_size import shown_bytes
from engine.model.config import ModelConfig
from engine.model.kv_bytes import IndexDtype, dense_token_bytes, page_bytes

CPU_CACHE_LIMIT = 2**30  # a server on a laptop does not take half of it unasked
CPU_SHARE = 0.5  # of the memory that is free, for the cache
CUDA_SHARE = 0.9  # of the memory that is free once the weights are there


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """Sizes of both pools and what they mean in tokens."""

    process_bytes: int  # taken already by interpreter and libraries; 0 where that is not known
    weight_bytes: int
    workspace_bytes: int  # largest activations of one step, an estimate
    decode_bytes: int  # workspace of the decode kernels, and what recorded steps keep
    block_tokens: int
    full_pages: int  # usable; one null page more is allocated
    window_pages: int
    full_page_bytes: int
    window_page_bytes: int
    max_model_len: int
    bytes_per_token: int  # what one more token of context costs: the full pool
    bytes_per_token_dense: int  # the same if every KV head kept everything

    @property
    def cache_bytes(self) -> int:
        full = (self.full_pages + 1) * self.full_page_bytes
        return full + (self.window_pages + 1) * self.window_page_bytes

    @property
    def total_bytes(self) -> int:
        fixed = self.process_bytes + self.weight_bytes + self.decode_bytes
        return fixed + self.cache_bytes + self.workspace_bytes

    @property
    def tokens(self) -> int | None:
        """Tokens of context that fit in all; None if only the window pool limits."""
        return self.full_pages * self.block_tokens if self.full_pages else None

    @property
    def tokens_dense(self) -> int:
        """Tokens that a dense cache of the same size would hold."""
        return self.cache_bytes // self.bytes_per_token_dense

    def render(self) -> str:
        """The plan as text, one line per fact."""
        tokens = "unlimited" if self.tokens is None else f"{self.tokens:,}"
        full, window = (
            f"{shown_bytes((pages + 1) * size)} in {pages:,} pages of {self.block_tokens} tokens"
            if size
            else "none"
            for pages, size in (
                (self.full_pages, self.full_page_bytes),
                (self.window_pages, self.window_page_bytes),
            )
        )
        lines = {
            "process": shown_bytes(self.process_bytes) if self.process_bytes else "not counted",
            "weights": shown_bytes(self.weight_bytes),
            "full pool": full,
            "window pool": window,
            "workspace": f"about {shown_bytes(self.workspace_bytes)}",
            "decode kernels": shown_bytes(self.decode_bytes) if self.decode_bytes else "none",
            "total": shown_bytes(self.total_bytes),
            "KV per token": f"{self.bytes_per_token:,} B, dense {self.bytes_per_token_dense:,} B",
            "tokens that fit": f"{tokens}, dense {self.tokens_dense:,}",
            "longest request": f"{self.max_model_len:,} tokens",
        }
        return "\n".join(f"{name:>16}  {value}" for name, value in lines.items())


def plan_memory(
    config: ModelConfig,
    *,
    item_bytes: int,
    weight_bytes: int,
    cache_bytes: int,
    max_model_len: int | None,
    max_num_seqs: int,
    max_batch_tokens: int,
    block_tokens: int,
    process_bytes: int = 0,
    decode_bytes: int = 0,
    prefill_bytes: int | None = None,
    index_dtype: IndexDtype = "auto",
) -> MemoryPlan:
    """Divide `cache_bytes` between the pools.

    The window pool gets what `max_num_seqs` sequences and one prefill chunk can use, twice over so
    that cached prefixes keep their windows, but at most half; the rest goes to the full pool.

    Args:
        item_bytes: of one element of keys and values.
        max_model_len: None takes the model's limit, or what fits if that is less.
        process_bytes: taken already, weights not counted; 0 if that is not known.
        decode_bytes: for the decode kernels; `cache_bytes` is what they leave.
        prefill_bytes: for the prefill kernels; None: the PyTorch ops, which gather the context.
        index_dtype: of index keys.

    Raises:
        ConfigError: one request of the maximum length does not fit; the message names the bytes.
    """
    full_page, window_page = page_bytes(config, item_bytes, block_tokens, index_dtype)
    window = config.sparse.window_tokens if config.sparse is not None else 0

    def blocks(tokens: int) -> int:
        return -(-tokens // block_tokens)

    wanted_len = max_model_len or config.max_position_embeddings
    if wanted_len > config.max_position_embeddings:
        raise ConfigError(
            f"max_model_len {wanted_len} is more than the model's {config.max_position_embeddings}"
        )
    live = min(blocks(window + max_batch_tokens) + 2, blocks(wanted_len))
    nulls = full_page + window_page
    smallest = nulls + blocks(wanted_len) * full_page + live * window_page
    if smallest > cache_bytes:
        if max_model_len is not None or not full_page:
            raise ConfigError(
                f"a request of max_model_len {wanted_len} needs {shown_bytes(smallest)} of KV "
                f"cache, there are {shown_bytes(cache_bytes)}; lower max_model_len or raise "
                "kv_cache_bytes"
            )
        room = (cache_bytes - nulls - live * window_page) // full_page
        if room < 1:
            raise ConfigError(f"{shown_bytes(cache_bytes)} of KV cache do not hold a single page")
        wanted_len = room * block_tokens

    window_pages = 0
    if window_page:
        useful = 2 * max_num_seqs * (blocks(window) + 2) + blocks(max_batch_tokens)
        share = cache_bytes // 2 if full_page else cache_bytes
        most = (cache_bytes - nulls - blocks(wanted_len) * full_page) // window_page
        window_pages = min(max(live, min(useful, share // window_page)), most)
    full_pages = 0
    if full_page:
        full_pages = (cache_bytes - nulls - window_pages * window_page) // full_page
    return MemoryPlan(
        process_bytes=process_bytes,
        weight_bytes=weight_bytes,
        workspace_bytes=_workspace_bytes(
            config, item_bytes, max_batch_tokens, max_num_seqs, wanted_len, prefill_bytes
        ),
        decode_bytes=decode_bytes,
        block_tokens=block_tokens,
        full_pages=full_pages,
        window_pages=window_pages,
        full_page_bytes=full_page,
        window_page_bytes=window_page,
        max_model_len=wanted_len,
        bytes_per_token=full_page // block_tokens,
        bytes_per_token_dense=dense_token_bytes(config, item_bytes),
    )


def default_cache_bytes(
    config: ModelConfig, *, free_bytes: int, on_cuda: bool, smallest_tokens: int, item_bytes: int
) -> int:
    """The cache's budget where the operator named none.

    On CUDA a share of what is free after loading. On a CPU at most 1 GiB, unless one request of
    `smallest_tokens` needs more, and never more than half of what is free.
    """
    if on_cuda:
        return int(free_bytes * CUDA_SHARE)
    one_request = int(1.2 * smallest_tokens * dense_token_bytes(config, item_bytes))
    return min(int(free_bytes * CPU_SHARE), max(CPU_CACHE_LIMIT, one_request))


def recorded_step_bytes(
    config: ModelConfig, item_bytes: int, num_seqs: int, max_blocks: int
) -> int:
    """What recorded decode steps of all padded sizes keep: the widest one's activations and block
    tables, which the others use again, and logits for each size, twice `num_seqs` rows in all."""
    tables = 2 * num_seqs * max_blocks * 8
    logits = 2 * num_seqs * config.vocab_size * (4 + item_bytes)
    return _activation_bytes(config, item_bytes) * num_seqs + tables + logits


def _activation_bytes(config: ModelConfig, item_bytes: int) -> int:
    """Of a token: hidden states, projections, MLP."""
    heads = (2 * config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    mlp = 3 * config.intermediate_size
    if config.moe is not None:  # rows for each chosen expert, sorted and put back
        moe = config.moe
        pair = 3 * moe.intermediate_size + 3 * config.hidden_size
        mlp = max(mlp if moe.dense_layers else 0, moe.experts_per_token * pair)
    return (4 * config.hidden_size + 2 * heads + mlp) * item_bytes


def _workspace_bytes(
    config: ModelConfig,
    item_bytes: int,
    batch_tokens: int,
    num_seqs: int,
    model_len: int,
    prefill_bytes: int | None,
) -> int:
    """Activations of the widest step: hidden states, projections, MLP, what prefill attention takes
    (the PyTorch ops gather one KV head of the longest context), and logits in float32."""
    per_token = _activation_bytes(config, item_bytes)
    gathered = 2 * model_len * config.head_dim * item_bytes
    attention = gathered if prefill_bytes is None else prefill_bytes
    return batch_tokens * per_token + attention + num_seqs * config.vocab_size * 4 * 2
