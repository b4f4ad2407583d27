"""The token view's data: what a correction did to the recorded tokens, as columns that the page renders."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from megatron_jackpot.monitor.report.curves import number
from megatron_jackpot.monitor.report.rejections import NewestDecisions, most_rejected
from megatron_jackpot.monitor.token_log import TokenRecord, load

SHOWN_STEPS = 12
"""Records on the page: the first, the last and others evenly between."""
MOST_TOKENS = 60_000
"""Tokens on the page, about 30 bytes each; later rollouts of each record are left out beyond it."""

Decode = Callable[[int], str]
"""Token id -> its text."""


def token_view(files: Sequence[Path], newest: NewestDecisions, decode: Decode) -> dict[str, object]:
    """What the page shows of a run's records, `files` in the order of their steps: tables, and the columns of
    each shown record. `counted` records of all stand in the table of the rejected, `recorded` tokens of them.

    Raises ValueError for a bad record, OSError for one that has gone.
    """
    shown = chosen(files, SHOWN_STEPS)
    texts: dict[int, int] = {}
    columns, omitted = [], 0
    for record in map(load, shown):
        room = MOST_TOKENS // len(shown)
        whole = int(np.searchsorted(np.cumsum(record.length_S), room, side="right"))
        whole = max(1, whole) if len(record.length_S) else 0
        omitted += len(record.length_S) - whole
        columns.append(_columns(record, whole, texts))
    counted = newest.look(files)
    ranked = most_rejected(counted)
    for rejection in ranked:
        texts.setdefault(rejection.token, len(texts))
    return {
        "recorded": sum(len(one.token_R) for one in counted),
        "counted": [len(counted), len(files)],
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


def chosen(files: Sequence[Path], most: int) -> list[Path]:
    """At most `most` of them, the first and the last among them."""
    places = np.linspace(0, len(files) - 1, min(most, len(files))).round().astype(int)
    return [files[place] for place in places]
