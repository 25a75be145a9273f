"""`rtpurbo convert` from folder to folder, on random small models of every family."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from conversion.distil_options import DistilOptions
from conversion.errors import ConversionError
from conversion.pipeline import ConvertOptions, ConvertRun, convert
from conversion.selection_trial import try_selection
from engine.model.checkpoint import preflight
from engine.model.weights import load_decoder
from tests.conversion.pipeline_case import QUICK, QUIET, refusal
from tests.engine.model.tiny_models import FAMILIES, make_checkpoint


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_converts_and_still_loads_in_transformers(
    family: str, tmp_path: Path, options: ConvertOptions, request: pytest.FixtureRequest
) -> None:
    if family != next(iter(FAMILIES)):  # pictures of one family are enough
        request.getfixturevalue("no_pictures")
    make_checkpoint(family, tmp_path / "dense")
    convert(tmp_path / "dense", tmp_path / "sparse", options, QUIET)
    checkpoint = preflight(tmp_path / "sparse")
    sparse = checkpoint.config.sparse
    assert sparse is not None
    assert sum(map(len, sparse.retrieval_heads)) == round(0.25 * 18)
    assert (sparse.window_tokens, sparse.index_dim, sparse.dense_below) == (64, 4, 100)
    decoder = load_decoder(checkpoint, "cpu", torch.float32)
    for layer, heads in enumerate(sparse.retrieval_heads):
        indexer = decoder.indexers[layer]
        assert (indexer is not None) == bool(heads)
        if indexer is not None:
            assert indexer.q_proj_HID.shape == (len(heads), 4, 16)
            assert indexer.q_proj_HID.isfinite().all()
            assert indexer.age_bias_HA is not None
            assert indexer.age_bias_HA[:, :5].all()  # 300 tokens reach range 5: it and more are 0
            assert not indexer.age_bias_HA[:, 5:].any()
    factory: Any = AutoModelForCausalLM
    first, second = (factory.from_pretrained(tmp_path / name) for name in ("dense", "sparse"))
    tokens = torch.arange(3, 50)[None]
    with torch.inference_mode():
        assert torch.equal(first(tokens).logits, second(tokens).logits)


@pytest.mark.usefixtures("no_pictures")
def test_whole_kv_heads_checked_by_what_they_do_with_a_top_p_each(
    tmp_path: Path, options: ConvertOptions
) -> None:
    make_checkpoint("qwen3", tmp_path / "dense")
    groups = replace(
        options,
        heads_granularity="kv_head",
        heads_share=0.34,
        index_scope="kv_head",
        causal_check=True,
        fit=replace(QUICK, adaptive_top_p=True),
    )
    convert(tmp_path / "dense", tmp_path / "out", groups, QUIET)
    checkpoint = preflight(tmp_path / "out")
    sparse = checkpoint.config.sparse
    assert sparse is not None
    kept = [
        (layer, head // 3) for layer, heads in enumerate(sparse.retrieval_heads) for head in heads
    ]
    assert len(kept) == 3 * len(set(kept)) > 0
    assert len(set(kept)) <= 2
    indexers = load_decoder(checkpoint, "cpu", torch.float32).indexers
    rows = sum(len(indexer.k_proj_HID) for indexer in indexers if indexer is not None)
    assert rows == len(set(kept))
    heads = json.loads((tmp_path / "out.work" / "heads.json").read_text())
    check = heads["causal_check"]
    assert len(check["candidates"]) == 6, "twice as many as are kept, and the two others matter"
    assert check["window_tokens"] == 300 // 8
    quality = json.loads((tmp_path / "out.work" / "quality.json").read_text())
    chosen = [line["setting"]["top_p"] for line in quality["heads"]]
    assert [p for layer in sparse.top_p for p in layer] == chosen
    assert chosen != [0.9] * len(chosen)


@pytest.mark.parametrize("keep_far", [True, False])
def test_rows_that_look_far_are_kept_unless_that_is_not_wanted(
    keep_far: bool, tmp_path: Path, options: ConvertOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []

    def noting(*args: Any, **settings: Any) -> Any:
        asked.append(settings["keep_far"])
        return try_selection(*args, **settings)

    monkeypatch.setattr("conversion.indexer_fit.try_selection", noting)
    make_checkpoint("qwen3", tmp_path / "dense")
    own = replace(options, fit=replace(QUICK, keep_far=keep_far))
    run = ConvertRun(preflight(tmp_path / "dense"), tmp_path / "out", own, QUIET)
    run.open()
    run.calibrate()
    run.fit()
    assert asked == [keep_far, keep_far], "of the closed form and of what was trained"


def test_without_steps_the_closed_form_is_kept(tmp_path: Path, options: ConvertOptions) -> None:
    make_checkpoint("qwen3", tmp_path / "dense")
    run = ConvertRun(
        preflight(tmp_path / "dense"),
        tmp_path / "out",
        replace(options, fit=replace(QUICK, steps=0)),
        QUIET,
    )
    run.open()
    run.calibrate()
    run.fit()
    made, closed = (
        load_file(run.work.path / name)
        for name in ("indexer.safetensors", "fit/closed_form.safetensors")
    )
    assert {name.split(".")[1] for name in made} == {"q", "k", "age"}
    for name, weight in made.items():
        if name.endswith(".k"):
            assert torch.equal(weight, closed[name])
        else:  # temperatures are a factor of every head
            factor = (weight / closed[name]).flatten(1)
            factor = factor[:, :5] if name.endswith(".age") else factor  # what is past them is 0
            torch.testing.assert_close(factor, factor[:, :1].expand_as(factor))


@pytest.mark.usefixtures("no_pictures")
def test_distilled_weights_are_exported(tmp_path: Path, options: ConvertOptions) -> None:
    make_checkpoint("qwen3", tmp_path / "dense")
    training = DistilOptions(
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
    full = replace(options, distil=training)
    convert(tmp_path / "dense", tmp_path / "out", full, QUIET)
    checkpoint = preflight(tmp_path / "out")
    section = json.loads((tmp_path / "out" / "config.json").read_text())["rtpurbo"]
    facts = section["calibration"]["distil"]
    assert facts["steps"] > 0
    before, after = (
        dict(load_decoder(preflight(tmp_path / name), "cpu", torch.float32).named_parameters())
        for name in ("dense", "out")
    )
    differs = {name for name, weight in before.items() if not torch.equal(weight, after[name])}
    assert bool(differs) == (facts["best"]["step"] > 0)
    assert checkpoint.config.sparse is not None


@pytest.mark.usefixtures("no_pictures")
def test_heads_that_a_person_edited_are_used(tmp_path: Path, options: ConvertOptions) -> None:
    make_checkpoint("qwen3", tmp_path / "dense")
    run = ConvertRun(preflight(tmp_path / "dense"), tmp_path / "out", options, QUIET)
    run.open()
    run.calibrate()
    path = run.work.heads_file
    heads = json.loads(path.read_text())
    heads["retrieval_heads"] = [[], [2], [0, 5]]
    path.write_text(json.dumps(heads))
    convert(tmp_path / "dense", tmp_path / "out", options, QUIET)
    sparse = preflight(tmp_path / "out").config.sparse
    assert sparse is not None
    assert sparse.retrieval_heads == ((), (2,), (0, 5))


@pytest.mark.usefixtures("no_pictures")
def test_heads_of_another_conversion_can_be_given(tmp_path: Path, options: ConvertOptions) -> None:
    model, out, file = (tmp_path / name for name in ("dense", "out", "heads.json"))
    make_checkpoint("qwen3", model)
    heads: list[list[int]] = [[2], [], [0]]
    file.write_text(json.dumps({"retrieval_heads": heads}))
    given = replace(options, heads=file, fit=replace(QUICK, steps=0))
    convert(model, out, given, QUIET)
    sparse = preflight(out).config.sparse
    assert sparse is not None
    assert sparse.retrieval_heads == ((2,), (), (0,))
    told = json.loads((out / "report" / "report.json").read_text())
    assert str(file) in json.dumps(told), "the report says where they come from"
    file.write_text(json.dumps({"retrieval_heads": heads[:2]}))
    with pytest.MonkeyPatch.context() as patch:  # the file is looked at before any score is taken
        patch.setattr("conversion.calibrate_step.needle_scores", None)
        assert "must list 3 layers" in refusal(model, tmp_path / "other", given)
    with pytest.raises(ConversionError, match="causal_check chooses heads"):
        replace(given, causal_check=True)


@pytest.mark.usefixtures("no_pictures")
def test_an_index_without_biases_is_made_as_before(tmp_path: Path, options: ConvertOptions) -> None:
    make_checkpoint("qwen3", tmp_path / "dense")
    convert(tmp_path / "dense", tmp_path / "out", replace(options, index_age_bias=False), QUIET)
    checkpoint = preflight(tmp_path / "out")
    assert checkpoint.config.sparse is not None
    assert not checkpoint.config.sparse.index_age_bias
    stored = load_file(tmp_path / "out" / "indexer.safetensors")
    assert {name.rsplit("indexer.")[1] for name in stored} == {"q_proj.weight", "k_proj.weight"}
    assert "no bias for ages" in (tmp_path / "out" / "report" / "report.html").read_text()
