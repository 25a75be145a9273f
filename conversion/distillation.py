"""The training loop of stage 2 (arXiv 2605.16928): optimizer steps, validations, when to stop.

Every weight but the indexer's is trained, on the KL of the teacher's most likely tokens at response
positions. Held-out sequences tell when to stop, and the weights with the smallest gap are kept.

Shapes: Z sequences, R response tokens, k tokens kept of the teacher, V vocabulary.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from conversion.distil_options import DistilOptions
from conversion.errors import ConversionError
from conversion.micro_batches import Shape, micro_batches
from conversion.parallel import Ranks
from conversion.progress_bar import progress_bar
from conversion.stop_rule import Gap, StopRule, best
from conversion.student import Student
from conversion.student_attention import StudentAttention
from conversion.student_layers import StudentLayers
from conversion.teacher_logits import TeacherCache, top_kl
from conversion.trained_weights import write_trained
from conversion.training_state import Progress as TrainingProgress
from conversion.training_state import TrainingState


class Distillation:
    """The loop: optimizer steps, validations, and which weights were best."""

    def __init__(
        self,
        student: Student,
        layers: StudentLayers,
        cache: TeacherCache,
        options: DistilOptions,
        ranks: Ranks,
    ) -> None:
        """Raises ConversionError if there are too few sequences."""
        self._student = student
        self._layers = layers
        self._cache = cache
        self._options = options
        self._ranks = ranks
        self._shapes = cache.shapes()
        self._held_out, self._trained_on = _split(self._shapes, options, ranks)
        self._parameters = student.parameters
        self._optimizer = torch.optim.AdamW(
            self._parameters.values(), lr=options.learning_rate, weight_decay=options.weight_decay
        )
        self._rule = StopRule(options.patience, options.growth, options.warmup)

    def run(self, state: TrainingState, console: Console) -> TrainingProgress:
        """Train until the steps are done or the rule says stop; resumes from `state`."""
        progress = state.load(self._parameters, self._optimizer) or TrainingProgress()
        self._student.round_weights()
        if not progress.curve:
            self._check_point(progress, state, console)
        with progress_bar(console, "distil", self._options.steps, progress.step) as advance:
            while progress.stopped is None:
                end = self._end(progress)
                loss = self.step(progress.step, end)
                progress.losses.append(loss)
                progress.step += 1
                advance(f"KL {loss:.5f}")
                if progress.step == end or progress.step % self._options.validate_every == 0:
                    self._check_point(progress, state, console)
        return progress

    def step(self, number: int, steps: int) -> float:
        """One optimizer step of `steps`; the mean loss of its response tokens in nats."""
        options, ranks = self._options, self._ranks
        numbers = self._order(number)
        rows = sum(self._shapes[n].response for n in numbers)
        total = torch.zeros((), device=ranks.device)
        for micro in micro_batches(
            numbers, self._shapes, ranks.rank, ranks.world, options.micro_tokens
        ):
            kl, _ = self._gap(micro.numbers, micro.shape)
            loss = kl * (micro.counts / rows)
            # Sharded gradients are averaged over the processes, and this is a sum.
            torch.autograd.backward(loss * ranks.world)
            self._student.collect_gradients()
            total += loss.detach()
        clip_grad_norm_(self._parameters.values(), options.clip)
        for group in self._optimizer.param_groups:
            group["lr"] = options.rate(number, steps)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._student.round_weights()
        return ranks.total([float(total)])[0]

    @torch.no_grad()
    def validate(self, step: int) -> Gap:
        """The gap on the held-out sequences."""
        ranks = self._ranks
        sums = torch.zeros(2, dtype=torch.float64, device=ranks.device)
        for micro in micro_batches(
            self._held_out, self._shapes, ranks.rank, ranks.world, self._options.micro_tokens
        ):
            kl, agreeing = self._gap(micro.numbers, micro.shape)
            sums += micro.counts * torch.stack([kl.double(), agreeing.double()])
        kl_sum, agreeing_sum = ranks.total(sums.tolist())
        rows = sum(self._shapes[n].response for n in self._held_out)
        return Gap(step, kl_sum / rows, agreeing_sum / rows)

    def _gap(self, numbers: tuple[int, ...], shape: Shape) -> tuple[Tensor, Tensor]:
        """Summed KL, and how many best guesses are the teacher's, over response tokens."""
        batch = self._cache.batch(numbers)
        prompt = shape.tokens - shape.response
        attention = StudentAttention(self._layers, len(numbers), prompt)
        # The last token predicts nothing, and the last prompt token predicts the first response.
        logits_ZRV = self._student.model(batch.ids_Zn[:, :-1], shape.response, attention)
        kl_ZR = top_kl(batch.top_logits_ZRk, logits_ZRV.gather(-1, batch.top_ids_ZRk))
        agreeing_ZR = logits_ZRV.detach().argmax(-1) == batch.top_ids_ZRk[..., 0]
        return kl_ZR.sum(), agreeing_ZR.sum()

    def _order(self, step: int) -> list[int]:
        """Sequences of a step: every one once in an order of its own, then again in another."""
        count, batch = len(self._trained_on), self._options.batch
        first, last = step * batch // count, ((step + 1) * batch - 1) // count
        shuffled: list[int] = []
        for epoch in range(first, last + 1):
            rng = random.Random(self._options.seed * 1_000_003 + epoch)
            shuffled += rng.sample(self._trained_on, count)
        start = step * batch - first * count
        return shuffled[start : start + batch]

    def _check_point(
        self,
        progress: TrainingProgress,
        state: TrainingState,
        console: Console,
    ) -> None:
        """Validate, keep the weights if they are the best so far, decide, save."""
        gap = self.validate(progress.step)
        progress.curve.append(gap)
        console.print(
            f"step {gap.step}: validation KL {gap.kl:.6f}, top-1 agreement {gap.agreement:.4f}"
        )
        self._decide(progress, console)
        if best(progress.curve).step == gap.step:
            self._keep(state.best_file(gap.step))
        best_step = best(progress.curve).step
        state.save(progress, self._parameters, self._optimizer, best_step)

    def _decide(self, progress: TrainingProgress, console: Console) -> None:
        """Go on, let the learning rate fall from here, or stop.

        At a constant rate the gap comes to rest, or rises, above what it is after a cooldown: where
        one is wanted the rule brings it forward, and does not end it.
        """
        end, falling = self._end(progress), self._options.cooldown_steps
        if progress.step >= end:
            why = progress.cooling
            done = f"all {end} steps are done"
            progress.stopped = done if why is None else f"{why}; then {falling} steps of cooldown"
            return
        reason = self._rule.reason(progress.curve)
        if reason is None:
            return
        if falling == 0 or math.isnan(progress.curve[-1].kl):
            progress.stopped = reason
        elif progress.step < end - falling:
            progress.last_step, progress.cooling = progress.step + falling, reason
            console.print(f"distil: {reason}; the learning rate falls from here")

    def _end(self, progress: TrainingProgress) -> int:
        """Steps after which training ends."""
        return progress.last_step or self._options.steps

    def _keep(self, path: Path) -> None:
        """Write the weights; every process helps to gather them, the first one writes."""
        if self._ranks.is_first:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_trained(path, self._student.checkpoint, self._student.stored())
        else:
            for _ in self._student.stored():
                pass


def _split(
    shapes: Mapping[int, Shape], options: DistilOptions, ranks: Ranks
) -> tuple[list[int], list[int]]:
    """Held-out sequences and the others; raises ConversionError if there are too few."""
    held_out = max(options.validation_sequences, ranks.world)
    needed = held_out + options.batch
    if len(shapes) < needed:
        raise ConversionError(
            f"too little text: {len(shapes)} sequences of {options.sequence_tokens} tokens; "
            f"{needed} are needed ({held_out} for validation, {options.batch} for a step)"
        )
    numbers = sorted(shapes)
    return numbers[:held_out], numbers[held_out:]
