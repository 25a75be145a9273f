"""One log line for every HTTP request that ended: ids, sizes and times, no prompt, no output."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Collection
from typing import Any

from server.request_record import RequestRecord

logger = logging.getLogger(__name__)


class RequestLog:
    """Writes the lines of one server."""

    def __init__(self, model_name: str, quiet: Collection[str]) -> None:
        """`quiet`: templates of routes that are asked all the time; a line only when the status is
        another than the last time."""
        self._model = model_name
        self._quiet = dict.fromkeys(quiet, 200)  # the newest status

    def write(self, record: RequestRecord) -> None:
        if record.route in self._quiet:
            before, self._quiet[record.route] = self._quiet[record.route], record.status
            if record.status == before:
                return
        level = logging.WARNING if record.status >= 500 else logging.INFO
        logger.log(
            level,
            "%s %s %d",
            record.method,
            record.route,
            record.status,
            extra={"fields": self.fields(record)},
        )

    def fields(self, record: RequestRecord) -> dict[str, Any]:
        """Everything but the fixed fields of a line; absent where a request has no such thing."""
        fields = {
            "request_id": record.request_id,
            "client_request_id": record.label,
            "trace_id": record.trace_id,
            "method": record.method,
            "route": record.route,
            "status": record.status,
            "error_code": record.error_code,
            "total_seconds": time.monotonic() - record.arrived,
        }
        if record.wanted is not None:
            fields |= {
                "model": self._model,
                "completion_id": record.wanted.completion_id,
                "stream": record.wanted.stream,
                **_generation(record),
            }
        return {name: value for name, value in fields.items() if value is not None}


def _generation(record: RequestRecord) -> dict[str, Any]:
    """Sums over the choices, and the same timings and token budget that the client was told."""
    choices = record.choices
    return {
        "choices": len(choices),
        "resumes": max((choice.resumes for choice in choices), default=0),
        "finish_reasons": dict(Counter(choice.reason for choice in choices)),
        **record.usage,
        **record.timings,
    }
