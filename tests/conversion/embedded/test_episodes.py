"""Planted facts of an episode: names that never repeat, and every fact asked once."""

from __future__ import annotations

import re

import numpy as np
import pytest
from tokenizers import Tokenizer

from conversion.code_facts import FACT_KINDS
from conversion.embedded import names
from conversion.embedded.episodes import PLAIN_TOKENS, EpisodeWriter
from conversion.embedded.names import NameMaker
from engine.embedded import embedded_model_path

WORDS = np.array(["ALPHA", "BRAVO", "CHARLIE"])
QUESTION = re.compile(r"assert (.+) == ")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(embedded_model_path() / "tokenizer.json"))


@pytest.mark.parametrize("seed", range(20))
def test_no_name_comes_twice_however_few_words_there_are(seed: int) -> None:
    maker = NameMaker(WORDS, np.random.default_rng(seed))
    made = [maker.name() for _ in range(300)]
    assert len(set(made)) == 300
    assert all(1 <= len(name.split("_")) <= 3 and name.isupper() for name in made)


def test_names_of_some_documents_share_their_words(monkeypatch: pytest.MonkeyPatch) -> None:
    words = np.array([f"W{chr(65 + i)}{chr(65 + j)}" for i in range(26) for j in range(26)])
    last_words = {}
    for shared in (0.0, 1.0):
        monkeypatch.setattr(names, "SHARED", shared)
        maker = NameMaker(words, np.random.default_rng(1))
        last_words[shared] = len({maker.name().split("_")[-1] for _ in range(100)})
    assert last_words[1.0] < last_words[0.0] / 2


def test_some_documents_have_plain_names_that_never_run_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(names, "PLAIN", 1.0)
    plain = [f"w{chr(97 + i)}{chr(97 + j)}" for i in range(8) for j in range(8)]
    lengths = set()
    for seed in range(10):
        maker = NameMaker(WORDS, np.random.default_rng(seed), plain)
        made = [maker.name() for _ in range(200)]
        assert len(set(made)) == 200
        assert {word for name in made for word in name.split("_")} <= set(plain)
        lengths.add(len(made[0].split("_")))
    assert lengths == {1, 2}


@pytest.mark.parametrize("kind", [*FACT_KINDS, "token"])
def test_planted_lines_are_tokenised_as_the_tokenizer_does(tokenizer: Tokenizer, kind: str) -> None:
    writer = EpisodeWriter(tokenizer, 5.0)
    code = np.array(tokenizer.encode("value = compute(value)\n" * 600).ids, dtype=np.int64)
    for seed in range(20):
        ids = writer.write(code, np.random.default_rng(seed), kind).ids.tolist()
        before = tokenizer.encode(tokenizer.decode(ids).split("\nassert")[0]).ids
        assert before == ids[: len(before)]


@pytest.mark.parametrize("kind", FACT_KINDS)
def test_every_fact_is_asked_once(tokenizer: Tokenizer, kind: str) -> None:
    """A question that was answered before would be a second needle."""
    writer = EpisodeWriter(tokenizer, 5.0)
    code = np.array(tokenizer.encode("value = compute(value)\n" * 2000).ids, dtype=np.int64)
    early = 0
    for seed in range(10):
        episode = writer.write(code[:4000], np.random.default_rng(seed), kind)
        asked = QUESTION.findall(tokenizer.decode(episode.ids.tolist()))
        assert len(asked) == len(set(asked))
        early += len(asked) - len(episode.answers)
    assert early, "some facts are asked inside the code"


def test_most_long_sequences_begin_with_plain_code(tokenizer: Tokenizer) -> None:
    writer = EpisodeWriter(tokenizer, 5.0)
    code = np.array(tokenizer.encode("value = compute(value)\n" * 2000).ids, dtype=np.int64)
    begins_plain = [
        np.array_equal(episode.ids[:PLAIN_TOKENS], code[:PLAIN_TOKENS])
        for episode in (
            writer.write(code[:4096], np.random.default_rng(seed), "constant") for seed in range(60)
        )
    ]
    assert 40 < sum(begins_plain) < 60
    short = [writer.write(code[:512], np.random.default_rng(seed), "list") for seed in range(20)]
    assert not all(np.array_equal(episode.ids[:128], code[:128]) for episode in short)


@pytest.mark.parametrize("share", [0.0, 0.6, 1.0])
def test_the_share_of_lists_can_be_chosen(tokenizer: Tokenizer, share: float) -> None:
    writer = EpisodeWriter(tokenizer, 5.0, share)
    code = np.array(tokenizer.encode("value = compute(value)\n" * 200).ids, dtype=np.int64)
    written = [writer.write(code[:900], np.random.default_rng(seed)).ids for seed in range(100)]
    lists = sum(".append(" in tokenizer.decode(ids.tolist()) for ids in written)
    assert abs(lists - 100 * share) <= 15
