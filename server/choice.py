"""One choice of an answer: engine updates in, text and log-probabilities out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from engine.client import Generation
from engine.messages import Attended, RequestUpdate, Timing, TokenLogprobs
from engine.tokenizer import Tokenizer
from server.detokenizer import make_detokenizer
from server.echo import EchoedPrompt
from server.logprobs import LogprobEntry
from server.stop_matcher import StopMatcher


@dataclass(slots=True)
class Delta:
    """What became certain since the last delta."""

    text: str = ""
    logprobs: list[LogprobEntry] = field(default_factory=list)
    finish_reason: str | None = None


class Choice:
    """Follows one generation; ends it early when a stop string appears.

    Text that could still become a stop string or half a character is held back, and so are the
    log-probabilities of its tokens, so that a stream and a plain answer carry the same.
    """

    def __init__(
        self,
        index: int,
        generation: Generation,
        tokenizer: Tokenizer,
        stops: Sequence[str],
        echo: EchoedPrompt | None = None,
    ) -> None:
        self.index = index
        self.generation = generation
        self.generated = 0  # tokens, the one that completed a stop string included
        self.prefilled = 0  # prompt tokens computed
        self.cached = 0  # prompt tokens from the prefix cache
        self.finish_reason: str | None = None
        self.timing = Timing()  # the engine's newest accounts
        self.attended = Attended()
        self._detokenizer = make_detokenizer(tokenizer, generation.prompt)
        self._matcher = StopMatcher(stops)
        self._echo = echo
        self._start = 0 if echo is None else len(echo.text)
        self._decoded = 0  # characters generated, held ones included
        self._released = 0
        self._entries: list[LogprobEntry] = []

    @property
    def prompt_tokens(self) -> int:
        return len(self.generation.prompt)

    def push(self, update: RequestUpdate) -> Delta:
        """Take over an update of the engine."""
        self.prefilled = max(self.prefilled, update.prefilled)
        self.cached = max(self.cached, update.cached)
        if self._echo is not None:
            self._echo.push(update.prompt_logprobs)
        self.timing = update.timing or self.timing
        self.attended = update.attended or self.attended
        text = ""
        for place, token_id in enumerate(update.tokens):
            if self.finish_reason is None:
                found = update.logprobs[place] if update.logprobs else None
                text += self._push_token(token_id, token_id == update.stop_token, found)
        if update.finish_reason is not None and self.finish_reason is None:
            text += self._finish(update.finish_reason)
        return self._release(text, begun=bool(update.tokens) or self.finish_reason is not None)

    def _push_token(self, token_id: int, is_stop: bool, found: TokenLogprobs | None) -> str:
        """Safe text after one more token; a stop id that ended generation has no text."""
        self.generated += 1
        piece = "" if is_stop else self._detokenizer.push(token_id)
        if found is not None:
            self._entries.append(LogprobEntry(token_id, self._start + self._decoded, found))
        self._decoded += len(piece)
        if self.generated <= self.generation.params.min_tokens:
            return piece
        text = self._matcher.push(piece)
        if self._matcher.matched:
            self.finish_reason = "stop"
            self.generation.abort()
        return text

    def _finish(self, reason: str) -> str:
        """The engine ended the request: what was held back is certain now."""
        tail = self._detokenizer.flush()
        self._decoded += len(tail)
        text = self._matcher.push(tail)
        self.finish_reason = "stop" if self._matcher.matched else reason
        return text if self._matcher.matched else text + self._matcher.flush()

    def _release(self, text: str, *, begun: bool) -> Delta:
        """Text with the entries of the tokens that it begins; the echo leads the first delta."""
        self._released += len(text)
        ended = self.finish_reason is not None and not self._matcher.matched
        end = self._start + self._released
        ready = [entry for entry in self._entries if entry.offset < end or ended]
        self._entries = self._entries[len(ready) :]
        if self._echo is not None and begun:
            text = self._echo.text + text
            ready = self._echo.entries + ready
            self._echo = None
        return Delta(text, ready, self.finish_reason)
