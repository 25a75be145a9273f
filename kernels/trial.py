"""Known answers: what a kernel gives on a device, held to what its PyTorch twin gives.

The trials of `decode_trial`, `layer_trial` and `step_trial` run every kernel once on small ragged
inputs before it serves, and then its twin. Tolerances are those of the tests on a GPU: of float32
what another order of sums makes, of bfloat16 twice the error that the PyTorch op has in bfloat16
itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from kernels._launch import KernelError

Random = Callable[..., Tensor]


class TrialError(KernelError):
    """A kernel ran and gave something else than the known answer; the message names it."""


class DeviceFaultError(KernelError):
    """A kernel broke the device for this process: nothing can run there any more."""


@contextmanager
def on_trial(device: torch.device) -> Iterator[None]:
    """Around trials: faults of the device get their name, and its memory is given back.

    Raises:
        DeviceFaultError: kernels failed while they ran, which CUDA does not forgive.
    """
    try:
        yield
        _wait(device)
    except torch.AcceleratorError as error:
        raise _fault(error) from error
    except KernelError:
        try:
            _wait(device)  # a refused launch is survived, what runs into an earlier fault is not
        except torch.AcceleratorError as error:
            raise _fault(error) from error
        raise
    if device.type == "cuda":
        torch.cuda.empty_cache()


def random_numbers(dtype: torch.dtype, seed: int) -> Random:
    """A maker of normal numbers, the same on every host: on the CPU, rounded to `dtype`."""
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(shape, generator=generator).to(dtype)


def check_close(
    kernel: str,
    got: Tensor,
    exact: Tensor,
    twin: Tensor | None = None,
    rtol: float = 1e-5,
    atol: float = 1e-5,
) -> None:
    """
    Args:
        kernel: its name.
        got: on any device.
        exact: the answer in float32, or float64; NaN where nothing may be written.
        twin: what the PyTorch op gives in the dtype of `got`; None, or float32: `rtol` and `atol`
            of float32 hold.

    Raises:
        TrialError: they differ by more than is allowed.
    """
    exact = exact.cpu()
    found = got.cpu().to(exact.dtype)
    if twin is None or twin.dtype == torch.float32:
        allowed = atol + rtol * exact.nan_to_num(0, 0, 0).abs()
    else:
        most = 2 * _differences(twin.cpu().to(exact.dtype), exact).max() + 1e-6
        allowed = most.expand_as(exact)
    off = _differences(found, exact)
    wrong = ~(off <= allowed)  # NaN is wrong
    if bool(wrong.any()):
        worst = int((off - allowed).argmax())
        raise TrialError(
            f"{kernel} gives wrong results on this device: off by {float(off.flatten()[worst]):.3g}"
            f" where {float(allowed.flatten()[worst]):.3g} is allowed"
            f" ({int(wrong.sum())} of {wrong.numel()} numbers)"
        )


def check_equal(kernel: str, got: Tensor, want: Tensor) -> None:
    """Raises TrialError unless all numbers are equal; NaN equals NaN."""
    check_close(kernel, got, want.double(), rtol=0.0, atol=0.0)


def _differences(got: Tensor, want: Tensor) -> Tensor:
    """|got - want|, 0 where both are the same infinity or not a number."""
    same = (got == want) | (got.isnan() & want.isnan())
    return (got - want).abs().masked_fill(same, 0.0)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _fault(error: Exception) -> DeviceFaultError:
    first = (str(error).strip().splitlines() or [""])[0]
    return DeviceFaultError(
        f"a kernel broke the device while it was tried out ({first}); this process cannot go on "
        "there, nor on the PyTorch ops: start again with kernels torch"
    )
