"""The training loop: batches in, a checkpoint every so many steps, resumed where it stopped."""

from __future__ import annotations

import math
import os
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from conversion.embedded.batches import TrainingBatches
from conversion.embedded.corpus import Corpus
from conversion.embedded.network import Network
from conversion.embedded.optimizers import Optimizers
from conversion.embedded.options import Phase, PretrainingOptions
from conversion.errors import ConversionError
from engine.model.checkpoint import preflight
from engine.model.config import ModelConfig
from engine.model.weights import load_decoder

LOG_STEPS = 50
WARM_STEPS = 3  # of a phase, not timed


@dataclass(slots=True)
class Place:
    """How far training is."""

    phase: int = 0
    inside: int = 0  # steps of this phase
    seconds: float = 0.0  # of this phase
    step: int = 0  # of all phases


@dataclass(slots=True)
class Trainer:
    """One training in a folder. `run` goes on from the newest checkpoint."""

    corpus: Corpus
    config: ModelConfig
    options: PretrainingOptions
    folder: Path
    console: Console
    place: Place = field(default_factory=Place)
    steps: list[int] = field(default_factory=list)  # of the phases that are over
    losses: list[float] = field(default_factory=list)  # means over up to LOG_STEPS steps

    def run(self, stop_after: float | None = None) -> Network:
        """Train to the end, or for `stop_after` seconds; the network as it is then.

        Raises:
            ConversionError: the checkpoint is of other options, or training has diverged.
        """
        network = Network(self.config).to(self.options.device)
        network.initialise(self.options.seed)
        if self.options.init is not None:
            weights = load_decoder(preflight(self.options.init), "cpu", torch.float32)
            network.decoder.load_state_dict(weights.state_dict())
        optimizers = Optimizers(network, self.options)
        self._resume(network, optimizers)
        deadline = math.inf if stop_after is None else time.monotonic() + stop_after
        while not self.done:
            self._phase(network, optimizers, deadline)
            if time.monotonic() > deadline:
                break
        self._save(network, optimizers)
        return network

    @property
    def done(self) -> bool:
        return self.place.phase == len(self.options.phases)

    def _phase(self, network: Network, optimizers: Optimizers, deadline: float) -> None:
        """Train until the phase is over or the deadline has passed."""
        options, place = self.options, self.place
        phase = options.phases[place.phase]
        kind, on_cuda = options.device.split(":")[0], options.device.startswith("cuda")
        compiled = torch.compile(network, dynamic=False) if options.compile else network
        batches = TrainingBatches(
            self.corpus.train, self.corpus.tokenizer, options, place.phase
        ).stream(place.inside, options.workers, on_cuda)
        window: list[Tensor] = []
        tick, warm = time.monotonic(), place.inside + WARM_STEPS
        while (share := _share(phase, place)) < 1:
            ids, weights = (x.to(options.device, non_blocking=True) for x in next(batches))
            with torch.autocast(kind, torch.bfloat16, enabled=on_cuda):
                loss = compiled(ids[:, :-1], ids[:, 1:], weights)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), options.clip)
            optimizers.step(options.rate(phase, share, place.step))
            place.step += 1
            place.inside += 1
            window.append(loss.detach())
            if place.inside == warm:  # what came before compiled and filled queues
                _wait(kind)
                tick, window = time.monotonic(), []
            if place.inside % LOG_STEPS == 0 and window:
                tick, window = self._log(window, tick, phase), []
            if place.step % options.save_every == 0:
                self._save(network, optimizers)
            if time.monotonic() > deadline:
                break
        if window:
            self._log(window, tick, phase)
        if _share(phase, place) >= 1:
            self.steps.append(place.inside)
            self.place = Place(phase=place.phase + 1, step=place.step)

    def _log(self, window: list[Tensor], tick: float, phase: Phase) -> float:
        """Account the steps since `tick`; the time now."""
        mean = float(torch.stack(window).mean())  # waits for the device
        now = time.monotonic()
        if math.isnan(mean):
            raise ConversionError(
                f"training has diverged at step {self.place.step}; lower the rates"
            )
        self.place.seconds += now - tick
        self.losses.append(round(mean, 4))
        rate = len(window) * self.options.batch_tokens / (now - tick)
        self.console.print(
            f"length {phase.length}  step {self.place.inside}, {self.place.seconds:.0f} s  "
            f"loss {mean:.4f}  {rate:,.0f} tokens/s",
            highlight=False,
        )
        return now

    def _save(self, network: Network, optimizers: Optimizers) -> None:
        state = {
            "options": self._described(),
            "place": asdict(self.place),
            "steps": self.steps,
            "losses": self.losses,
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
        state = torch.load(path, map_location=self.options.device, weights_only=True)
        if state["options"] != self._described():
            raise ConversionError(f"{path}: is of a training with other options; remove it")
        self.place = Place(**state["place"])
        self.steps, self.losses = state["steps"], state["losses"]
        network.load_state_dict(state["network"])
        optimizers.load_state_dict(state["optimizers"])
        self.console.print(f"going on after step {self.place.step}")

    def _described(self) -> dict[str, Any]:
        """The options that the weights depend on, and the text."""
        options = asdict(self.options)
        for name in ("text", "init", "device", "compile", "save_every", "workers"):
            del options[name]
        return {"options": repr(options), "train_tokens": len(self.corpus.train)}


def _share(phase: Phase, place: Place) -> float:
    """How much of a phase is over; a timed one is accounted whenever it is logged."""
    if phase.steps is not None:
        return place.inside / phase.steps
    return place.seconds / phase.seconds


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
