"""Chat messages to a prompt, by the model's own template in a sandbox.

A template comes from the model folder: it runs in jinja2's immutable sandbox and cannot reach
Python objects, so a hostile template runs no code. It may still waste time and memory: `range` is
bounded there, nested loops and repeated texts are not.
"""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from engine.tokenizer import Tokenizer
from server.errors import ApiError, invalid

ROLES = ("system", "developer", "user", "assistant")
MAX_MESSAGES = 4096


class ChatTemplate:
    """A compiled template with the model's special tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """
        Raises:
            ApiError: 400 `no_chat_template`; the folder has none, or one that does not compile.
        """
        source = tokenizer.chat_template
        if source is None:
            raise invalid(
                "this model has no chat template; use /v1/completions", code="no_chat_template"
            )
        try:
            self._template = _compiled(source)
        except jinja2.TemplateError:
            raise invalid(
                "this model's chat template is not usable", code="no_chat_template"
            ) from None
        self._special = {
            name: tokenizer.special_token(name) or "" for name in ("bos_token", "eos_token")
        }

    def render(self, messages: list[dict[str, str]]) -> str:
        """The prompt of a conversation, ready for the assistant's turn.

        Raises:
            ApiError: 400; the template does not take these messages.
        """
        try:
            return self._template.render(
                messages=messages, add_generation_prompt=True, tools=None, **self._special
            )
        except ApiError:
            raise
        except Exception:  # a template may raise anything; it is the messages' fault here
            raise invalid("the chat template does not take these messages", "messages") from None


@lru_cache(maxsize=1)  # a server has one template, and compiling takes longer than rendering
def _compiled(source: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value, **_: json.dumps(value, ensure_ascii=False)
    environment.globals["raise_exception"] = _refuse
    return environment.from_string(source)


def parse_messages(value: Any) -> list[dict[str, str]]:
    """`messages`: roles and texts; content may be a text or a list of text parts.

    Raises:
        ApiError: 400 naming `messages`.
    """
    if not isinstance(value, list) or not 0 < len(value) <= MAX_MESSAGES:
        raise invalid(f"messages must be a list of 1 to {MAX_MESSAGES} messages", "messages")
    return [_parse_message(message) for message in value]


def _parse_message(message: Any) -> dict[str, str]:
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        raise invalid(f"messages: each needs a role of {', '.join(ROLES)}", "messages")
    if message.get("tool_calls") is not None or message.get("function_call") is not None:
        raise invalid("messages: tool calls are not supported", "messages", "unsupported_field")
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(_parse_part(part) for part in content)
    if not isinstance(content, str):
        raise invalid("messages: content must be a text or a list of text parts", "messages")
    return {"role": message["role"], "content": content}


def _parse_part(part: Any) -> str:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        text: str = part["text"]
        return text
    raise invalid("messages: only text parts are supported", "messages", "unsupported_field")


def _refuse(_message: str) -> None:
    """What templates call to refuse; the message may quote the conversation, so it is dropped."""
    raise invalid("the chat template does not take these messages", "messages")
