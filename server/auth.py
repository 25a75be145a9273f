"""API keys: deny by default, every key compared, in constant time."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable, Collection

from starlette.types import Scope

from server.errors import ApiError
from server.info_api import LIVE, READY

OPEN_PATHS = frozenset([LIVE, READY])  # everything else needs a key once there is one


class KeyRing:
    """The keys of a server; without any, everybody may do everything (loopback only)."""

    def __init__(
        self, keys: Callable[[], tuple[str, ...]], open_paths: Collection[str] = OPEN_PATHS
    ) -> None:
        """`keys` is asked for those that are valid now, at every request."""
        self._keys = keys
        self._open_paths = open_paths
        self._known: tuple[str, ...] = ()
        self._digests: list[bytes] = []

    def check(self, scope: Scope) -> None:
        """Refuse a request without a valid bearer key.

        Raises:
            ApiError: 401, the same whatever is wrong.
        """
        keys = self._keys()
        if keys is not self._known:
            self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]
            self._known = keys
        if not keys or scope["path"] in self._open_paths:
            return
        if not self._is_valid(_bearer(scope)):
            raise ApiError(
                401,
                "a valid API key is needed as bearer token",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    def _is_valid(self, key: bytes) -> bool:
        """Digests of equal length are compared with all keys, without an early exit."""
        digest = hashlib.sha256(key).digest()
        matches = [secrets.compare_digest(digest, known) for known in self._digests]
        return any(matches)


def _bearer(scope: Scope) -> bytes:
    for name, value in scope["headers"]:
        if name == b"authorization":
            scheme, _, key = value.partition(b" ")
            if scheme.lower() == b"bearer":
                token: bytes = key.strip()
                return token
    return b""
