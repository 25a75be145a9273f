"""What stands in OUT/report: the state's numbers, every section with and without its data, and
nothing that a name from outside could do harm with."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest

from conversion.report.report_folder import make_report
from tests.conversion.report.report_data import (
    Page,
    ablations,
    evaluation,
    refusal,
    report_of,
    silent,
    written,
)

SECTIONS = "summary heads scores indexer training attended accuracy text ablations origin".split()


def test_convert_leaves_a_report(conversion: Path) -> None:
    files = {path.name for path in (conversion / "out" / "report").iterdir()}
    drawn = {
        "head-map.png",
        "scores.png",
        "kept-mass.png",
        "blocks.png",
        "age-bias.png",
        "training.png",
    }
    assert files == {"report.html", "report.json", *drawn}
    for name in drawn:
        assert (conversion / "out" / "report" / name).read_bytes().startswith(b"\x89PNG")
    found = report_of(conversion / "out")
    assert found["converted_with"] == found["versions"]
    assert found["seed"] == 5


def test_every_section_is_there_and_in_the_contents(evaluated: Path) -> None:
    page = Page(evaluated / "report" / "report.html")
    assert page.contents() == [f"#{name}" for name in SECTIONS]
    for name in SECTIONS:
        assert page.hints(name) == []
    images = {name: page.images(name) for name in SECTIONS}
    assert images == {
        "summary": 0,
        "heads": 1,
        "scores": 1,
        "indexer": 3,  # the last: biases by age
        "training": 1,
        "attended": 1,
        "accuracy": 2,
        "text": 2,
        "ablations": 1,
        "origin": 0,
    }


def test_a_section_without_data_says_how_to_get_them(out: Path) -> None:
    shutil.rmtree(out.with_name("out.work"))
    shutil.rmtree(out / "report")
    config = json.loads((out / "config.json").read_text())
    del config["rtpurbo"]["calibration"]
    (out / "config.json").write_text(json.dumps(config))
    page = Page(make_report(out, silent))
    commands = {
        "scores": ["rtpurbo convert"],
        "indexer": ["rtpurbo convert"],
        "training": ["rtpurbo convert", "--distil"],
        "attended": ["rtpurbo eval"],
        "accuracy": ["rtpurbo eval"],
        "text": ["rtpurbo eval"],
        "ablations": ["rtpurbo ablate"],
        "origin": ["rtpurbo report"],
    }
    for name, expected in commands.items():
        hints = page.hints(name)
        assert len(hints) == len(expected)
        assert all(words in hint for words, hint in zip(expected, hints, strict=True))
        assert page.images(name) == 0
    assert page.images("heads") == 1  # the folder itself says which heads they are
    found = report_of(out)
    assert all(found[name] is None for name in ("heads", "indexer", "distil", "options", "seed"))


def test_the_same_numbers_give_the_same_files(evaluated: Path) -> None:
    folder = evaluated / "report"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    make_report(evaluated, silent)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_pictures_of_an_earlier_report_go_and_a_persons_files_stay(
    evaluated: Path, tmp_path: Path
) -> None:
    folder = evaluated / "report"
    (folder / "My notes.png").write_bytes(b"mine")
    assert {"attended.png", "passkey.png"} <= {path.name for path in folder.iterdir()}
    text = written(tmp_path / "text.json", evaluation(tasks=()).as_dict())
    make_report(evaluated, silent, evaluations=[text])
    left = {path.name for path in folder.iterdir()}
    assert left.isdisjoint({"attended.png", "passkey.png", "accuracy.png"})
    assert {"loss.png", "My notes.png"} <= left


def test_evaluations_of_the_same_variants_are_one(out: Path, tmp_path: Path) -> None:
    files = [
        written(tmp_path / f"{number}.json", report.as_dict())
        for number, report in enumerate(
            [
                evaluation(lengths=(256,)),
                evaluation(lengths=(512,)),
                evaluation(lengths=(512,)),  # the same cells again
                evaluation(lengths=(128,), variants=("dense", "server"), text=False),
            ]
        )
    ]
    page = Page(make_report(out, silent, evaluations=files))
    assert page.images("accuracy") == 3
    attended = report_of(out)["attended"]
    assert [[point["length"] for point in group] for group in attended] == [
        [256, 512],
        [512],
        [128],
    ]
    assert all(point["tokens"] == pytest.approx(64) for group in attended for point in group)
    assert "out: dense, server" in page.text("accuracy")


def test_tables_show_the_numbers_of_the_json(evaluated: Path) -> None:
    page, found = Page(evaluated / "report" / "report.html"), report_of(evaluated)
    (line,) = (
        own
        for own in found["evaluations"][0]["averages"]
        if (own["name"], own["length"]) == ("retrieval", 512)
    )
    gap = line["differences"]["sparse"]
    expected = f"{100 * gap['value']:+.2f} [{100 * gap['low']:+.2f}, {100 * gap['high']:+.2f}]"
    rows = {(row[0], row[1]): row for row in page.cells("summary")}
    assert rows["retrieval", "512"][-1] == expected
    assert gap["value"] == pytest.approx(-0.5)
    head = found["indexer"]["heads"][0]
    by_head = {tuple(row[:3]): row for row in page.cells("indexer") if len(row) == 10}
    shown = by_head[str(head["layer"]), str(head["head"]), "answers"]
    assert shown[4:6] == [f"{head['answers']['kl']:.3f}", f"{head['answers']['kept_mass']:.3f}"]
    lines = {(own["name"], own["length"]): own for own in found["ablation_lines"]}
    assert lines["sparse", 512]["kl"] == 0.0123
    assert lines["random heads", 512]["kl"] is None
    assert "index_dim 32: left out, too large" in page.text("ablations")


def test_the_page_asks_for_nothing_and_runs_nothing(evaluated: Path) -> None:
    page = Page(evaluated / "report" / "report.html")
    assert page.tags().isdisjoint({"script", "link", "iframe", "object", "embed", "form", "base"})
    for tag, name, value in page.attributes():
        assert not name.startswith("on"), (tag, name)
        if name in ("src", "href", "action", "srcset", "data", "poster"):
            assert value.startswith(("#", "data:image/png;base64,")), (tag, name)
    assert "://" not in page.source
    assert "url(" not in page.source
    assert "@import" not in page.source
    assert "default-src 'none'" in page.source


HOSTILE = "<script>alert(1)</script>\"'&amp; \u202eevil ]]> {{ 7*7 }} $\\frac{"


def test_names_from_outside_stay_text(out: Path, tmp_path: Path) -> None:
    name = HOSTILE.replace("/", "_")
    folder = out.rename(out.with_name(name))
    out.with_name("out.work").rename(out.with_name(name + ".work"))
    report = evaluation(model=HOSTILE, variants=("dense", HOSTILE), tasks=(HOSTILE,))
    page = Page(
        make_report(
            folder,
            silent,
            evaluations=[written(tmp_path / "eval.json", report.as_dict())],
            ablations=written(tmp_path / "ablations.json", ablations({HOSTILE: report})),
        )
    )
    shown = HOSTILE.replace("\u202e", "\ufffd")
    assert "script" not in page.tags()
    assert "\u202e" not in page.source
    for section in ("accuracy", "ablations"):
        assert shown in page.text(section)
    assert shown.replace("/", "_") in page.text("summary")


def test_a_name_that_is_no_unicode_is_shown_with_a_mark(out: Path) -> None:
    folder = out.rename(out.with_name("model-\udcff"))
    out.with_name("out.work").rename(out.with_name("model-\udcff.work"))
    assert "model-\ufffd" in Page(make_report(folder, silent)).text("summary")


def test_without_matplotlib_there_are_tables(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    told: list[str] = []
    path = written(tmp_path / "eval.json", evaluation(grid=True).as_dict())
    page = Page(make_report(out, told.append, evaluations=[path]))
    assert len(told) == 1
    assert "rtpurbo[plot]" in told[0]
    assert sum(page.images(name) for name in SECTIONS) == 0
    assert list((out / "report").glob("*.png")) == []
    for name in ("heads", "scores", "indexer", "training", "attended", "accuracy", "text"):
        assert page.cells(name), name
    assert report_of(out)["evaluations"]


def test_a_place_that_cannot_be_written_is_named(out: Path) -> None:
    shutil.rmtree(out / "report")
    (out / "report").write_text("a file")
    assert "report" in refusal(lambda: make_report(out, silent))


def test_the_page_comes_last(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader who sees the new page finds its numbers and pictures beside it."""
    written_names: list[str] = []
    replace = os.replace

    def noting(source: Path, target: Path) -> None:
        written_names.append(target.name)
        replace(source, target)

    monkeypatch.setattr("conversion.report.report_folder.os.replace", noting)
    make_report(out, silent)
    assert written_names[-2:] == ["report.json", "report.html"]
    assert not list((out / "report").glob(".*"))
