"""The chaos run, with the toy engine behind the real server: many faults in two minutes."""

from __future__ import annotations

import copy
import io
import json
import random
from collections.abc import Callable

import pytest
from rich.console import Console

from benchmarks.chaos import ChaosBench, run_chaos
from benchmarks.chaos_checker import Verdict, difference
from benchmarks.chaos_nemesis import STRIKES
from benchmarks.completion_client import Answer, ChoiceAnswer
from engine.embedded import embedded_model_path


def toy_prompt(tokens: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(89) for _ in range(tokens)]


@pytest.mark.timeout(400)
def test_f01_nothing_is_lost_and_nothing_is_wrong_under_random_faults() -> None:
    bench = ChaosBench(
        model=str(embedded_model_path()),
        make_prompt=toy_prompt,
        seconds=120.0,
        seed=7,
        clients=8,
        requests=24,
        lengths=(3, 20, 90, 300),
        most_tokens=80,
        least_pause=0.5,
        mean_pause=1.0,
        silence=2.5,
        tolerance=0.0,
        program=("tests.benchmarks.toy_server", "serve"),
    )
    printed = io.StringIO()
    result = run_chaos(bench, Console(file=printed, width=200))
    assert result["passed"], printed.getvalue()
    assert result["left_out_as_unstable"] == 0, "the toy has no last digits"
    assert result["restarts"] >= 4, "the run is to have faults in it"
    assert result["resumed"] >= 4
    assert result["finished"] >= 25
    assert set(result["strikes"]) <= set(STRIKES)
    json.dumps(result)


def an_answer() -> Answer:
    entries: list[tuple[str, float | None, int]] = [("a", None, 0), ("b", -0.5, 1)]
    return Answer([ChoiceAnswer("ab", "stop", entries)], usage=(3, 2))


def test_the_checker_sees_every_kind_of_difference() -> None:
    want = an_answer()
    assert difference(want, an_answer(), 0.0) is None
    changes: dict[str, Callable[[Answer], object]] = {
        "text differs from character 1": lambda a: setattr(a.choices[0], "text", "aXb"),
        "length, not stop": lambda a: setattr(a.choices[0], "finish_reason", "length"),
        "1 log-probabilities, not 2": lambda a: a.choices[0].logprobs.pop(),
        "entry 1 is": lambda a: a.choices[0].logprobs.__setitem__(1, ("b", -0.6, 1)),
        "entry 0 is": lambda a: a.choices[0].logprobs.__setitem__(0, ("a", -0.1, 0)),
        "usage": lambda a: setattr(a, "usage", (3, 3)),
    }
    for message, change in changes.items():
        got = copy.deepcopy(an_answer())
        change(got)
        assert message in str(difference(want, got, 0.01))
    got = an_answer()
    got.choices[0].logprobs[1] = ("b", -0.505, 1)
    assert difference(want, got, 0.01) is None, "within the tolerance"


def test_a_verdict_fails_on_one_wrong_answer() -> None:
    verdict = Verdict()
    verdict.judge("7", an_answer(), an_answer(), 0.0)
    assert verdict.passed
    assert verdict.counts["finished"] == 1
    other = an_answer()
    other.usage = (3, 1)
    verdict.judge("7", an_answer(), other, 0.0)
    assert not verdict.passed
    assert verdict.wrong == ["request 7: usage (3, 1), not (3, 2)"]
