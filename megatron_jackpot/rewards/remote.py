"""A reward that a service gives: items of several responses in one HTTP request, with a limit of time.

    POST {"items": [{"response": ..., "label": ..., "prompt": ..., "num_tokens": ..., "finish_reason": ...}]}
    200  {"rewards": [0.5, ...]}, for each item in their order a number, or {"score": 0.5, ...}

Standard library only; no redirects and no proxies: responses and labels go to the address that is named.
"""

import asyncio
import json
import socket
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http.client import HTTPConnection, HTTPException, HTTPSConnection, IncompleteRead
from typing import Any
from urllib.parse import urlsplit

from megatron_jackpot.rewards.returned import numbers_of, of_reward

LINGER_S = 0.02
"""How long the first item of a request waits for others."""
AT_ONCE = 16
"""Requests that a service has at once from one leader, each with a thread that waits for it; others wait for
their turn, and their limit of time begins with it. Of 32 items each it is 512 responses, enough to fill a
judge on a GPU; more come at once than plain servers let wait for a connection, and those beyond are reset."""
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
        self._loop: asyncio.AbstractEventLoop | None = None
        self._turns = asyncio.Semaphore(AT_ONCE)
        self._waiting: list[tuple[dict[str, object], asyncio.Future[Reply]]] = []
        self._sending: set[asyncio.Task[None]] = set()
        # Its own: those of an event loop are fewer on a small machine, and other work has them too.
        self._threads = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="reward-service")
        self._posts: set[_Post] = set()
        self._closed = False

    async def score(self, response_text: str, label: object, seen: Mapping[str, object]) -> Reply:
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            # One that has ended has no one behind it any more.
            self._loop, self._waiting, self._turns = loop, [], asyncio.Semaphore(AT_ONCE)
        reply: asyncio.Future[Reply] = loop.create_future()
        self._waiting.append(({"response": response_text, "label": label, **seen}, reply))
        if len(self._waiting) >= self.batch:
            self._send()
        elif len(self._waiting) == 1:
            loop.call_later(LINGER_S, self._send)
        return await reply

    def close(self) -> None:
        """End what is under way, and its threads; calls in flight raise RuntimeError."""
        self._closed = True
        for post in list(self._posts):
            post.cut()
        self._threads.shutdown(wait=False)

    def _send(self) -> None:
        taken, self._waiting = self._waiting, []
        if taken:
            task = asyncio.ensure_future(self._request(taken))
            self._sending.add(task)
            task.add_done_callback(self._sending.discard)

    async def _request(self, taken: list[tuple[dict[str, object], asyncio.Future[Reply]]]) -> None:
        async with self._turns:
            # Until its turn came whoever asked may have gone.
            wanted = [(item, reply) for item, reply in taken if not reply.done()]
            replies = list[Reply]()
            if wanted and not self._closed:
                replies = await self._replies([item for item, _ in wanted])
            for place, (_, future) in enumerate(wanted):
                if future.done():
                    continue
                if self._closed:
                    future.set_exception(RuntimeError("The reward pool was closed during a call."))
                else:
                    future.set_result(replies[place])

    async def _replies(self, items: list[dict[str, object]]) -> list[Reply]:
        try:
            body = json.dumps({"items": items}).encode()
            return self._read(await self._posted(body), len(items))
        except TimeoutError:
            why = f"{self.url}: no reply within {self.timeout_s:g} s"
            return [{"failed": "timed_out", "why": why}] * len(items)
        except (OSError, HTTPException) as error:
            why = f"{self.url}: {type(error).__name__} {error}".strip()
            return [{"failed": "crashed", "why": why}] * len(items)
        except (TypeError, ValueError) as error:
            return [{"error": f"{self.url}: {error}"}] * len(items)

    async def _posted(self, body: bytes) -> tuple[int, bytes]:
        """(status, body) of the reply. Raises as `_Post` does."""
        loop, post = asyncio.get_running_loop(), _Post(self.url, self.timeout_s)
        late = loop.call_later(self.timeout_s + GRACE_S, post.cut)
        self._posts.add(post)
        try:
            # Until its thread has ended: the next request finds one that is free.
            return await loop.run_in_executor(self._threads, post, body)
        finally:
            self._posts.discard(post)
            late.cancel()
            post.cut()

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


class _Post:
    """A request and its reply, in a thread that waits for them; `cut` ends that from another one."""

    def __init__(self, url: str, timeout_s: float) -> None:
        self.url, self.timeout_s = url, timeout_s
        self._socket: socket.socket | None = None
        self._cut = False

    def __call__(self, body: bytes) -> tuple[int, bytes]:
        """(status, body) of the reply. Raises TimeoutError past the limit or where it was cut, OSError or
        HTTPException for what breaks off, ValueError for a reply that is too large."""
        try:
            found = self._exchange(body)
        except (OSError, HTTPException) as error:
            if self._cut:
                raise TimeoutError from error
            raise
        if self._cut:
            raise TimeoutError  # The end of what came may have been made here.
        return found

    def cut(self) -> None:
        """What has been connected ends at once, a connection that is being made after its limit."""
        self._cut = True
        if self._socket is not None:
            with suppress(OSError):
                # Of TLS too the socket below: its own way would pull the state from under the reader.
                socket.socket.shutdown(self._socket, socket.SHUT_RDWR)

    def _exchange(self, body: bytes) -> tuple[int, bytes]:
        parts, deadline = urlsplit(self.url), time.monotonic() + self.timeout_s
        kind = HTTPSConnection if parts.scheme == "https" else HTTPConnection
        assert parts.hostname is not None, "checked at start"
        connection = kind(parts.hostname, parts.port, timeout=self.timeout_s)
        try:
            connection.connect()
            # The connection gives its own away with the reply's head. After this line `cut` finds it.
            self._socket = connection.sock
            if self._cut:
                raise TimeoutError
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
