"""The requests that an engine has not ended, and what its next report tells of them."""

from __future__ import annotations

from engine.batch import Batch
from engine.messages import Add, EngineInfo, RequestUpdate, Timing
from engine.request import FinishReason, Request
from engine.request_check import read_request
from engine.step import StepResult
from engine.tracker import RequestTracker


class RequestBook:
    """Every request that is entered gets updates, the last of them with the reason of its end, if
    it is not removed before. Times are monotonic seconds. Others read `requests` and `trackers`."""

    def __init__(self, info: EngineInfo) -> None:
        """`info`: the model's bounds on a request."""
        self.requests: dict[int, Request] = {}  # by id, in order of arrival
        self.trackers: dict[int, RequestTracker] = {}  # of the same
        self._info = info
        self._updates: list[RequestUpdate] = []

    def __contains__(self, request_id: int) -> bool:
        return request_id in self.requests

    def enter(self, message: Add) -> Request:
        """The request of a message whose id is not in the book.

        Raises:
            RequestError: it cannot be computed; nothing is entered.
        """
        request = read_request(message, self._info)
        tracker = RequestTracker(
            request, self._info.eos_token_ids, self._info.max_model_len, message.progress
        )
        self.requests[request.request_id] = request
        self.trackers[request.request_id] = tracker
        return request

    def refuse(self, message: Add, now: float) -> None:
        """Tell that a request is not computed; if it was entered, it is gone."""
        self.remove(message.request_id)
        waited = Timing(queue=now - message.arrival)
        self._updates.append(
            RequestUpdate(request_id=message.request_id, finish_reason="error", timing=waited)
        )

    def remove(self, request_id: int) -> None:
        """A request is told nothing more; unknown ids are ignored."""
        self.requests.pop(request_id, None)
        self.trackers.pop(request_id, None)

    @property
    def has_deadlines(self) -> bool:
        return any(request.deadline is not None for request in self.requests.values())

    def overdue(self, now: float) -> list[int]:
        """Ids of the requests whose deadline has passed."""
        return [
            request_id
            for request_id, request in self.requests.items()
            if request.deadline is not None and request.deadline <= now
        ]

    def stamp(self, batch: Batch, now: float) -> None:
        """Requests of a batch leave the queue now; a preempted one keeps its first time."""
        for span in batch.spans:
            request = self.requests[span.request_id]
            if request.first_scheduled is None:
                request.first_scheduled = now

    def advance(
        self, request_id: int, result: StepResult, token: int | None, now: float
    ) -> RequestUpdate:
        """Tell what a step brought for a request that is well.

        Returns:
            The update; where it has a finish reason, this step was the request's last.
        """
        tracker = self.trackers[request_id]
        attended = result.attended.get(request_id)
        if attended is not None:
            tracker.count_attended(attended)
        finish: FinishReason | None = None
        if tracker.wants_no_tokens:
            token = None
            finish = None if tracker.request.is_prefill else "length"
        elif token is not None:
            finish = tracker.finish_of(token)
        update = tracker.update(result, token, finish, now)
        self._updates.append(update)
        return update

    def cut_off(self, request_id: int, reason: FinishReason, now: float) -> None:
        """Tell that a request ends before it is done; whoever says so removes it."""
        self._updates.append(self.trackers[request_id].cut_off(reason, now))

    def take_updates(self) -> list[RequestUpdate]:
        """All that was told since the last call."""
        updates, self._updates = self._updates, []
        return updates
