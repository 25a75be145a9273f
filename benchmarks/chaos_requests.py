"""What the chaos run asks for: requests of many kinds from one seed, each with one right answer."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from benchmarks.completion_client import Manners

MakePrompt = Callable[[int, int], list[int]]  # tokens, seed -> ids
STOP_LETTERS = 3  # of a stop string, taken from the middle of what would be answered


@dataclass(frozen=True, slots=True)
class ChaosRequest:
    """One request; its answer is the same whenever and however it is sent."""

    name: str
    body: dict[str, Any]


def draw_requests(
    seed: int, count: int, make_prompt: MakePrompt, lengths: tuple[int, ...], most_tokens: int
) -> list[ChaosRequest]:
    """Greedy and seeded ones, with log-probabilities, echo, choices and several lengths."""
    rng = random.Random(seed)
    requests = []
    for number in range(count):
        length = lengths[number % len(lengths)]
        sampled = number % 2 == 1
        body: dict[str, Any] = {
            "prompt": make_prompt(length, seed * 1000 + number),
            "max_tokens": rng.randint(most_tokens // 4, most_tokens),
            "temperature": 0.9 if sampled else 0,
            "ignore_eos": True,
        }
        if sampled:
            body |= {"seed": rng.randrange(2**40), "top_p": rng.choice((1.0, 0.9))}
        if rng.random() < 0.4:
            body["logprobs"] = rng.choice((0, 2))
            body["echo"] = length < 100 and rng.random() < 0.4
        if rng.random() < 0.25:
            body["n"] = 2
        requests.append(ChaosRequest(f"{number}", body))
    return requests


def with_stop(request: ChaosRequest, text: str) -> ChaosRequest | None:
    """The same request that is to stop within `text`, its answer; None if that is too short."""
    middle = len(text) // 2
    stop = text[middle : middle + STOP_LETTERS]
    if len(stop) < STOP_LETTERS or request.body.get("echo"):
        return None
    return ChaosRequest(f"{request.name} with stop", {**request.body, "stop": [stop, "\x07never"]})


def draw_manners(seed: int) -> Iterator[Manners]:
    """How one client after another behaves: most read to the end."""
    rng = random.Random(seed)
    while True:
        kind = rng.random()
        stream = rng.random() < 0.7
        if kind < 0.15:
            yield Manners(stream, leave_after=rng.choice((0.0, 0.05, 0.3, 1.0)))
        elif kind < 0.3:
            yield Manners(True, read_pause=rng.choice((0.02, 0.1)))
        else:
            yield Manners(stream)
