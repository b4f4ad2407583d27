"""When servers and trainer of a run work and wait: a simulation by events, from rates that somebody measured.

What it knows of a run is rollout/pipeline.py's order: step t's requests begin when step t - ahead does; the
trainer takes step t when all of them have ended, learns, and pushes; servers stand still during a push.
"""

import heapq
import math
import random
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Measured, or assumed."""

    stream_tps: float
    """Tokens a second of a response that is alone on its server."""
    server_tps: float
    """Tokens a second of a full server, all its responses together."""
    learn_s: float
    """Scoring, correction and updates of a step."""
    push_s: float
    """A push, in which servers say nothing."""

    def each(self, running: int) -> float:
        """Tokens a second of each of a server's responses: alone until the server is full, then its share."""
        return min(self.stream_tps, self.server_tps / running)


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a step asks for."""

    sequences: int
    mean_tokens: float
    """Of a response, were none cut."""
    spread: float
    """Standard deviation of the length's logarithm: at 0 all are alike, at 1 a twentieth is above 3 means."""
    longest: float
    """Where responses are cut."""

    def lengths(self, step: int) -> list[float]:
        """Of the step's responses: exp of a normal with this mean and spread."""
        rng, middle = random.Random(f"timeline/{step}"), math.log(self.mean_tokens) - self.spread**2 / 2
        return [min(self.longest, rng.lognormvariate(middle, self.spread)) for _ in range(self.sequences)]


@dataclass(frozen=True)
class Timeline:
    """What came of it, per step, after the first ones."""

    step_s: float
    idle_trainer: float
    """Share of the time in which the trainer waits for rollouts."""
    idle_servers: float
    """Share of the time in which a server has nothing to say, the mean of all."""
    staleness_mean: float
    """Weight versions between a token and its training."""
    staleness_max: int

    @property
    def steps_per_hour(self) -> float:
        return 3600 / self.step_s


@dataclass
class _Request:
    step: int
    tokens: float
    mark: float = 0.0
    """The server's count when the age was last summed."""
    age: float = 0.0
    """Sum over its tokens."""
    oldest: int = 0


class _Server:
    """Shares its rate evenly: `said` counts what every running response got since the beginning."""

    def __init__(self, rates: Rates, slots: int) -> None:
        self.rates, self.slots = rates, slots
        self.now = self.said = self.idle_s = 0.0
        self.version = 0
        self.running: list[tuple[float, int, _Request]] = []
        self.waiting: deque[_Request] = deque()
        self.left: Counter[int] = Counter()
        """Requests of each step that have not ended."""
        self.ended: list[_Request] = []
        self.number = 0

    @property
    def load(self) -> int:
        return len(self.running) + len(self.waiting)

    def ask(self, request: _Request) -> None:
        self.left[request.step] += 1
        self.waiting.append(request)
        self._admit()

    def advance(self, to: float) -> None:
        """Go on until then."""
        while self.running and self._next_end() <= to:
            self._end_one()
        if self.running:
            self.said += (to - self.now) * self.rates.each(len(self.running))
        else:
            self.idle_s += to - self.now
        self.now = to

    def finish(self, step: int) -> float:
        """Go on until the step's last request here has ended; when that is, or was."""
        while self.left[step]:
            self._end_one()
        return self.now

    def push(self, seconds: float) -> None:
        """Newer weights, and nothing said meanwhile."""
        for _, _, request in self.running:
            self._age(request)
        self.version += 1
        if not self.running:
            self.idle_s += seconds
        self.now += seconds

    def _next_end(self) -> float:
        return self.now + (self.running[0][0] - self.said) / self.rates.each(len(self.running))

    def _end_one(self) -> None:
        self.now, self.said = self._next_end(), self.running[0][0]
        request = heapq.heappop(self.running)[2]
        self._age(request)
        self.left[request.step] -= 1
        self.ended.append(request)
        self._admit()

    def _admit(self) -> None:
        while self.waiting and len(self.running) < self.slots:
            request = self.waiting.popleft()
            request.mark, request.oldest = self.said, request.step - 1 - self.version
            self.number += 1
            heapq.heappush(self.running, (self.said + request.tokens, self.number, request))

    def _age(self, request: _Request) -> None:
        request.age += (self.said - request.mark) * (request.step - 1 - self.version)
        request.mark = self.said


def simulate(work: Work, rates: Rates, *, servers: int, slots: int, ahead: int, steps: int = 8) -> Timeline:
    """`steps` of a run after the 3 (ahead + 1) in which it settles; `slots` requests run on a server at once.

    Raises ValueError for no server and no slot.
    """
    if servers < 1 or slots < 1:
        raise ValueError(f"servers = {servers}, slots = {slots}: must be >= 1. Give the servers GPUs.")
    pool = [_Server(rates, slots) for _ in range(servers)]
    now = begun = waited = idle_before = 0.0
    first, started = 3 * (ahead + 1), 0
    for step in range(1, first + steps + 1):
        if step == first + 1:
            begun, waited = now, 0.0
            idle_before = sum(server.idle_s for server in pool)
        while started < step + ahead:
            started += 1
            _ask(pool, [_Request(started, length) for length in work.lengths(started)])
        ready = max(now, *(server.finish(step) if server.left[step] else now for server in pool))
        waited += ready - now
        for server in pool:
            server.advance(ready + rates.learn_s)
            server.push(rates.push_s)
        now = ready + rates.learn_s + rates.push_s
    period = now - begun
    ended = [r for server in pool for r in server.ended if first < r.step <= first + steps]
    return Timeline(
        step_s=period / steps,
        idle_trainer=waited / period,
        idle_servers=(sum(server.idle_s for server in pool) - idle_before) / period / servers,
        staleness_mean=sum(r.age for r in ended) / sum(r.tokens for r in ended),
        staleness_max=max(r.oldest for r in ended),
    )


def _ask(pool: Sequence[_Server], requests: Sequence[_Request]) -> None:
    """Each of the server that has the fewest."""
    loads = [(server.load, index) for index, server in enumerate(pool)]
    heapq.heapify(loads)
    for request in requests:
        load, index = loads[0]
        pool[index].ask(request)
        heapq.heapreplace(loads, (load + 1, index))
