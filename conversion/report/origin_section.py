"""Where the numbers come from: versions, digests, options."""

from __future__ import annotations

import json
from collections.abc import Mapping

from conversion.report.contents import Contents
from conversion.report.section import Block, Missing, Paragraph, Section, Table

OF_REPORT = "rtpurbo report OUT"


def origin_section(contents: Contents) -> Section:
    """Always there."""
    model, converted = contents.model, contents.converted_with
    facts = [
        ("model", model.name),
        ("SHA-256 of config.json and samples of the weights", model.sha256),
        ("converted from", model.source or "not known"),
        ("SHA-256 of the same of the source", model.source_sha256 or "not known"),
        ("converted with", "not known" if converted is None else _listed(converted)),
        ("report made with", _listed(contents.versions)),
        ("weights on disk", f"{model.weight_bytes:,} bytes"),
    ]
    blocks: list[Block] = [
        Paragraph("Every number behind the pictures and tables is in report.json."),
        Table(("", ""), facts, "Origin", words=2),
    ]
    if contents.options is None:
        missing = "The options are not known: the state of the conversion (OUT.work) is not there."
        blocks.append(Missing(missing, OF_REPORT))
    else:
        rows = [(name, json.dumps(value)) for name, value in contents.options.items()]
        blocks.append(Table(("option", "value"), rows, "Options of the conversion", words=2))
    if contents.distil is not None and contents.distil.options is not None:
        rows = [(name, json.dumps(value)) for name, value in contents.distil.options.items()]
        blocks.append(Table(("option", "value"), rows, "Options of distillation", words=2))
    return Section("origin", "Origin", blocks)


def _listed(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())
