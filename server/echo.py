"""The echoed prompt at the head of a completion: its text, and where each token begins in it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from engine.messages import TokenLogprobs
from engine.tokenizer import Tokenizer
from server.detokenizer import make_detokenizer
from server.logprobs import LogprobEntry


class PromptText:
    """A prompt's text and the character where each token begins, shared by all its choices.

    Linear in the prompt: for a long one the work of a thread, not of the event loop.
    """

    def __init__(self, tokens: Sequence[int], text: str | None, tokenizer: Tokenizer) -> None:
        """`text` is the prompt as the client wrote it; None if it came as token ids."""
        detokenizer = make_detokenizer(tokenizer, skip_special_tokens=False)
        pieces = [detokenizer.push(token_id) for token_id in tokens]
        pieces.append(detokenizer.flush())
        decoded = "".join(pieces)
        self.text = decoded if text is None else text
        self.tokens = tokens
        # A token that the tokenizer put before the client's text has no place in it.
        added = len(decoded) - len(self.text) if decoded.endswith(self.text) else 0
        self.offsets = [
            max(offset - added, 0) for offset in accumulate(map(len, pieces), initial=0)
        ]


class EchoedPrompt:
    """Collects the prompt's log-probabilities while it is computed for one choice."""

    def __init__(self, prompt: PromptText) -> None:
        self.text = prompt.text
        self.entries: list[LogprobEntry] = []
        self._prompt = prompt

    def push(self, found: Sequence[TokenLogprobs | None]) -> None:
        """Log-probabilities of the next prompt tokens, in order."""
        for logprobs in found:
            place = len(self.entries)
            token, offset = self._prompt.tokens[place], self._prompt.offsets[place]
            self.entries.append(LogprobEntry(token, offset, logprobs))
