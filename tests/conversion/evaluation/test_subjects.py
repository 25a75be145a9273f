"""Models in process: greedy continuations, traces and text against slow or direct computations."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn.functional import kl_div

from conversion.code_facts import FactDocument, Question
from conversion.evaluation.in_process import InProcess
from conversion.evaluation.samples import PromptSample, Sample
from conversion.evaluation.teacher_forced import decode_loss
from conversion.evaluation.text_agreement import TextMeasure, TextPass
from conversion.evaluation.trace_run import right_steps, split_by_distance
from conversion.evaluation.traces import Step, Trace
from tests.conversion.evaluation.word_model import (
    MODEL,
    greedy_after,
    prompt,
    variant,
    word_tokenizer,
    words,
)
from tests.engine.tiny_checkpoint import write_checkpoint

LENGTH, DECODED = 180, 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model"), MODEL)


def test_scores_are_those_of_greedy_generation(folder: Path) -> None:
    """Of four generated words the second and third are asked for, then one that never comes."""
    ids = prompt(120, 2)
    greedy = greedy_after(folder, ids, len(ids), 4)
    assert MODEL.eos not in greedy
    references = (f"w{greedy[1]} w{greedy[2]}", "W9999")
    asked = [
        PromptSample(words(ids), references, generated_tokens=4),
        PromptSample(words(ids), references, generated_tokens=2),
        PromptSample(words(ids), references[:1], generated_tokens=4),
    ]
    counted: list[int] = []

    subject = InProcess("sparse", variant(folder), word_tokenizer())
    scores = subject.scores(asked, lambda: counted.append(1))

    assert scores == [(0.5,), (0.0,), (1.0,)]
    assert len(counted) == 3
    assert subject.attended_fraction is not None
    assert 0 < subject.attended_fraction < 1


def test_documents_and_prompts_of_any_length_share_one_cache(folder: Path) -> None:
    """A later sample does not see an earlier, longer one."""
    long, short = prompt(150, 3), prompt(90, 4)
    answer = greedy_after(folder, short, 84, 3)
    fact = FactDocument(words(short[:84]), (Question(words(short[84:]), words(answer)),))
    other = PromptSample(words(long), ("w1",), generated_tokens=3)
    samples: list[Sample] = [other, fact, other, fact]

    scores = InProcess("sparse", variant(folder), word_tokenizer()).scores(samples)

    assert scores[1] == scores[3] == (1.0,)
    assert scores[0] == scores[2]


@pytest.mark.parametrize("prompt_tokens", [64, 65, 71])  # around the edges of a page of 8
@pytest.mark.parametrize("dense", [False, True], ids=["sparse", "dense"])
def test_branches_are_what_each_continuation_would_be_alone(
    folder: Path, dense: bool, prompt_tokens: int
) -> None:
    """Pages hold 8 tokens; 80 branches need more than the spare pages, so they run in groups."""
    one = variant(folder, dense=dense)
    ids = prompt(prompt_tokens, 20)
    continuations = [prompt(1 + seed % 19, 21 + seed) for seed in range(80)]
    sequence = one.sequence(prompt_tokens, branch_tokens=19)
    sequence.prefill(ids)
    branches = sequence.branch(continuations, decode=one.selects)

    assert [len(hidden) for hidden in branches] == [len(own) for own in continuations]
    for own, hidden in zip(continuations, branches, strict=True):
        alone = one.sequence(prompt_tokens + len(own))
        alone.prefill(ids)
        assert torch.allclose(hidden, one.generate(alone, own), atol=1e-5)
    # Nothing of them is left: the sequence goes on as if there had been none.
    sequence.cut(prompt_tokens - 5)
    alone = one.sequence(prompt_tokens)
    alone.prefill(ids[:-5])
    assert torch.allclose(one.generate(sequence, ids[:3]), one.generate(alone, ids[:3]), atol=1e-5)


def test_generation_stops_at_the_end_token(tmp_path: Path) -> None:
    ids = prompt(100, 5)
    folder = write_checkpoint(tmp_path, MODEL)
    greedy = greedy_after(folder, ids, len(ids), 3)
    config = (folder / "config.json").read_text()
    ended = config.replace(f'"eos_token_id": {MODEL.eos}', f'"eos_token_id": {greedy[1]}')
    assert ended != config
    (folder / "config.json").write_text(ended)
    subject = InProcess("sparse", variant(folder), word_tokenizer())
    sample = PromptSample(words(ids), (f"w{greedy[0]}", f"w{greedy[2]}", f"w{greedy[1]}"), 3)
    assert len({*greedy}) == 3
    ((score,),) = subject.scores([sample])
    assert score == pytest.approx(1 / 3)


def test_steps_of_a_trace_are_right_where_greedy_decoding_gives_them(folder: Path) -> None:
    ids = prompt(100, 6)
    greedy = greedy_after(folder, ids, 79, 3)
    wrong = [*greedy[:2], (greedy[2] + 1) % MODEL.vocab]
    steps = (Step(100, 103, distance=9), Step(100, 102, distance=50), Step(101, 103, distance=30))

    def right(made: list[int]) -> list[bool]:
        trace = Trace(tuple(ids[:80]), (*ids[80:], *made), steps)
        return right_steps(variant(folder), trace)

    assert right(greedy) == [True, True, True]
    assert right(wrong) == [False, True, False]


def test_steps_are_parted_by_the_distance_of_what_they_need() -> None:
    steps = tuple(Step(0, 1, distance) for distance in (5, 10, 19, 20, 90))
    traces = [Trace((), (), steps), Trace((), (), steps[:1])]
    groups = split_by_distance(traces, [[True, False, True, True, False], [False]], (10, 20))
    assert groups == {
        "below 10": [(1.0,), (0.0,)],
        "10-20": [(0.0, 1.0), ()],
        "20 or more": [(1.0, 0.0), ()],
    }


def measure(folder: Path, passes: list[TextPass]) -> TextMeasure:
    found = TextMeasure(passes, LENGTH, DECODED)
    found.run([prompt(LENGTH, 7), prompt(LENGTH, 8)], lambda: None)
    return found


@torch.no_grad()
def test_agreement_is_that_of_the_whole_distributions(folder: Path) -> None:
    dense, sparse = variant(folder, dense=True), variant(folder)
    found = measure(folder, [TextPass("dense", dense), TextPass("sparse", sparse)])
    distances, same = [], []
    for seed in (7, 8):
        ids = prompt(LENGTH, seed)
        both = []
        for one in (dense, sparse):
            sequence = one.sequence(LENGTH)
            sequence.prefill(ids[: LENGTH - DECODED])
            hidden = one.generate(sequence, ids[LENGTH - DECODED : -1])
            both.append(one.decoder.logits(hidden).log_softmax(-1))
        distances.append(kl_div(both[1], both[0], log_target=True, reduction="none").sum(-1))
        same.append(both[0].argmax(-1) == both[1].argmax(-1))
    expected = torch.cat(distances)

    (agreement,) = found.agreements()

    assert (agreement.variant, agreement.prompt) == ("sparse", "served")
    assert agreement.tokens == 2 * (DECODED - 1) == len(expected)
    assert agreement.kl_mean == pytest.approx(float(expected.mean()), rel=1e-4)
    assert agreement.kl_mean > 1e-6
    assert agreement.kl_p99 == pytest.approx(float(expected.quantile(0.99)), rel=1e-4)
    assert agreement.top1.value == pytest.approx(float(torch.cat(same).float().mean()))


def test_loss_by_position_is_the_loss_of_the_decoded_part_there(folder: Path) -> None:
    sparse = variant(folder)
    (curve,) = measure(folder, [TextPass("sparse", sparse)]).curves()
    documents = [prompt(LENGTH, 7), prompt(LENGTH, 8)]
    # decode_loss counts targets, so its last 39 of 180 tokens are those after position 140.
    expected = decode_loss(sparse, documents, DECODED - 1)
    assert curve.decoded_mean == pytest.approx(expected.loss, rel=1e-5)
    assert (curve.edges[0], curve.edges[-1]) == (0, LENGTH - 1)
    sizes = [b - a for a, b in zip(curve.edges, curve.edges[1:], strict=False)]
    total = sum(loss * size for loss, size in zip(curve.losses, sizes, strict=True))
    assert total / (LENGTH - 1) == pytest.approx(curve.mean, rel=1e-5)


def test_a_variant_agrees_with_itself(folder: Path) -> None:
    sparse = variant(folder)
    (agreement,) = measure(folder, [TextPass("a", sparse), TextPass("b", sparse)]).agreements()
    assert agreement.kl_mean == 0.0
    assert agreement.top1.value == 1.0


def test_a_dense_prompt_is_that_of_the_dense_model(folder: Path) -> None:
    """Behind it only decoding differs; the local heads' window would have changed the prompt."""
    ids = prompt(LENGTH, 9)
    dense = variant(folder, dense=True).sequence(LENGTH).prefill(ids)
    assert torch.allclose(
        variant(folder).sequence(LENGTH).prefill(ids, dense=True), dense, atol=1e-5
    )
    assert not torch.allclose(variant(folder).sequence(LENGTH).prefill(ids), dense, atol=1e-3)
    found = measure(
        folder,
        [
            TextPass("dense", variant(folder, dense=True)),
            TextPass("sparse", variant(folder)),
            TextPass("sparse", variant(folder), dense_prompt=True),
        ],
    )
    assert [agreement.prompt for agreement in found.agreements()] == ["served", "dense"]
    assert [curve.variant for curve in found.curves()] == ["dense", "sparse"]
