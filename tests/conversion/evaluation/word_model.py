"""A tiny sparse model whose tokens are words, and greedy generation without a cache for it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from conversion.evaluation.teacher_forced import Variant
from engine.model.weights import load_decoder
from engine.request import SamplingParams
from tests.engine.oracle import Answer, Oracle
from tests.engine.tiny_checkpoint import TinyModel

MODEL = TinyModel(vocab=320, eos=319)
GREEDY = SamplingParams(max_tokens=5, temperature=0.0, ignore_eos=True)


def variant(folder: Path, *, dense: bool = False) -> Variant:
    """The model of `folder`, with float32 weights on the CPU."""
    decoder = load_decoder(folder, "cpu", torch.float32)
    if dense:
        return Variant(decoder, replace(decoder.config, sparse=None), [None] * MODEL.layers)
    return Variant(decoder, decoder.config, decoder.indexers)


def prompt(tokens: int, seed: int) -> list[int]:
    """Random token ids, none of them the end."""
    return random.Random(seed).choices(range(64, 319), k=tokens)


def greedy_after(folder: Path, ids: list[int], generated_from: int, count: int) -> list[int]:
    """Greedy tokens after `ids`, of which those from `generated_from` follow the decode rule."""
    oracle, made = Oracle(folder, MODEL), list(ids)
    for _ in range(count):
        answer = Answer()
        oracle._forward(made, generated_from, GREEDY, answer)
        made.append(int(answer.logits[-1].argmax()))
    return made[len(ids) :]


def word_tokenizer() -> Tokenizer:
    """Token i is the word "wi", so that any tokens are a text."""
    vocab = {f"w{i}": i for i in range(MODEL.vocab)}
    tokenizer = Tokenizer(models.WordLevel(vocab=vocab, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def words(ids: Sequence[int]) -> str:
    """The text of token ids."""
    return "".join(f"w{i} " for i in ids)
