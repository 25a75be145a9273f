"""Key-value retrieval: a JSON object of random uuid pairs, one value asked (arXiv 2307.03172)."""

from __future__ import annotations

import json
import random
import uuid
from collections.abc import Callable

from conversion.errors import ConversionError
from conversion.evaluation.samples import PromptSample

TEMPLATE = (
    "Extract the value corresponding to the specified key in the JSON object below.\n\n"
    'JSON data:\n{data}\n\nKey: "{key}"\nCorresponding value:'
)
GENERATED_TOKENS = 64
PROBE_PAIRS = 8


def key_value_sample(length: int, number: int, count_tokens: Callable[[str], int]) -> PromptSample:
    """As many pairs as fit; the asked one stands anywhere among them.

    Args:
        length: prompt and generated tokens together, at most.
        number: of the sample, which draws the pairs.

    Raises:
        ConversionError: the length is too short.
    """
    room = length - GENERATED_TOKENS
    per_pair = count_tokens(_prompt(number, PROBE_PAIRS)[0]) / PROBE_PAIRS
    pairs = int(room / per_pair * 1.5) + 1  # the probe counts the instruction as well
    while pairs > 0:
        prompt, value = _prompt(number, pairs)
        excess = count_tokens(prompt) - room
        if excess <= 0:
            return PromptSample(prompt, (value,), GENERATED_TOKENS)
        pairs -= max(1, int(excess / per_pair))
    raise ConversionError("kv: the length is too short for one sample of it")


def _prompt(number: int, pairs: int) -> tuple[str, str]:
    """The prompt and the value asked for."""
    rng = random.Random(f"kv {number}")

    def item() -> str:
        return str(uuid.UUID(int=rng.getrandbits(128), version=4))

    data = {item(): item() for _ in range(pairs)}
    key = rng.choice(list(data))
    lines = ",\n ".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in data.items())
    return TEMPLATE.format(data="{" + lines + "}", key=key), data[key]
