"""The training loop: batches in, a checkpoint every so many steps, resumed where it stopped."""

from __future__ import annotations

import os
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from conversion.embedded.batches import TrainingBatches, stream
from conversion.embedded.corpus import Corpus
from conversion.embedded.network import Network
from conversion.embedded.optimizers import Optimizers
from conversion.embedded.options import PretrainingOptions
from conversion.errors import ConversionError
from engine.model.config import ModelConfig

LOG_STEPS = 50


@dataclass(slots=True)
class Trainer:
    """One training in a folder. `run` goes on from the newest checkpoint."""

    corpus: Corpus
    config: ModelConfig
    options: PretrainingOptions
    folder: Path
    console: Console
    step: int = 0
    losses: list[float] = field(default_factory=list)  # mean of every LOG_STEPS steps

    def run(self, stop_after: float | None = None) -> Network:
        """Train to the end, or for `stop_after` seconds; the network as it is then.

        Raises:
            ConversionError: the checkpoint is of other options, or training has diverged.
        """
        network = Network(self.config).to(self.options.device)
        network.initialise(self.options.seed)
        optimizers = Optimizers(network, self.options)
        self._resume(network, optimizers)
        begun = time.monotonic()
        self._train(network, optimizers, None if stop_after is None else begun + stop_after)
        self._save(network, optimizers)
        return network

    @property
    def done(self) -> bool:
        return self.step == self.options.total_steps

    def _train(self, network: Network, optimizers: Optimizers, deadline: float | None) -> None:
        options = self.options
        compiled = torch.compile(network, dynamic=False) if options.compile else network
        batches = TrainingBatches(self.corpus.train, self.corpus.tokenizer, options)
        on_cuda = options.device.startswith("cuda")
        window, tick = [], time.monotonic()
        for ids, weights in stream(batches, self.step, options.workers, on_cuda):
            ids, weights = (x.to(options.device, non_blocking=True) for x in (ids, weights))
            with torch.autocast(options.device.split(":")[0], torch.bfloat16, enabled=on_cuda):
                loss = compiled(ids[:, :-1], ids[:, 1:], weights)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), options.clip)
            optimizers.step(options.rate(self.step))
            self.step += 1
            window.append(loss.detach())
            if self.step % LOG_STEPS == 0 or self.done:
                self._log(window, time.monotonic() - tick)
                window, tick = [], time.monotonic()
            if self.step % options.save_every == 0:
                self._save(network, optimizers)
            if deadline is not None and time.monotonic() > deadline:
                return

    def _log(self, window: list[Tensor], seconds: float) -> None:
        mean = float(torch.stack(window).mean())
        if mean != mean:
            raise ConversionError(f"training has diverged before step {self.step}; lower the rates")
        self.losses.append(round(mean, 4))
        phase, _ = self.options.place(self.step - 1)
        rate = len(window) * self.options.batch_tokens / seconds
        self.console.print(
            f"step {self.step}/{self.options.total_steps}  length {phase.length}  "
            f"loss {mean:.4f}  {rate:,.0f} tokens/s",
            highlight=False,
        )

    def _save(self, network: Network, optimizers: Optimizers) -> None:
        state = {
            "options": self._described(),
            "step": self.step,
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
        self.step, self.losses = state["step"], state["losses"]
        network.load_state_dict(state["network"])
        optimizers.load_state_dict(state["optimizers"])
        self.console.print(f"going on after step {self.step}")

    def _described(self) -> dict[str, Any]:
        """The options that the weights depend on, and the text."""
        options = asdict(self.options)
        for name in ("text", "device", "compile", "save_every", "workers"):
            del options[name]
        return {"options": repr(options), "train_tokens": len(self.corpus.train)}
