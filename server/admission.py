"""From a validated request to generations in the engine: all of them, or none."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

import msgspec

from engine.client import Generation, Job
from engine.request import SamplingParams
from server.service import Service

_GOLDEN = 0x9E3779B97F4A7C15  # odd, so that distinct choices get distinct seeds


def hold_room(
    service: Service, prompts: Sequence[str | Sequence[int]], requests: int
) -> AbstractContextManager[None]:
    """Count a call of so many requests as queued while its prompts, or the texts that make up its
    prompt, are tokenised: a full queue refuses it before.

    How many tokens a text has is not known yet; it has at least its characters over the bytes of
    the longest token. The choices of a prompt share its pages, so it counts once.

    Raises:
        QueueFullError: on entry.
    """
    longest = service.tokenizer.longest_token_bytes
    tokens = sum(
        len(prompt) // longest if isinstance(prompt, str) else len(prompt) for prompt in prompts
    )
    return service.engine.hold(requests, tokens)


def submit_all(
    service: Service,
    prompts: Sequence[tuple[Sequence[int], SamplingParams]],
    n: int,
    deadline: float,
) -> list[Generation]:
    """`n` generations of every prompt, prompt by prompt, to end by `deadline`.

    Choice 0 keeps the request's seed; the others derive theirs, so that a seeded request is
    reproducible as a whole. With temperature 0 all choices of a prompt are equal.

    Raises:
        EngineError: the engine or its queue has no room; nothing was left running.
    """
    jobs = [
        Job(prompt, params if choice == 0 else _reseeded(params, choice), deadline)
        for prompt, params in prompts
        for choice in range(n)
    ]
    return service.engine.submit_all(jobs)


def _reseeded(params: SamplingParams, choice: int) -> SamplingParams:
    seed = (params.seed + choice * _GOLDEN) % 2**63
    return msgspec.structs.replace(params, seed=seed)
