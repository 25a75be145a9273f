"""What the embedded model is: its shape, its text, and its curriculum by length."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conversion.embedded.focus import BLOCK_TOKENS
from conversion.errors import ConversionError
from conversion.schedule import warmup_constant

# What heads see that do not retrieve, in tokens.
WINDOW_TOKENS, SINK_TOKENS = 512, 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """A stretch of training at one length."""

    length: int  # tokens
    steps: int
    episodes: float  # share of the sequences that are retrieval episodes
    first_rate: float  # learning rate at its start, as a share of the peak
    last_rate: float  # at its end; linear between
    batch_tokens: int = 131_072  # of one optimizer step
    limited: float = 0.0  # share of the sequences that see by `retrieval_heads`
    agreement: float = 0.0  # weight of the divergence between limited and dense sequences: every
    # one is then seen both ways. This and the next ask for `limited` 1
    focus: float = 0.0  # weight of the loss that asks retrieval heads for few, findable blocks
    lists: float | None = None  # share of the episodes that are lists; None: as ever
    answer_weight: float | None = None  # of the tokens of an answer in the loss; None: as ever


# One H100 trains 2.0 M tokens/s at 512, 1.7 M at 2K, 0.66 M at 16K and 0.38 M at 32K.
# Looking up by way of another name is found late and suddenly, and that takes steps more than
# tokens: hence short sequences full of questions in small batches first. The longer phases carry it
# far and anneal.
CURRICULUM = (
    Phase(
        length=256, steps=5000, episodes=0.95, first_rate=1.0, last_rate=1.0, batch_tokens=32_768
    ),
    Phase(length=512, steps=4000, episodes=0.9, first_rate=1.0, last_rate=0.9, batch_tokens=65_536),
    Phase(length=2048, steps=2500, episodes=0.8, first_rate=0.9, last_rate=0.5),
    Phase(length=8192, steps=600, episodes=0.7, first_rate=0.5, last_rate=0.3),
    Phase(length=16384, steps=500, episodes=0.7, first_rate=0.3, last_rate=0.15),
    Phase(length=32768, steps=500, episodes=0.7, first_rate=0.15, last_rate=0.0),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class PretrainingOptions:
    """Everything the result depends on, beside the text itself."""

    text: tuple[Path, ...] = ()  # folders with Python sources; none: this environment's
    phases: tuple[Phase, ...] = CURRICULUM
    init: Path | None = None  # model folder to start from; None: random weights
    retrieval_heads: tuple[tuple[int, ...], ...] = ()  # per layer; of limited sequences
    window_tokens: int = WINDOW_TOKENS  # that their other heads see
    sink_tokens: int = SINK_TOKENS
    vocab_size: int = 4096
    layers: int = 8
    hidden: int = 320
    heads: int = 8
    kv_heads: int = 2
    head_dim: int = 64
    intermediate: int = 896
    rope_theta: float = 1e6
    matrix_rate: float = 4e-3  # peak learning rate of Muon (the projections)
    other_rate: float = 3e-3  # of AdamW (embedding and norms)
    focus_rate: float = 3e-2  # of AdamW (the index of the focus loss)
    warmup_steps: int = 100
    weight_decay: float = 0.05  # of matrices
    clip: float = 1.0  # gradient norm
    answer_weight: float = 5.0  # of the tokens of an answer in the loss; those of code have 1
    seed: int = 0
    device: str = "cuda"
    compile: bool = True
    save_every: int = 500  # steps
    workers: int = max(2, (os.cpu_count() or 1) - 2)  # processes that put batches together

    def __post_init__(self) -> None:
        if not self.phases:
            raise ConversionError("the curriculum has no phase")
        for phase in self.phases:
            if phase.length < 64 or phase.batch_tokens % phase.length:
                raise ConversionError(
                    f"length {phase.length} must be at least 64 and divide "
                    f"batch_tokens {phase.batch_tokens}"
                )
            if phase.steps < 1 or not 0 <= phase.episodes <= 1:
                raise ConversionError("a phase needs steps, and a share of episodes from 0 to 1")
            if not 0 <= phase.limited <= 1:
                raise ConversionError(f"limited must be a share from 0 to 1, got {phase.limited}")
            if min(phase.agreement, phase.focus) < 0:
                raise ConversionError("weights of agreement and focus must be at least 0")
            if (phase.agreement or phase.focus) and phase.limited != 1:
                raise ConversionError("a phase with agreement or focus must have limited 1")
            if phase.focus and phase.length % BLOCK_TOKENS:
                raise ConversionError(
                    f"a phase with focus has whole blocks of {BLOCK_TOKENS}, got {phase.length}"
                )
            if phase.lists is not None and not 0 <= phase.lists <= 1:
                raise ConversionError(f"lists must be a share from 0 to 1, got {phase.lists}")
            if phase.answer_weight is not None and phase.answer_weight <= 1:
                raise ConversionError(f"answer_weight must be above 1, got {phase.answer_weight}")
            if phase.limited and not self.retrieval_heads:
                raise ConversionError("a phase with limited sequences needs retrieval heads")
        if self.window_tokens < 1:
            raise ConversionError(f"window_tokens must be at least 1, got {self.window_tokens}")
        if self.vocab_size > 2**16:
            raise ConversionError(f"vocab_size must be at most 65536, got {self.vocab_size}")

    @property
    def max_length(self) -> int:
        """The context that the model is trained for, in tokens."""
        return max(phase.length for phase in self.phases)

    def rate(self, phase: Phase, share: float, step: int) -> float:
        """Learning rate as a share of the peak.

        Args:
            share: of the phase that is over, from 0 to 1.
            step: since the beginning of training.
        """
        rate = phase.first_rate + (phase.last_rate - phase.first_rate) * share
        return rate * warmup_constant(step, self.warmup_steps)

    def model_config(self) -> dict[str, Any]:
        """config.json of the model, a plain Qwen3."""
        return {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": self.max_length,
            "rms_norm_eps": 1e-6,
            "rope_theta": self.rope_theta,
            "tie_word_embeddings": True,
            "attention_bias": False,
            "attention_dropout": 0.0,
            "initializer_range": 0.02,
            "use_cache": True,
            "bos_token_id": 0,
            "eos_token_id": 0,
            "pad_token_id": 0,
            "use_sliding_window": False,
            "torch_dtype": "bfloat16",
        }


def read_curriculum(curriculum: Path) -> tuple[Phase, ...]:
    """The phases in a file: a JSON list of objects with the fields of `Phase`.

    Raises:
        ConversionError: it is not such a list.
    """
    try:
        return tuple(Phase(**phase) for phase in json.loads(curriculum.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise ConversionError(f"{curriculum}: not a curriculum ({error})") from None
