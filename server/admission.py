"""From a validated request to generations in the engine: all of them, or none."""

from __future__ import annotations

import msgspec

from engine.client import Generation
from engine.errors import EngineError
from engine.request import SamplingParams
from server.service import Service

_GOLDEN = 0x9E3779B97F4A7C15  # odd, so that distinct choices get distinct seeds


def submit_all(
    service: Service,
    prompts: list[tuple[list[int], SamplingParams]],
    n: int,
    deadline: float,
) -> list[Generation]:
    """`n` generations of every prompt, prompt by prompt, to end by `deadline`.

    Choice 0 keeps the request's seed; the others derive theirs, so that a seeded request is
    reproducible as a whole. With temperature 0 all choices of a prompt are equal.

    Raises:
        EngineError: the engine or its queue has no room; nothing was left running.
    """
    generations: list[Generation] = []
    try:
        for prompt, params in prompts:
            for choice in range(n):
                own = params if choice == 0 else _reseeded(params, choice)
                generations.append(service.engine.submit(prompt, own, deadline=deadline))
    except EngineError:
        for generation in generations:
            generation.abort()
        raise
    return generations


def _reseeded(params: SamplingParams, choice: int) -> SamplingParams:
    seed = (params.seed + choice * _GOLDEN) % 2**63
    return msgspec.structs.replace(params, seed=seed)
