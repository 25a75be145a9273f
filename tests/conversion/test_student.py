"""The student's weights: exact ones that are trained, rounded ones that compute."""

from __future__ import annotations

from pathlib import Path

import torch

from conversion.parallel import Ranks
from conversion.student import Student
from tests.conversion.tiny_distillation import TinyDistillation


def test_steps_are_taken_on_float32_weights(tmp_path: Path) -> None:
    """A model in bfloat16 still adds up changes that it cannot hold, and starts from the truth."""
    tiny = TinyDistillation.make(tmp_path, tie_word_embeddings=True)
    student = Student(tiny.checkpoint, Ranks(), torch.bfloat16, recompute=False)
    exact = student.parameters["layers.0.attention.o_proj.weight"]
    rounded = student.model.decoder.get_parameter("layers.0.attention.o_proj.weight")
    before, rounded_before = exact.detach().clone(), rounded.detach().clone()
    assert (exact.dtype, rounded.dtype) == (torch.float32, torch.bfloat16)
    for _ in range(3):  # gradients of several batches add up, in float32
        for parameter in student.model.parameters():
            parameter.grad = torch.full_like(parameter, 1 / 3)
        student.collect_gradients()
    assert rounded.grad is None
    torch.testing.assert_close(exact.grad, torch.ones_like(exact), rtol=1e-2, atol=0)

    with torch.no_grad():
        exact.sub_(exact.abs() * 1e-4)
        student.round_weights()
        assert (rounded == rounded_before).float().mean() > 0.9
        exact.sub_(exact.abs() * 0.05)
        student.round_weights()
        assert (rounded == rounded_before).float().mean() < 0.1
    assert torch.equal(rounded, exact.to(torch.bfloat16))
    assert not torch.equal(exact, before)
