"""One small model, converted once with every step, and a copy of it for each test."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from rich.console import Console

from conversion.convert_options import ConvertOptions
from conversion.distil_options import DistilOptions
from conversion.fit_options import FitOptions
from conversion.pipeline import convert
from conversion.report.report_folder import make_report
from tests.conversion.report.report_data import ablations, evaluation, written
from tests.engine.model.tiny_models import make_checkpoint
from tests.once import made_once

FIT = FitOptions(steps=3, queries=16, moment_documents=1, trial_documents=1, quality_documents=1)
DISTIL = DistilOptions(
    sequence_tokens=300,
    response_tokens=40,
    sequences=4,
    validation_sequences=2,
    facts_share=0.0,
    steps=4,
    batch=2,
    learning_rate=1e-2,
    warmup_steps=1,
    validate_every=2,
)


@pytest.fixture(scope="session", autouse=True)
def small_pictures() -> Iterator[None]:
    """A sixteenth of the dots: nobody looks at them, and they are most of the work."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("conversion.report.plots.DOTS_PER_INCH", 38)
        yield


@pytest.fixture(scope="session")
def conversion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with dense/, out/ and out.work/; not to be changed."""
    return made_once(tmp_path_factory, "conversion", _convert)


def _convert(folder: Path) -> None:
    data = folder / "text"
    data.mkdir()
    for number in range(30):
        (data / f"{number}.py").write_text(f"value_{number} = [{number}, 'text']\n" * 40)
    options = ConvertOptions(
        data=data,
        heads_share=0.25,
        window_tokens=64,
        index_dim=4,
        block_tokens=16,
        documents=2,
        document_tokens=300,
        fit=FIT,
        distil=DISTIL,
        seed=5,
    )
    make_checkpoint("qwen3", folder / "dense")
    convert(folder / "dense", folder / "out", options, Console(quiet=True))


@pytest.fixture(scope="session")
def evaluation_made(conversion: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with an evaluation and ablations in the report; not to be changed."""
    return made_once(tmp_path_factory, "evaluated", partial(_evaluate, conversion))


def _evaluate(conversion: Path, folder: Path) -> None:
    _copy(conversion, folder)
    runs = {"sparse": evaluation(), "random heads": evaluation(text=False)}
    make_report(
        folder / "out",
        print,
        evaluations=[written(folder / "eval.json", evaluation(grid=True).as_dict())],
        ablations=written(folder / "ablations.json", ablations(runs)),
    )


@pytest.fixture
def evaluated(evaluation_made: Path, tmp_path: Path) -> Path:
    """A folder with an evaluation and ablations in its report, the state beside it."""
    _copy(evaluation_made, tmp_path)
    return tmp_path / "out"


@pytest.fixture
def out(conversion: Path, tmp_path: Path) -> Path:
    """The converted folder, its state beside it."""
    _copy(conversion, tmp_path)
    return tmp_path / "out"


def _copy(source: Path, target: Path) -> None:
    for name in ("out", "out.work"):
        shutil.copytree(source / name, target / name)
