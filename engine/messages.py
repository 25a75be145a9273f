"""The messages that cross between front end and engine: integers and floats, never text of users.

Encoding and frames are in `engine.ipc`; prompts travel as one int32 buffer beside the message.
Times are seconds of `time.monotonic`, which on Linux is one clock for all processes of a host.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from engine.request import FinishReason, SamplingParams


class Add(msgspec.Struct, tag=True, kw_only=True):
    """Start a request, or go on with one that an engine before this one was lost with."""

    request_id: int  # made by the front end, unique while it lives
    params: SamplingParams
    prompt: bytes  # int32 little endian
    output: bytes = b""  # tokens that were already generated, int32 little endian
    progress: Progress | None = None  # what was already told; None: a new request
    arrival: float
    deadline: float | None = None  # the engine drops it then by itself, queued or running


class Abort(msgspec.Struct, tag=True):
    """Forget these requests at the next step; ids that are unknown are ignored."""

    request_ids: list[int]


class Shutdown(msgspec.Struct, tag=True):
    """Leave the loop and exit 0."""


class TokenLogprobs(msgspec.Struct, array_like=True):
    """Log-probabilities at one position, natural log, of the raw model distribution."""

    token_id: int
    logprob: float
    top_ids: list[int]  # most probable first, as many as asked for
    top_logprobs: list[float]


class Timing(msgspec.Struct, array_like=True):
    """Durations of one request so far, in seconds; None where the phase has not ended."""

    queue: float | None = None  # arrival to first scheduled
    prefill: float | None = None  # first scheduled to first token
    decode: float | None = None  # first token to last token


class Attended(msgspec.Struct, array_like=True):
    """Token budget of one request: sums over (decode step, retrieval head) pairs."""

    pairs: int = 0  # how many pairs selected; 0 where nothing was selected
    tokens: int = 0  # tokens attended, summed over the pairs
    fraction: float = 0.0  # attended / context length, summed over the pairs


class Progress(msgspec.Struct, array_like=True):
    """What was told of a request so far, so that no engine tells or counts it a second time."""

    prompt_logprobs: int = 0  # entries
    cached: int | None = None  # prompt tokens from the prefix cache; None: it had not begun
    timing: Timing = msgspec.field(default_factory=Timing)
    attended: Attended = msgspec.field(default_factory=Attended)


class RequestUpdate(msgspec.Struct, kw_only=True):
    """What one step brought for one request. Also sent without tokens, as prefill progress."""

    request_id: int
    tokens: list[int] = []  # newly sampled; a stop id is included, it is the last one
    logprobs: list[TokenLogprobs] = []  # one per new token if asked for
    prompt_logprobs: list[TokenLogprobs | None] = []  # for prompt positions in order, first None
    prefilled: int = 0  # prompt tokens computed so far, cached ones included
    cached: int = 0  # prompt tokens taken from the prefix cache
    finish_reason: FinishReason | None = None
    stop_token: int | None = None  # the id that ended it, when finish_reason is "stop"
    timing: Timing | None = None  # so far
    attended: Attended | None = None  # so far, with updates that have tokens and with the last


class Stats(msgspec.Struct, kw_only=True):
    """State of the engine after a step; cheap to make, one per step."""

    step: int = 0  # steps since start
    running: int = 0
    waiting: int = 0
    full_used: int = 0  # pages
    full_total: int = 0
    window_used: int = 0
    window_total: int = 0
    prefill_remaining: int = 0  # prompt tokens still to compute, of running and waiting requests
    preemptions: int = 0  # since start
    prefix_hit_tokens: int = 0  # since start
    prompt_tokens: int = 0  # computed under the prefill rule, since start
    generated_tokens: int = 0  # sampled, since start
    layer_attended_fraction: dict[int, float] = {}  # layer -> moving mean over decode steps
    # Where the time goes: steps since start by what they computed, and the seconds in them, from
    # the call of the runner, or the results of the step before where those came later, to its
    # results. Decode: one new token of each sequence and nothing else; prefill: chunks of prompts,
    # or of output that is replayed; mixed: both together.
    decode_steps: int = 0
    decode_seconds: float = 0.0
    prefill_steps: int = 0
    prefill_seconds: float = 0.0
    mixed_steps: int = 0
    mixed_seconds: float = 0.0
    step_seconds: float = 0.0  # of the newest step
    step_seconds_predicted: float = 0.0  # the same as the scheduler foresaw it; 0: it did not
    memory_retries: int = 0  # steps tried again in smaller chunks for want of memory, since start
    full_cached: int = 0  # pages that only the prefix cache keeps
    window_cached: int = 0
    free_tokens: int = 0  # of context that still fit (KvPools.free_tokens)
    prefilling: int = 0  # running requests whose prompt is being computed
    oldest_prefill_done: int = 0  # prompt tokens of the one of these that runs for longest
    oldest_prefill_total: int = 0  # 0: there is none
    oldest_waiting: float | None = None  # arrival of the first of those that wait; monotonic
    oldest_running: float | None = None  # the same of those that run
    log_lines_dropped: int = 0  # since start
    # What decode steps attended and read since start (engine.read_bytes). Sums of bytes leave the
    # range of int64 within a day.
    attended_tokens: int = 0
    context_tokens: int = 0
    read_selected_bytes: float = 0.0
    read_whole_bytes: float = 0.0
    read_window_bytes: float = 0.0
    read_index_bytes: float = 0.0
    read_dense_bytes: float = 0.0


class Report(msgspec.Struct, tag=True, kw_only=True):
    """Everything one step has to say."""

    updates: list[RequestUpdate]
    stats: Stats


class ReadBytes(msgspec.Struct, kw_only=True, frozen=True):
    """Bytes that a decode step reads per token of a row's context, by role (engine.read_bytes)."""

    head: int  # keys and values of one KV head of one layer
    full: int  # of all full KV heads
    index: int  # index keys; 0: no indexer
    local: int  # of all KV heads that a local query head reads, for tokens of the window only
    dense: int  # of all KV heads
    window_tokens: int  # window and sinks


class EngineInfo(msgspec.Struct, kw_only=True, frozen=True):
    """Facts that hold from start to end of an engine process."""

    vocab_size: int  # width of the logits: every token id of a request is below it
    max_model_len: int  # tokens, prompt + output
    eos_token_ids: tuple[int, ...]
    attention: str  # "sparse" or "dense", as served
    retrieval_heads: int  # query heads with full context; all of them when dense
    attention_heads: int  # query heads of all layers
    kv_bytes_per_token: int  # as served, growing part (full pool with index keys)
    kv_bytes_per_token_dense: int  # the same model served densely
    block_tokens: int
    full_pages: int  # usable pages of the full pool
    window_pages: int
    full_page_bytes: int  # index keys included
    window_page_bytes: int
    window_tokens: int  # of local heads; 0: there are none
    reads: ReadBytes
    max_num_seqs: int
    device: str
    dtype: str
    kernels: Literal["cuda", "torch"]  # of decode attention
    plan: str  # the memory plan, ready to print


class Ready(msgspec.Struct, tag=True):
    """The engine has loaded and takes work."""

    info: EngineInfo


class Failed(msgspec.Struct, tag=True):
    """The engine cannot start; it exits after this. `message` is one line for the operator."""

    message: str
    kind: Literal["engine", "config", "checkpoint"] = "engine"  # which error the front end raises


ToEngine = Add | Abort | Shutdown
FromEngine = Ready | Report | Failed
