"""What must hold for a run, whatever happened in it.

For every choice: exactly one end; every token is the oracle's, in order, once, so what was received
is a beginning of the right answer and all of it where the choice finished; log-probabilities stand
beside their tokens; the prompt's come once. And nothing is lost: a good request whose client stayed
finishes, unless the scenario says why not.
"""

from __future__ import annotations

from collections.abc import Iterator

from engine.messages import RequestUpdate
from engine.request import SamplingParams
from tests.simulation.child import make_pools
from tests.simulation.history import ChoiceStory, History
from tests.simulation.scenario import ClientPlan, Scenario
from tests.simulation.toy_model import Expected, toy_answer

MAX_MODEL_LEN = 128  # tokens, of the toy


def check_stories(scenario: Scenario, history: History) -> Iterator[str]:
    """One line for everything that is wrong."""
    for story in history.stories:
        plan = scenario.clients[story.client]
        params = plan.choices[story.index]
        expected = toy_answer(plan.prompt, params, MAX_MODEL_LEN)
        problems = [
            *_check_end(scenario, history, plan, params, story),
            *_check_tokens(params, expected, story),
            *_check_prompt(plan, params, story),
        ]
        yield from (f"client {story.client}.{story.index}: {problem}" for problem in problems)


def _check_end(
    scenario: Scenario,
    history: History,
    plan: ClientPlan,
    params: SamplingParams,
    story: ChoiceStory,
) -> Iterator[str]:
    """Whether the request ended once, and as it may."""
    if len(story.ends) != 1:
        yield f"has {len(story.ends)} ends: {story.ends}"
        return
    end, message = story.ends[0]
    fits = _fits(scenario, plan, params)
    if end == "finished" and (plan.poison is not None or not fits):
        yield "finished, but could not"
    if end == "left" and plan.leaves_after is None and plan.leaves_at is None:
        yield "was left by a client that stays"
    if end == "deadline" and plan.deadline is None:
        yield "passed a deadline that it does not have"
    if end == "error" and plan.poison is None and fits:
        lost = sum(time >= story.began for time in history.launch_times)
        if lost < scenario.policy.max_resumes:  # the last one was not started yet
            yield f"failed alone, but is good, after {lost} restarts"
    if end == "failed" and plan.poison is None and not _may_fail(scenario, history, message):
        yield f"was lost: {message}"
    if end == "refused" and "Unavailable" not in message and "QueueFull" not in message:
        yield f"was refused: {message}"


def _fits(scenario: Scenario, plan: ClientPlan, params: SamplingParams) -> bool:
    """Whether the request could be computed alone."""
    pools = make_pools(scenario)
    full, window = pools.needed(len(plan.prompt) + params.max_tokens)
    return full <= scenario.full_pages and window <= scenario.window_pages


def _may_fail(scenario: Scenario, history: History, message: str) -> bool:
    """Whether a good request may be cut off: the service itself ended."""
    if "dead" in message:
        return history.launches > scenario.policy.max_restarts
    return "stopped" in message and scenario.drain is not None and scenario.drain[1] < 10


def _check_tokens(params: SamplingParams, expected: Expected, story: ChoiceStory) -> Iterator[str]:
    tokens = story.tokens
    if tokens != expected.tokens[: len(tokens)]:
        yield f"has tokens {tokens}, not {expected.tokens}"
    logprobs = [entry for update in story.updates for entry in update.logprobs]
    if params.logprobs is None:
        if logprobs:
            yield "has log-probabilities that nobody asked for"
    elif [(entry.token_id, entry.logprob) for entry in logprobs] != list(
        zip(tokens, expected.logprobs, strict=False)
    ):
        yield f"has log-probabilities {logprobs} beside {tokens}"
    if story.ends and story.ends[0][0] == "finished":
        last = story.updates[-1]
        if len(tokens) != len(expected.tokens):
            yield f"finished after {len(tokens)} of {len(expected.tokens)} tokens"
        if last.finish_reason != expected.finish_reason:
            yield f"finished by {last.finish_reason}, not {expected.finish_reason}"
        if last.stop_token != (tokens[-1] if expected.finish_reason == "stop" else None):
            yield f"names stop token {last.stop_token}"


def _check_prompt(plan: ClientPlan, params: SamplingParams, story: ChoiceStory) -> Iterator[str]:
    """Echoed log-probabilities, progress and accounts."""
    entries = [entry for update in story.updates for entry in update.prompt_logprobs]
    want = [None, *((t, -float(i)) for i, t in enumerate(plan.prompt[1:], 1))]
    got = [None if entry is None else (entry.token_id, entry.logprob) for entry in entries]
    finished = bool(story.ends) and story.ends[0][0] == "finished"
    if params.prompt_logprobs is None:
        want = []
    if got != want[: len(got)] or (finished and len(got) != len(want)):
        yield f"has log-probabilities {got} of its prompt"
    furthest = 0  # a prompt that is computed again is told of from its start
    for update in story.updates:
        furthest = max(furthest, update.prefilled)
        if not 0 <= update.cached <= furthest <= len(plan.prompt):
            yield f"reports {update.cached} cached of {furthest} computed tokens"
    if finished:
        yield from _check_accounts(plan, story.updates)


def _check_accounts(plan: ClientPlan, updates: list[RequestUpdate]) -> Iterator[str]:
    last = updates[-1]
    if max(update.prefilled for update in updates) != len(plan.prompt):
        yield "finished with a prompt that was not computed"
    timing = last.timing
    if timing is None or timing.queue is None or timing.prefill is None:
        yield "finished without its times"
    elif min(timing.queue, timing.prefill, timing.decode or 0.0) < 0:
        yield f"took {timing}"
