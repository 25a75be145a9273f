"""JSON files of a model folder, read strictly: typed access whose every failure names file and key.

Torch-free; nothing of the folder is imported or executed.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import CheckpointError

LFS_MARK = "version https://git-lfs"
LARGEST_INTEGER = 2**31 - 1  # of any size or id in a configuration


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; NaN and infinities are refused, as JSON has none.

    Raises:
        CheckpointError: one line that names the file.
    """
    try:
        text = path.read_text(encoding="utf-8")
        if text.startswith(LFS_MARK):
            raise CheckpointError(f"{path}: a Git-LFS pointer, not the file; run git lfs pull")
        value = json.loads(text, parse_constant=_refuse_constant)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({type(error).__name__})") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    return value


def shown(value: object) -> str:
    """A value from outside as it may stand in a one-line message."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


@dataclass(frozen=True, slots=True)
class JsonObject:
    """Typed access to the keys of one object. A null counts as a missing key.

    `prefix` is what stands before a key in messages: "" for the file's own keys, "rtpurbo." for
    those of a section.
    """

    path: Path
    values: dict[str, Any]
    prefix: str = ""

    def error(self, key: str, message: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {self.prefix}{key} {message}")

    def get(self, key: str) -> Any:
        return self.values.get(key)

    def section(self, key: str) -> JsonObject | None:
        """The object under `key`, or None where there is none."""
        value = self.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.error(key, "must be an object")
        return JsonObject(self.path, value, f"{self.prefix}{key}.")

    def integer(
        self,
        key: str,
        default: int | None = None,
        minimum: int = 1,
        maximum: int = LARGEST_INTEGER,
    ) -> int:
        value = default if self.get(key) is None else self.get(key)
        if value is None:
            raise self.error(key, "is missing")
        if type(value) is not int or not minimum <= value <= maximum:
            raise self.error(key, f"must be a whole number from {minimum} to {maximum}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A positive finite number."""
        value = default if self.get(key) is None else self.get(key)
        if value is None:
            raise self.error(key, "is missing")
        if type(value) not in (int, float) or not 0 < value <= LARGEST_INTEGER:
            raise self.error(key, f"must be a positive number up to {LARGEST_INTEGER}")
        return float(value)

    def optional_number(self, key: str) -> float | None:
        return None if self.get(key) is None else self.number(key)

    def boolean(self, key: str, default: bool) -> bool:
        value = default if self.get(key) is None else self.get(key)
        if type(value) is not bool:
            raise self.error(key, "must be true or false")
        return value

    def integers(self, key: str, minimum: int = 0, maximum: int = LARGEST_INTEGER) -> list[int]:
        """A whole number, a list of them, or nothing."""
        value = self.get(key)
        items = [] if value is None else value if isinstance(value, list) else [value]
        if any(type(item) is not int or not minimum <= item <= maximum for item in items):
            raise self.error(key, f"must be whole numbers from {minimum} to {maximum}")
        return items


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")
