"""POST /v1/chat/completions: the same engine behind the model's chat template."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from engine.messages import EngineInfo
from server.admission import hold_room, submit_all
from server.answer import Answer
from server.chat_template import ChatTemplate, parse_messages
from server.choice import Choice, Delta
from server.errors import invalid
from server.event_stream import answered
from server.logprobs import LogprobEntry, chat_logprobs
from server.protocol import ChatCompletionRequest
from server.reply import reply
from server.request_record import RequestRecord, Wanted, record_of
from server.service import Service
from server.validation import check_length, clamp_max_tokens, encode_prompt, parse_sampling


def chat_router(service: Service) -> APIRouter:
    """The route, bound to its service."""
    router = APIRouter()

    @router.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        body = await service.parse(ChatCompletionRequest, request)
        messages = parse_messages(body.messages)
        template = ChatTemplate(service.tokenizer)
        service.require_ready()
        record = record_of(request)
        call = await answered(ChatCall.prepare(service, body, template, messages, record), request)
        keep_alive = service.config.keep_alive_seconds
        return await reply(call, request, keep_alive, streamed=bool(body.stream))

    return router


@dataclass(frozen=True, slots=True)
class ChatCall:
    """One admitted call."""

    service: Service
    body: ChatCompletionRequest
    answer: Answer
    completion_id: str
    created: int

    @classmethod
    async def prepare(
        cls,
        service: Service,
        body: ChatCompletionRequest,
        template: ChatTemplate,
        messages: list[dict[str, str]],
        record: RequestRecord,
    ) -> ChatCall:
        """Render, tokenise and admit.

        Raises:
            ApiError: 400 naming the field.
            EngineError: no room, or no engine.
        """
        info = service.engine.info
        deadline = service.deadline(body.timeout_seconds)
        if body.top_logprobs is not None and not body.logprobs:
            raise invalid("top_logprobs needs logprobs", "top_logprobs")
        n = body.n or 1
        if n > service.config.max_choices:
            raise invalid(f"n: at most {service.config.max_choices}", "n")
        texts = [message["content"] for message in messages]
        for text in texts:
            check_length(text, service.tokenizer, info)
        with hold_room(service, texts, n):
            prompt = await service.in_thread(
                *(_encode, template, messages, service, info), size=sum(map(len, texts))
            )
        max_tokens = clamp_max_tokens(len(prompt), _wanted_tokens(body, info), info)
        sampling = parse_sampling(
            body,
            info,
            max_tokens=max_tokens,
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        )
        generations = submit_all(service, [(prompt, sampling.params)], n, deadline)
        choices = [
            Choice(index, generation, service.tokenizer, sampling.stops)
            for index, generation in enumerate(generations)
        ]
        answer = Answer(service, choices, deadline, record)
        completion_id = f"chatcmpl-{uuid.uuid4().hex}"
        record.wanted = Wanted("chat", completion_id, bool(body.stream), sampling.params)
        return cls(service, body, answer, completion_id, int(time.time()))

    def whole(self, texts: Sequence[str], entries: Sequence[list[LogprobEntry]]) -> dict[str, Any]:
        """The answer in one piece."""
        return {
            **self._head("chat.completion"),
            "choices": [
                {
                    "index": choice.index,
                    "message": {"role": "assistant", "content": texts[choice.index]},
                    "logprobs": self._logprobs(entries[choice.index]),
                    "finish_reason": choice.finish_reason,
                }
                for choice in self.answer.choices
            ],
            "usage": self.answer.usage(),
            "metrics": self.answer.metrics(),
        }

    def first_chunks(self) -> list[dict[str, Any]]:
        """The role of every choice, before any text."""
        role = {"role": "assistant", "content": ""}
        return [self._chunk(choice.index, role, None, None) for choice in self.answer.choices]

    def chunk(self, choice: Choice, delta: Delta) -> dict[str, Any] | None:
        """One streamed chunk, None if there is nothing to say."""
        if not delta.text and not delta.logprobs and delta.finish_reason is None:
            return None
        content = {"content": delta.text} if delta.text else {}
        logprobs = self._logprobs(delta.logprobs)
        return self._chunk(choice.index, content, logprobs, delta.finish_reason)

    def usage_chunk(self) -> dict[str, Any] | None:
        """The chunk that closes a stream, if it was asked for."""
        options = self.body.stream_options
        if options is None or not options.include_usage:
            return None
        accounts = {"usage": self.answer.usage(), "metrics": self.answer.metrics()}
        return {**self._head("chat.completion.chunk"), "choices": [], **accounts}

    def _chunk(
        self, index: int, delta: dict[str, Any], logprobs: Any, finish_reason: str | None
    ) -> dict[str, Any]:
        choice = {
            "index": index,
            "delta": delta,
            "logprobs": logprobs,
            "finish_reason": finish_reason,
        }
        return {**self._head("chat.completion.chunk"), "choices": [choice]}

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.completion_id,
            "object": kind,
            "created": self.created,
            "model": self.service.config.model_name,
        }

    def _logprobs(self, entries: list[LogprobEntry]) -> dict[str, Any] | None:
        if not self.body.logprobs:
            return None
        return chat_logprobs(entries, self.service.tokenizer, self.body.top_logprobs or 0)


def _encode(
    template: ChatTemplate, messages: list[dict[str, str]], service: Service, info: EngineInfo
) -> Sequence[int]:
    """Render and tokenise; the template writes the special tokens itself."""
    text = template.render(messages)
    if not text:
        raise invalid("the chat template made an empty prompt", "messages")
    return encode_prompt(text, service.tokenizer, info, add_special_tokens=False)


def _wanted_tokens(body: ChatCompletionRequest, info: EngineInfo) -> int:
    """Chat has no default limit: what the context leaves."""
    wanted = body.max_completion_tokens or body.max_tokens
    return info.max_model_len if wanted is None else wanted
