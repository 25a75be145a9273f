"""What is exported loads again as it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from conversion.export import export_model
from engine.errors import CheckpointError
from engine.model.checkpoint import preflight
from engine.model.weights import load_decoder
from tests.engine.tiny_checkpoint import TinyModel, write_checkpoint


@pytest.mark.parametrize("scope", ["query_head", "kv_head"])
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "bias-by-age"])
def test_a_converted_model_survives_a_round_trip(biased: bool, scope: str, tmp_path: Path) -> None:
    model = TinyModel(index_age_bias=biased, index_scope=scope)  # type: ignore[arg-type]
    source = preflight(write_checkpoint(tmp_path / "source", model))
    assert source.config.sparse is not None
    indexers = load_decoder(source, "cpu", torch.float32).indexers
    export_model(source, tmp_path / "out", source.config.sparse, indexers, {})
    again = preflight(tmp_path / "out")
    assert again.config == source.config
    for old, new in zip(indexers, load_decoder(again, "cpu", torch.float32).indexers, strict=True):
        assert (old is None) == (new is None)
        if old is None or new is None:
            continue
        assert torch.equal(old.q_proj_HID, new.q_proj_HID)
        assert torch.equal(old.k_proj_HID, new.k_proj_HID)
        assert (new.age_bias_HA is not None) == biased
        if old.age_bias_HA is not None and new.age_bias_HA is not None:
            assert torch.equal(old.age_bias_HA, new.age_bias_HA)


def test_a_bias_that_the_section_does_not_name_leaves_no_folder(tmp_path: Path) -> None:
    biased = preflight(write_checkpoint(tmp_path / "biased", TinyModel(index_age_bias=True)))
    plain = preflight(write_checkpoint(tmp_path / "plain", TinyModel()))
    assert plain.config.sparse is not None
    indexers = load_decoder(biased, "cpu", torch.float32).indexers
    with pytest.raises(CheckpointError, match="age_bias"):
        export_model(plain, tmp_path / "out", plain.config.sparse, indexers, {})
    assert not (tmp_path / "out").exists()
