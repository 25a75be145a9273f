"""An engine in memory: implements `engine.client.Engine` with a toy model on the event loop.

Tokens are letters that depend on the prompt, the place and, when sampled, the seed; or a script.
"""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from engine.client import EngineState, Generation, Job
from engine.errors import EngineUnavailableError, QueueFullError
from engine.messages import (
    Attended,
    EngineInfo,
    ReadBytes,
    RequestUpdate,
    Stats,
    Timing,
    TokenLogprobs,
)
from engine.recovery import Recovery
from engine.request import FinishReason, SamplingParams
from engine.tokenizer import Tokenizer

EOS = 2


class FakeEngine:
    """`running`, cleared, holds all generation back, as does `pause_after` that many tokens.

    `scripts` answers given prompts with given ids.
    """

    def __init__(self, tokenizer: Tokenizer, max_model_len: int = 256) -> None:
        self.state: EngineState = "ready"
        self.restarts = 0
        self.recovery = Recovery()
        self.pid: int | None = os.getpid()
        self.trouble: str | None = None
        self.step_allowance = 0.0
        self.stats = Stats(full_total=100, window_total=100, layer_attended_fraction={3: 0.25})
        self.queue_limit = 64
        self.prefill_limit = 10**6
        self.held: list[tuple[int, int]] = []
        self.aborted: list[int] = []
        self.live: dict[int, Generation] = {}
        self.submitted: list[SamplingParams] = []
        self.deadlines: list[float | None] = []
        self.scripts: dict[tuple[int, ...], list[int]] = {}
        self.pause_after: int | None = None
        self.minus_infinity = False
        self.silence = 0.0
        self.running = asyncio.Event()
        self.running.set()
        self.info = EngineInfo(
            vocab_size=320,
            max_model_len=max_model_len,
            eos_token_ids=(EOS,),
            attention="sparse",
            retrieval_heads=2,
            attention_heads=16,
            kv_bytes_per_token=100,
            kv_bytes_per_token_dense=400,
            block_tokens=8,
            full_pages=100,
            window_pages=100,
            full_page_bytes=800,
            window_page_bytes=400,
            window_tokens=64,
            reads=ReadBytes(head=4, full=8, index=2, local=4, dense=16, window_tokens=66),
            max_num_seqs=8,
            device="cpu",
            dtype="float32",
            kernels="torch",
            plan="none",
        )
        self._letters = tokenizer.encode("abcdefghijklmnopqrstuvwxyz ,.\n")
        self._ids = itertools.count(1)
        self._tasks: set[asyncio.Task[None]] = set()

    def seconds_since_step(self) -> float:
        return self.silence

    def step_seconds(self) -> float:
        return self.step_allowance

    def submit_all(self, jobs: Sequence[Job]) -> list[Generation]:
        if self.state != "ready":
            raise EngineUnavailableError(f"the engine is {self.state}", retry_after=7)
        if len(self.live) + len(jobs) > self.queue_limit:
            raise QueueFullError("full", retry_after=3)
        return [self._start(job) for job in jobs]

    @contextmanager
    def hold(self, requests: int, prefill_tokens: int) -> Iterator[None]:
        self.held.append((requests, prefill_tokens))
        if prefill_tokens > self.prefill_limit:
            raise QueueFullError("full", retry_after=4, reason="prefill_backlog")
        yield

    def _start(self, job: Job) -> Generation:
        generation = Generation(next(self._ids), job.prompt, job.params, self._abort, job.deadline)
        self.live[generation.request_id] = generation
        self.submitted.append(job.params)
        self.deadlines.append(job.deadline)
        task = asyncio.get_running_loop().create_task(self._generate(generation))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return generation

    def fail_all(self) -> None:
        """As if the engine process had died."""
        for generation in list(self.live.values()):
            generation.fail(EngineUnavailableError("the engine failed"))
        self.live.clear()

    def expire_all(self) -> None:
        """As if the engine had found every deadline passed."""
        for generation in list(self.live.values()):
            self._push(generation, RequestUpdate(request_id=0, finish_reason="deadline"))

    async def start(self) -> None: ...

    async def drain(self, seconds: float) -> None: ...

    async def stop(self) -> None: ...

    def _abort(self, request_id: int) -> None:
        if self.live.pop(request_id, None) is not None:
            self.aborted.append(request_id)

    async def _generate(self, generation: Generation) -> None:
        params, total = generation.params, len(generation.prompt)
        self._push(generation, RequestUpdate(request_id=0, prefilled=total // 2))
        await self.running.wait()
        prompt_logprobs: list[TokenLogprobs | None] = []
        if params.prompt_logprobs is not None:
            prompt_logprobs = [None, *(self._logprobs(t, 1) for t in generation.prompt[1:])]
        self._push(
            generation,
            RequestUpdate(request_id=0, prefilled=total, prompt_logprobs=prompt_logprobs),
        )
        if params.max_tokens == 0:
            self._push(generation, RequestUpdate(request_id=0, finish_reason="length"))
        for place in range(params.max_tokens):
            await asyncio.sleep(0)
            if place == self.pause_after:
                self.running.clear()
            await self.running.wait()
            if generation.request_id not in self.live:
                return
            self._push(generation, self._step(generation, place))

    def _step(self, generation: Generation, place: int) -> RequestUpdate:
        params = generation.params
        token = self._token(generation.prompt, params, place)
        finish: FinishReason | None = None
        if token in params.stop_token_ids or (token == EOS and not params.ignore_eos):
            finish = "stop"
        elif place + 1 == params.max_tokens:
            finish = "length"
        logprobs = [] if params.logprobs is None else [self._logprobs(token, params.logprobs)]
        return RequestUpdate(
            request_id=0,
            tokens=[token],
            logprobs=logprobs,
            prefilled=len(generation.prompt),
            finish_reason=finish,
            stop_token=token if finish == "stop" else None,
            timing=Timing(0.001, 0.5, 0.01 * place),
            attended=Attended(place, 20 * place, 0.1 * place),
        )

    def _token(self, prompt: Sequence[int], params: SamplingParams, place: int) -> int:
        script = self.scripts.get(tuple(prompt))
        if script is not None:
            return script[place] if place < len(script) else EOS
        seed = params.seed if params.temperature > 0 else 0
        state = sum((i + 1) * token for i, token in enumerate(prompt)) + 7919 * place + seed
        return self._letters[(state * 2654435761 >> 8) % len(self._letters)]

    def _logprobs(self, token: int, count: int) -> TokenLogprobs:
        own = float("-inf") if self.minus_infinity else -0.5
        tops = [token, *range(100, 100 + count)][:count]
        return TokenLogprobs(token, own, tops, [own - i for i in range(len(tops))])

    def _push(self, generation: Generation, update: RequestUpdate) -> None:
        if generation.request_id in self.live:
            if update.finish_reason is not None:
                del self.live[generation.request_id]
            generation.push(update)
