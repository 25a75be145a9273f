"""Gradient steps on the indexer's weights: stage 1 of RTPurbo (arXiv 2605.16928).

The model is frozen and reads every document once, under the rule that serves (local heads
windowed). While it does, all retrieval heads of a layer compare their index with their attention
from sampled query positions to every key before them (`conversion.index_loss`), and the gradient
with respect to W_Q, W_K and the biases for ages is taken at once, so that no layer is kept. The
loss is the sum over heads of the mean over queries, of which those that look far weigh more
(`conversion.far_rows`); what is reported is the mean over heads.

Memory: one projected key matrix and a bounded number of scores (`conversion.chunk_sizes`) at a
time, whatever the document's length. Several processes read different documents and average their
gradients.

The bias learns at a rate of its own and does not decay: it has few numbers, of several nats, and
its 0 is no less arbitrary than any other.

Shapes: R sampled rows, T tokens, G query heads of a group, D head_dim, I index_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from conversion.attention_samples import PlantedDocument, sample_rows
from conversion.chunk_sizes import chunk_sizes
from conversion.document_attention import LayerView, attention_rows, watch_document
from conversion.far_rows import far_mass, row_weights
from conversion.fit_options import FitOptions
from conversion.index_loss import index_loss
from conversion.index_weights import GroupWeights, IndexWeights
from conversion.parallel import Ranks
from conversion.schedule import warmup_cosine
from conversion.state import read_snapshot, write_snapshot
from engine.model.config import ModelConfig
from engine.model.decoder import Decoder

MOMENTS = ("exp_avg", "exp_avg_sq")

Report = Callable[[int, float], None]  # steps taken, loss of the last one


class IndexerTraining:
    """The weights of one model's index in training, their optimizer and their state on disk."""

    def __init__(
        self,
        decoder: Decoder,
        config: ModelConfig,
        start: IndexWeights,
        options: FitOptions,
        seed: int = 0,
        ranks: Ranks | None = None,
    ) -> None:
        """`config` is the model's with the sparse section that is being made.

        Raises:
            ConversionError: the processes cannot share the documents of a step.
        """
        assert config.sparse is not None
        self.weights = start.copied(next(decoder.parameters()).device, trained=True)
        self.losses: list[float] = []  # per step, nats per query, mean over heads
        self._decoder = decoder
        self._config = config
        self._block_tokens = config.sparse.block_tokens
        self._heads = sum(map(len, config.sparse.retrieval_heads))
        self._options = options
        self._seed = seed
        self._ranks = ranks or Ranks()
        self.batch = options.documents_per_step(self._ranks.world)
        self._parameters = self.weights.parameters()
        rate, decay = options.learning_rate, options.weight_decay
        parts = [
            {"params": self.weights.projections(), "rate": rate, "weight_decay": decay},
            {
                "params": self.weights.age_biases(),
                "rate": rate * options.age_bias_rate,
                "weight_decay": 0.0,
            },
        ]
        self._optimizer = torch.optim.AdamW([part for part in parts if part["params"]])

    @property
    def step(self) -> int:
        """Optimizer steps taken."""
        return len(self.losses)

    @property
    def first_document(self) -> int:
        """Number of the next document of this process."""
        return self.step * self.batch + self._ranks.rank

    def run(self, documents: Iterator[PlantedDocument], path: Path, report: Report) -> None:
        """Take the steps that are left, saving to `path`.

        Args:
            documents: this process's, from `first_document` on, every `ranks.world`-th of all.

        Raises:
            ConversionError: the text is too short, or the state cannot be written.
        """
        every, last = self._options.save_every, self._options.steps
        while self.step < last:
            number = self.first_document
            mine = [next(documents) for _ in range(self.batch // self._ranks.world)]
            numbers = range(number, number + self.batch, self._ranks.world)
            self.take(list(zip(numbers, mine, strict=True)))
            if self.step % every == 0 or self.step == last:
                self.save(path)
            report(self.step, self.losses[-1])

    def take(self, documents: list[tuple[int, PlantedDocument]]) -> None:
        """One optimizer step on this process's documents, given with their numbers."""
        self._optimizer.zero_grad()
        loss = 0.0
        for number, document in documents:
            seed = self._seed * 1_000_003 + number
            rows_R = sample_rows(document, self._options.queries, seed)
            loss += self.add_gradient(document, rows_R)
        self._average()
        torch.nn.utils.clip_grad_norm_(self._parameters, self._options.clip)
        for group in self._optimizer.param_groups:
            group["lr"] = group["rate"] * warmup_cosine(
                self.step, self._options.steps, self._options.warmup_steps
            )
        self._optimizer.step()
        (total,) = self._ranks.total([loss])
        self.losses.append(total / self.batch)

    def add_gradient(self, document: PlantedDocument, rows_R: Tensor) -> float:
        """Add the gradient of one document's loss / `batch`; returns its loss, mean over heads."""
        device = self._parameters[0].device
        rows_R = rows_R.to(device)
        total = torch.zeros((), dtype=torch.float64, device=device)

        def watch(view: LayerView) -> None:
            for _, group in self.weights.of_layer(view.layer):
                total.add_(self._group_gradient(group, view, rows_R))

        watch_document(self._decoder, self._config, document.ids, watch)
        return float(total) / self._heads

    @torch.enable_grad()
    def _group_gradient(self, group: GroupWeights, view: LayerView, rows_R: Tensor) -> Tensor:
        """Sum over the group's heads of the weighted mean loss over rows, float64."""
        total = torch.zeros((), dtype=torch.float64, device=rows_R.device)
        chunk = max(1, chunk_sizes(rows_R.device).scores // len(view.k_TND))
        parts = torch.split(rows_R, chunk)

        @lru_cache(maxsize=1)  # so that it is computed once where all rows are one part
        def attention(head: int, part: int) -> Tensor:
            return attention_rows(view, head, parts[part], self._config.group_size)

        for place, head in enumerate(group.group.heads):
            far = [
                far_mass(attention(head, part), part_R, self._block_tokens)
                for part, part_R in enumerate(parts)
            ]
            weights_R = row_weights(torch.cat(far), self._options.far_share)
            for part, weight_R in enumerate(torch.split(weights_R, chunk)):
                loss_R = index_loss(
                    attention(head, part),
                    group.scores(place, view, parts[part], self._block_tokens),
                    self._block_tokens,
                    self._options.block_share,
                )
                loss = (loss_R * weight_R).sum()
                torch.autograd.backward(loss / self.batch, inputs=group.parameters)
                total += loss.detach().double()
        return total

    def _average(self) -> None:
        """Sum the gradients of all processes, in one exchange; each is divided already."""
        if self._ranks.world == 1:
            return
        flat = torch.cat([_gradient(parameter).flatten() for parameter in self._parameters])
        parts = torch.split(self._ranks.summed(flat), [p.numel() for p in self._parameters])
        for parameter, part in zip(self._parameters, parts, strict=True):
            parameter.grad = part.view_as(parameter)

    def save(self, path: Path) -> None:
        """Write weights, moments and losses as one file; the first process does."""
        if self._ranks.is_first:
            tensors = {f"{number}.weight": p for number, p in enumerate(self._parameters)}
            for number, parameter in enumerate(self._parameters):
                state = self._optimizer.state[parameter]
                tensors |= {f"{number}.{name}": state[name] for name in MOMENTS}
            write_snapshot(path, tensors, self._about())
        self._ranks.wait()

    def load(self, path: Path) -> bool:
        """Go on from what `save` wrote; False if that is not there or of another training.

        Raises:
            ConversionError: the file is unreadable.
        """
        if not path.exists():
            return False
        tensors, about = read_snapshot(path)
        losses = about.pop("losses")
        if about | {"losses": []} != self._about() | {"losses": []}:
            return False
        for number, parameter in enumerate(self._parameters):
            with torch.no_grad():
                parameter.copy_(tensors[f"{number}.weight"])
            self._optimizer.state[parameter] = {
                "step": torch.tensor(float(len(losses))),
                **{name: tensors[f"{number}.{name}"].to(parameter.device) for name in MOMENTS},
            }
        self.losses = losses
        return True

    def _about(self) -> dict[str, Any]:
        """What is trained; a state of something else is not gone on with."""
        groups = [[g.group.layer, g.group.kv_head, *g.group.heads] for g in self.weights.groups]
        return {
            "losses": self.losses,
            "groups": groups,
            "age_bias": bool(self.weights.age_biases()),
            "batch": self.batch,
            "seed": self._seed,
        }


def _gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad
