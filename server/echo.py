"""The echoed prompt at the head of a completion: its text, and where each token begins in it."""

from __future__ import annotations

from collections.abc import Sequence

from engine.messages import TokenLogprobs
from engine.tokenizer import Tokenizer
from server.detokenizer import make_detokenizer
from server.logprobs import LogprobEntry


class EchoedPrompt:
    """Collects the prompt's log-probabilities while it is computed."""

    def __init__(self, tokens: Sequence[int], text: str | None, tokenizer: Tokenizer) -> None:
        """`text` is the prompt as the client wrote it; None if it came as token ids."""
        detokenizer = make_detokenizer(tokenizer, skip_special_tokens=False)
        pieces = [detokenizer.push(token_id) for token_id in tokens]
        pieces.append(detokenizer.flush())
        self.text = "".join(pieces) if text is None else text
        self._tokens = tokens
        self._offsets = [0]
        for piece in pieces:
            self._offsets.append(self._offsets[-1] + len(piece))
        self.entries: list[LogprobEntry] = []

    def push(self, found: Sequence[TokenLogprobs | None]) -> None:
        """Log-probabilities of the next prompt tokens, in order."""
        for logprobs in found:
            place = len(self.entries)
            self.entries.append(LogprobEntry(self._tokens[place], self._offsets[place], logprobs))
