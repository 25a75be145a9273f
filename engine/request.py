"""One sequence to generate, as the engine sees it: integers and ranges, no text, no torch."""

from __future__ import annotations

from typing import Literal

import msgspec

FinishReason = Literal["stop", "length", "abort", "deadline", "error"]


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How to choose tokens. Validated at the HTTP edge; every id is below the logits width."""

    max_tokens: int = 16  # tokens to generate; 0 only with prompt_logprobs (echo without output)
    min_tokens: int = 0  # end-of-sequence and stop ids are masked before this many tokens
    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0  # (0, 1]; 1 is off
    top_k: int = 0  # 0 is off; larger than the vocabulary is clamped
    min_p: float = 0.0  # [0, 1]; 0 is off
    presence_penalty: float = 0.0  # [-2, 2]; counts generated tokens only
    frequency_penalty: float = 0.0  # [-2, 2]; counts generated tokens only
    repetition_penalty: float = 1.0  # > 0; 1 is off; counts prompt and generated tokens
    logit_bias: dict[int, float] = {}  # token id -> added to its logit
    seed: int = 0  # always set: the front end draws one when the client gave none
    stop_token_ids: tuple[int, ...] = ()  # end generation; the id itself is reported
    ignore_eos: bool = False  # the model's own end-of-sequence ids do not stop
    logprobs: int | None = None  # alternatives reported with each generated token; None is off
    prompt_logprobs: int | None = None  # the same for prompt tokens (echo); disables cache hits
    attention_top_p: float | None = None  # (0, 1]; None takes the checkpoint's per-head values

    @property
    def penalises(self) -> bool:
        """Whether tokens that were generated change the logits of those that follow."""
        counted = self.presence_penalty or self.frequency_penalty
        return bool(counted) or self.repetition_penalty != 1.0


class Request:
    """Mutable state of one sequence in the engine.

    Positions of a sequence, with prompt length p and t = p + generated tokens:

        [0, cached) shared pages from the prefix cache
        [cached, computed) KV stored by this request
        [computed, total) still to compute; the last one is the newest sampled token

    Positions below p follow the prefill rule, the others the decode rule, whenever and however
    often they are computed (design: "the rule follows the token's origin").
    """

    __slots__ = (
        "arrival",
        "cached",
        "computed",
        "deadline",
        "digests",
        "first_scheduled",
        "full_blocks",
        "last_step",
        "output",
        "params",
        "preemptions",
        "prompt",
        "registered",
        "request_id",
        "slot",
        "window_blocks",
        "window_start",
    )

    def __init__(
        self,
        request_id: int,
        prompt: list[int],
        params: SamplingParams,
        output: list[int] | None = None,
        arrival: float = 0.0,
        deadline: float | None = None,
    ) -> None:
        assert prompt, "the edge refuses empty prompts"
        self.request_id = request_id
        self.prompt = prompt
        self.params = params
        self.output = output if output is not None else []  # non-empty on arrival: a resumed one
        self.arrival = arrival  # time.monotonic() seconds when the front end admitted it
        self.deadline = deadline  # time.monotonic() seconds; None: it may take for ever
        self.first_scheduled: float | None = None  # time.monotonic() seconds
        self.cached = 0
        self.computed = 0
        self.full_blocks: list[int] = []  # page ids by logical block
        self.window_blocks: list[int] = []  # the same; a page that slid out is replaced by 0
        self.window_start = 0  # logical blocks before it are released, but for the sinks
        self.registered = 0  # leading logical blocks that the prefix cache was told about
        self.digests: list[bytes] = []  # of leading full blocks (engine.block_digest)
        self.slot: int | None = None  # row of the worker's persistent tables while running
        self.preemptions = 0
        self.last_step = 0  # number of the newest step that computed something of it

    @property
    def prompt_len(self) -> int:
        return len(self.prompt)

    @property
    def total(self) -> int:
        """Tokens of the sequence so far, prompt and generated."""
        return len(self.prompt) + len(self.output)

    @property
    def remaining(self) -> int:
        """Tokens whose KV is still to compute; 1 while decoding."""
        return self.total - self.computed

    @property
    def is_row(self) -> bool:
        """Whether nothing but its newest token is to compute."""
        prompt = len(self.prompt)  # asked of every request at every step
        return prompt <= self.computed == prompt + len(self.output) - 1

    @property
    def is_prefill(self) -> bool:
        """Whether prompt tokens are still to compute."""
        return self.computed < len(self.prompt)

    def tokens(self, start: int, stop: int) -> list[int]:
        """Token ids at positions [start, stop), taken from the prompt and the output."""
        p = len(self.prompt)
        if stop <= p:
            return self.prompt[start:stop]
        if start >= p:
            return self.output[start - p : stop - p]
        return self.prompt[start:] + self.output[: stop - p]
