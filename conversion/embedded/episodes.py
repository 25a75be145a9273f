"""Retrieval episodes: code with planted facts, and questions that only the facts answer.

A fact is one or more lines, put before line breaks of real code at random depths, in order; a
question is a line that repeats the fact's name and ends with its value. Lines have the forms of
`conversion.code_facts`, so that a model is judged in the form it was taught; names come from other
words than there, with other lengths, so that none is known from training.

Planting works on token ids. "\\nNAME = 1" goes before a token that begins with a line break, which
is where the tokenizer splits the finished text as well, so the ids are those of natural text.
"""

from __future__ import annotations

import string
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from conversion.code_facts import FIRST_WORDS, SECOND_WORDS, Question

Fact = tuple[list[str], Question]  # lines in the order in which they must stand, and what is asked
KINDS = ("constant", "dictionary", "list", "chain", "token", "copy")
KIND_WEIGHTS = (0.16, 0.12, 0.3, 0.3, 0.06, 0.06)  # what takes longest to learn most often
MAX_FACTS = 17
CHAIN_LINKS = (0.6, 0.25, 0.15)  # shares of chains of 1, 2 and 3 assignments
MIDDLE_QUESTIONS = 0.3  # share of the questions asked again inside the code
COPY_TOKENS = (8, 48)
MIN_CODE = 16  # tokens of code that must be left
JUDGED_WORDS = frozenset(FIRST_WORDS + SECOND_WORDS)


@dataclass(slots=True)
class Episode:
    """Token ids of one sequence and the weight of each as a target of the loss."""

    ids: NDArray[np.int64]
    weights: NDArray[np.float32]
    answers: list[tuple[int, int]] = field(
        default_factory=list
    )  # [start, stop) of answers at the end


class EpisodeWriter:
    """Writes episodes over given code; every draw comes from the generator of the call."""

    def __init__(self, tokenizer: Tokenizer, answer_weight: float) -> None:
        self._tokenizer = tokenizer
        self._answer_weight = answer_weight
        vocabulary = {i: text for text, i in tokenizer.get_vocab().items()}
        letters = [vocabulary.get(i, "") for i in range(tokenizer.get_vocab_size())]
        self._breaks = np.array([text.startswith("Ċ") for text in letters])  # byte-level "\n"
        words = (text.strip("Ġ").upper() for text in letters)
        known = {w for w in words if w.isascii() and w.isalpha() and len(w) > 2}
        self._words = np.array(sorted(known - JUDGED_WORDS))

    def write(
        self, code: NDArray[np.int64], rng: np.random.Generator, kind: str | None = None
    ) -> Episode:
        """An episode as long as `code`, whose own end gives way to facts and questions.

        Args:
            code: at least 64 token ids of real text.
            kind: of KINDS; None draws one.
        """
        kind = kind or str(rng.choice(KINDS, p=KIND_WEIGHTS))
        if kind == "copy":
            return self._copy(code, rng)
        wanted = int(rng.integers(1, MAX_FACTS + 1))
        return self.plant(code, [self._fact(kind, rng) for _ in range(wanted)], rng)

    def plant(
        self, code: NDArray[np.int64], facts: list[Fact], rng: np.random.Generator
    ) -> Episode:
        """Put facts into code and their questions at its end, in random order."""
        tail_ids: list[int] = []
        tail_spans: list[tuple[int, int]] = []
        for index in rng.permutation(len(facts)):
            ids, start = self._question(facts[index][1])
            tail_spans.append((len(tail_ids) + start, len(tail_ids) + len(ids)))
            tail_ids += ids
        inserts = self._inserts(facts, rng)
        room = len(code) - len(tail_ids) - sum(len(ids) for _, ids, _ in inserts)
        if room < MIN_CODE:  # facts that fill a short sequence: keep the first half of them
            assert len(facts) > 1, "one fact fits any sequence"
            return self.plant(code, facts[: len(facts) // 2], rng)
        body, weights = self._insert(code[:room], inserts)
        offset = len(body)
        ids_T = np.concatenate([body, np.array(tail_ids, dtype=np.int64)])
        tail = np.ones(len(tail_ids), dtype=np.float32)
        for start, stop in tail_spans:
            tail[start:stop] = self._answer_weight
        answers = [(offset + start, offset + stop) for start, stop in tail_spans]
        return Episode(ids_T, np.concatenate([weights, tail]), answers)

    def _inserts(
        self, facts: list[Fact], rng: np.random.Generator
    ) -> list[tuple[float, list[int], int]]:
        """(depth, token ids, start of the answer or -1) of every line, and of some questions."""
        inserts = []
        for lines, question in facts:
            depths = np.sort(rng.random(len(lines)))
            for depth, line in zip(depths, lines, strict=True):
                inserts.append((float(depth), self._encode("\n" + line), -1))
            if rng.random() < MIDDLE_QUESTIONS:
                ids, start = self._question(question)
                inserts.append((float(rng.uniform(depths[-1], 1.0)), ids, start))
        return inserts

    def _insert(
        self, code: NDArray[np.int64], inserts: list[tuple[float, list[int], int]]
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Code with the lines before line breaks at their depths; those of one place keep order."""
        places = np.flatnonzero(self._breaks[code])
        if not len(places):
            places = np.array([len(code)])
        ids: list[NDArray[np.int64]] = []
        weights: list[NDArray[np.float32]] = []
        done = 0
        for depth, line, start in sorted(inserts, key=lambda insert: insert[0]):
            place = int(places[min(int(depth * len(places)), len(places) - 1)])
            ids += [code[done:place], np.array(line, dtype=np.int64)]
            weight = np.ones(len(line), dtype=np.float32)
            if start >= 0:
                weight[start:] = self._answer_weight
            weights += [np.ones(place - done, dtype=np.float32), weight]
            done = place
        ids.append(code[done:])
        weights.append(np.ones(len(code) - done, dtype=np.float32))
        return np.concatenate(ids), np.concatenate(weights)

    def _question(self, question: Question) -> tuple[list[int], int]:
        """Ids of a question with its answer, and where the answer begins."""
        ask = self._encode("\n" + question.text)
        return ask + self._encode(question.answer), len(ask)

    def _copy(self, code: NDArray[np.int64], rng: np.random.Generator) -> Episode:
        """A span of random tokens, and the same span again at the end: pure induction."""
        length = int(rng.integers(COPY_TOKENS[0], min(COPY_TOKENS[1], len(code) // 4)))
        span = rng.integers(1, self._tokenizer.get_vocab_size(), length)
        ids = code.copy()
        early = int(rng.integers(0, len(code) - 2 * length))
        ids[early : early + length] = span
        ids[-length:] = span
        weights = np.ones(len(ids), dtype=np.float32)
        weights[early : early + length] = 0  # noise teaches nothing
        cue = min(4, length // 2)  # its first tokens cannot be known
        weights[-length : len(ids) - length + cue] = 0
        weights[len(ids) - length + cue :] = self._answer_weight
        return Episode(ids, weights, [(len(ids) - length + cue, len(ids))])

    def _fact(self, kind: str, rng: np.random.Generator) -> Fact:
        name, value = self._name(rng), self._number(rng)
        if kind == "constant":
            return [f"{name} = {value}"], Question(f"assert {name} == ", value)
        if kind == "dictionary":
            table = str(rng.choice(["REGISTRY", self._name(rng)]))
            key = f'{table}["{name.lower()}"]'
            return [f"{key} = {value}"], Question(f"assert {key} == ", value)
        if kind == "token":
            secret = "".join(rng.choice(list("0123456789abcdef"), int(rng.integers(6, 17))))
            return [f'{name} = "{secret}"'], Question(f'assert {name} == "', f'{secret}"')
        if kind == "list":
            values = [self._number(rng) for _ in range(int(rng.integers(2, 5)))]
            lines = [f"{name}.append({number})" for number in values]
            return lines, Question(f"assert {name} == [", ", ".join(values) + "]")
        links = 1 + int(rng.choice(len(CHAIN_LINKS), p=CHAIN_LINKS))
        names = [name, *(self._name(rng) for _ in range(links))]
        lines = [f"{name} = {value}"]
        lines += [f"{new} = {old}" for old, new in pairwise(names)]
        return lines, Question(f"assert {names[-1]} == ", value)

    def _name(self, rng: np.random.Generator) -> str:
        """Two or three words of the vocabulary or random letters, joined by underscores."""
        count = int(rng.integers(2, 4))
        if rng.random() < 0.3:
            sizes = rng.integers(3, 8, count)
            letters = list(string.ascii_uppercase)
            return "_".join("".join(rng.choice(letters, size)) for size in sizes)
        return "_".join(str(word) for word in rng.choice(self._words, count))

    @staticmethod
    def _number(rng: np.random.Generator) -> str:
        digits = int(rng.choice([3, 4, 5, 5, 5, 6, 7]))
        return str(int(rng.integers(10 ** (digits - 1), 10**digits)))

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids
