"""The SGLang client in a process of its own: `python -m megatron_jackpot.servers.client_process SOCKET_FD`.

Whoever reads and parses replies holds the interpreter meanwhile, and learning, which launches thousands of
small operations, waits for it. Here the trainer's side of a reply is one message with arrays.

What makes the client comes by stdin. Messages are an 8-byte length and a pickle: there goes a Call; back come
(its number, what it returned or raised), and the bare number where a request is tried again.
"""

import asyncio
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Coroutine, Mapping
from contextlib import suppress
from functools import partial, wraps
from itertools import count
from types import CoroutineType, TracebackType
from typing import Concatenate, NamedTuple, ParamSpec, Self, TypeVar, cast

from megatron_jackpot.servers.client import SGLangClient
from megatron_jackpot.servers.protocol import ServerError, StaleWeights

P = ParamSpec("P")
T = TypeVar("T")
Retried = Callable[[], None] | None

REQUESTS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""To save and end: who signals a whole job means its ranks. The process ends when its rank has."""
END_LIMIT_S = 10.0
"""For the process to end by itself once nobody listens to it."""


class Call(NamedTuple):
    number: int
    method: str
    """Of the client; "" ends the call of this number."""
    args: tuple[object, ...] = ()
    options: Mapping[str, object] = {}
    tells: bool = False
    """It takes `retried`."""


def _asked(
    method: Callable[Concatenate[SGLangClient, P], Coroutine[object, None, T]],
) -> "Callable[Concatenate[ClientProcess, P], CoroutineType[object, None, T]]":
    """The client's method, in the process; `retried` is called here."""

    @wraps(method)
    async def ask(self: "ClientProcess", *args: P.args, **options: P.kwargs) -> T:
        retried = options.pop("retried", None)
        return cast(T, await self.call(method.__name__, args, options, cast(Retried, retried)))

    return ask


class ClientProcess:
    """An SGLangClient, asked through a socket. Use as `async with ClientProcess(...) as client`.

    Calls do and raise what those of SGLangClient do. A process that ends makes all calls raise RuntimeError:
    the rank ends, and `launch` starts it again. A call that is cancelled returns when the client has let go
    of its request.
    """

    def __init__(self, client: Callable[[], SGLangClient]) -> None:
        """`client` is called in the process, and here for what it raises."""
        client()
        self._client = client
        self._calls: dict[int, tuple[asyncio.Future[object], Retried]] = {}
        self._numbers = count()
        self._closing = False
        self._gone: RuntimeError | None = None

    async def __aenter__(self) -> Self:
        """Starts the process, and does not wait for it: calls do. Where that fails, or is given up, it is
        ended again."""
        ours, theirs = socket.socketpair()
        self._process = _started(theirs)
        try:
            assert self._process.stdin is not None
            with self._process.stdin as stdin:
                stdin.write(pickle.dumps(self._client))
            self._messages = _Messages(self._take, self._end)
            await asyncio.get_running_loop().create_connection(lambda: self._messages, sock=ours)
        except BaseException:
            self._closing = True
            ours.close()
            self._process.kill()
            self._process.wait()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing = True
        self._messages.close()
        deadline = time.monotonic() + END_LIMIT_S
        while self._process.poll() is None and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        self._process.kill()
        self._process.wait()

    hold = _asked(SGLangClient.hold)
    quiet = _asked(SGLangClient.quiet)
    use = _asked(SGLangClient.use)
    generate_group = _asked(SGLangClient.generate_group)
    answers = _asked(SGLangClient.answers)

    async def call(
        self, method: str, args: tuple[object, ...], options: Mapping[str, object], retried: Retried
    ) -> object:
        """What the client's `method` returns or raises."""
        if self._gone is not None:
            raise self._gone
        number, done = next(self._numbers), asyncio.get_running_loop().create_future()
        self._calls[number] = done, retried
        self._messages.send(Call(number, method, args, options, tells=retried is not None))
        try:
            return await asyncio.shield(done)
        except asyncio.CancelledError:
            self._messages.send(Call(number, ""))
            with suppress(Exception):
                await asyncio.shield(done)
            raise

    def _take(self, message: object) -> None:
        if isinstance(message, int):
            _, retried = self._calls[message]
            assert retried is not None, "it was asked to tell"
            retried()
            return
        number, value = cast(tuple[int, object], message)
        done, _ = self._calls.pop(number)
        if isinstance(value, Exception):
            done.set_exception(value)
        else:
            done.set_result(value)

    def _end(self) -> None:
        if not self._closing:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(1.0)
        self._gone = RuntimeError(
            f"The process of the servers' client, {self._process.pid}, is gone (exit code "
            f"{self._process.returncode}). Its last words are in this rank's log."
        )
        for done, _ in self._calls.values():
            done.set_exception(self._gone)
            done.exception()  # Nobody may be left who awaits it: it was told.
        self._calls.clear()


def _started(theirs: socket.socket) -> "subprocess.Popen[bytes]":
    """The process, which speaks through `theirs`."""
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    # A mask is inherited: no moment of the start is without it.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, REQUESTS)
    try:
        with theirs:
            return subprocess.Popen(
                [sys.executable, "-m", "megatron_jackpot.servers.client_process", str(theirs.fileno())],
                env={"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": path},
                stdin=subprocess.PIPE,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


class _Messages(asyncio.Protocol):
    """Whole messages to and from the other end of a socket."""

    def __init__(self, take: Callable[[object], None], end: Callable[[], None]) -> None:
        self._take, self._end = take, end
        self._received = bytearray()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._received += data
        while len(self._received) >= 8:
            end = 8 + int.from_bytes(self._received[:8], "big")
            if len(self._received) < end:
                return
            with memoryview(self._received) as received, received[8:end] as body:
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


async def serve(connection: socket.socket, make: Callable[[], SGLangClient]) -> None:
    """Do what the other end asks of a client, until it closes the connection."""
    closed, calls = asyncio.Event(), dict[int, asyncio.Task[object]]()

    def answer(number: int, task: asyncio.Task[object]) -> None:
        # Also of a call that was cancelled before it began: the other end waits for its end.
        del calls[number]
        error = None if task.cancelled() else task.exception()
        if error is not None and not isinstance(error, ServerError | StaleWeights | ValueError):
            error = RuntimeError("The servers' client failed:\n" + "".join(traceback.format_exception(error)))
        try:
            messages.send((number, error if error is not None or task.cancelled() else task.result()))
        except Exception as failure:  # Of pickling. The other end would wait for ever.
            messages.send((number, RuntimeError(f"The client's answer cannot be sent: {failure!r}")))

    def take(message: object) -> None:
        call = cast(Call, message)
        if call.method:
            told = {"retried": partial(messages.send, call.number)} if call.tells else {}
            asked = getattr(client, call.method)(*call.args, **call.options, **told)
            calls[call.number] = asyncio.ensure_future(asked)
            calls[call.number].add_done_callback(partial(answer, call.number))
        elif call.number in calls:  # Else its answer is on the way.
            calls[call.number].cancel()

    messages = _Messages(take, closed.set)
    async with make() as client:
        await asyncio.get_running_loop().create_connection(lambda: messages, sock=connection)
        await closed.wait()


if __name__ == "__main__":
    asyncio.run(serve(socket.socket(fileno=int(sys.argv[1])), pickle.load(sys.stdin.buffer)))
