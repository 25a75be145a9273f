"""POST /v1/completions: one JSON answer, or a stream of chunks."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from server.admission import hold_room, submit_all
from server.answer import Answer
from server.choice import Choice, Delta
from server.echo import EchoedPrompt, PromptText
from server.errors import invalid
from server.event_stream import answered
from server.logprobs import LogprobEntry, completion_logprobs
from server.protocol import CompletionRequest
from server.reply import reply
from server.request_record import RequestRecord, Wanted, record_of
from server.service import Service
from server.validation import (
    DEFAULT_MAX_TOKENS,
    SamplingChoice,
    check_length,
    clamp_max_tokens,
    encode_prompt,
    parse_prompts,
    parse_sampling,
)


def completions_router(service: Service) -> APIRouter:
    """The route, bound to its service."""
    router = APIRouter()

    @router.post("/v1/completions")
    async def completions(request: Request) -> Response:
        body = await service.parse(CompletionRequest, request)
        service.require_ready()
        record = record_of(request)
        call = await answered(CompletionCall.prepare(service, body, record), request)
        keep_alive = service.config.keep_alive_seconds
        return await reply(call, request, keep_alive, streamed=bool(body.stream))

    return router


@dataclass(frozen=True, slots=True)
class CompletionCall:
    """One admitted call."""

    service: Service
    body: CompletionRequest
    answer: Answer
    completion_id: str
    created: int

    @classmethod
    async def prepare(
        cls, service: Service, body: CompletionRequest, record: RequestRecord
    ) -> CompletionCall:
        """Validate, tokenise and admit.

        Raises:
            ApiError: 400 naming the field.
            EngineError: no room, or no engine.
        """
        info = service.engine.info
        deadline = service.deadline(body.timeout_seconds)
        max_tokens = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
        if max_tokens == 0 and not body.echo:
            raise invalid("max_tokens 0 makes sense with echo only", "max_tokens")
        n = body.n or 1
        prompts = parse_prompts(body.prompt, service.config.max_prompts)
        if len(prompts) * n > service.config.max_choices:
            raise invalid(f"prompts times n: at most {service.config.max_choices}", "n")
        common = parse_sampling(
            body,
            info,
            max_tokens=max_tokens,
            logprobs=body.logprobs,
            prompt_logprobs=body.logprobs if body.echo else None,
        )
        for prompt in prompts:
            check_length(prompt, service.tokenizer, info)
        with hold_room(service, prompts, len(prompts) * n):
            encoded = [
                await service.in_thread(
                    encode_prompt, prompt, service.tokenizer, info, size=len(prompt)
                )
                for prompt in prompts
            ]
            jobs = [
                (ids, _for_prompt(common, clamp_max_tokens(len(ids), max_tokens, info)))
                for ids in encoded
            ]
            echoes = [
                await service.in_thread(
                    *(PromptText, ids, prompt if isinstance(prompt, str) else None),
                    service.tokenizer,
                    size=len(ids),
                )
                for prompt, ids in zip(prompts, encoded, strict=True)
                if body.echo
            ]
        answer = _admit(service, jobs, echoes, common, n, deadline, record)
        completion_id = f"cmpl-{uuid.uuid4().hex}"
        record.wanted = Wanted(
            "text_completion", completion_id, bool(body.stream), jobs[0][1].params
        )
        return cls(service, body, answer, completion_id, int(time.time()))

    def whole(self, texts: Sequence[str], entries: Sequence[list[LogprobEntry]]) -> dict[str, Any]:
        """The answer in one piece."""
        return {
            **self._head(),
            "choices": [
                self._choice(c, texts[c.index], entries[c.index], c.finish_reason)
                for c in self.answer.choices
            ],
            "usage": self.answer.usage(),
            "metrics": self.answer.metrics(),
        }

    def first_chunks(self) -> list[dict[str, Any]]:
        """Chunks before any text: none."""
        return []

    def chunk(self, choice: Choice, delta: Delta) -> dict[str, Any] | None:
        """One streamed chunk, None if there is nothing to say."""
        if not delta.text and not delta.logprobs and delta.finish_reason is None:
            return None
        body = self._choice(choice, delta.text, delta.logprobs, delta.finish_reason)
        return {**self._head(), "choices": [body]}

    def usage_chunk(self) -> dict[str, Any] | None:
        """The chunk that closes a stream, if it was asked for."""
        options = self.body.stream_options
        if options is None or not options.include_usage:
            return None
        accounts = {"usage": self.answer.usage(), "metrics": self.answer.metrics()}
        return {**self._head(), "choices": [], **accounts}

    def _head(self) -> dict[str, Any]:
        return {
            "id": self.completion_id,
            "object": "text_completion",
            "created": self.created,
            "model": self.service.config.model_name,
        }

    def _choice(
        self, choice: Choice, text: str, entries: list[LogprobEntry], finish_reason: str | None
    ) -> dict[str, Any]:
        logprobs = None
        if self.body.logprobs is not None:
            logprobs = completion_logprobs(entries, self.service.tokenizer, self.body.logprobs)
        return {
            "index": choice.index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": finish_reason,
        }


def _for_prompt(common: SamplingChoice, max_tokens: int) -> SamplingChoice:
    """The common parameters with what is left of the context after one prompt."""
    params = msgspec.structs.replace(
        common.params,
        max_tokens=max_tokens,
        min_tokens=min(common.params.min_tokens, max_tokens),
    )
    return SamplingChoice(params, common.stops)


def _admit(
    service: Service,
    jobs: list[tuple[Sequence[int], SamplingChoice]],
    echoes: list[PromptText],
    common: SamplingChoice,
    n: int,
    deadline: float,
    record: RequestRecord,
) -> Answer:
    generations = submit_all(service, [(ids, job.params) for ids, job in jobs], n, deadline)
    choices = []
    for index, generation in enumerate(generations):
        echo = EchoedPrompt(echoes[index // n]) if echoes else None
        choices.append(Choice(index, generation, service.tokenizer, common.stops, echo))
    return Answer(service, choices, deadline, record)
