"""How long ranks wait for servers and for each other, in one place.

Whoever does a thing gives up first, for it knows why; MARGIN_S later those that wait for it; last the
watchdog, whose word is stacks alone.
"""

MARGIN_S = 60.0
"""What a rank is given to tell the others why it gives up."""
END_LIMIT_S = 60.0
"""For requests to end that were told to, or to begin again."""
CALLS = 12
"""Of a push, each with the time limit sync.timeout_s; of buckets, of which there may be more, each is far
below it."""


def behind(limit_s: float) -> float:
    """Of those that wait for whoever gives up after `limit_s`."""
    return limit_s + MARGIN_S


def watched(limit_s: float) -> float:
    """The watchdog's, of a phase in which somebody waits for `limit_s`."""
    return behind(behind(limit_s))


def hold_s(phase_s: float) -> float:
    """For a leader to begin no more requests, and for its responses in flight where they are awaited."""
    return END_LIMIT_S + phase_s


def attempt_s(start_timeout_s: float, timeout_s: float) -> float:
    """Of one attempt to push weights: until a server answers, and the calls. After it none is begun."""
    return start_timeout_s + CALLS * timeout_s


def push_s(start_timeout_s: float, timeout_s: float) -> float:
    """Of all attempts: the last one may begin when the first one's time is over."""
    return 2 * attempt_s(start_timeout_s, timeout_s)


def evaluation_s(phase_s: float, num_sets: int, num_models: int) -> float:
    """Of a leader: the servers' answers to every set, and the verdicts on those of each model."""
    return (1 + num_models) * phase_s * num_sets
