"""Settings of stage 2. Torch-free but for the question whether a device is there."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

from conversion.errors import ConversionError
from conversion.schedule import cooldown, warmup_constant


@dataclass(frozen=True, slots=True, kw_only=True)
class DistilOptions:
    """How the sparse student learns from the dense teacher. Lengths are in tokens.

    Defaults of the optimizer are the paper's (arXiv 2605.16928). Small models bear more: some tens
    of times the learning rate for ten million parameters.
    """

    data: Path | None = None  # JSONL with prompt and response, or text; None: the text source
    sequence_tokens: int = 16384  # of a sequence, its response included; at most the model's limit
    response_tokens: int = 300  # the last ones of a sequence, which count in the loss
    sequences: int = 1024  # trained on, again and again; fewer if the text ends before
    validation_sequences: int = 32  # held out
    facts_share: float = 0.5  # of the sequences: planted facts and questions; text source only
    steps: int = 600
    batch: int = 8  # sequences per step, over all processes
    learning_rate: float = 3e-6
    warmup_steps: int = 200  # at most a third of the steps
    cooldown_steps: int = 0  # last ones, in which the learning rate falls to 0; the paper has none
    weight_decay: float = 0.01
    clip: float = 1.0  # of the gradient's norm
    validate_every: int = 50  # steps; the state is saved as often
    # When training stops, or the cooldown begins:
    patience: int = 3  # validations without a smaller gap, counted after the warm-up
    growth: float = 0.25  # the gap is more than this share above its smallest
    micro_tokens: int = 131072  # at most so many computed at once in a process, or one sequence
    recompute: bool = True  # layers in the backward pass, which saves memory and costs a third
    seed: int = 0
    device: str = "cpu"  # cpu, cuda (one per process under torchrun) or cuda:N

    def __post_init__(self) -> None:
        """Raises ConversionError, naming the field."""
        least = {"sequence_tokens": 2, "warmup_steps": 0, "cooldown_steps": 0, "seed": 0}
        for field in fields(self):
            value = getattr(self, field.name)
            if type(value) is int and value < least.get(field.name, 1):
                raise ConversionError(
                    f"{field.name} must be at least {least.get(field.name, 1)}, got {value}"
                )
        if self.cooldown_steps > self.steps:
            raise ConversionError(
                f"cooldown_steps must be at most {self.steps}, all steps, got {self.cooldown_steps}"
            )
        if not 0 <= self.facts_share <= 1:
            raise ConversionError(f"facts_share must be from 0 to 1, got {self.facts_share}")
        for name in ("learning_rate", "clip", "growth"):
            if not getattr(self, name) > 0:
                raise ConversionError(f"{name} must be above 0, got {getattr(self, name)}")
        if not self.weight_decay >= 0:
            raise ConversionError(f"weight_decay must be at least 0, got {self.weight_decay}")
        if self.response_tokens >= self.sequence_tokens:
            raise ConversionError(
                f"response_tokens {self.response_tokens} must be less than sequence_tokens "
                f"{self.sequence_tokens}"
            )

    @property
    def warmup(self) -> int:
        """Steps over which the learning rate rises."""
        return min(self.warmup_steps, self.steps // 3)

    def rate(self, step: int, steps: int) -> float:
        """Learning rate of step 0, 1, ... of a training that ends after `steps`."""
        falling = cooldown(step, steps, self.cooldown_steps)
        return self.learning_rate * warmup_constant(step, self.warmup) * falling
