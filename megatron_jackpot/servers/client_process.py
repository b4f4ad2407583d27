"""The SGLang client in a process of its own: `python -m megatron_jackpot.servers.client_process SOCKET_FD`.

Whoever reads and parses replies holds the interpreter meanwhile, and learning, which launches thousands of
small operations, waits for it. Here the trainer's side of a reply is one message with arrays.

Messages are an 8-byte length and a pickle: (number, method, args, keywords) of the client, or (number, None,
(), {}) to cancel that call; back come (number, kind, value).
"""

import asyncio
import inspect
import os
import pickle
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import count
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np

from megatron_jackpot.servers.admin import ServerAdmin
from megatron_jackpot.servers.client import SGLangClient
from megatron_jackpot.servers.protocol import Completion, Sampling, ServerError, StaleWeights

END_LIMIT_S = 10.0
"""For the process to end by itself once nobody listens to it."""
Kind = Literal["result", "error", "retried"]


class ClientProcess:
    """An SGLangClient, asked through a socket. Use as `async with ClientProcess(urls, ...) as client`.

    Calls do and raise what those of SGLangClient do. A process that ends makes all calls raise RuntimeError:
    the rank ends, and `launch` starts it again. A call that is cancelled returns when the client has let go
    of its request.
    """

    def __init__(self, urls: Sequence[str], **settings: Any) -> None:
        """`settings` are those of SGLangClient."""
        self._settings = (list(urls), settings)
        self.admin = ServerAdmin(urls, timeout_s=60)
        self._calls: dict[int, tuple[asyncio.Future[Any], Callable[[], None]]] = {}
        self._numbers = count()
        self._lost: RuntimeError | None = None

    async def __aenter__(self) -> Self:
        """Raises what making the client raises."""
        ours, theirs = socket.socketpair()
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        with theirs:
            # Its own session: Ctrl-C reaches only the trainer, which ends requests before it ends this.
            self._process = subprocess.Popen(
                [sys.executable, "-m", "megatron_jackpot.servers.client_process", str(theirs.fileno())],
                env={"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": path},
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        self._messages = _Messages(self._take, self._end)
        await asyncio.get_running_loop().create_connection(lambda: self._messages, sock=ours)
        try:
            urls, settings = self._settings
            await self._call("", urls, **settings)
        except BaseException:
            await self.__aexit__(None, None, None)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._messages.close()
        deadline = time.monotonic() + END_LIMIT_S
        while self._process.poll() is None and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        self._process.kill()
        self._process.wait()

    async def hold(self) -> None:
        """Begin no request until `use`; those that servers have go on."""
        await self._call("hold")

    async def quiet(self) -> None:
        """Until servers have no request any more."""
        await self._call("quiet")

    async def use(self, version: int) -> None:
        """Servers hold these weights now: begin requests again."""
        await self._call("use", version)

    async def generate_group(
        self,
        prompt_tokens: Sequence[int],
        n: int,
        sampling: Sampling,
        *,
        retried: Callable[[], None] = lambda: None,
    ) -> list[Completion]:
        return await self._call("generate_group", prompt_tokens, n, sampling, retried=retried)

    async def answers(
        self,
        prompt_tokens: Sequence[int],
        max_new_tokens: int,
        stop_token_ids: Sequence[int] = (),
        *,
        n: int = 1,
        temperature: float = 0.0,
    ) -> list[np.ndarray]:
        asked = (prompt_tokens, max_new_tokens, stop_token_ids)
        return await self._call("answers", *asked, n=n, temperature=temperature)

    async def _call(self, method: str, *args: Any, **keywords: Any) -> Any:
        if self._lost is not None:
            raise self._lost
        number, done = next(self._numbers), asyncio.get_running_loop().create_future()
        self._calls[number] = done, keywords.pop("retried", lambda: None)
        self._messages.send((number, method, args, keywords))
        try:
            return await asyncio.shield(done)
        except asyncio.CancelledError:
            self._messages.send((number, None, (), {}))
            with suppress(Exception):
                await asyncio.shield(done)
            raise

    def _take(self, message: tuple[int, Kind, Any]) -> None:
        number, kind, value = message
        done, retried = self._calls[number]
        if kind == "retried":
            retried()
            return
        del self._calls[number]
        if kind == "error":
            done.set_exception(value)
        else:
            done.set_result(value)

    def _end(self) -> None:
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(1.0)
        self._lost = RuntimeError(
            f"The process of the servers' client, {self._process.pid}, is gone (exit code "
            f"{self._process.returncode}). Its last words are in this rank's log."
        )
        for done, _ in self._calls.values():
            done.set_exception(self._lost)
        self._calls.clear()


class _Messages(asyncio.Protocol):
    """Whole messages to and from the other end of a socket."""

    def __init__(self, take: Callable[[Any], None], end: Callable[[], None]) -> None:
        self._take, self._end = take, end
        self._received = bytearray()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._received += data
        while len(self._received) >= 8:
            end = 8 + int.from_bytes(self._received[:8], "big")
            if len(self._received) < end:
                return
            with memoryview(self._received)[8:end] as body:
                message = pickle.loads(body)
            del self._received[:end]
            self._take(message)

    def connection_lost(self, exc: Exception | None) -> None:
        self._end()

    def send(self, message: object) -> None:
        body = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
        self._transport.writelines([len(body).to_bytes(8, "big"), body])

    def close(self) -> None:
        self._transport.close()


async def serve(connection: socket.socket) -> None:
    """Do what the other end asks of a client, until it closes the connection."""
    closed, calls = asyncio.Event(), dict[int, asyncio.Task[None]]()
    client: SGLangClient | None = None

    async def made(urls: Sequence[str], **settings: Any) -> None:
        nonlocal client
        client = await SGLangClient(urls, **settings).__aenter__()

    async def answer(number: int, method: str, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        if method == "generate_group":
            keywords["retried"] = lambda: messages.send((number, "retried", None))
        reply: tuple[Kind, Any]
        try:
            asked = (getattr(client, method) if method else made)(*args, **keywords)
            reply = "result", await asked if inspect.isawaitable(asked) else asked
        except (ServerError, StaleWeights, ValueError) as error:
            reply = "error", error
        except asyncio.CancelledError:
            reply = "result", None
        except Exception:
            reply = "error", RuntimeError("The servers' client failed:\n" + traceback.format_exc())
        del calls[number]
        messages.send((number, *reply))

    def take(message: tuple[int, str | None, tuple[Any, ...], dict[str, Any]]) -> None:
        number, method, args, keywords = message
        if method is not None:
            calls[number] = asyncio.ensure_future(answer(number, method, args, keywords))
        elif number in calls:  # Else its reply is on the way.
            calls[number].cancel()

    messages = _Messages(take, closed.set)
    await asyncio.get_running_loop().create_connection(lambda: messages, sock=connection)
    await closed.wait()
    if client is not None:
        await client.__aexit__(None, None, None)


if __name__ == "__main__":
    asyncio.run(serve(socket.socket(fileno=int(sys.argv[1]))))
