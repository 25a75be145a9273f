"""The training loop: batches in, a checkpoint every so many steps, resumed where it stopped."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from conversion.code_facts import FACT_KINDS
from conversion.embedded.attention import head_roles
from conversion.embedded.batches import TrainingBatches
from conversion.embedded.corpus import Corpus
from conversion.embedded.judge import Judge
from conversion.embedded.network import Losses, Network
from conversion.embedded.optimizers import Optimizers
from conversion.embedded.options import Phase, PretrainingOptions
from conversion.errors import ConversionError
from conversion.parallel import Ranks
from conversion.student_layers import StudentLayers
from engine.model.config import ModelConfig

LOG_STEPS = 50
CHECK_STEPS = 10  # between two looks at the clock, on which several processes must agree
JUDGED_FACTS, JUDGED_DOCUMENTS = 5, 8  # of the short judgement that goes with every checkpoint


@dataclass(slots=True)
class Place:
    """How far training is."""

    phase: int = 0
    inside: int = 0  # steps of this phase
    step: int = 0  # of all phases


@dataclass(slots=True)
class Trainer:
    """One training in a folder. `run` goes on from the newest checkpoint.

    Several processes share every batch: each reads its rows, and gradients are summed.
    """

    corpus: Corpus
    config: ModelConfig
    options: PretrainingOptions
    folder: Path
    console: Console
    ranks: Ranks
    place: Place = field(default_factory=Place)
    losses: list[float] = field(default_factory=list)  # means over LOG_STEPS steps
    progress: list[dict[str, Any]] = field(default_factory=list)  # short judgements

    def run(self, stop_after: float | None = None) -> Network:
        """Train to the end, or for `stop_after` seconds; the network as it is then.

        Raises:
            CheckpointError: the model to start from is unusable.
            ConversionError: the checkpoint is of other options, or training has diverged.
        """
        network = Network(self.config, self._roles()).to(self.ranks.device)
        network.initialise(self.options.seed)
        if self.options.init is not None:
            network.load(self.options.init)
        optimizers = Optimizers(network, self.options)
        self._resume(network, optimizers)
        deadline = math.inf if stop_after is None else time.monotonic() + stop_after
        while not self.done and self._phase(network, optimizers, deadline):
            self.place = Place(phase=self.place.phase + 1, step=self.place.step)
        self._save(network, optimizers)
        return network

    @property
    def done(self) -> bool:
        return self.place.phase == len(self.options.phases)

    def _phase(self, network: Network, optimizers: Optimizers, deadline: float) -> bool:
        """Train until the phase is over (True) or the deadline has passed."""
        options, place = self.options, self.place
        phase = options.phases[place.phase]
        compiled = torch.compile(network, dynamic=False) if options.compile else network
        source = TrainingBatches(
            self.corpus.train, self.corpus.tokenizer, options, place.phase, self.ranks
        )
        batches = source.stream(place.inside, options.workers, self._on_cuda)
        loss = partial(
            compiled, limited=source.limited, both=phase.agreement > 0, focus=phase.focus > 0
        )
        window: list[Tensor] = []
        tick = time.monotonic()
        while place.inside < phase.steps:
            window.append(self._gradients(network, loss, phase, next(batches)))
            torch.nn.utils.clip_grad_norm_(network.parameters(), options.clip)
            optimizers.step(options.rate(phase, place.inside / phase.steps, place.step))
            place.step += 1
            place.inside += 1
            if place.inside % LOG_STEPS == 0:
                tick, window = self._log(window, tick, phase), []
            if place.step % options.save_every == 0:
                self._judge(network, phase)
                self._save(network, optimizers)
            is_time = place.inside % CHECK_STEPS == 0
            if is_time and self.ranks.agreed(time.monotonic() > deadline):
                break
        return place.inside == phase.steps

    def _gradients(
        self,
        network: Network,
        losses_of: Callable[..., Losses],
        phase: Phase,
        batch: tuple[Tensor, Tensor],
    ) -> Tensor:
        """Gradients of the whole batch's mean loss; this process's part of all losses, [3]."""
        device = self.ranks.device
        ids, weights = (x.to(device, non_blocking=True) for x in batch)
        total = self.ranks.summed(weights.sum())
        with torch.autocast(device.type, torch.bfloat16, enabled=self._on_cuda):
            losses = losses_of(ids[:, :-1], ids[:, 1:], weights)
        loss = losses.code + phase.agreement * losses.agreement + phase.focus * losses.focus
        torch.autograd.backward(loss / total)
        self.ranks.sum_in_place([p.grad for p in network.parameters() if p.grad is not None])
        return torch.stack(losses).detach() / total

    def _log(self, window: list[Tensor], tick: float, phase: Phase) -> float:
        """Account the steps since `tick`; the time now."""
        means = self.ranks.summed(torch.stack(window).mean(0)).tolist()  # waits for the device
        mean = means[0]
        now = time.monotonic()
        if math.isnan(mean):
            raise ConversionError(
                f"training has diverged at step {self.place.step}; lower the rates"
            )
        self.losses.append(round(mean, 4))
        rate = len(window) * phase.batch_tokens / (now - tick)
        self.console.print(
            f"length {phase.length}  step {self.place.inside} of {phase.steps}  "
            f"loss {mean:.4f}{_others(phase, means)}  {rate:,.0f} tokens/s",
            highlight=False,
        )
        return now

    def _judge(self, network: Network, phase: Phase) -> None:
        """A short judgement, so that a person sees which kind of fact is learnt when."""
        if not self.ranks.is_first:
            return
        judge = Judge(self.corpus, self.options.seed)
        line: dict[str, Any] = {"step": self.place.step, "length": phase.length}
        for kind in FACT_KINDS:
            asked = (network, kind, phase.length, JUDGED_FACTS, JUDGED_DOCUMENTS)
            line[kind] = round(judge.facts(*asked), 3)
            if phase.limited:
                line[f"{kind}, limited"] = round(judge.facts(*asked, limited=True), 3)
        self.progress.append(line)
        self.console.print(f"judged: {line}", highlight=False)

    def _roles(self) -> StudentLayers | None:
        options = self.options
        if not options.retrieval_heads:
            return None
        heads, window = options.retrieval_heads, options.window_tokens
        return head_roles(self.config, heads, window, options.sink_tokens, self.ranks.device)

    @property
    def _on_cuda(self) -> bool:
        return self.ranks.device.type == "cuda"

    def _save(self, network: Network, optimizers: Optimizers) -> None:
        if not self.ranks.is_first:
            return
        state = {
            "options": self._described(),
            "place": asdict(self.place),
            "losses": self.losses,
            "progress": self.progress,
            "network": network.state_dict(),
            "optimizers": optimizers.state_dict(),
        }
        path = self.folder / "state.pt"
        part = path.with_suffix(".part")
        torch.save(state, part)
        os.replace(part, path)

    def _resume(self, network: Network, optimizers: Optimizers) -> None:
        path = self.folder / "state.pt"
        if not path.exists():
            return
        state = torch.load(path, map_location=self.ranks.device, weights_only=True)
        if state["options"] != self._described():
            raise ConversionError(f"{path}: is of a training with other options; remove it")
        self.place = Place(**state["place"])
        self.losses, self.progress = state["losses"], state["progress"]
        network.load_state_dict(state["network"])
        optimizers.load_state_dict(state["optimizers"])
        self.console.print(f"going on after step {self.place.step}")

    def _described(self) -> dict[str, Any]:
        """The options that the weights depend on, and the text."""
        options = asdict(self.options)
        for name in ("text", "init", "device", "compile", "save_every", "workers"):
            del options[name]
        return {"options": repr(options), "train_tokens": len(self.corpus.train)}


def _others(phase: Phase, means: list[float]) -> str:
    """The losses beside that of code, where the phase has them."""
    named = (("agreement", phase.agreement, means[1]), ("focus", phase.focus, means[2]))
    return "".join(f"  {name} {mean:.4f}" for name, weight, mean in named if weight)
