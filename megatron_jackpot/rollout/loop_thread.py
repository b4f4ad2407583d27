"""An event loop in a thread of its own: requests and rewards go on while the main thread trains."""

import asyncio
import threading
from collections.abc import Callable, Coroutine
from concurrent import futures
from typing import TypeVar

T = TypeVar("T")

CLOSE_LIMIT_S = 30.0


class LoopThread:
    """One thread that owns an event loop from the first check of a run to its end.

    What the kernel ends with its parent *thread*, as it does reward workers, is to be started by `call`: the
    thread outlives it. The loop installs no signal handlers; they belong to the main thread.
    """

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True, name="rollouts")
        self._thread.start()

    def submit(self, work: Coroutine[object, None, T]) -> futures.Future[T]:
        """Have the loop run `work`. What is submitted first takes its first step first."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def wait(self, work: Coroutine[object, None, T], limit_s: float, what: str) -> T:
        """The result of `work`. Raises TimeoutError naming `what` after `limit_s`, and its own errors."""
        future = self.submit(work)
        if not futures.wait([future], limit_s).done:
            future.cancel()
            raise TimeoutError(f"Waited {limit_s:g} s for {what}.")
        return future.result()

    def call(self, function: Callable[[], T], limit_s: float, what: str) -> T:
        """The result of a function that this thread runs, nothing else meanwhile. Raises as `wait`."""

        async def run() -> T:
            return function()

        return self.wait(run(), limit_s, what)

    def cancel(self) -> None:
        """End what is under way. Raises TimeoutError where that does not let itself be ended."""
        self.wait(self._cancel_all(), 2 * CLOSE_LIMIT_S, "requests and rewards to be cancelled")

    async def _cancel_all(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        left = (await asyncio.wait(others, timeout=CLOSE_LIMIT_S))[1] if others else set()
        if left:
            raise TimeoutError(
                f"Waited {CLOSE_LIMIT_S:g} s for {len(left)} requests or rewards to be cancelled."
            )

    def close(self) -> None:
        """Cancel what is under way, and end the thread. Raises TimeoutError when it does not end.

        One that is busy for longer than this waits for it still lets what it does clean up, before it ends.
        """
        ended = self.submit(self._end())
        self._thread.join(2 * CLOSE_LIMIT_S)
        if self._thread.is_alive():
            raise TimeoutError(f"Waited {2 * CLOSE_LIMIT_S:g} s for the thread of the rollouts to end.")
        self._loop.close()
        ended.result()

    async def _end(self) -> None:
        try:
            await self._cancel_all()
        finally:
            # Not before this has come to its end.
            self._loop.call_soon(self._loop.stop)
