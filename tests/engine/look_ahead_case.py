"""The same requests with and without steps that are started ahead: the answers must be the same.

Lengths are ragged; some requests end by a stop id in the middle of an answer, some are left by
their clients, some sample, some report log-probabilities. For the kernels on a GPU and their
emulation on a CPU alike.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec
import pytest

from engine.core import EngineCore
from engine.messages import Abort, Add, Attended
from engine.request import FinishReason, SamplingParams
from engine.step import EngineParts
from tests.engine.fake_channel import FakeChannel

Requests = list[tuple[list[int], SamplingParams]]


@dataclass
class Told:
    """All that was said of a request."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)  # of the tokens, if they were asked for
    reason: FinishReason | None = None
    attended: Attended = field(default_factory=Attended)


def answers(
    parts: EngineParts, requests: Requests, leaving: Mapping[int, int], *, look_ahead: bool
) -> list[Told]:
    """What a loop tells; then nothing may be left in it.

    Args:
        leaving: of some requests, by place, after how many tokens their clients are gone.
    """
    channel = FakeChannel()
    core = EngineCore(parts.scheduler, parts.runner, channel, look_ahead=look_ahead)
    for request_id, (prompt, params) in enumerate(requests):
        ids = array("i", prompt).tobytes()
        channel.inbox.append(Add(request_id=request_id, params=params, prompt=ids, arrival=0.0))
    told = [Told() for _ in requests]
    while any(one.reason is None for one in told):
        core.turn()
        for report in channel.reports:
            for update in report.updates:
                one = told[update.request_id]
                assert one.reason is None, "told of a request that has ended"
                one.tokens += update.tokens
                one.logprobs += [entry.logprob for entry in update.logprobs]
                one.attended = update.attended or one.attended
                one.reason = update.finish_reason
                if one.reason is None and len(one.tokens) == leaving.get(update.request_id):
                    one.reason = "abort"
                    channel.inbox.append(Abort([update.request_id]))
        channel.reports.clear()
    core.turn()
    core.turn()
    assert parts.scheduler.pools.full.used == parts.scheduler.pools.window.used == 0
    parts.scheduler.check_integrity()
    return told


def compare(load: Callable[[], EngineParts], prompts: list[list[int]], most: int) -> None:
    """Engines of a kind, in float32, on these six prompts; the longest answer has `most` tokens."""
    lengths = [most, most // 2, most - 3, most - 1, most // 3, most]
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 0.0, "logprobs": 2},
        {"temperature": 0.9, "top_p": 0.9, "seed": 5},
        {"temperature": 0.0},
        {"temperature": 1.1, "min_p": 0.02, "seed": 6, "logprobs": 1},
        {"temperature": 0.7, "seed": 7, "logit_bias": {3: 2.0}, "min_tokens": most // 4},
    ]
    params = [
        SamplingParams(max_tokens=count, ignore_eos=True, **kind)
        for count, kind in zip(lengths, kinds, strict=True)
    ]
    requests: Requests = list(zip(prompts, params, strict=True))
    whole = answers(load(), requests, {}, look_ahead=False)
    for place in (0, 2, 5):  # stop by a token that they do choose, in the middle
        stop = (whole[place].tokens[most // 3],)
        own = msgspec.structs.replace(params[place], stop_token_ids=stop)
        requests[place] = (prompts[place], own)
    leaving = {3: most // 2, 4: 2}
    want = answers(load(), requests, leaving, look_ahead=False)
    got = answers(load(), requests, leaving, look_ahead=True)
    assert [one.reason for one in want].count("stop") >= 2
    for place, (mine, its) in enumerate(zip(got, want, strict=True)):
        assert mine.tokens == its.tokens, f"request {place}"
        assert mine.reason == its.reason, f"request {place}"
        assert mine.logprobs == pytest.approx(its.logprobs, abs=1e-4), f"request {place}"
        assert mine.attended.pairs == its.attended.pairs, f"request {place}"
        # The row for nothing makes a batch larger, and with it sums end otherwise in their last
        # digit: a block whose mass lies on the threshold may fall to the other side.
        assert mine.attended.tokens == pytest.approx(its.attended.tokens, rel=0.02)
