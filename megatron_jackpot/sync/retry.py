"""Which servers a push reaches: those that answer now; a push that breaks off is tried again with who is
left."""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from megatron_jackpot.run.interrupt import Stop, never
from megatron_jackpot.servers.admin import ServerAdmin
from megatron_jackpot.servers.protocol import ServerError
from megatron_jackpot.sync.proof import Present, SyncError, wait

T = TypeVar("T")

log = logging.getLogger(__name__)

ATTEMPTS = 3
ALIVE_LIMIT_S = 5.0
"""For a server's answer: one that hangs or is gone must not hold up every push."""
BUSY_LIMIT_S = 30.0
"""For its scheduler's, where the rest of it answers: sampling ahead of training, it may be busy that long."""
POLL_S = 1.0


class PushInterrupted(Exception):
    """The run was asked to save and end while no server answered: nothing was sent."""


def wait_for_healthy(urls: Sequence[str], patience_s: float, stop: Stop = never) -> Present:
    """Those of `urls` whose scheduler answers, in their order.

    Raises SyncError when none does within `patience_s`: a server that is being started again needs that long;
    PushInterrupted when there is a reason to `stop` meanwhile.
    """
    deadline = time.monotonic() + patience_s
    while True:
        if present := wait(answering(urls)):
            return present
        if (reason := stop()) is not None:
            raise PushInterrupted(f"No server answered ({', '.join(urls)}) when asked to stop: {reason}.")
        if time.monotonic() > deadline:
            raise SyncError(f"Waited {patience_s:g} s for any server to answer: {', '.join(urls)}.")
        time.sleep(POLL_S)


def retry(push: Callable[[], T], within_s: float) -> T:
    """`push()`, again when it breaks off, ATTEMPTS times in all, none of them begun after `within_s`;
    then its error."""
    deadline = time.monotonic() + within_s
    for left in reversed(range(ATTEMPTS)):
        try:
            return push()
        except (ServerError, SyncError) as error:
            if not left or time.monotonic() > deadline:
                raise
            log.warning(f"a weight update broke off and is tried again: {error}")
    raise AssertionError("unreachable")


async def answering(urls: Sequence[str]) -> Present:
    """Those whose front answers at once, and their scheduler then or later: one that was left out of a push
    would be of no use until the next."""

    async def ask(url: str) -> list[str]:
        try:
            return await ServerAdmin([url]).alive(timeout_s=ALIVE_LIMIT_S, scheduler_s=BUSY_LIMIT_S)
        except ServerError:
            return []

    answers = await asyncio.gather(*(ask(url) for url in urls))
    return {url: version for url, answer in zip(urls, answers, strict=True) for version in answer}
