"""Load a checked folder into a Decoder, tensor by tensor; the reverse for export.

Peak memory is the decoder plus one stored tensor: parameters are made on their device in their
dtype, then filled in place.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from engine.errors import CheckpointError
from engine.model.checkpoint import AGE_BIAS, Checkpoint, preflight
from engine.model.config import ModelConfig
from engine.model.decoder import Decoder, Indexer
from engine.model.safetensors_header import StoredTensor
from engine.model.weight_names import WeightRule, weight_rules

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def load_decoder(
    checkpoint: Checkpoint | Path, device: torch.device | str, dtype: torch.dtype
) -> Decoder:
    """The model of a folder, ready for inference, with its indexers.

    Raises:
        CheckpointError: one line that names the file.
    """
    if isinstance(checkpoint, Path):
        checkpoint = preflight(checkpoint)
    config = checkpoint.config
    with torch.device("meta"):
        decoder = Decoder(config)
    decoder = decoder.to(dtype).to_empty(device=device).eval()  # dtype first: nothing exists yet
    parameters = dict(decoder.named_parameters())
    places = {**checkpoint.tensors, **checkpoint.indexer}
    with TensorReader(places) as reader, torch.no_grad():
        for rule in weight_rules(config):
            _fill(parameters.pop(rule.target), rule, reader)
        decoder.indexers = _load_indexers(checkpoint, reader, torch.device(device), dtype)
    assert not parameters, f"no rule fills {sorted(parameters)}"
    return decoder


def stored_tensors(decoder: Decoder) -> Iterator[tuple[str, Tensor]]:
    """The decoder's weights under their stored names: the inverse of loading."""
    parameters = dict(decoder.named_parameters())
    for rule in weight_rules(decoder.config):
        yield from stored_parts(rule, parameters[rule.target].detach())


def stored_parts(rule: WeightRule, parameter: Tensor) -> Iterator[tuple[str, Tensor]]:
    """One parameter as it is stored: names and contiguous parts."""
    whole = parameter.flatten(0, 1) if rule.layout == "experts" else parameter
    sizes = [shape[0] for _, shape in rule.sources]
    for (name, _), part in zip(rule.sources, torch.split(whole, sizes), strict=True):
        yield name, part.contiguous()


def joined_parts(rule: WeightRule, reader: TensorReader) -> Tensor:
    """The reverse of `stored_parts`, in the stored dtype, on the CPU; experts still flat."""
    return torch.cat([reader.read(name) for name, _ in rule.sources])


class TensorReader:
    """Reads stored tensors by name from where the checked headers say they lie.

    Plain reads instead of a memory map: a mapped shard counts as resident memory beside the model,
    and one that shrinks meanwhile would kill the process.
    """

    def __init__(self, places: Mapping[str, StoredTensor]) -> None:
        self._places = places
        self._file: BinaryIO | None = None
        self._path: Path | None = None

    def __enter__(self) -> TensorReader:
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._file is not None:
            self._file.close()

    def read(self, name: str) -> Tensor:
        """The tensor in its stored dtype, on the CPU."""
        stored = self._places[name]
        content = torch.empty(stored.num_bytes, dtype=torch.uint8)
        try:
            file = self._open(stored.file)
            file.seek(stored.offset)
            count = file.readinto(content.numpy())  # type: ignore[attr-defined]  # typeshed gap
        except OSError as error:
            raise CheckpointError(f"{stored.file}: {error.strerror or 'not readable'}") from None
        if count != stored.num_bytes:
            raise CheckpointError(f"{stored.file}: truncated while it was read")
        return content.view(DTYPES[stored.dtype]).view(stored.shape)

    def _open(self, path: Path) -> BinaryIO:
        if self._file is None or path != self._path:
            if self._file is not None:
                self._file.close()
            self._file, self._path = path.open("rb"), path
        return self._file


def _fill(parameter: Tensor, rule: WeightRule, reader: TensorReader) -> None:
    """Copy the stored parts of one parameter into place."""
    whole = parameter.flatten(0, 1) if rule.layout == "experts" else parameter
    start = 0
    for name, shape in rule.sources:
        whole[start : start + shape[0]].copy_(reader.read(name))
        start += shape[0]


def _load_indexers(
    checkpoint: Checkpoint, reader: TensorReader, device: torch.device, dtype: torch.dtype
) -> list[Indexer | None]:
    indexers: list[Indexer | None] = []
    for layer in range(checkpoint.config.num_layers):
        prefix = f"model.layers.{layer}.self_attn.indexer."
        if prefix + "q_proj.weight" not in checkpoint.indexer:
            indexers.append(None)
            continue
        q, k = (
            reader.read(f"{prefix}{name}.weight").to(device, dtype) for name in ("q_proj", "k_proj")
        )
        bias_HA = _load_age_bias(checkpoint, reader, prefix + AGE_BIAS)
        bias_HA = None if bias_HA is None else bias_HA.to(device)  # in float32, as it is stored
        indexers.append(Indexer(q_proj_HID=q, k_proj_HID=k, age_bias_HA=bias_HA))
    return indexers


def _load_age_bias(checkpoint: Checkpoint, reader: TensorReader, name: str) -> Tensor | None:
    if name not in checkpoint.indexer:
        return None
    bias_HA = reader.read(name)
    if not bool(bias_HA.isfinite().all()):
        raise CheckpointError(f"{checkpoint.indexer[name].file}: tensor {name!r} is not finite")
    return bias_HA


def decoder_with_random_weights(config: ModelConfig, seed: int, std: float = 0.02) -> Decoder:
    """A decoder for tests and benchmarks, float32 on CPU, weights drawn from `seed`."""
    generator = torch.Generator().manual_seed(seed)
    decoder = Decoder(config).eval()
    with torch.no_grad():
        for parameter in decoder.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, std, generator=generator)
    return decoder
