"""An engine loop without a wire around the real runner, on a tiny model."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.config import EngineConfig
from engine.core import EngineCore
from engine.loading import load_engine_parts
from engine.messages import Add
from engine.request import SamplingParams
from engine.step import EngineParts
from tests.engine.fake_channel import FakeChannel
from tests.engine.tiny_checkpoint import CACHE_BYTES


def load(folder: Path, **settings: object) -> EngineParts:
    options: dict[str, Any] = {"max_num_seqs": 4, "max_model_len": 64}
    options |= {"kv_cache_bytes": CACHE_BYTES} | settings
    return load_engine_parts(EngineConfig(model=str(folder), device="cpu", threads=1, **options))


class Session:
    """An engine loop without a wire, for prompts one after another or together."""

    def __init__(self, parts: EngineParts) -> None:
        self.channel = FakeChannel()
        self.parts = parts
        self.core = EngineCore(parts.scheduler, parts.runner, self.channel)
        self.next_id = 0
        self.memory_retries = 0

    def generate(
        self,
        *prompts: list[int],
        max_tokens: int = 5,
        beside: Sequence[dict[str, Any]] = (),
    ) -> list[tuple[list[int], str | None]]:
        """Tokens and finish reason of each prompt, all computed together.

        Those with the parameters `beside` have a prompt of three tokens.
        """
        common = {"max_tokens": max_tokens, "temperature": 0.0, "ignore_eos": True}
        params = [common] * len(prompts) + [{"max_tokens": 5, **own} for own in beside]
        prompts = (*prompts, *([4, 5, 6] for _ in beside))
        ids = range(self.next_id, self.next_id + len(prompts))
        self.next_id = ids.stop
        for request_id, prompt, own in zip(ids, prompts, params, strict=True):
            self.channel.inbox.append(
                Add(
                    request_id=request_id,
                    params=SamplingParams(**own),
                    prompt=array("i", prompt).tobytes(),
                    arrival=0.0,
                )
            )
        answers: dict[int, tuple[list[int], str | None]] = {i: ([], None) for i in ids}
        while any(reason is None for _, reason in answers.values()):
            self.core.turn()
            for report in self.channel.reports:
                self.memory_retries = report.stats.memory_retries
                for update in report.updates:
                    tokens, _ = answers[update.request_id]
                    answers[update.request_id] = (tokens + update.tokens, update.finish_reason)
            self.channel.reports.clear()
        self.parts.scheduler.check_integrity()
        return [answers[i] for i in ids]
