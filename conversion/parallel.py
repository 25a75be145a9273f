"""Several processes of one conversion: who they are, what they exchange, how they share a model.

Started under torchrun, every process reads its own part of the data. Where a model is trained its
weights are sharded over the processes too (FSDP2), so that each holds 1 / world of the float32
weights, gradients and optimizer moments, and whole layers only while they compute.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from conversion.errors import ConversionError

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among `world`; alone, every exchange is the identity."""

    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_first(self) -> bool:
        """Whether this process writes the shared files and talks to people."""
        return self.rank == 0

    def total(self, values: Sequence[float]) -> list[float]:
        """Sums over all processes, in float64."""
        if self.world == 1:
            return list(values)
        sums = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(sums)
        return [float(value) for value in sums.tolist()]

    def summed(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, where and in the dtype that `tensor` is; it stays as is."""
        if self.world == 1:
            return tensor
        total = tensor.detach().to(self.device, copy=True)
        dist.all_reduce(total)
        return total.to(tensor.device)

    def sum_in_place(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over all processes; they are on this process's device."""
        if self.world == 1:
            return
        sums = [dist.all_reduce(tensor, async_op=True) for tensor in tensors]
        for pending in sums:
            pending.wait()

    def agreed(self, value: Item) -> Item:
        """The first process's value, on all of them."""
        if self.world == 1:
            return value
        box: list[Any] = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]  # type: ignore[no-any-return]  # what went in

    def wait(self) -> None:
        """Return when every process has come this far."""
        if self.world > 1:
            self.total([0.0])


@contextmanager
def joined(device: str) -> Iterator[Ranks]:
    """The processes that torchrun started, or this one alone.

    A process group that is there already is used and left; one made here is ended here.

    Args:
        device: "cpu", "cuda" or "cuda:N"; under torchrun "cuda" is one device per process.

    Raises:
        ConversionError: the device does not fit several processes, or they cannot meet.
    """
    if not dist.is_initialized() and not dist.is_torchelastic_launched():
        yield Ranks(device=torch.device(device))
        return
    made = not dist.is_initialized()
    if made:
        device = _local_device(device)
        try:
            dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
        except (RuntimeError, ValueError) as error:
            raise ConversionError(f"the processes cannot meet: {error}".splitlines()[0]) from None
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size(), torch.device(device))
    finally:
        if made:
            dist.destroy_process_group()


def shard(model: nn.Module, layers: Sequence[nn.Module], dtype: torch.dtype, ranks: Ranks) -> None:
    """Share a model's float32 parameters over all processes, layer by layer (FSDP2), in place.

    Layers compute in `dtype`; gradients are averaged over the processes in float32.
    """
    mesh = init_device_mesh(ranks.device.type, (ranks.world,))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


def fill(parameter: Tensor, whole: Tensor) -> None:
    """Copy values into a parameter; a sharded one takes this process's part of `whole`."""
    if isinstance(parameter, DTensor):
        mesh, placements = parameter.device_mesh, parameter.placements
        whole = whole.to(parameter.device, parameter.dtype)
        # Every process has read the same file: nothing needs to be sent.
        whole = distribute_tensor(whole, mesh, placements, src_data_rank=None)
    parameter.copy_(whole)


def gathered(parameter: Tensor) -> Tensor:
    """The whole parameter on every process; all of them must call this."""
    parameter = parameter.detach()
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


def own_part(parameter: Tensor) -> Tensor:
    """What this process holds of a tensor, as a plain tensor that shares its memory."""
    parameter = parameter.detach()
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def _local_device(device: str) -> str:
    """One device per process of a host."""
    if device == "cpu":
        return device
    if device != "cuda":
        raise ConversionError(f"device {device} is one device; use cuda for several processes")
    number = dist.get_node_local_rank(fallback_rank=0)
    if number >= torch.cuda.device_count():
        raise ConversionError(
            f"process {number} of this host has no device; {torch.cuda.device_count()} are there"
        )
    torch.cuda.set_device(number)
    return f"cuda:{number}"
