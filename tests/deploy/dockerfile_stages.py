"""The Dockerfile as stages of instructions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dockerfile_parse import DockerfileParser
from dockerfile_parse.util import WordSplitter

ROOT = Path(__file__).resolve().parents[2]

Step = dict[str, Any]  # instruction, value and content, as dockerfile-parse names them


def read_stages() -> dict[str, list[Step]]:
    """Instructions of every stage by its name; the first of each is its FROM."""
    found: dict[str, list[Step]] = {}
    steps: list[Step] = []
    for step in DockerfileParser(path=str(ROOT / "docker"), cache_content=True).structure:
        if step["instruction"] == "FROM":
            steps = found.setdefault(step["value"].split(" AS ")[1], [])
        steps.append(step)
    return found


def values(steps: list[Step], instruction: str) -> list[str]:
    """What stands behind every such instruction of a stage."""
    return [step["value"] for step in steps if step["instruction"] == instruction]


def environment(steps: list[Step]) -> dict[str, str]:
    """Variables that a stage sets, unexpanded."""
    found: dict[str, str] = {}
    for value in values(steps, "ENV"):
        found.update(word.split("=", 1) for word in WordSplitter(value).split())
    return found


def command(steps: list[Step]) -> list[str]:
    """What a container of the stage runs."""
    (entrypoint,), (arguments,) = values(steps, "ENTRYPOINT"), values(steps, "CMD")
    return [*json.loads(entrypoint), *json.loads(arguments)]


def health_check(steps: list[Step]) -> list[str]:
    """What is run in it again and again to see whether it is well."""
    (check,) = values(steps, "HEALTHCHECK")
    found: list[str] = json.loads(check.split(" CMD ")[1])
    return found
