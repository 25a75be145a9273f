"""RULER's generators against the published rules, and against samples of the original scripts."""

from __future__ import annotations

import hashlib
import random
import re
from collections import Counter

import pytest

from conversion.errors import ConversionError
from conversion.evaluation.haystack import Haystack
from conversion.evaluation.ruler.niah import NIAH_RULES, NOISE, enumerated
from conversion.evaluation.ruler.tasks import PAPER_COLUMNS, RULER_TASKS, ruler_samples
from conversion.evaluation.sample_maker import NEEDS_PROSE
from conversion.evaluation.samples import PromptSample, reference_score
from conversion.evaluation.words import Words

LENGTH, COUNT = 2048, 3
GENERATED = {"vt": 30, "cwe": 120, "fwe": 50} | dict.fromkeys(NIAH_RULES, 128)
ORIGINAL = {
    "niah_single_1": "e986b439bed6ac70",
    "niah_single_3": "3298a3cbb08c392a",
    "niah_multikey_2": "c7122e0d711013b9",
    "niah_multikey_3": "13882092eb488275",
    "niah_multivalue": "5975aae5be742ab3",
    "niah_multiquery": "f9edc449b235a8c5",
    "vt": "db17abaaee6852fd",
    "cwe": "0bbdff6d571b655e",
    "fwe": "744eb35f3887293e",
}
"""sha256 of three prompts of 2048 tokens as NVIDIA/RULER's scripts (c3f5e3b) made them, with
`count_tokens` and `sentences` of this project and the haystack below."""


@pytest.fixture(scope="module")
def words() -> Words:
    return Words.load()


@pytest.fixture(scope="module")
def haystack() -> Haystack:
    rng = random.Random(0)
    vocabulary = "river stone walks Green under light paper still again north".split()
    sentences = (" ".join(rng.choice(vocabulary) for _ in range(9)) for _ in range(900))
    text = " ".join(sentence.capitalize() + "." for sentence in sentences)
    return Haystack(tuple(text.split()), "made up")


def count_tokens(text: str) -> int:
    return len(re.findall(r"\w+|[^\w\s]", text))


def samples(
    name: str, words: Words, haystack: Haystack, length: int = LENGTH
) -> list[PromptSample]:
    return ruler_samples(name, COUNT, length, count_tokens, words, haystack)


@pytest.mark.parametrize("name", ORIGINAL)
def test_prompts_are_those_of_the_original(name: str, words: Words, haystack: Haystack) -> None:
    text = "".join(sample.prompt for sample in samples(name, words, haystack))
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == ORIGINAL[name]


@pytest.mark.parametrize("length", [LENGTH, 4500])
@pytest.mark.parametrize("name", RULER_TASKS)
def test_prompts_fill_the_length_and_leave_room_for_the_answer(
    name: str, length: int, words: Words, haystack: Haystack
) -> None:
    made = samples(name, words, haystack, length)
    assert len(made) == COUNT
    assert len({sample.prompt for sample in made}) == COUNT
    for sample in made:
        assert sample.generated_tokens == GENERATED[name]
        total = count_tokens(sample.prompt) + sample.generated_tokens
        # Prose that does not fit is cut by 500 words at a time.
        least = length - 600 if name in NEEDS_PROSE else 0.85 * length
        assert least < total <= length


@pytest.mark.parametrize("name", NIAH_RULES)
def test_every_needle_is_hidden_once_and_the_asked_ones_are_the_references(
    name: str, words: Words, haystack: Haystack
) -> None:
    rule = NIAH_RULES[name]
    for sample in samples(name, words, haystack):
        found = re.findall(
            r"One of the special magic (\w+) for (\S+) is: (\S+)\.", sample.prompt.split("?")[0]
        )
        asked = re.search(r"for (.*) mentioned in the provided text\?", sample.prompt)
        assert asked is not None
        keys = re.split(r", and |, ", asked[1].split(" for ")[-1])
        by_key: dict[str, list[str]] = {}
        for kind, key, value in found:
            assert kind == rule.value_kind
            by_key.setdefault(key, []).append(value)
        assert len(keys) == rule.queries
        assert sorted(sample.references) == sorted(v for key in keys for v in by_key[key])
        assert len(sample.references) == rule.queries * rule.values
        if rule.haystack != "needle":
            assert len(found) == rule.keys_hidden * rule.values
        else:
            assert len(found) > 30


@pytest.mark.parametrize("name", ["niah_single_1", "niah_multivalue"])
def test_the_prompt_speaks_of_one_needle_or_of_several(
    name: str, words: Words, haystack: Haystack
) -> None:
    prompt = samples(name, words, haystack)[0].prompt
    if name == "niah_single_1":
        assert prompt.startswith("A special magic number is hidden within the following text.")
        assert re.search(r"text\? The special magic number for \S+ mentioned .* is$", prompt)
    else:
        assert prompt.startswith("Some special magic numbers are hidden within the following")
        assert re.search(r"text\? The special magic numbers for \S+ mentioned .* are$", prompt)


def test_values_are_seven_digits_or_uuids(words: Words, haystack: Haystack) -> None:
    for sample in samples("niah_single_1", words, haystack):
        assert re.fullmatch(r"\d{7}", sample.references[0])
    for sample in samples("niah_multikey_3", words, haystack):
        assert re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", sample.references[0])


def test_needles_stand_at_depths_spread_over_the_text(words: Words, haystack: Haystack) -> None:
    made = ruler_samples("niah_single_2", 40, LENGTH, count_tokens, words, haystack)
    depths = [s.prompt.index("One of the special") / len(s.prompt) for s in made]
    assert min(depths) < 0.2
    assert max(depths) > 0.8
    assert 0.35 < sum(depths) / len(depths) < 0.65


def test_a_chain_keeps_its_order_behind_an_example(words: Words, haystack: Haystack) -> None:
    examples = set()
    for sample in samples("vt", words, haystack):
        example, question = re.split(r"(?<!^)Memorize and track", sample.prompt)
        examples.add(example)
        assert len(re.findall(r"VAR [A-Z]{3} = ", example)) == 5
        chain = re.findall(r"VAR ([A-Z]{5}) = (\d+|VAR [A-Z]{5}) ?", question)
        names = [name for name, _ in chain]
        assert tuple(names) == sample.references
        assert [value for _, value in chain[1:]] == [f"VAR {name}" for name in names[:-1]]
        assert re.fullmatch(r"[1-9]\d{4}", chain[0][1])
        assert f"assigned the value {chain[0][1]}, they are: " in question
        assert "5 variables are assigned" in question
        assert NOISE in question
    assert len(examples) == COUNT


@pytest.mark.parametrize(("length", "often", "seldom"), [(LENGTH, 6, 1), (4500, 30, 3)])
def test_common_words_stand_more_often(
    length: int, often: int, seldom: int, words: Words, haystack: Haystack
) -> None:
    for sample in samples("cwe", words, haystack, length):
        example, question = re.split(r"(?<!^)Below is a numbered list", sample.prompt)
        listed = re.findall(r"\d+\. (.+?)(?= \d+\. |\n|$)", question.split("Question")[0])
        counts = Counter(listed)
        assert {word for word, count in counts.items() if count == often} == {*sample.references}
        assert set(counts.values()) == {often, seldom}
        assert len(sample.references) == 10
        assert example.rstrip().split("10. ")[-1].strip()


def test_frequent_words_fall_with_the_square_of_their_rank(
    words: Words, haystack: Haystack
) -> None:
    for sample in samples("fwe", words, haystack):
        text = sample.prompt.split("coded words. ")[1].split("\nQuestion")[0]
        ranked = Counter(text.split()).most_common()
        assert ranked[0][0] == "..."
        assert tuple(word for word, _ in ranked[1:4]) == sample.references
        top = ranked[0][1]
        for rank in (2, 3, 4):
            assert abs(ranked[rank - 1][1] - top / rank**2) <= 1
        assert len({*text.split()}) <= (LENGTH - 50) // 50


def test_the_score_is_the_share_of_references_found_in_any_case() -> None:
    text = "The words are: APPLE, banana and figure"
    assert reference_score(text, ("apple", "Banana", "cherry", "fig")) == 0.75
    assert reference_score("", ("x",)) == 0.0


def test_the_same_arguments_give_the_same_samples(words: Words, haystack: Haystack) -> None:
    assert samples("niah_multiquery", words, haystack) == samples(
        "niah_multiquery", words, haystack
    )


@pytest.mark.parametrize("name", RULER_TASKS)
def test_a_length_too_short_is_refused(name: str, words: Words, haystack: Haystack) -> None:
    with pytest.raises(ConversionError, match=f"{name}: the length is too short"):
        samples(name, words, haystack, length=240)


def test_the_papers_columns_cover_every_task() -> None:
    assert {task for tasks in PAPER_COLUMNS.values() for task in tasks} == {*RULER_TASKS}


def test_queries_are_enumerated_as_in_english() -> None:
    assert enumerated(["a"]) == "a"
    assert enumerated(["a", "b", "c"]) == "a, b, and c"


def test_a_pair_of_words_is_any_of_the_sorted_pairs() -> None:
    words = Words(("b", "eyed-a", "a"), ("blue", "blue-eyed", "red"), ())
    pairs = sorted({f"{a}-{n}" for a in words.adjectives for n in words.nouns})
    drawn, expected = random.Random(5), random.Random(5)
    assert [words.pair(drawn) for _ in range(60)] == [expected.choice(pairs) for _ in range(60)]


def test_more_words_than_the_lists_have_are_pairs(words: Words) -> None:
    singles = words.shuffled(42)
    rng = random.Random(0)
    assert len({*words.distinct(rng, singles, len(singles))}) == len(singles)
    more = words.distinct(rng, singles, len(singles) + 1)
    assert len({*more}) == len(singles) + 1
    assert all("-" in word for word in more)
