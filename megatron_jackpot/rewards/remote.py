"""A reward that a service gives: items of several responses in one HTTP request, with a limit of time.

    POST {"items": [{"response": ..., "label": ..., "prompt": ..., "num_tokens": ..., "finish_reason": ...}]}
    200  {"rewards": [0.5, ...]}, for each item in their order a number, or {"score": 0.5, ...}

Standard library only; no redirects and no proxies: responses and labels go to the address that is named.
"""

import asyncio
import json
import time
from collections.abc import Mapping
from http.client import HTTPConnection, HTTPException, HTTPSConnection, IncompleteRead
from typing import Any
from urllib.parse import urlsplit

from megatron_jackpot.rewards.returned import numbers_of, of_reward

LINGER_S = 0.02
"""How long the first item of a request waits for others."""
GRACE_S = 1.0
"""What a request may take beyond its limit: a service that sends a byte now and then is cut off here."""
LARGEST_REPLY = 2**24
"""Bytes."""

Reply = dict[str, Any]
"""{"parts": name -> float, "measured": name -> float}, {"failed": "timed_out" or "crashed", "why": text}, or
{"error": text}: a worker's form."""


def is_remote(reward: str) -> bool:
    return reward.startswith(("http://", "https://"))


def address_mistake(url: str) -> str | None:
    """What is wrong with a service's address."""
    try:
        parts = urlsplit(url)
        fits = bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        fits, parts = False, urlsplit("")
    if fits and not (parts.username or parts.fragment):
        return None
    return "must be http://HOST:PORT/PATH or https://, an IPv6 address in brackets. Write it so."


class RemoteReward:
    """`await reward.score(text, label, seen)`; calls that are made together travel together.

    A reply that does not come in time, a refused connection and a status of 500 or more fail the items of the
    request; another status, or a body of another form, is a mistake of the service.
    """

    def __init__(self, name: str, url: str, timeout_s: float, batch: int) -> None:
        self.name, self.url, self.timeout_s, self.batch = name, url, timeout_s, batch
        self._waiting: list[tuple[dict[str, object], asyncio.Future[Reply]]] = []
        self._sending: set[asyncio.Task[None]] = set()

    async def score(self, response_text: str, label: object, seen: Mapping[str, object]) -> Reply:
        loop = asyncio.get_running_loop()
        if self._waiting and self._waiting[0][1].get_loop() is not loop:
            self._waiting.clear()  # Of an event loop that has ended: no one is behind them any more.
        reply: asyncio.Future[Reply] = loop.create_future()
        self._waiting.append(({"response": response_text, "label": label, **seen}, reply))
        if len(self._waiting) >= self.batch:
            self._send()
        elif len(self._waiting) == 1:
            loop.call_later(LINGER_S, self._send)
        return await reply

    def _send(self) -> None:
        taken, self._waiting = self._waiting, []
        wanted = [(item, reply) for item, reply in taken if not reply.done()]
        if wanted:
            task = asyncio.ensure_future(self._request(wanted))
            self._sending.add(task)
            task.add_done_callback(self._sending.discard)

    async def _request(self, wanted: list[tuple[dict[str, object], asyncio.Future[Reply]]]) -> None:
        try:
            body = json.dumps({"items": [item for item, _ in wanted]}).encode()
            asked = asyncio.to_thread(_post, self.url, body, self.timeout_s)
            found = await asyncio.wait_for(asked, self.timeout_s + GRACE_S)
            replies = self._read(found, len(wanted))
        except TimeoutError:
            why = f"{self.url}: no reply within {self.timeout_s:g} s"
            replies = [{"failed": "timed_out", "why": why}] * len(wanted)
        except (OSError, HTTPException) as error:
            why = f"{self.url}: {type(error).__name__} {error}".strip()
            replies = [{"failed": "crashed", "why": why}] * len(wanted)
        except (TypeError, ValueError) as error:
            replies = [{"error": f"{self.url}: {error}"}] * len(wanted)
        for (_, future), reply in zip(wanted, replies, strict=True):
            if not future.done():
                future.set_result(reply)

    def _read(self, found: tuple[int, bytes], num: int) -> list[Reply]:
        """Raises ValueError for what is no answer to so many items."""
        status, body = found
        if status >= 500:
            return [{"failed": "crashed", "why": f"{self.url}: status {status}"}] * num
        if status != 200:
            raise ValueError(f"status {status}, must be 200.")
        told = json.loads(body)
        rewards = told.get("rewards") if isinstance(told, dict) else None
        if not isinstance(rewards, list) or len(rewards) != num:
            raise ValueError(f'replied {body[:200]!r}, must be {{"rewards": [...]}} with {num} numbers.')
        return [self._reply(reward) for reward in rewards]

    def _reply(self, told: object) -> Reply:
        try:
            value, measured = numbers_of(told)
        except ValueError as error:
            raise ValueError(f"gave {told!r}, {error}.") from error
        return {"parts": {self.name: value}, "measured": of_reward(self.name, measured)}


def _post(url: str, body: bytes, timeout_s: float) -> tuple[int, bytes]:
    """(status, body) of the reply. Raises TimeoutError past the limit, OSError or HTTPException for what
    breaks off, ValueError for a reply that is too large."""
    parts, deadline = urlsplit(url), time.monotonic() + timeout_s
    kind = HTTPSConnection if parts.scheme == "https" else HTTPConnection
    assert parts.hostname is not None, "checked at start"
    connection = kind(parts.hostname, parts.port, timeout=timeout_s)
    try:
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        headers = {"Content-Type": "application/json", "Connection": "close"}
        connection.request("POST", path, body, headers)
        response, told = connection.getresponse(), b""
        while piece := response.read1(65536):
            told += piece
            if len(told) > LARGEST_REPLY:
                raise ValueError(f"a reply of more than {LARGEST_REPLY} bytes.")
            if time.monotonic() > deadline:
                raise TimeoutError
        if response.length:  # What was announced and did not come; `read1` says nothing of it.
            raise IncompleteRead(told, response.length)
        return response.status, told
    finally:
        connection.close()
