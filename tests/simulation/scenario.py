"""A seed becomes a scenario: the sizes of an engine, what clients want, and what goes wrong."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from typing import Literal

from engine.request import SamplingParams
from engine.supervision import SupervisionPolicy
from tests.simulation.toy_model import POISON

# Where in a turn of the engine's loop its process is lost.
CrashPoint = Literal["receive", "before execute", "after execute", "before send", "after send"]
CRASH_POINTS: tuple[CrashPoint, ...] = (
    *("receive", "before execute", "after execute", "before send", "after send"),
)
LoadFault = Literal["crash", "hang", "refusal"]
FrameFault = Literal["to engine", "from engine"]


@dataclass(frozen=True, slots=True)
class ClientPlan:
    """One call: a prompt with one or several choices, and how the client behaves."""

    arrival: float  # seconds
    prompt: tuple[int, ...]
    choices: tuple[SamplingParams, ...]
    deadline: float | None = None  # seconds after arrival
    leaves_after: int | None = None  # tokens of the first choice; the client then disconnects
    leaves_at: float | None = None  # seconds after it was admitted
    read_pause: float = 0.0  # seconds between two reads; a slow reader
    tries: int = 4  # calls until a refused client gives up
    poison: str | None = None  # a key of toy_model.POISON, None for a good request


@dataclass(frozen=True, slots=True)
class LifePlan:
    """What happens to one engine process."""

    load_seconds: float = 0.5
    load_fault: LoadFault | None = None
    crash: tuple[int, CrashPoint] | None = None  # turn with work, and where in it
    hang: int | None = None  # turn with work whose step never returns
    slow: tuple[int, float] | None = None  # turn with work, seconds that its step takes
    bad_frame: tuple[int, FrameFault] | None = None  # which message of that direction


@dataclass(frozen=True, slots=True)
class Scenario:
    """Everything that a run depends on beside the code."""

    seed: int
    clients: tuple[ClientPlan, ...]
    lives: tuple[LifePlan, ...]  # of the first engine processes; later ones live well
    full_pages: int = 64
    window_pages: int = 64
    max_num_seqs: int = 4
    max_batch_tokens: int = 16
    max_step_seconds: float | None = None
    memory: int | None = None  # tokens; a step of more finds no memory
    prefix_caching: bool = True
    cache_generated: bool = False
    max_queued_requests: int = 64
    max_queued_prefill_tokens: int = 1000
    step_seconds: float = 0.004
    token_seconds: float = 0.0005
    latency: float = 0.0005  # of a message, either way
    drain: tuple[float, float] | None = None  # when, and for how many seconds
    interrupted_load: float | None = None  # seconds after which the first start is given up
    policy: SupervisionPolicy = field(default_factory=SupervisionPolicy)
    look_ahead: bool = True  # steps are started before the one before is read


def draw_scenario(seed: int) -> Scenario:
    """The scenario of a seed. What is drawn first stays the same when later draws are added."""
    rng = random.Random(seed)
    stems = [[rng.randrange(89) for _ in range(16)] for _ in range(2)]
    tiny = rng.random() < 0.6
    clients = tuple(_client(rng, stems) for _ in range(rng.randint(2, 9)))
    budget = 100 if rng.random() < 0.95 else rng.randint(0, 2)
    lives = [_life(rng) for _ in range(rng.choice((1, 1, 2, 2, 3, 5)))]
    if rng.random() < 0.9:  # a service that does not start at all is soon told
        lives[0] = replace(lives[0], load_fault=None)
    return Scenario(
        seed=seed,
        clients=clients,
        lives=tuple(lives),
        full_pages=rng.randint(4, 16) if tiny else 64,
        window_pages=rng.randint(5, 16) if tiny else 64,
        max_num_seqs=rng.randint(1, 4),
        max_batch_tokens=rng.choice((4, 8, 16, 32)),
        max_step_seconds=rng.choice((None, None, 0.006, 0.03)),
        memory=rng.choice((None, None, None, None, 4, 7)),
        prefix_caching=rng.random() < 0.8,
        cache_generated=rng.random() < 0.2,
        max_queued_requests=rng.choice((1, 2, 4, 64, 64)),
        max_queued_prefill_tokens=rng.choice((20, 100, 1000)),
        step_seconds=rng.choice((0.001, 0.004, 0.02)),
        latency=rng.choice((0.0, 0.0005, 0.03)),
        drain=(rng.uniform(0, 4), rng.choice((0.0, 0.05, 600.0))) if rng.random() < 0.15 else None,
        interrupted_load=rng.choice((0.0, 0.4, 2.0)) if rng.random() < 0.02 else None,
        policy=SupervisionPolicy(
            load_seconds=20.0,
            silence_seconds=5.0,
            stop_seconds=1.0,
            max_restarts=budget,
            restart_window=3600.0,
            first_backoff=0.1,
            max_backoff=1.0,
            max_resumes=3,
            poison_seconds=30.0,
        ),
        look_ahead=rng.random() < 0.75,
    )


def _client(rng: random.Random, stems: list[list[int]]) -> ClientPlan:
    own = [rng.randrange(89) for _ in range(rng.choice((1, 2, 3, 6, 12, 24)))]
    prompt = rng.choice(stems)[: rng.choice((0, 4, 8, 9, 16))] + own
    poison = rng.choice(sorted(POISON)) if rng.random() < 0.06 else None
    if poison is not None:
        prompt[rng.randrange(len(prompt))] = POISON[poison]
    count = rng.choice((1, 1, 1, 1, 2, 3))
    leaves = rng.random()
    return ClientPlan(
        arrival=rng.choice((0.0, rng.uniform(0, 0.3), rng.uniform(0, 2.0))),
        prompt=tuple(prompt),
        choices=tuple(_params(rng, echo=rng.random() < 0.15) for _ in range(count)),
        deadline=rng.choice((0.02, 0.2, 1.5)) if rng.random() < 0.08 else None,
        leaves_after=rng.randint(0, 12) if leaves < 0.12 else None,
        leaves_at=rng.choice((0.0, 0.005, 0.1, 0.7)) if 0.12 < leaves < 0.22 else None,
        read_pause=rng.choice((0.0, 0.0, 0.0, 0.01, 0.3)),
        poison=poison,
    )


def _params(rng: random.Random, *, echo: bool) -> SamplingParams:
    stops = rng.sample(range(89), 12) if rng.random() < 0.3 else []
    return SamplingParams(
        max_tokens=0 if echo and rng.random() < 0.3 else rng.choice((1, 2, 5, 9, 14, 22, 30)),
        min_tokens=rng.choice((0, 0, 3)),
        temperature=rng.choice((0.0, 1.0)),
        seed=rng.randrange(2**40),
        stop_token_ids=tuple(stops),
        ignore_eos=rng.random() < 0.5,
        logprobs=0 if rng.random() < 0.3 else None,
        prompt_logprobs=0 if echo else None,
    )


def _life(rng: random.Random) -> LifePlan:
    """Half of all lives are good; the others end in one of many ways."""
    load = rng.choice((0.01, 0.5, 3.0))
    turn = rng.choice((0, 0, 1, 2, 3, 5, 8, 13, 21, 34))
    fate = rng.random()
    if fate < 0.45:
        return LifePlan(load, crash=(turn, rng.choice(CRASH_POINTS)))
    if fate < 0.55:
        return LifePlan(load, hang=turn)
    if fate < 0.62:
        return LifePlan(load, slow=(turn, rng.choice((0.5, 3.0))))
    if fate < 0.70:
        frame: FrameFault = rng.choice(("to engine", "from engine"))
        return LifePlan(load, bad_frame=(rng.choice((0, 1, 2, 7, 20)), frame))
    if fate < 0.76:
        fault: LoadFault = rng.choice(("crash", "hang", "refusal"))
        return LifePlan(load, load_fault=fault)
    return LifePlan(load)
