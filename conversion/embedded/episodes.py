"""Retrieval episodes: code with planted facts, and questions that only the facts answer.

A fact is one or more lines, put before line breaks of real code at random depths, in order; a
question is a line that repeats the fact's name and ends with its value. Lines have the forms of
`conversion.code_facts`, so that a model is judged in the form it was taught; names come from other
words than there, with other lengths, so that none is known from training.

Planting works on token ids. "\\nNAME = 1" goes before a token that begins with a line break, which
is where the tokenizer splits the finished text as well, so the ids are those of natural text.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from conversion.code_facts import FIRST_WORDS, SECOND_WORDS, Question
from conversion.embedded.names import NameMaker

Fact = tuple[list[str], Question]  # lines in the order in which they must stand, and what is asked
KINDS = ("constant", "dictionary", "list", "chain", "token", "copy")
KIND_WEIGHTS = (0.1, 0.08, 0.42, 0.33, 0.04, 0.03)  # what takes longest to learn most often
FEW_FACTS = 17  # at most, in half of the episodes
TOKENS_PER_FACT, MOST_FACTS = 80, 96  # the others have up to one in so many tokens
EARLY_QUESTIONS = 0.6  # share of the facts that are asked inside the code and not at its end
NEAR_QUESTIONS = 0.2  # share of those asked right after the fact: a look-up by way of another is
# learnt where the first is easy, and then found to work from afar
COPY_TOKENS = (8, 48)
DIGITS = (3, 4, 5, 5, 5, 6, 7)  # of a value
MIN_CODE = 16  # tokens of code that must be left
# The beginning of a long sequence is left plain, in most of them: what goes on after a short prompt
# should be code and not a planted line.
PLAIN_TOKENS, PLAIN_SHARE = 512, 0.9
# Of planted lines, as byte-level BPE splits them; most lines are made of pieces seen before.
PIECES = re.compile(r" ?[A-Za-z]+| ?[^\sA-Za-z\d]+|\d|\s")
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

    def __init__(
        self, tokenizer: Tokenizer, answer_weight: float, lists: float | None = None
    ) -> None:
        """`lists` is their share of the episodes, the other kinds keep their proportions."""
        self._kind_weights = _kind_weights(lists)
        self._tokenizer = tokenizer
        self._answer_weight = answer_weight
        vocabulary = {i: text for text, i in tokenizer.get_vocab().items()}
        letters = [vocabulary.get(i, "") for i in range(tokenizer.get_vocab_size())]
        self._breaks = np.array([text.startswith("Ċ") for text in letters])  # byte-level "\n"
        words = (text.strip("Ġ").upper() for text in letters)
        known = {w for w in words if w.isascii() and w.isalpha() and len(w) > 2}
        self._words = np.array(sorted(known - JUDGED_WORDS))
        spaced = {text[1:] for text in letters if text.startswith("Ġ")}
        self._plain = sorted(w for w in spaced.intersection(letters) if _is_plain(w))
        self._pieces: dict[str, list[int]] = {}

    def write(
        self, code: NDArray[np.int64], rng: np.random.Generator, kind: str | None = None
    ) -> Episode:
        """An episode as long as `code`, whose own end gives way to facts and questions.

        Args:
            code: at least 64 token ids of real text.
            kind: of KINDS; None draws one.
        """
        kind = kind or str(rng.choice(KINDS, p=self._kind_weights))
        if kind == "copy":
            return self._copy(code, rng)
        most = FEW_FACTS
        if rng.random() < 0.5:  # a long sequence teaches more by many questions than by few
            most = max(most, min(MOST_FACTS, len(code) // TOKENS_PER_FACT))
        names = NameMaker(self._words, rng, self._plain)
        wanted = int(rng.integers(1, most + 1))
        facts = [self._fact(kind, names, rng) for _ in range(wanted)]
        is_plain = len(code) > 4 * PLAIN_TOKENS and rng.random() < PLAIN_SHARE
        return self.plant(code, facts, rng, EARLY_QUESTIONS, PLAIN_TOKENS if is_plain else 0)

    def plant(
        self,
        code: NDArray[np.int64],
        facts: list[Fact],
        rng: np.random.Generator,
        early: float = 0.0,
        plain: int = 0,
    ) -> Episode:
        """Put facts into code and their questions at its end, in random order.

        Every fact is asked once: a question that was answered before would be a second needle.

        Args:
            early: mean share of the facts that are asked inside the code instead; each episode
                draws its own, from 0 to twice as much. At least one is asked at the end.
            plain: tokens of code at the beginning that nothing is put into.
        """
        order = rng.permutation(len(facts))
        late = order[int(early * rng.random() * 2 * len(facts)) :] if early else order
        late = late if len(late) else order[:1]
        tail_ids: list[int] = []
        tail_spans: list[tuple[int, int]] = []
        for index in late:
            ids, start = self._question(facts[index][1])
            tail_spans.append((len(tail_ids) + start, len(tail_ids) + len(ids)))
            tail_ids += ids
        inserts = self._inserts(facts, set(late.tolist()), rng)
        room = len(code) - len(tail_ids) - sum(len(ids) for _, ids, _ in inserts)
        if room < MIN_CODE:  # facts that fill a short sequence: keep the first half of them
            assert len(facts) > 1, "one fact fits any sequence"
            return self.plant(code, facts[: len(facts) // 2], rng, early, plain)
        body, weights = self._insert(code[:room], inserts, plain)
        offset = len(body)
        ids_T = np.concatenate([body, np.array(tail_ids, dtype=np.int64)])
        tail = np.ones(len(tail_ids), dtype=np.float32)
        for start, stop in tail_spans:
            tail[start:stop] = self._answer_weight
        answers = [(offset + start, offset + stop) for start, stop in tail_spans]
        return Episode(ids_T, np.concatenate([weights, tail]), answers)

    def _inserts(
        self, facts: list[Fact], late: set[int], rng: np.random.Generator
    ) -> list[tuple[float, list[int], int]]:
        """(depth, token ids, start of the answer or -1) of every line, and of early questions."""
        inserts = []
        for number, (lines, question) in enumerate(facts):
            depths = np.sort(rng.random(len(lines)))
            for depth, line in zip(depths, lines, strict=True):
                inserts.append((float(depth), self._encode("\n" + line), -1))
            if number not in late:
                depth = depths[-1] + (1.0 - depths[-1]) * self._distance(rng)
                ids, start = self._question(question)
                inserts.append((float(depth), ids, start))
        return inserts

    def _insert(
        self, code: NDArray[np.int64], inserts: list[tuple[float, list[int], int]], plain: int
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Code with the lines before line breaks at their depths; those of one place keep order."""
        places = np.flatnonzero(self._breaks[code])
        places = places[places >= plain]
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

    def _fact(self, kind: str, names: NameMaker, rng: np.random.Generator) -> Fact:
        name, value = names.name(), self._number(rng)
        if kind == "constant":
            return [f"{name} = {value}"], Question(f"assert {name} == ", value)
        if kind == "dictionary":
            table = str(rng.choice(["REGISTRY", names.name()]))
            key = f'{table}["{name.lower()}"]'
            return [f"{key} = {value}"], Question(f"assert {key} == ", value)
        if kind == "token":
            secret = "".join(rng.choice(list("0123456789abcdef"), int(rng.integers(6, 17))))
            return [f'{name} = "{secret}"'], Question(f'assert {name} == "', f'{secret}"')
        if kind == "list":
            values = [self._number(rng) for _ in range(int(rng.integers(2, 5)))]
            lines = [f"{name}.append({number})" for number in values]
            return lines, Question(f"assert {name} == [", ", ".join(values) + "]")
        alias = names.name()
        return [f"{name} = {value}", f"{alias} = {name}"], Question(f"assert {alias} == ", value)

    @staticmethod
    def _distance(rng: np.random.Generator) -> float:
        """Of an early question from its fact, as a share of what follows; often little."""
        return 0.0 if rng.random() < NEAR_QUESTIONS else float(10 ** rng.uniform(-2.0, 0.0))

    @staticmethod
    def _number(rng: np.random.Generator) -> str:
        digits = DIGITS[int(rng.integers(len(DIGITS)))]
        return str(int(rng.integers(10 ** (digits - 1), 10**digits)))

    def _encode(self, text: str) -> list[int]:
        """What the tokenizer gives, put together from pieces that it never joins."""
        ids: list[int] = []
        for piece in PIECES.findall(text):
            if piece not in self._pieces:
                encoding = self._tokenizer.encode(piece, add_special_tokens=False)
                self._pieces[piece] = encoding.ids
            ids += self._pieces[piece]
        return ids


def _kind_weights(lists: float | None) -> list[float]:
    if lists is None:
        return list(KIND_WEIGHTS)
    others = 1.0 - KIND_WEIGHTS[KINDS.index("list")]
    return [
        lists if kind == "list" else weight / others * (1.0 - lists)
        for kind, weight in zip(KINDS, KIND_WEIGHTS, strict=True)
    ]


def _is_plain(word: str) -> bool:
    return word.isascii() and word.isalpha() and word.islower() and len(word) > 2
