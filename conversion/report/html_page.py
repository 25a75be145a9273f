"""The page: one file that needs nothing else, in light and dark and on paper.

It is written so that it is well-formed XML as well. Names of models, files and tasks come from
outside: the template escapes everything, and a policy in the page forbids all requests.
"""

from __future__ import annotations

import base64
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from conversion.report.plots import DOTS_PER_INCH
from conversion.report.section import Picture, Section

TEMPLATE = "page.html.jinja"
CSS_DOTS_PER_INCH = 96


@dataclass(frozen=True, slots=True)
class InlinePicture:
    """A PNG as the page holds it."""

    uri: str
    width: int  # CSS pixels, at its drawn size
    height: int

    @classmethod
    def of(cls, png: bytes) -> InlinePicture:
        width, height = struct.unpack(">II", png[16:24])  # of the IHDR chunk, always the first
        scale = CSS_DOTS_PER_INCH / DOTS_PER_INCH
        uri = "data:image/png;base64," + base64.b64encode(png).decode("ascii")
        return cls(uri, round(width * scale), round(height * scale))


def render_page(title: str, sections: Sequence[Section], pictures: Mapping[str, bytes]) -> str:
    """The HTML text.

    Args:
        pictures: PNG files by name; a picture that is not there is left out with its caption.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_finalize,
    )
    shown = [
        Section(
            section.id,
            section.title,
            [b for b in section.blocks if not isinstance(b, Picture) or b.file in pictures],
        )
        for section in sections
    ]
    return environment.get_template(TEMPLATE).render(
        title=title,
        sections=shown,
        pictures={name: InlinePicture.of(png) for name, png in pictures.items()},
    )


def printable(text: str) -> str:
    """Without what no page can show or what changes the direction of reading."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def _finalize(value: object) -> object:
    """Every value on its way into the page."""
    return printable(value) if type(value) is str else value
