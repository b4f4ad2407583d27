"""A worker of the reward pool: `python -m megatron_jackpot.rewards.worker REWARD SOCKET_FD PARENT_PID
LIMITS`.

REWARD is a reward's name, or the parts of several as a JSON object (parts.py). LIMITS is a JSON object of
memory_bytes, cpu_s (of one item) and network, and has the settings of the reward `code` under that name.

It answers one request at a time in its main thread. Messages are a 4-byte length and a body: requests are
pickled (kind, response_text, label, seen) with kind "score", or "check" and a list of labels; `seen` is what
else the reward asks for, by keyword: SEEN. Replies are JSON.
"""

import ctypes
import importlib
import inspect
import json
import os
import pickle
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

from megatron_jackpot.algorithm.registry import load
from megatron_jackpot.rewards.confine import confine, cpu_left, limit_cpu
from megatron_jackpot.rewards.parts import Several, read
from megatron_jackpot.rewards.returned import numbers_of, of_reward

REWARDS = {
    name: f"megatron_jackpot.rewards.{name}" for name in ("exact", "reasoning_gym", "math_verify", "code")
}

SEEN = ("prompt", "num_tokens", "finish_reason")
"""What a reward is given by keyword where it has a parameter of that name: the prompt's text as the model saw
it, tokens of the response, and why it ended ("stop", "length")."""

Score = Callable[..., Any]
"""(response_text, label, and those of SEEN that it asks for) -> float, or "score" and others by name; or of
several that for each."""
Check = Callable[[Any], None]


def find_reward(name: str, code: Mapping[str, object]) -> tuple[Score, Check | None]:
    """(score, check) of a built-in reward, or of the user's own: `package.module:name` of a function, or of a
    class, of which one instance is made. A last dot may stand for the colon. `asked_for` says what else it is
    given; `code` has the settings of the reward of that name.

    Raises ValueError for neither.
    """
    if name in REWARDS:
        module = importlib.import_module(REWARDS[name])
        if hasattr(module, "CodeReward"):
            reward = module.CodeReward(**code)
            return reward.score, reward.check
        if hasattr(module, "warm_up"):
            module.warm_up()
        return module.score, module.check
    path = name if ":" in name else ":".join(name.rsplit(".", 1))
    if ":" not in path:
        raise ValueError(
            f"data.reward = '{name}' is unknown. Use {', '.join(REWARDS)} or package.module:name."
        )
    found = load(path, "data.reward")
    score = found() if isinstance(found, type) else found
    try:
        if not callable(score):
            raise TypeError(f"{score!r} is not a callable object")
        inspect.signature(score).bind("response", None, **dict.fromkeys(asked_for(score), ""))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"data.reward = '{name}': must be called with (response_text, label), and by keyword with "
            f"{', '.join(SEEN)} where it has them: {error}. Write it so."
        ) from error
    return cast(Score, score), None


def find_judge(name: str, code: Mapping[str, object]) -> tuple[Score, Check | None, list[str]]:
    """(score, check, what it asks for) of one reward or of several. Raises ValueError as `find_reward`."""
    parts = read(name)
    if parts is not None:
        several = Several(parts, partial(find_reward, code=code), asked_for)
        return several, several.check, several.asks
    score, check = find_reward(name, code)
    return score, check, asked_for(score)


def asked_for(score: Callable[..., object]) -> list[str]:
    """Which of SEEN a reward has as a parameter, after the first two."""
    return [name for name in list(inspect.signature(score).parameters)[2:] if name in SEEN]


def answer(
    score: Score, check: Check | None, request: tuple[str, str, Any, dict[str, object]]
) -> dict[str, Any]:
    """{"parts": name -> float, "measured": name -> float}, the name of a single reward being empty,
    {"faults": text or None of each label} or {"error": text}; {"failed": "timed_out" or "crashed", "why":
    text} where the item met a limit.
    """
    kind, response_text, label, seen = request
    try:
        if kind == "check":
            return {"faults": [check and _fault(check, one) for one in label]}
        reward = score(response_text, label, **seen)
    except (MemoryError, RecursionError) as error:
        return {"failed": "crashed", "why": f"{type(error).__name__} {error}".strip()}
    except TimeoutError as error:
        return {"failed": "timed_out", "why": str(error) or "TimeoutError"}
    except Exception:
        return {"error": "raised an exception:\n" + traceback.format_exc()[-4000:]}
    returned = reward if isinstance(score, Several) else {"": reward}
    found: dict[str, dict[str, float]] = {"parts": {}, "measured": {}}
    for name, value in returned.items():
        try:
            found["parts"][name], measured = numbers_of(value)
        except ValueError as error:
            which = f"{name}: " if name else ""
            told = f"returned {repr(value)[:200]} for label {repr(label)[:200]}, {error}."
            return {"error": f"{which}{told}"}
        found["measured"] |= of_reward(name, measured)
    return found


def _fault(check: Check, label: Any) -> str | None:
    try:
        check(label)
    except ValueError as error:
        return str(error)
    except (MemoryError, RecursionError, TimeoutError):
        raise
    except Exception:
        return "its check raised an exception:\n" + traceback.format_exc()[-4000:]
    return None


def frame(body: bytes) -> bytes:
    return len(body).to_bytes(4, "big") + body


def main(name: str, fd: int, parent: int, limits: dict[str, Any]) -> None:
    _end_with(parent)
    connection = socket.socket(fileno=fd)
    connection.set_inheritable(False)
    stream = connection.makefile("rb")
    try:
        score, check, asks = find_judge(name, limits["code"])
        exposed = confine(limits["memory_bytes"], limits["network"])
        ready: dict[str, Any] = {"ready": True, "exposed": exposed, "asks": asks}
    except ValueError as error:
        ready = {"error": str(error)}
    except Exception:
        ready = {"error": f"data.reward = '{name}' cannot be imported:\n" + traceback.format_exc()[-4000:]}
    connection.sendall(frame(json.dumps(ready).encode()))
    while "ready" in ready and (header := stream.read(4)):
        request = pickle.loads(stream.read(int.from_bytes(header, "big")))
        limit_cpu(limits["cpu_s"])
        reply = answer(score, check, request)
        if cpu_left() <= limits["cpu_s"] + 1:
            # The user's own limit is near: the next item gets a new process rather than an early end.
            reply["last"] = True
        connection.sendall(frame(json.dumps(reply).encode()))


def _end_with(parent: int) -> None:
    """Have the kernel end this process with its parent, and first of all when memory runs out."""
    if not sys.platform.startswith("linux"):
        return
    set_death_signal = 1
    ctypes.CDLL(None).prctl(set_death_signal, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(1)  # The trainer is gone already, and whoever ended it reads the terminal.
    Path("/proc/self/oom_score_adj").write_text("1000", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), json.loads(sys.argv[4]))
