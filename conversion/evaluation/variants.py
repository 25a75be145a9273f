"""The models to compare, loaded in this process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from conversion.errors import ConversionError
from conversion.evaluation.options import EvalOptions
from conversion.evaluation.teacher_forced import Variant
from engine.errors import CheckpointError
from engine.model.checkpoint import preflight
from engine.model.config import ModelConfig
from engine.model.decoder import Decoder
from engine.model.weights import load_decoder


def load_variants(folder: Path, options: EvalOptions) -> dict[str, Variant]:
    """Variants by name, the reference first: teacher, dense, sparse.

    Raises:
        CheckpointError: a folder is unusable.
        ConversionError: an option does not suit the model.
    """
    config = preflight(folder).config
    wanted: Sequence[str] = options.attention or (
        ("dense",) if config.sparse is None else ("dense", "sparse")
    )
    if "sparse" in wanted and config.sparse is None:
        raise ConversionError(f"{folder} is a dense model: it has no sparse attention to measure")
    if options.prefill_attention == "sparse" and not _has_indexer(config):
        raise ConversionError(f"{folder} has no indexer: its prompts cannot be read sparsely")
    refuse_length(options, config)
    decoder = load_weights(folder, options)
    variants: dict[str, Variant] = {}
    if options.teacher is not None:
        teacher = load_weights(options.teacher, options)
        if teacher.config.vocab_size != config.vocab_size:
            raise ConversionError(
                f"teacher {options.teacher}: its vocabulary has {teacher.config.vocab_size} "
                f"tokens, the model's {config.vocab_size}"
            )
        variants["teacher"] = dense_variant(teacher)
    if "dense" in wanted:
        variants["dense"] = dense_variant(decoder)
    if "sparse" in wanted:
        variants["sparse"] = Variant(
            decoder,
            decoder.config,
            decoder.indexers,
            prefill_attention=options.prefill_attention,
            index_dtype=options.index_dtype,
        )
    return variants


def _has_indexer(config: ModelConfig) -> bool:
    return config.sparse is not None and config.sparse.index_dim is not None


def refuse_length(options: EvalOptions, config: ModelConfig) -> None:
    """Raises ConversionError if a length is more than the model was made for."""
    if max(options.lengths) > config.max_position_embeddings:
        raise ConversionError(
            f"length {max(options.lengths)} is beyond the model's "
            f"{config.max_position_embeddings} tokens"
        )


def dense_variant(decoder: Decoder) -> Variant:
    """The weights with full attention in every head."""
    return Variant(
        decoder, replace(decoder.config, sparse=None), [None] * decoder.config.num_layers
    )


def load_weights(folder: Path, options: EvalOptions) -> Decoder:
    """The model of a folder on the device and in the dtype of the options.

    Raises:
        CheckpointError: the folder is unusable, or the weights do not fit.
        ConversionError: the device is not there.
    """
    on_cuda = options.device.startswith("cuda")
    if on_cuda and not torch.cuda.is_available():
        raise ConversionError(f"device {options.device} is not there")
    half = options.dtype == "bfloat16" or (options.dtype == "auto" and on_cuda)
    try:
        return load_decoder(folder, options.device, torch.bfloat16 if half else torch.float32)
    except torch.OutOfMemoryError:
        raise CheckpointError(f"{folder}: the weights do not fit on {options.device}") from None
