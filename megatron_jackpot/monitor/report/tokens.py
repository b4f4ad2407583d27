"""The token view's data: what a correction did to the recorded tokens, as columns that the page renders."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from megatron_jackpot.monitor.report.curves import number
from megatron_jackpot.monitor.token_log import TokenRecord

SHOWN_STEPS = 12
"""Records on the page: the first, the last and others evenly between."""
MOST_TOKENS = 60_000
"""Tokens on the page, about 30 bytes each; later rollouts of each record are left out beyond it."""
MOST_REJECTED = 20
"""Tokens in the table of those that are rejected most often."""

Decode = Callable[[int], str]
"""Token id -> its text."""


def token_view(kept: list[TokenRecord], decode: Decode) -> dict[str, object]:
    """What the page shows of a run's records: tables, and the columns of each shown record."""
    shown = chosen(kept, SHOWN_STEPS)
    texts: dict[int, int] = {}
    columns, omitted = [], 0
    for record in shown:
        room = MOST_TOKENS // len(shown)
        whole = int(np.searchsorted(np.cumsum(record.length_S), room, side="right"))
        whole = max(1, whole) if len(record.length_S) else 0
        omitted += len(record.length_S) - whole
        columns.append(_columns(record, whole, texts))
    ranked = most_rejected(kept)
    for rejection in ranked:
        texts.setdefault(rejection.token, len(texts))
    return {
        "recorded": sum(int(record.trained_N.sum()) for record in kept),
        "omitted": omitted,
        "texts": [decode(token) for token in texts],
        "rejected": [[texts[r.token], r.seen, r.rejected, number(r.median_ratio, 3)] for r in ranked],
        "records": columns,
    }


def _columns(record: TokenRecord, rollouts: int, texts: dict[int, int]) -> dict[str, object]:
    """The first `rollouts` of a record; `texts` maps an id to its place among the page's texts, and grows."""
    stops = np.cumsum(record.length_S)
    end = int(stops[rollouts - 1]) if rollouts else 0
    logp = {"policy": record.target_logp_N, "server": record.server_logp_N, "actor": record.actor_logp_N}
    return {
        "step": record.step,
        "rollouts": [
            {
                "id": [int(part) for part in record.rollout_S3[place]],
                "right": bool(record.correct_S[place]),
                "advantage": number(float(record.advantage_S[place]), 3),
                "length": int(record.length_S[place]),
            }
            for place in range(rollouts)
        ],
        "token": [texts.setdefault(int(token), len(texts)) for token in record.token_N[:end]],
        "kind": "".join(kinds(record)[:end]),
        "weight": [number(float(weight), 3) for weight in record.weight_N[:end]],
        "logp": {
            name: [number(float(one), 4) for one in values[:end]]
            for name, values in logp.items()
            if values is not None
        },
    }


def kinds(record: TokenRecord) -> np.ndarray:
    """[N] one letter each: p of the prompt, u not scored, k kept, r rejected."""
    return np.select([~record.response_N, ~record.trained_N, record.keep_N], ["p", "u", "k"], default="r")


def chosen(kept: list[TokenRecord], most: int) -> list[TokenRecord]:
    """At most `most` records, the first and the last among them."""
    places = np.linspace(0, len(kept) - 1, min(most, len(kept))).round().astype(int)
    return [kept[place] for place in places]


@dataclass(frozen=True)
class Rejection:
    token: int
    seen: int
    rejected: int
    median_ratio: float
    """p(policy) / p(server), median of its occurrences."""


def most_rejected(kept: Iterable[TokenRecord], most: int = MOST_REJECTED) -> list[Rejection]:
    """The tokens with the most rejections, in that order; by id where they are equal."""
    ratios: dict[int, list[float]] = defaultdict(list)
    rejected: dict[int, int] = defaultdict(int)
    for record in kept:
        for place in np.flatnonzero(record.trained_N):
            token = int(record.token_N[place])
            ratios[token].append(
                math.exp(min(50.0, record.target_logp_N[place] - record.server_logp_N[place]))
            )
            rejected[token] += not record.keep_N[place]
    order = sorted((token for token in rejected if rejected[token]), key=lambda t: (-rejected[t], t))
    return [
        Rejection(token, len(ratios[token]), rejected[token], float(np.median(ratios[token])))
        for token in order[:most]
    ]
