"""Rewards in worker processes: every item has a time limit, and nothing a response does can hang the trainer.

Workers are plain subprocesses behind a socket pair rather than multiprocessing's, which would import the
trainer's main module (torch, Megatron) into each of them. The pool serves any event loop, also another one
later.
"""

import asyncio
import json
import os
import pickle
import select
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from megatron_jackpot.rewards.failures import Counts, Failures
from megatron_jackpot.rewards.label_cache import CheckedLabels
from megatron_jackpot.rewards.parts import Given, fault_of, of_row, read, weighted, written
from megatron_jackpot.rewards.remote import RemoteReward, Reply, is_remote
from megatron_jackpot.rewards.worker import SEEN, frame

if TYPE_CHECKING:
    from pathlib import Path

    from megatron_jackpot.records import Prompt

Verdict: TypeAlias = tuple[float, bool] | tuple[float, bool, dict[str, float]]
"""(reward, correct), and the parts of several with what rewards measured."""
START_TIMEOUT_S = 120.0
QUIET = ("-W", "ignore::SyntaxWarning")
"""The compiler's, of packages that are compiled when they are first needed, as uv installs them."""
MAX_REPORTED = 5
CHUNK = 32
"""Labels of one request."""
PROGRESS_LABELS = 1000


class RewardPool:
    """`await pool(response_text, label)` -> (reward, correct); correct means a reward of exactly 1.0. Of
    several it is (their weighted sum, whether the row's first is exactly 1.0, name -> number of each), and
    what a reward returned beside its `score` is there too, by its name.

    `seen` of a call holds what the reward asks for by keyword: `asks`.

    An item beyond `timeout_s` or a TimeoutError in the reward, an item beyond its memory or one that ends its
    worker, gets reward 0 and is counted in `failures`. Too many of them raise RewardsFailing. Another error
    in the reward, or a result other than a finite float, raises ValueError.
    """

    def __init__(
        self,
        reward: str | Mapping[str, Given],
        workers: int,
        timeout_s: float,
        *,
        start_timeout_s: float = START_TIMEOUT_S,
        memory_bytes: int = 4 * 2**30,
        network: bool = False,
        max_failed: float = 1.0,
        batch: int = 32,
        code: Mapping[str, object] | None = None,
    ):
        """Blocks until every worker has imported the reward. Raises ValueError when it cannot be imported.

        An item may take `memory_bytes` of memory and, over all threads, four times `timeout_s` of CPU time.
        `max_failed` is the share of a call's rewards that may fail, `batch` how many items a service is
        asked for at once, `code` the settings of the reward of that name. Where services give all rewards
        there are no workers.
        """
        self.limits = {"memory_bytes": memory_bytes, "cpu_s": 4 * timeout_s, "network": network}
        self.code = dict(code or {})
        self.reward = written(reward)
        self.parts = read(self.reward)
        self.where = (
            f"data.reward = '{reward}'" if self.parts is None else f"data.rewards ({', '.join(reward)})"
        )
        self.timeout_s, self.start_timeout_s = timeout_s, start_timeout_s
        self.failures = Failures(self.where, timeout_s, max_failed)
        named = {"": reward} if isinstance(reward, str) else {n: part.reward for n, part in reward.items()}
        self.remote = {n: RemoteReward(n, r, timeout_s, batch) for n, r in named.items() if is_remote(r)}
        self.asks = list(SEEN)
        """What a reward may have beside text and label: some of the worker's SEEN, for a service all."""
        self._closed = False
        self._workers: set[_Worker] = set()
        self._idle: list[_Worker] = []
        self._waiting: deque[asyncio.Future[_Worker]] = deque()
        try:
            self._idle = [self._start() for _ in range(workers if len(self.remote) < len(named) else 0)]
            deadline = time.monotonic() + start_timeout_s
            for worker in self._idle:
                worker.block_until_ready(deadline)
            if not self.remote:
                self.asks = self._idle[0].asks
            if self._idle and self._idle[0].exposed:
                # Not refused: a container may allow no namespaces, and its own network may be closed already.
                warnings.warn(f"rewards can reach the network: {self._idle[0].exposed}", stacklevel=2)
        except BaseException:
            self.close()
            raise

    async def __call__(
        self,
        response_text: str,
        label: Any,
        counts: Counts | None = None,
        seen: Mapping[str, object] | None = None,
    ) -> Verdict:
        """`counts` are those of the call it belongs to, from `failures.begin`; else those of the pool."""
        counts = self.failures.counters if counts is None else counts
        verdict = await self.judge(response_text, label, counts, seen or {})
        return verdict or self._verdict(dict.fromkeys(of_row(self.parts, label), 0.0), {})

    async def judge(
        self, response_text: str, label: Any, counts: Counts, seen: Mapping[str, object]
    ) -> Verdict | None:
        """The same; None in place of reward 0 where it failed."""
        names = of_row(self.parts, label)
        values, measured = dict[str, float](), dict[str, float]()
        asked = [*self._asked(names, response_text, label, seen)]
        for reply in [await asked[0]] if len(asked) == 1 else await asyncio.gather(*asked):
            if "failed" in reply:
                self.failures.add(reply["failed"], reply["why"], response_text, label, counts)
                return None
            if "error" in reply:
                raise ValueError(f"{self.where} {reply['error']}")
            values |= reply["parts"]
            measured |= reply["measured"]
        self.failures.add_scored(counts)
        return self._verdict({name: values[name] for name in names}, measured)

    def _asked(
        self, names: Sequence[str], response_text: str, label: object, seen: Mapping[str, object]
    ) -> Iterator[Coroutine[object, object, Reply]]:
        """What each of the rewards `names` replies: those in the workers together, those of services each."""
        local = [name for name in names if name not in self.remote]
        if local:
            given = seen if self.parts is None else {**seen, "names": local}
            yield self._ask("score", response_text, label, given)
        for name in names:
            if name in self.remote:
                yield self.remote[name].score(response_text, label, seen)

    def _verdict(self, values: dict[str, float], measured: dict[str, float]) -> Verdict:
        first = next(iter(values.values()))
        if self.parts is None:
            return (first, first == 1.0, measured) if measured else (first, first == 1.0)
        return weighted(self.parts, values), first == 1.0, values | measured

    @property
    def counters(self) -> Counts:
        """Rewards since the start: scored, timed_out, crashed."""
        return self.failures.counters

    async def check_labels(
        self,
        prompts: "Iterable[Prompt]",
        path: "Path | None" = None,
        progress: Callable[[int], None] = lambda labels: None,
    ) -> None:
        """Raises ValueError naming the prompts (file and line of `path`) whose label no answer could match.

        Labels that an earlier call found right, under the same versions, are not checked again. `progress` is
        told how many of the others have been, every PROGRESS_LABELS of them.
        """
        prompts = list(prompts)
        known = CheckedLabels(self.reward, self.code)
        unchecked = [prompt for prompt in prompts if prompt.label not in known]
        chunks = [unchecked[i : i + CHUNK] for i in range(0, len(unchecked), CHUNK)]
        done = 0

        async def checked(chunk: "Sequence[Prompt]") -> list[str | None]:
            nonlocal done
            found = await self._faults(chunk)
            before, done = done // PROGRESS_LABELS, done + len(chunk)
            if done // PROGRESS_LABELS > before:
                progress(done // PROGRESS_LABELS * PROGRESS_LABELS)
            return found

        faults = [fault for found in await asyncio.gather(*map(checked, chunks)) for fault in found]
        known.add(prompt.label for prompt, fault in zip(unchecked, faults, strict=True) if fault is None)
        bad = [
            f"prompt {prompt.id}: {fault}" if path is None else f"{path}, line {prompt.id + 1}: {fault}"
            for prompt, fault in zip(unchecked, faults, strict=True)
            if fault is not None
        ]
        if bad:
            more = [f"... and {len(bad) - MAX_REPORTED} more."] if len(bad) > MAX_REPORTED else []
            head = f"{self.where}: {len(bad)} of {len(prompts)} labels cannot be scored."
            raise ValueError("\n".join([head, *bad[:MAX_REPORTED], *more]))

    async def _faults(self, prompts: "Sequence[Prompt]") -> list[str | None]:
        """What is wrong with each label. A chunk that takes too long is asked again one by one."""
        if not self._workers:
            return [None if self.parts is None else fault_of(self.parts, prompt.label) for prompt in prompts]
        reply = await self._ask("check", "", [prompt.label for prompt in prompts])
        if "failed" not in reply:
            return reply["faults"]
        if len(prompts) == 1:
            return [f"its check failed: {reply['why']}"]
        return [fault for prompt in prompts for fault in await self._faults([prompt])]

    def close(self) -> None:
        """End this pool's own workers and what they started; calls in flight raise RuntimeError."""
        self._closed = True
        for service in self.remote.values():
            service.close()
        for worker in self._workers:
            worker.end()
        for worker in self._idle:
            worker.connection.close()
        self._workers.clear()
        self._idle.clear()

    def __enter__(self) -> "RewardPool":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    async def _ask(
        self, kind: str, response_text: str, label: Any, seen: Mapping[str, object] | None = None
    ) -> Reply:
        """The worker's reply; {"failed": kind, "why": text} also when the time limit passed or the worker
        died."""
        request = frame(pickle.dumps((kind, response_text, label, dict(seen or {}))))
        worker = await self._acquire()
        whole = False
        try:
            await worker.ready(self.start_timeout_s)
            reply = await worker.ask(request, self.timeout_s)
            whole = not reply.get("last")
        except TimeoutError:
            reply = {"failed": "timed_out", "why": f"no reply within {self.timeout_s:g} s"}
        except ConnectionError as error:
            if self._closed:
                raise RuntimeError("The reward pool was closed during a call.") from error
            reply = {"failed": "crashed", "why": f"its worker ended ({worker.ending()})"}
        finally:
            # Also on cancellation: a worker that still owes a reply would give it to the next item.
            self._release(worker if whole else self._replace(worker))
        return reply

    async def _acquire(self) -> "_Worker":
        if self._closed:
            raise RuntimeError("The reward pool is closed.")
        if self._idle:
            worker = self._idle.pop()
            return worker if worker.alive else self._replace(worker)
        waiting: asyncio.Future[_Worker] = asyncio.get_running_loop().create_future()
        self._waiting.append(waiting)
        try:
            return await waiting
        except asyncio.CancelledError:
            if waiting.done() and not waiting.cancelled():
                self._release(waiting.result())
            raise

    def _release(self, worker: "_Worker") -> None:
        while self._waiting:
            waiting = self._waiting.popleft()
            # A future of an earlier event loop has no one behind it any more.
            if not waiting.done() and waiting.get_loop() is asyncio.get_running_loop():
                waiting.set_result(worker)
                return
        self._idle.append(worker)

    def _start(self) -> "_Worker":
        worker = _Worker(self.reward, {**self.limits, "code": {**self.code, "timeout_s": self.timeout_s}})
        self._workers.add(worker)
        return worker

    def _replace(self, worker: "_Worker") -> "_Worker":
        if self._closed:
            return worker
        worker.connection.close()
        worker.end()
        self._workers.discard(worker)
        return self._start()


class _Worker:
    """The trainer's side of one worker process."""

    def __init__(self, reward: str, limits: dict[str, Any]):
        self.exposed: str | None = None
        self.asks: list[str] = []
        self.connection, other = socket.socketpair()
        self.connection.setblocking(False)
        self._received = b""
        self._ready = False
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        module, fd = "megatron_jackpot.rewards.worker", other.fileno()
        with other:
            # Its own session: Ctrl-C reaches only the trainer, and end() takes what the reward started.
            self.process = subprocess.Popen(
                [sys.executable, *QUIET, "-m", module, reward, str(fd), str(os.getpid()), json.dumps(limits)],
                env={"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": path},
                stdin=subprocess.DEVNULL,
                pass_fds=[fd],
                start_new_session=True,
            )

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def block_until_ready(self, deadline: float) -> None:
        """The first start, outside any event loop. `deadline` is on time.monotonic()."""
        while not self._take_ready():
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError(f"Reward worker {self.process.pid} was not ready in time.")
            # Not select(): a trainer may hold more than 1024 descriptors.
            poll = select.poll()
            poll.register(self.connection, select.POLLIN)
            poll.poll(left * 1000)

    async def ready(self, timeout_s: float) -> None:
        """A replaced worker is awaited by the next item that gets it, outside that item's own time limit."""
        try:
            async with asyncio.timeout(timeout_s):
                while not self._take_ready():
                    await self._readable()
        except TimeoutError as error:
            late = f"Reward worker {self.process.pid} was not ready within {timeout_s} s."
            raise RuntimeError(late) from error

    async def ask(self, request: bytes, timeout_s: float) -> Reply:
        """Raises TimeoutError past the limit, ConnectionError when the worker is gone."""
        try:
            async with asyncio.timeout(timeout_s):
                await asyncio.get_running_loop().sock_sendall(self.connection, request)
                while (reply := self._take_reply()) is None:
                    await self._readable()
        except TimeoutError:
            # The event loop itself may have been busy for that long: a reply that is here counts.
            reply = self._take_reply()
            if reply is None:
                raise
        return reply

    def ending(self) -> str:
        """How a process that closed its connection ended."""
        try:
            code = self.process.wait(1.0)
        except subprocess.TimeoutExpired:
            return "connection closed"
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"

    def end(self) -> None:
        """Kill the process and what it started, and reap it. One reaped before no longer owns its id."""
        if self.process.returncode is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def _take_ready(self) -> bool:
        try:
            reply = {} if self._ready else self._take_reply()
        except ConnectionError as error:
            raise RuntimeError(f"Reward worker {self.process.pid} ended while it started.") from error
        if reply is None:
            return False
        if "error" in reply:
            raise ValueError(reply["error"])
        self._ready, self.exposed = True, reply.get("exposed", self.exposed)
        self.asks = reply.get("asks", self.asks)
        return True

    def _take_reply(self) -> Reply | None:
        """A whole reply from what has arrived, else None."""
        closed = False
        try:
            while chunk := self.connection.recv(65536):
                self._received += chunk
            closed = True
        except BlockingIOError:
            pass
        size = int.from_bytes(self._received[:4], "big")
        if 0 < size <= len(self._received) - 4:
            body, self._received = self._received[4 : 4 + size], self._received[4 + size :]
            return json.loads(body)
        if closed:
            raise ConnectionResetError("The reward worker closed its connection.")
        return None

    async def _readable(self) -> None:
        loop = asyncio.get_running_loop()
        arrived = loop.create_future()
        loop.add_reader(self.connection, lambda: arrived.done() or arrived.set_result(None))
        try:
            await arrived
        finally:
            loop.remove_reader(self.connection)
