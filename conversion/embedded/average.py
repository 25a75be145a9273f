"""The mean of dense models, weight for weight: what each of several trainings has repaired.

    python -m conversion.embedded.average OUT MODEL MODEL [--weights 0.5,0.5]

Where trainings from one model have not gone far from each other, their mean can have what each has
learnt (model soups, arXiv 2203.05482).
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

from conversion.errors import ConversionError
from conversion.export import COMPANIONS, copy_files, new_folder, refuse_existing
from conversion.trained_weights import stored_order, write_shards, write_trained
from engine.errors import EngineError
from engine.model.checkpoint import INDEX_FILE, Checkpoint, preflight
from engine.model.weights import TensorReader


def average(out: Path, models: Sequence[Path], weights: Sequence[float]) -> None:
    """Make the model folder `out`: means in float32, rounded to the dtype in which they are stored.

    Everything but the weights is the first model's.

    Args:
        models: dense, of one config, dtype and tokenizer.
        weights: positive, one per model; their sum counts as 1.

    Raises:
        CheckpointError: a folder is unusable.
        ConversionError: the models are unlike, the weights are none, `out` exists or cannot be
            written.
    """
    refuse_existing(out)
    if len(models) < 2:
        raise ConversionError(f"a mean is of at least 2 models, got {len(models)}")
    if len(weights) != len(models):
        raise ConversionError(f"weights must be one per model, got {len(weights)} of {len(models)}")
    if not all(0 < weight < math.inf for weight in weights):
        raise ConversionError(f"weights must be positive and finite, got {list(weights)}")
    checkpoints = [preflight(model) for model in models]
    first = checkpoints[0]
    for checkpoint in checkpoints:
        _check_alike(first, checkpoint)
    shares = [weight / math.fsum(weights) for weight in weights]
    with new_folder(out) as work:
        means = work / "means.safetensors"
        write_trained(means, first, _means(checkpoints, shares))
        write_shards(first, means, work)
        means.unlink()
        copy_files(first.folder, ("config.json", INDEX_FILE, *COMPANIONS), work)


def _check_alike(first: Checkpoint, other: Checkpoint) -> None:
    """Names and shapes need no look: a folder that passed has those of its config."""
    if other.config.sparse is not None:
        raise ConversionError(f"{other.folder}: is converted; only dense models have a mean")
    for field in fields(first.config):
        ours, theirs = (getattr(model.config, field.name) for model in (first, other))
        if ours != theirs:
            raise ConversionError(
                f"{other.folder / 'config.json'}: {field.name} is {theirs}, not {ours} "
                f"as in {first.folder}"
            )
    for name in stored_order(first):
        place, dtype = other.tensors[name], first.tensors[name].dtype
        if place.dtype != dtype:
            raise ConversionError(
                f"{place.file}: tensor {name!r} has dtype {place.dtype}, not {dtype} "
                f"as in {first.folder}"
            )
    tokenizers = [(model.folder / "tokenizer.json").read_bytes() for model in (first, other)]
    if tokenizers[0] != tokenizers[1]:
        raise ConversionError(f"{other.folder / 'tokenizer.json'}: is not that of {first.folder}")


def _means(
    checkpoints: Sequence[Checkpoint], shares: Sequence[float]
) -> Iterator[tuple[str, Tensor]]:
    """By stored name, float32; one tensor of each model is held at once."""
    with ExitStack() as stack:
        readers = [stack.enter_context(TensorReader(model.tensors)) for model in checkpoints]
        for name in stored_order(checkpoints[0]):
            parts = [
                share * reader.read(name).float()
                for share, reader in zip(shares, readers, strict=True)
            ]
            yield name, functools.reduce(torch.add, parts)


def main(
    out: Annotated[Path, typer.Argument(help="Folder to make.")],
    models: Annotated[list[Path], typer.Argument(help="Model folders, two or more.")],
    weights: Annotated[
        str | None, typer.Option(help="Numbers, one per model; default: all the same.")
    ] = None,
) -> None:
    """Average dense models, weight for weight."""
    try:
        average(out, models, _numbers(weights) if weights is not None else [1.0] * len(models))
    except EngineError as error:
        print(error, file=sys.stderr)
        raise SystemExit(1) from None
    print(f"made {out}")


def _numbers(text: str) -> list[float]:
    try:
        return [float(number) for number in text.split(",")]
    except ValueError:
        raise ConversionError(
            f"weights must be numbers with commas between, got {text!r}"
        ) from None


if __name__ == "__main__":
    typer.run(main)
