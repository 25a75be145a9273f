"""Files of API keys, as the server and its clients read them."""

from __future__ import annotations

from pathlib import Path

from engine.errors import ConfigError


def read_keys(file: Path) -> tuple[str, ...]:
    """Keys of a file, one a line; blank lines are skipped.

    Raises:
        ConfigError: the file cannot be read or holds no key.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ConfigError(f"api_key_file: cannot read {file}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"api_key_file: cannot read {file}: not UTF-8 text") from None
    keys = tuple(line.strip() for line in lines if line.strip())
    if not keys:
        raise ConfigError(f"api_key_file: {file} holds no key")
    return keys
