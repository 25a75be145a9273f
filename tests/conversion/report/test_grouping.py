"""Files that are shown as one, and files that are not."""

from __future__ import annotations

from dataclasses import replace

from conversion.report.grouping import grouped
from tests.conversion.report.report_data import evaluation


def test_a_file_for_each_length_is_one_evaluation() -> None:
    whole = evaluation(lengths=(256, 512))
    parts = [evaluation(lengths=(256,)), evaluation(lengths=(512,))]
    assert grouped(parts) == [whole]


def test_text_of_one_file_goes_with_the_answers_of_another() -> None:
    answers, text = evaluation(text=False), evaluation(tasks=())
    (found,) = grouped([answers, text])
    assert (found.cells, found.averages) == (answers.cells, answers.averages)
    assert (found.agreements, found.curves) == (text.agreements, text.curves)


def test_what_was_measured_twice_is_shown_twice() -> None:
    first, second, third = evaluation(), evaluation(), evaluation(lengths=(1024,))
    assert grouped([first, second, third])[1:] == [second]
    assert grouped([first, replace(first, model="other")])[1].model == "other"
    assert len(grouped([evaluation(), evaluation(variants=("dense", "server"))])) == 2


def test_averages_of_the_same_name_stay_apart() -> None:
    """Over constants in one file, over lists in another: neither is the average over both."""
    parts = [evaluation(tasks=(task,), text=False) for task in ("code_constant", "code_list")]
    assert grouped(parts) == parts


def test_settings_that_differ_are_not_told() -> None:
    first, second = evaluation(lengths=(256,)), evaluation(lengths=(512,))
    second = replace(second, settings={**second.settings, "samples": 9}, notes=("other",))
    (found,) = grouped([first, second])
    assert found.settings == {"seed": 3}
    assert found.notes == ("text: made up", "other")
