"""What the toy engine says of itself, and the real scheduler over pools of its size."""

from __future__ import annotations

from engine.kv_pools import KvPools
from engine.messages import EngineInfo, ReadBytes
from engine.scheduler import Scheduler
from tests.engine.fake_runner import EOS, SINKS, VOCAB, WINDOW


def toy_info(
    *, block_tokens: int = 4, full_pages: int = 64, window_pages: int = 64, max_num_seqs: int = 4
) -> EngineInfo:
    return EngineInfo(
        vocab_size=VOCAB,
        max_model_len=128,
        eos_token_ids=(EOS,),
        attention="sparse",
        retrieval_heads=1,
        attention_heads=2,
        kv_bytes_per_token=1,
        kv_bytes_per_token_dense=2,
        block_tokens=block_tokens,
        full_pages=full_pages,
        window_pages=window_pages,
        full_page_bytes=8 * block_tokens,
        window_page_bytes=4 * block_tokens,
        window_tokens=WINDOW,
        reads=ReadBytes(head=4, full=8, index=2, local=4, dense=16, window_tokens=WINDOW + SINKS),
        max_num_seqs=max_num_seqs,
        device="cpu",
        dtype="int",
        kernels="torch",
        plan="toy",
    )


def toy_scheduler(info: EngineInfo, *, max_batch_tokens: int = 16) -> Scheduler:
    """The real scheduler over pools of the toy's size."""
    pools = KvPools(
        full_pages=info.full_pages,
        window_pages=info.window_pages,
        block_tokens=info.block_tokens,
        window_tokens=WINDOW,
        sink_tokens=SINKS,
    )
    return Scheduler(pools, max_num_seqs=info.max_num_seqs, max_batch_tokens=max_batch_tokens)
