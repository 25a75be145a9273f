"""Evaluations that are refused: options that cannot be, and those that do not suit the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from conversion.errors import ConversionError
from conversion.evaluation.run import evaluate
from tests.conversion.evaluation.small_evaluation import (
    POSITIONS,
    QUIET,
    options,
)
from tests.engine.model.tiny_models import make_checkpoint


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tasks": ("niah",)}, "unknown task 'niah'; known: ruler, code"),
        ({"tasks": ()}, "tasks: none is given"),
        ({"lengths": ()}, "lengths must be positive"),
        ({"lengths": (700, 0)}, "lengths must be positive"),
        ({"samples": 0}, "samples must be at least 1, got 0"),
        ({"facts": (0,)}, "facts must be positive"),
        ({"depths": (1.5,)}, "depths must be from 0 to 1"),
        ({"decoded": 1200}, "decoded must be less than every length"),
        ({"attention": ("dense", "dense")}, "the same one is named twice"),
        ({"urls": ("http://a",)}, "trace_counters needs the model in process"),
        ({"urls": ("http://a",), "attention": ("dense",)}, "belong to a model in process"),
        (
            {"urls": ("x=http://a", "x=http://b"), "tasks": ("kv",)},
            "the same name twice; give NAME=URL",
        ),
        ({"tasks": ("code_frequent",), "facts": (25,)}, "at most 24 for code_frequent"),
    ],
)
def test_impossible_options_are_refused(data: Path, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConversionError, match=message):
        options(data, **values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lengths": (POSITIONS + 1,)}, f"length 2049 is beyond the model's {POSITIONS} tokens"),
        ({"attention": ("sparse",)}, "has no sparse attention to measure"),
        ({"data": Path("/nowhere")}, "no such file or folder"),
        ({"tasks": ("niah_single_2",), "haystack": Path("/nowhere")}, "no such file or folder"),
        ({"tasks": ("code_list",), "lengths": (60,), "decoded": 9}, "60 is too short for 1 facts"),
        ({"tasks": ("text",), "text_samples": 500}, "too little text"),
        ({"device": "cuda:7"}, "device cuda:7 is not there"),
    ],
)
def test_what_does_not_suit_the_model_is_refused(
    dense_folder: Path, data: Path, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConversionError, match=message):
        evaluate(dense_folder, options(data, **values), QUIET)


def test_a_teacher_with_other_words_is_refused(
    dense_folder: Path, data: Path, tmp_path: Path
) -> None:
    make_checkpoint("llama", tmp_path, vocab_size=330)
    with pytest.raises(ConversionError, match="its vocabulary has 330 tokens"):
        evaluate(dense_folder, options(data, teacher=tmp_path), QUIET)
