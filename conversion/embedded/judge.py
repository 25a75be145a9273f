"""How good the dense model is: loss on held-out code, and planted facts answered exactly.

    python -m conversion.embedded.judge MODEL --corpus OUT/corpus [--heads FILE]

prints one line of JSON about a model folder, as a training does in its training.json.

Answers are judged teacher-forced in one pass: an answer is right if every token of it is the best
guess after the tokens before it, which is what greedy decoding would give. Facts are those of
`conversion.code_facts`, whose names training never saw, planted in held-out code.
"""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from torch.nn.functional import cross_entropy

from conversion.code_facts import FACT_KINDS, FactKind, plain_facts
from conversion.embedded.attention import Kernel, attention_kernels, head_roles
from conversion.embedded.corpus import Corpus
from conversion.embedded.episodes import Episode, EpisodeWriter
from conversion.embedded.network import Network
from conversion.embedded.options import SINK_TOKENS, WINDOW_TOKENS
from conversion.errors import ConversionError
from conversion.head_roles import read_heads
from conversion.text_source import load_tokenizer
from engine.errors import EngineError
from engine.model.checkpoint import preflight

LENGTHS = (2048, 4096, 8192, 16384, 32768)  # of documents and windows, as far as the model goes
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


def judgement(network: Network, corpus: Corpus, documents: int, seed: int) -> dict[str, Any]:
    """The whole report: dense, and by head roles where the network has them.

    Args:
        documents: per kind, length and number of facts.
    """
    longest = network.config.max_position_embeddings
    lengths = [length for length in LENGTHS if length <= longest] or [longest]
    judge = Judge(corpus, seed)
    report = {
        "parameters": sum(p.numel() for p in network.decoder.parameters()),
        "corpus": corpus.description,
        "judged": {"documents": documents, "seed": seed},
        **judge.report(network, lengths, documents),
    }
    if network.roles is not None:
        report["limited"] = judge.report(network, lengths, documents, limited=True)
    return report


def hardware(device: torch.device, count: int = 1) -> str:
    """What a report was made on."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    return f"{count} x {name}, {platform.machine()}, torch {torch.__version__}"


def load_network(
    model: Path, heads: Path | None, window_tokens: int, device: torch.device
) -> Network:
    """The network of a model folder, with the roles that a heads.json gives its heads.

    Raises:
        CheckpointError, ConversionError: one line that names the file.
    """
    config = preflight(model).config
    roles = None
    if heads is not None:
        chosen = read_heads(heads, config.num_layers, config.num_heads)
        roles = head_roles(config, chosen, window_tokens, SINK_TOKENS, device)
    network = Network(config, roles)
    network.load(model)
    return network.to(device)


def open_corpus(folder: Path, model: Path) -> Corpus:
    """A prepared corpus, to judge a model on.

    Raises:
        ConversionError: it is none, or its ids are those of another tokenizer.
    """
    corpus = Corpus.open(folder)
    if load_tokenizer(model).get_vocab() != corpus.tokenizer.get_vocab():
        raise ConversionError(f"{folder}: not of the tokenizer of {model}")
    return corpus


def _device(network: Network) -> torch.device:
    return network.decoder.embedding.weight.device


def _precision(network: Network) -> torch.autocast:
    """bfloat16 products on CUDA, as in training; float32 elsewhere."""
    device = _device(network).type
    return torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda")


def main(
    model: Annotated[Path, typer.Argument(help="Model folder.")],
    corpus: Annotated[Path, typer.Option(help="OUT/corpus of a training with its tokenizer.")],
    heads: Annotated[
        Path | None, typer.Option(help="heads.json: judge with heads limited to it, too.")
    ] = None,
    window_tokens: Annotated[
        int, typer.Option(min=1, help="That all other heads see then.")
    ] = WINDOW_TOKENS,
    documents: Annotated[int, typer.Option(min=1, help="Documents per cell.")] = 32,
    seed: Annotated[int, typer.Option(min=0, help="Of the documents.")] = 0,
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cuda",
    attention: Annotated[Kernel, typer.Option(help="Attention kernel on CUDA.")] = "flash",
) -> None:
    """Judge a dense model."""
    try:
        with attention_kernels(attention, device):
            where = torch.device(device)
            text = open_corpus(corpus, model)
            network = load_network(model, heads, window_tokens, where)
            report = judgement(network, text, documents, seed)
    except EngineError as error:
        print(error, file=sys.stderr)
        raise SystemExit(1) from None
    command = " ".join(["python -m conversion.embedded.judge", *sys.argv[1:]])
    print(json.dumps(report | {"command": command, "hardware": hardware(where)}))


if __name__ == "__main__":
    typer.run(main)
