"""Which live requests a new engine process gets, in which order, and which one is to blame.

The engine notes before each step whose tokens it computes, so when it is lost the blame falls on
the requests of that step. If it was lost between two steps, the blame falls on all that it had and
that got no further.

What "consecutive" means: a request counts the crashes that it was blamed for in a row *without
getting further in between*, that is without a new token, and without a prompt token computed beyond
those ever computed. So a stream that goes on for a thousand tokens beside a poison that clients
send again and again always starts anew, while the poison itself, which ends the engine at the same
place each time, counts up. One that counts two is a suspect; most suspects are innocent neighbours.

No suspect, the usual case: a new engine gets everything at once, in order of arrival. Otherwise:

1. those that got further in the life before, all at once; when each has got further again
2. the suspects one by one, the least blamed first, the next when the one before has got further
3. the rest, and what arrived meanwhile, all at once

What has got further stays in the engine and runs on. So if the engine is lost during 2, one request
in the step has not got further, and it is blamed alone: after `max_resumes` resumes in vain it is
guilty. Two crashes from outside at unlucky moments only make suspects, and a suspect loses time.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

_SUSPECT = 2  # crashes in a row


@dataclass(slots=True)
class _Standing:
    """One live request."""

    crashes: int = 0  # that it was blamed for, without getting further in between
    sent: bool = False  # to the engine that runs now
    further: bool = False  # it got further in the engine that runs now, or in the one before it

    @property
    def is_suspect(self) -> bool:
        return self.crashes >= _SUSPECT

    @property
    def is_unproven(self) -> bool:
        return self.sent and not self.further


class ReplayOrder:
    """The rules above as a pure state machine over request ids. Methods return ids to send now."""

    def __init__(self, max_resumes: int) -> None:
        """`max_resumes`: engines that a request may be given to, one after another, in vain."""
        self._max_resumes = max_resumes
        self._live: dict[int, _Standing] = {}  # in order of arrival
        self._held: list[int] = []  # not sent yet, in the order in which they will be

    @property
    def most_crashes(self) -> int:
        """Of all live requests: crashes in a row that one of them is blamed for."""
        return max((standing.crashes for standing in self._live.values()), default=0)

    def enter(self, request_id: int) -> list[int]:
        """A new request. It waits while suspects are tried, so that it is not mistaken for one."""
        self._live[request_id] = _Standing()
        self._held.append(request_id)
        return self._next()

    def got_further(self, request_id: int) -> list[int]:
        """The engine that runs now brought news of a request."""
        standing = self._live.get(request_id)
        if standing is None or standing.further:
            return []
        standing.further = True
        return self._next()

    def leave(self, request_id: int) -> list[int]:
        """A request ended or was aborted."""
        standing = self._live.pop(request_id)
        if not standing.sent:
            self._held.remove(request_id)
        return self._next()

    def crash(self, in_step: Collection[int] | None) -> tuple[int, int] | None:
        """The engine is lost.

        Args:
            in_step: requests of the step that it was computing; None between two steps.

        Returns:
            The one that is guilty, if one is, and how many crashes it is blamed for. It stays live.
        """
        blamed: list[int] = []
        for request_id, standing in self._live.items():
            if not standing.sent:
                continue
            if standing.further:
                standing.crashes = 0
            if request_id in in_step if in_step is not None else standing.is_unproven:
                standing.crashes += 1
                if standing.is_unproven:
                    blamed.append(request_id)
        if len(blamed) == 1 and self._live[blamed[0]].crashes > self._max_resumes:
            return blamed[0], self._live[blamed[0]].crashes
        return None

    def restart(self) -> list[int]:
        """Another engine takes work."""
        live = self._live
        suspects = [i for i in live if live[i].is_suspect]
        proven = [i for i in live if live[i].further and i not in suspects]
        rest = [i for i in live if not live[i].further and i not in suspects]
        for standing in live.values():
            standing.sent = standing.further = False
        if not suspects:
            self._held = list(live)
            return self._next()
        suspects.sort(key=lambda i: live[i].crashes)
        self._held = suspects + rest
        return [self._sent(i) for i in proven] or self._next()

    def _next(self) -> list[int]:
        """What may be sent now: all of it, or the next suspect if nothing unproven runs."""
        if not any(self._live[i].is_suspect for i in self._held):
            if self._trial():
                return []
            now, self._held = self._held, []
            return [self._sent(i) for i in now]
        if any(standing.is_unproven for standing in self._live.values()):
            return []
        return [self._sent(self._held.pop(0))]

    def _trial(self) -> bool:
        """Whether a suspect runs that has not got further."""
        return any(s.is_unproven and s.is_suspect for s in self._live.values())

    def _sent(self, request_id: int) -> int:
        self._live[request_id].sent = True
        return request_id
