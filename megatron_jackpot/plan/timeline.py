"""When servers and trainer of a run work and wait: a simulation by events, from rates that somebody measured.

What it knows of a run is rollout/pipeline.py's order: step t's requests begin when step t - ahead does; the
trainer takes step t when all of them have ended, learns, and pushes; servers stand still during a push. And
servers/client.py's: a request is a group, goes to one server, and holds its slot until its last response has
ended.
"""

import heapq
import math
import random
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field


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
    group: int = 1
    """Responses of a request: the samples of a prompt."""

    def lengths(self, step: int) -> list[float]:
        """Of the step's responses: exp of a normal with this mean and spread."""
        rng, middle = random.Random(f"timeline/{step}"), math.log(self.mean_tokens) - self.spread**2 / 2
        return [min(self.longest, rng.lognormvariate(middle, self.spread)) for _ in range(self.sequences)]

    def groups(self, step: int) -> list[list[float]]:
        """Lengths of the responses of each of the step's requests."""
        lengths = self.lengths(step)
        return [lengths[first : first + self.group] for first in range(0, len(lengths), self.group)]


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
class _Group:
    step: int
    lengths: list[float]
    left: int = field(init=False)
    """Of its responses, those that have not ended."""

    def __post_init__(self) -> None:
        self.left = len(self.lengths)


@dataclass
class _Response:
    group: _Group
    tokens: float
    mark: float = 0.0
    """The server's count when the age was last summed."""
    age: float = 0.0
    """Sum over its tokens."""
    oldest: int = 0

    @property
    def step(self) -> int:
        return self.group.step


class _Server:
    """Shares its rate evenly: `said` counts what every running response got since the beginning."""

    def __init__(self, rates: Rates, slots: int) -> None:
        self.rates, self.slots = rates, slots
        self.now = self.said = self.idle_s = 0.0
        self.version = 0
        self.running: list[tuple[float, int, _Response]] = []
        self.begun = 0
        """Groups that hold a slot."""
        self.waiting: deque[_Group] = deque()
        self.left: Counter[int] = Counter()
        """Groups of each step that have not ended."""
        self.ended: list[_Response] = []
        self.number = 0

    @property
    def load(self) -> int:
        return self.begun + len(self.waiting)

    def ask(self, group: _Group) -> None:
        self.left[group.step] += 1
        self.waiting.append(group)
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
        """Go on until the step's last group here has ended; when that is, or was."""
        while self.left[step]:
            self._end_one()
        return self.now

    def push(self, seconds: float) -> None:
        """Newer weights, and nothing said meanwhile."""
        for _, _, response in self.running:
            self._age(response)
        self.version += 1
        if not self.running:
            self.idle_s += seconds
        self.now += seconds

    def _next_end(self) -> float:
        return self.now + (self.running[0][0] - self.said) / self.rates.each(len(self.running))

    def _end_one(self) -> None:
        self.now, self.said = self._next_end(), self.running[0][0]
        response = heapq.heappop(self.running)[2]
        self._age(response)
        self.ended.append(response)
        response.group.left -= 1
        if not response.group.left:
            self.left[response.step] -= 1
            self.begun -= 1
            self._admit()

    def _admit(self) -> None:
        while self.waiting and self.begun < self.slots:
            self.begun += 1
            group = self.waiting.popleft()
            for tokens in group.lengths:
                response = _Response(group, tokens, mark=self.said, oldest=group.step - 1 - self.version)
                self.number += 1
                heapq.heappush(self.running, (self.said + tokens, self.number, response))

    def _age(self, response: _Response) -> None:
        response.age += (self.said - response.mark) * (response.step - 1 - self.version)
        response.mark = self.said


def slots_of(leaders: int, concurrency: int, servers: int) -> int:
    """Groups that a server runs at once: of each leader's `concurrency`, which all servers share."""
    return max(1, leaders * concurrency // servers)


def simulate(work: Work, rates: Rates, *, servers: int, slots: int, ahead: int, steps: int = 8) -> Timeline:
    """`steps` of a run after the 3 (ahead + 1) in which it settles; `slots` groups run on a server at once.

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
            _ask(pool, [_Group(started, lengths) for lengths in work.groups(started)])
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


def _ask(pool: Sequence[_Server], groups: Sequence[_Group]) -> None:
    """Each of the server that has the fewest."""
    loads = [(server.load, index) for index, server in enumerate(pool)]
    heapq.heapify(loads)
    for group in groups:
        load, index = loads[0]
        pool[index].ask(group)
        heapq.heapreplace(loads, (load + 1, index))
