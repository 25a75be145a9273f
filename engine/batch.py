"""What one engine step computes: plain integers, handed from the scheduler to the worker."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal, NamedTuple

Rule = Literal["prefill", "decode"]

NEWEST_TOKEN = -1  # in place of an id: what the step before, not read yet, chooses in that slot


class Span(NamedTuple):
    """Consecutive positions of one sequence, all of one attention rule.

    A named tuple, since a step makes one for each sequence: a frozen dataclass takes three times
    as long, while the device waits.

    A span under the decode rule is one new token, or several generated tokens replayed after a
    preemption or a restart. Block lists belong to the request and are only read; both are indexed
    by logical block, and a window page that slid out is 0 (the null page, never allocated).
    """

    request_id: int
    slot: int  # row of the worker's persistent tables, below max_num_seqs
    start: int  # first position
    tokens: list[int]  # ids at positions start, start + 1, ...; or NEWEST_TOKEN alone
    rule: Rule
    full_blocks: list[int]
    window_blocks: list[int]
    sample: bool  # whether the last position's logits choose the next token
    epoch: int = 0  # grows whenever the request lost its pages: its tables start anew

    @property
    def is_row(self) -> bool:
        """Whether it is one new token; all other spans are chunks."""
        return self.rule == "decode" and len(self.tokens) == 1

    @property
    def stop(self) -> int:
        """Context length after the span: position of the last token + 1."""
        return self.start + len(self.tokens)


@dataclass(frozen=True, slots=True)
class Batch:
    """The spans of one step, decode spans first. Spans of one request are in position order."""

    spans: list[Span]

    @property
    def num_tokens(self) -> int:
        return sum(len(span.tokens) for span in self.spans)

    @property
    def request_ids(self) -> list[int]:
        """Of all spans, each once."""
        return list(dict.fromkeys(span.request_id for span in self.spans))

    def rows(self) -> list[tuple[int, int]]:
        """First row and end of each span among the tokens of the batch."""
        ends = list(accumulate(len(span.tokens) for span in self.spans))
        return list(zip([0, *ends], ends, strict=False))

    def without(self, request_ids: Collection[int]) -> Batch:
        """The same but for the spans of some requests."""
        if not request_ids:
            return self
        return Batch([span for span in self.spans if span.request_id not in request_ids])
