"""Training in progress on disk: what a stopped run needs to go on as if it had not stopped.

    progress.json                    step, validations, losses; names the step of the other files
    state-000050.0of1.safetensors    weights and AdamW moments, float32: a process's own part
    best-000050.safetensors          weights of the smallest gap, as they would be exported

`progress.json` is written last and replaced as a whole, so what it names is complete.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from conversion.errors import ConversionError
from conversion.parallel import Ranks, own_part
from conversion.state import read_json, write_json
from conversion.stop_rule import Gap

PROGRESS = "progress.json"


@dataclass(slots=True)
class Progress:
    """How far training has come."""

    step: int = 0  # optimizer steps taken
    losses: list[float] = field(default_factory=list)  # per step, nats per response token
    curve: list[Gap] = field(default_factory=list)
    stopped: str | None = None  # why training has ended
    last_step: int | None = None  # the end, if it was brought forward; None: that of the options
    cooling: str | None = None  # and why


class TrainingState:
    """The files of one training in a folder of their own."""

    def __init__(self, folder: Path, described: Any, ranks: Ranks) -> None:
        """
        Args:
            described: of what and how, as JSON values; a state of something else is not used.
        """
        self._folder = folder
        self._described = described
        self._ranks = ranks

    def best_file(self, step: int) -> Path:
        return self._folder / f"best-{step:06d}.safetensors"

    def save(
        self,
        progress: Progress,
        parameters: dict[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        best_step: int,
    ) -> None:
        """Write everything, then remove what it replaces; raises ConversionError."""
        path = self._own_file(progress.step)
        tensors = {name: part.contiguous() for name, part in _parts(parameters, optimizer)}
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            save_file({name: tensor.cpu() for name, tensor in tensors.items()}, path)
        except Exception as error:  # no room on disk comes as the library's own type
            raise ConversionError(f"{path}: cannot be written ({error})".splitlines()[0]) from None
        self._ranks.wait()
        if self._ranks.is_first:
            content = {"processes": self._ranks.world, **asdict(progress), "of": self._described}
            write_json(self._folder / PROGRESS, content)
            for old in self._folder.glob("*.safetensors"):
                if not old.name.startswith(
                    (f"state-{progress.step:06d}.", f"best-{best_step:06d}.")
                ):
                    old.unlink(missing_ok=True)
        self._ranks.wait()

    def load(
        self, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer
    ) -> Progress | None:
        """Put weights and moments in place; None if there is nothing to go on with.

        Raises:
            ConversionError: the state is unreadable, or of another number of processes.
        """
        path = self._folder / PROGRESS
        if not path.exists():
            return None
        found = read_json(path)
        if not isinstance(found, dict) or found.get("of") != self._described:
            return None
        if found["processes"] != self._ranks.world:
            raise ConversionError(
                f"{self._folder}: begun with {found['processes']} processes, not "
                f"{self._ranks.world}; start as many, or remove it"
            )
        progress = Progress(
            step=found["step"],
            losses=found["losses"],
            curve=[Gap(**gap) for gap in found["curve"]],
            stopped=found["stopped"],
            last_step=found.get("last_step"),
            cooling=found.get("cooling"),
        )
        self._restore(self._own_file(progress.step), parameters, optimizer, progress.step)
        return progress

    @torch.no_grad()
    def _restore(
        self,
        path: Path,
        parameters: dict[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        step: int,
    ) -> None:
        try:
            stored = load_file(path)
        except Exception:  # the library raises its own types
            raise ConversionError(f"{path}: not readable; remove {self._folder}") from None
        if step:
            for parameter in parameters.values():
                optimizer.state[parameter] = {
                    "step": torch.tensor(float(step)),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
        for name, part in _parts(parameters, optimizer):
            part.copy_(stored[name])

    def _own_file(self, step: int) -> Path:
        rank, world = self._ranks.rank, self._ranks.world
        return self._folder / f"state-{step:06d}.{rank}of{world}.safetensors"


def _parts(
    parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> Iterator[tuple[str, Tensor]]:
    """This process's part of every weight and of its moments, if it has been stepped."""
    for name, parameter in parameters.items():
        yield name, own_part(parameter)
        for moment in ("exp_avg", "exp_avg_sq"):
            if moment in optimizer.state[parameter]:
                yield f"{name}.{moment}", own_part(optimizer.state[parameter][moment])
