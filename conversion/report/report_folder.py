"""OUT/report: the page, the pictures beside it, and report.json. Made again whenever it is asked.

Every file is replaced as a whole, report.json before the page. Pictures that an earlier report had
and this one has not are removed; nothing else in the folder is touched.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from conversion.errors import ConversionError
from conversion.report.ablation_section import ablation_section
from conversion.report.contents import Contents
from conversion.report.evaluation_file import read_ablations, read_evaluation
from conversion.report.evaluation_sections import (
    accuracy_section,
    attended_section,
    text_section,
)
from conversion.report.head_sections import head_map_section, score_section
from conversion.report.html_page import printable, render_page
from conversion.report.origin_section import origin_section
from conversion.report.plots import draw_pictures, has_matplotlib
from conversion.report.sources import REPORT_FILE, REPORT_FOLDER, Sources
from conversion.report.summary_section import summary_section
from conversion.report.training_sections import indexer_section, training_section

PAGE_FILE = "report.html"
PICTURE_NAME = re.compile(r"[a-z_-]+(-\d+)?\.png")
SECTIONS = (
    summary_section,
    head_map_section,
    score_section,
    indexer_section,
    training_section,
    attended_section,
    accuracy_section,
    text_section,
    ablation_section,
    origin_section,
)


def make_report(
    out: Path,
    tell: Callable[[str], None],
    *,
    evaluations: Sequence[Path] = (),
    ablations: Path | None = None,
    converting: bool = False,
) -> Path:
    """Write the report of a converted folder into it; returns the page's path.

    Args:
        tell: takes a line for the operator about what is left out.
        evaluations: files of `rtpurbo eval --json`, in the place of those of an earlier report;
            none keeps them.
        ablations: file of `rtpurbo ablate`; None keeps those of an earlier report.
        converting: the conversion itself calls.

    Raises:
        CheckpointError: the folder is unusable; one line that names the file.
        ConversionError: a file that was given or the state is unusable, or the report cannot be
            written; one line.
    """
    out = Path(os.path.abspath(out))  # the state lies beside it, under its name
    found = [read_evaluation(path) for path in evaluations]
    others = None if ablations is None else read_ablations(ablations)
    sources = Sources(out, tell)
    contents = Contents.gather(sources, found, others, converting=converting)
    pictures: dict[str, bytes] = {}
    if has_matplotlib():
        pictures = draw_pictures(contents)
    else:
        tell("no pictures: they need matplotlib (pip install 'rtpurbo[plot]')")
    title = printable(contents.model.name)
    page = render_page(title, [section(contents) for section in SECTIONS], pictures)
    files = {
        **pictures,
        REPORT_FILE: (json.dumps(contents.as_dict(), indent=1) + "\n").encode("ascii"),
        PAGE_FILE: page.encode("utf-8"),
    }
    _write(out / REPORT_FOLDER, files)
    return out / REPORT_FOLDER / PAGE_FILE


def _write(folder: Path, files: dict[str, bytes]) -> None:
    """The files in their order; raises ConversionError."""
    try:
        folder.mkdir(exist_ok=True)
        for name, content in files.items():
            part = folder / f".{name}.part"
            part.write_bytes(content)
            os.replace(part, folder / name)
        for path in folder.iterdir():
            if PICTURE_NAME.fullmatch(path.name) and path.name not in files:
                path.unlink()
    except OSError as error:
        raise ConversionError(f"{folder}: cannot be written ({error.strerror})") from None
