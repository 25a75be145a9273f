"""Training of the embedded model, small: corpus, episodes, resumed runs, the exported folder."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

from conversion.code_facts import FACT_KINDS, plain_facts
from conversion.embedded.__main__ import pretrain
from conversion.embedded.batches import TrainingBatches
from conversion.embedded.corpus import END, Corpus
from conversion.embedded.episodes import KINDS, EpisodeWriter
from conversion.embedded.network import Network
from conversion.embedded.options import CURRICULUM, Phase, PretrainingOptions, read_curriculum
from conversion.errors import ConversionError
from conversion.parallel import Ranks
from engine.model.checkpoint import preflight
from engine.model.config_reader import read_config
from engine.model.weights import load_decoder
from tests.conversion.embedded.little_text import copy_of, text_folders
from tests.conversion.embedded.little_training import little_options
from tests.conversion.two_processes import in_two_processes

QUIET = Console(quiet=True)
ODD_PHASE = Phase(
    length=256, steps=1, episodes=0.5, first_rate=1.0, last_rate=1.0, batch_tokens=1000
)


@pytest.fixture
def options() -> PretrainingOptions:
    phases = (
        Phase(length=256, steps=3, episodes=0.5, first_rate=1.0, last_rate=0.5, batch_tokens=1024),
        Phase(length=512, steps=3, episodes=0.5, first_rate=0.5, last_rate=0.0, batch_tokens=1024),
    )
    phases = (phases[0], dataclasses.replace(phases[1], answer_weight=20.0))
    return little_options(*phases, text=text_folders(), layers=2, warmup_steps=2, save_every=2)


def test_files_are_split_once_and_end_with_the_end_token(corpus: Corpus) -> None:
    counts = corpus.description
    assert 0 < counts["held_out"]["files"] < counts["train"]["files"]
    for name, ids in (("train", corpus.train), ("held_out", corpus.held_out)):
        assert int((ids == END).sum()) == counts[name]["files"]
        assert len(ids) == counts[name]["tokens"]
        assert ids[-1] == END


def test_the_tokenizer_spells_numbers_digit_by_digit_and_loses_nothing(corpus: Corpus) -> None:
    text = "value_1234 = 56789  # é漢\n\tpass"
    encoding = corpus.tokenizer.encode(text)
    assert corpus.tokenizer.decode(encoding.ids) == text
    assert all(not (len(t.strip("Ġ")) > 1 and t.strip("Ġ").isdigit()) for t in encoding.tokens)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [256, 257, 1000])
def test_episodes_are_as_long_as_the_code_and_read_as_natural_text(
    corpus: Corpus, kind: str, length: int
) -> None:
    """Planting works on ids; tokenising the finished text again gives the same ids."""
    writer, tokenizer = EpisodeWriter(corpus.tokenizer, 5.0), corpus.tokenizer
    for seed in range(20):
        rng = np.random.default_rng(seed)
        code = corpus.train[700 : 700 + length].astype(np.int64)
        episode = writer.write(code, rng, kind)
        assert len(episode.ids) == len(episode.weights) == length
        assert episode.answers
        for start, stop in episode.answers:
            assert (episode.weights[start:stop] == 5.0).all()
        if kind != "copy":
            ids = episode.ids.tolist()
            again = tokenizer.encode(tokenizer.decode(ids, skip_special_tokens=False)).ids
            # The first word may be half of one that the code was cut in.
            assert again[8:] == ids[len(ids) - len(again) + 8 :]


@pytest.mark.parametrize("kind", FACT_KINDS)
def test_every_question_of_an_episode_is_answered_by_what_was_planted(
    corpus: Corpus, kind: Any
) -> None:
    writer, rng = EpisodeWriter(corpus.tokenizer, 5.0), np.random.default_rng(0)
    drawn = plain_facts(kind, 4, 7)
    facts = [([line.rstrip("\n") for line in lines], question) for lines, question in drawn]
    episode = writer.plant(corpus.train[:2000].astype(np.int64), facts, rng)
    text = corpus.tokenizer.decode(episode.ids.tolist())
    for lines, question in drawn:
        places = [text.index("\n" + line.rstrip("\n")) for line in lines]
        assert places == sorted(places)
        assert places[-1] < text.rindex(question.text + question.answer)
    answers = {corpus.tokenizer.decode(episode.ids[a:b].tolist()) for a, b in episode.answers}
    assert answers == {question.answer for _, question in drawn}


def test_a_batch_is_a_function_of_its_step(corpus: Corpus, options: PretrainingOptions) -> None:
    for number, phase in enumerate(options.phases):
        first, second = (
            TrainingBatches(corpus.train, corpus.tokenizer, options, number, Ranks())
            for _ in range(2)
        )
        ids, weights = first[3]
        assert ids.shape == (1024 // phase.length, phase.length + 1)
        assert weights.shape == (1024 // phase.length, phase.length)
        assert torch.equal(ids, second[3][0])
        assert not torch.equal(ids, first[4][0])
        assert torch.equal(next(first.stream(3, 0, False))[0], ids)
        assert max(float(first[step][1].max()) for step in range(8)) == (5.0, 20.0)[number]
        for rank in range(2):
            ranks = Ranks(rank, 2)
            part = TrainingBatches(corpus.train, corpus.tokenizer, options, number, ranks)[3][0]
            assert torch.equal(part, ids[rank::2])


def test_the_rate_warms_up_and_falls_to_the_end(options: PretrainingOptions) -> None:
    first, last = options.phases
    assert options.rate(first, 0.0, 0) == 0.5  # half of two warm-up steps
    assert options.rate(first, 0.5, 5) == 0.75
    assert options.rate(last, 0.5, 9) == 0.25
    assert options.rate(last, 1.0, 9) == 0.0


def test_a_stopped_training_ends_as_one_that_was_not(
    options: PretrainingOptions, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("conversion.embedded.trainer.CHECK_STEPS", 1)
    assert pretrain(copy_of(prepared, tmp_path / "whole"), options, QUIET, documents=1)
    calls = 0
    copy_of(prepared, tmp_path / "parts")
    while not pretrain(tmp_path / "parts", options, QUIET, stop_after=0.0, documents=1):
        calls += 1
    assert calls == 4  # a step a call, and one more where a phase ends
    for whole in (tmp_path / "whole" / "model").iterdir():
        assert whole.read_bytes() == (tmp_path / "parts" / "model" / whole.name).read_bytes()


def train_in_one_of_two(rank: int, folder: Path, options: PretrainingOptions) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("conversion.embedded.corpus.HELD_OUT_SHARE", 0.2)
        pretrain(folder / "out", options, QUIET, documents=1)


def test_two_processes_train_what_one_trains(options: PretrainingOptions, tmp_path: Path) -> None:
    """Up to the order of sums, which Muon's bfloat16 products magnify."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    pretrain(tmp_path / "one" / "out", options, QUIET, documents=1)
    in_two_processes(train_in_one_of_two, tmp_path / "two", options)
    one, two = (
        torch.load(tmp_path / name / "out" / "state.pt", weights_only=True)["network"]
        for name in ("one", "two")
    )
    untrained = Network(read_config(tmp_path / "one" / "out"))
    untrained.initialise(options.seed)
    for name, start in untrained.state_dict().items():
        moved = float((one[name] - start).norm())
        assert moved > 0
        assert float((one[name] - two[name]).norm()) < 0.05 * moved


def test_the_exported_folder_serves_and_loads_in_transformers(
    options: PretrainingOptions, prepared: Path, tmp_path: Path
) -> None:
    pretrain(copy_of(prepared, tmp_path / "out"), options, QUIET, documents=1)
    folder = tmp_path / "out" / "model"
    decoder = load_decoder(preflight(folder), "cpu", torch.float32)
    factory: Any = AutoModelForCausalLM
    model = factory.from_pretrained(folder, dtype=torch.float32)
    ids = torch.arange(5, 90)
    from conversion.document_attention import watch_document

    with torch.inference_mode():
        ours = decoder.logits(watch_document(decoder, decoder.config, ids.tolist(), lambda _: None))
        assert torch.allclose(ours, model(ids[None]).logits[0], atol=1e-4)


def test_training_goes_on_from_a_model(
    options: PretrainingOptions, prepared: Path, tmp_path: Path
) -> None:
    pretrain(copy_of(prepared, tmp_path / "first"), options, QUIET, documents=1)
    model = tmp_path / "first" / "model"
    still = dataclasses.replace(options, init=model, matrix_rate=0.0, other_rate=0.0)
    pretrain(tmp_path / "second", still, QUIET, documents=1)
    for file in model.glob("*.safetensors"):
        assert (tmp_path / "second" / "model" / file.name).read_bytes() == file.read_bytes()


def test_a_curriculum_is_read_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "curriculum.json"
    file.write_text(json.dumps([dataclasses.asdict(phase) for phase in CURRICULUM]))
    assert read_curriculum(file) == CURRICULUM
    file.write_text('[{"length": 2048, "pace": 3}]')
    with pytest.raises(ConversionError, match=r"curriculum\.json: not a curriculum"):
        read_curriculum(file)


def test_another_options_state_is_refused(
    options: PretrainingOptions, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("conversion.embedded.trainer.CHECK_STEPS", 1)
    pretrain(copy_of(prepared, tmp_path / "out"), options, QUIET, stop_after=0.0, documents=1)
    with pytest.raises(ConversionError, match="other options"):
        pretrain(tmp_path / "out", dataclasses.replace(options, clip=2.0), QUIET, documents=1)


def test_too_little_text_is_one_line(options: PretrainingOptions, tmp_path: Path) -> None:
    (tmp_path / "few").mkdir()
    few = dataclasses.replace(options, text=(tmp_path / "few",))
    with pytest.raises(ConversionError, match="too little text"):
        pretrain(tmp_path / "out", few, QUIET)
    wide = dataclasses.replace(options, vocab_size=60_000)
    with pytest.raises(ConversionError, match="too little text for a vocabulary of 60000"):
        pretrain(tmp_path / "wide", wide, QUIET)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"phases": ()}, "no phase"),
        ({"phases": (ODD_PHASE,)}, "divide"),
        ({"vocab_size": 70_000}, "65536"),
    ],
)
def test_impossible_options(options: PretrainingOptions, change: Any, message: str) -> None:
    with pytest.raises(ConversionError, match=message):
        dataclasses.replace(options, **change)
