"""Files of API keys, as the server and its clients read them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path

from engine.errors import ConfigError

logger = logging.getLogger(__name__)

LOOK_SECONDS = 1.0  # between two looks at whether a file has changed


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


class KeyFile:
    """The keys of a file, read again when it changes, so that rotation needs no restart.

    One that becomes unusable changes nothing: the keys before it stay valid, and the log says so.
    """

    def __init__(self, file: Path, clock: Callable[[], float] = time.monotonic) -> None:
        """
        Raises:
            ConfigError: the file cannot be read or holds no key.
        """
        self._file = file
        self._clock = clock
        self._looked = clock()
        self._stamp = self._look()
        self._keys = read_keys(file)

    def keys(self) -> tuple[str, ...]:
        """The keys that are valid now; the same object until they change."""
        now = self._clock()
        if now - self._looked >= LOOK_SECONDS:
            self._looked = now
            stamp = self._look()
            if stamp != self._stamp:
                self._stamp = stamp
                self._read_again()
        return self._keys

    def _look(self) -> tuple[int, ...]:
        """What differs when the file was written or replaced, also through a link."""
        try:
            found = self._file.stat()
        except OSError:
            return ()
        return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns

    def _read_again(self) -> None:
        try:
            self._keys = read_keys(self._file)
        except ConfigError as error:
            logger.error("%s; the keys before stay valid", error)
        else:
            logger.info("api_key_file has changed: %d keys are valid", len(self._keys))
