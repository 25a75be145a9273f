"""Settings of stage 1. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass

from conversion.errors import ConversionError


@dataclass(frozen=True, slots=True, kw_only=True)
class FitOptions:
    """How the indexer is fitted. Defaults of the optimizer are the paper's (arXiv 2605.16928)."""

    steps: int = 600  # optimizer steps; 0 keeps the closed form
    batch: int | None = None  # documents per step, over all processes; None: one in each
    queries: int = 256  # query positions per document in the loss, a quarter of them at answers
    learning_rate: float = 1e-3
    age_bias_rate: float = 10.0  # learning rate of the biases for ages, in those of the projections
    warmup_steps: int = 100  # at most half of the steps
    weight_decay: float = 0.01
    clip: float = 1.0  # of the gradient's norm, over all heads
    far_share: float = 0.5  # of the loss of a head, for rows in which it looks far, 0 to 1
    block_share: float = 0.0  # of the loss: KL over blocks instead of tokens, 0 to 1
    keep_far: bool = True  # temperatures keep enough of rows in which a head looks far, too
    adaptive_top_p: bool = False  # per head: the top_p whose measured kept mass reaches the target
    moment_documents: int = 3  # for the closed form
    age_tokens: int = 0  # length of documents that set the biases of ages which those of the fit
    # hardly reach or not at all; 0: none, such ages count as the oldest seen
    age_documents: int = 4
    trial_documents: int = 8  # on which temperatures are chosen
    quality_documents: int = 8  # on which the result is measured
    save_every: int = 50  # steps

    def __post_init__(self) -> None:
        """Raises ConversionError, naming the field."""
        least = {"steps": 0, "warmup_steps": 0, "queries": 4, "age_tokens": 0}
        for name in (
            "steps",
            "queries",
            "warmup_steps",
            "age_tokens",
            "age_documents",
            "moment_documents",
            "trial_documents",
            "quality_documents",
            "save_every",
        ):
            if getattr(self, name) < least.get(name, 1):
                raise ConversionError(
                    f"fit {name} must be at least {least.get(name, 1)}, got {getattr(self, name)}"
                )
        if self.batch is not None and self.batch < 1:
            raise ConversionError(f"fit batch must be at least 1, got {self.batch}")
        for name in ("learning_rate", "age_bias_rate", "clip"):
            if not getattr(self, name) > 0:
                raise ConversionError(f"fit {name} must be above 0, got {getattr(self, name)}")
        if not self.weight_decay >= 0:
            raise ConversionError(f"fit weight_decay must be at least 0, got {self.weight_decay}")
        for name in ("far_share", "block_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConversionError(f"fit {name} must be from 0 to 1, got {getattr(self, name)}")

    @property
    def held_out(self) -> int:
        """Documents that no gradient comes from."""
        return self.moment_documents + self.trial_documents + self.quality_documents

    def documents_per_step(self, world: int) -> int:
        """Over all `world` processes; raises ConversionError if they cannot share them."""
        if self.batch is None:
            return world
        if self.batch % world:
            raise ConversionError(
                f"fit batch {self.batch} must be a multiple of {world}, the processes"
            )
        return self.batch
