"""How good the dense model is: loss on held-out code, and planted facts answered exactly.

Answers are judged teacher-forced in one pass: an answer is right if every token of it is the best
guess after the tokens before it, which is what greedy decoding would give. Facts are those of
`conversion.code_facts`, whose names training never saw, planted in held-out code.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import cross_entropy

from conversion.code_facts import FACT_KINDS, FactKind, plain_facts
from conversion.embedded.corpus import Corpus
from conversion.embedded.episodes import Episode, EpisodeWriter
from conversion.embedded.network import Network

LOSS_TOKENS = 2**19  # of held-out text, at every length
DISTRACTORS = (1, 4, 16)  # facts of a document beside the one that is asked


class Judge:
    """Measures a network on held-out text. Everything drawn follows from the seed."""

    def __init__(self, corpus: Corpus, seed: int) -> None:
        self._corpus = corpus
        self._writer = EpisodeWriter(corpus.tokenizer, 1.0)
        self._seed = seed

    @torch.no_grad()
    def loss(self, network: Network, length: int, tokens: int, *, limited: bool = False) -> float:
        """Nats per token over about `tokens` tokens in windows of `length`.

        Args:
            limited: heads see by their roles, here and below.
        """
        held_out = self._corpus.held_out
        count = max(1, min(tokens, len(held_out) - 1) // length)
        total = 0.0
        for number in range(count):
            window = held_out[number * length : (number + 1) * length + 1].astype(np.int64)
            ids = torch.from_numpy(window).to(_device(network))
            with _precision(network):
                logits = network.decoder.logits(network.hidden(ids[None, :-1], int(limited)))
            total += float(cross_entropy(logits, ids[1:]))
        return total / count

    @torch.no_grad()
    def facts(
        self,
        network: Network,
        kind: FactKind,
        length: int,
        facts: int,
        count: int,
        *,
        limited: bool = False,
    ) -> float:
        """Share of right answers over `count` documents of `length` tokens with `facts` facts.

        All facts are asked, one after the other at the document's end.
        """
        right = asked = 0
        for number in range(count):
            episode = self._episode(kind, length, facts, number)
            ids = torch.from_numpy(episode.ids).to(_device(network))
            with _precision(network):
                hidden = network.hidden(ids[None], int(limited))
                for start, stop in episode.answers:
                    guesses = network.decoder.logits(hidden[start - 1 : stop - 1]).argmax(-1)
                    right += bool((guesses == ids[start:stop]).all())
                    asked += 1
        return right / asked

    def report(
        self, network: Network, lengths: Sequence[int], documents: int, *, limited: bool = False
    ) -> dict[str, Any]:
        """Loss by length, and accuracy by kind, length and number of facts."""
        return {
            "held_out_loss": {
                str(n): self.loss(network, n, LOSS_TOKENS, limited=limited) for n in lengths
            },
            "facts": {
                kind: {
                    str(length): {
                        str(others): self.facts(
                            network, kind, length, others + 1, documents, limited=limited
                        )
                        for others in DISTRACTORS
                    }
                    for length in lengths
                }
                for kind in FACT_KINDS
            },
        }

    def _episode(self, kind: FactKind, length: int, facts: int, number: int) -> Episode:
        rng = np.random.default_rng([self._seed, length, facts, number])
        held_out: NDArray[np.uint16] = self._corpus.held_out
        start = int(rng.integers(0, max(1, len(held_out) - length)))
        code = held_out[start : start + length].astype(np.int64)
        planted = [
            ([line.rstrip("\n") for line in lines], question)
            for lines, question in plain_facts(kind, facts, int(rng.integers(2**31)))
        ]
        return self._writer.plant(code, planted, rng)


def _device(network: Network) -> torch.device:
    return network.decoder.embedding.weight.device


def _precision(network: Network) -> torch.autocast:
    """bfloat16 products on CUDA, as in training; float32 elsewhere."""
    device = _device(network).type
    return torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda")
