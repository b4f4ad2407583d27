"""Watching over the servers of one launch: those that end or hang are started again, with a growing pause."""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from megatron_jackpot.config import Servers
from megatron_jackpot.servers.process import HEALTH, HEALTH_GENERATE, ServerProcess

HEALTH_EVERY_S = 5.0
FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 60.0


@dataclass
class _Child:
    server: ServerProcess
    restarts: int = 0
    start_at: float | None = None
    """When it is to be started again; None while it is meant to run."""
    answered_at: float = field(default_factory=time.monotonic)
    asking: threading.Thread | None = None


class Supervisor:
    """`look()` again and again, a few times a second; nothing in it waits for a server.

    A server that was started anew holds the first weights and samples nothing before the trainer has sent it
    new ones: that is the trainer's part (servers/client.py, sync/retry.py).
    """

    def __init__(self, servers: Sequence[ServerProcess], config: Servers, say: Callable[[str], None]):
        self.config, self.say = config, say
        # A server that lends its memory samples nothing for as long as a step trains, and would be taken for
        # hung.
        self.path = HEALTH if config.release_memory else HEALTH_GENERATE
        self.children = [_Child(server) for server in servers]

    def look(self) -> bool:
        """Start again what ended or hangs. False when a server has used up servers.max_restarts."""
        return all([self._look_at(child) for child in self.children])

    def renew(self, why: str) -> None:
        """Start every server again, with the next look; none of it counts as a restart."""
        for child in self.children:
            self.say(f"server {child.server.url} is started again: {why}")
            child.server.stop(grace_s=0)
            child.start_at = time.monotonic()

    def _look_at(self, child: _Child) -> bool:
        server, now = child.server, time.monotonic()
        if child.start_at is not None and now < child.start_at:
            return True
        if child.start_at is not None:
            # While it starts, the time of its start limit counts.
            child.start_at, child.answered_at = None, now + self.config.start_timeout_s
            try:
                server.start()
            except RuntimeError as error:
                return self._restart(child, f"could not be started: {error}")
            return True
        if not server.running:
            code = server.process.returncode if server.process else None
            return self._restart(child, f"ended with exit code {code}. {server.log_end()}")
        if now - child.answered_at > self.config.hang_s:
            return self._restart(
                child, f"has not answered {self.path} for {self.config.hang_s:g} s (servers.hang_s)"
            )
        self._ask(child)
        return True

    def _restart(self, child: _Child, why: str) -> bool:
        server = child.server
        self.say(f"server {server.url} {why}")
        server.stop(grace_s=0)
        if child.restarts >= self.config.max_restarts:
            self.say(f"server {server.url} was started again {child.restarts} times (servers.max_restarts)")
            return False
        pause = min(FIRST_PAUSE_S * 2**child.restarts, LONGEST_PAUSE_S)
        child.restarts += 1
        child.start_at = time.monotonic() + pause
        restart = f"restart {child.restarts} of {self.config.max_restarts} in {pause:g} s"
        self.say(f"server {server.url}: {restart}")
        server.note(f"[supervisor] {restart}")
        return True

    def _ask(self, child: _Child) -> None:
        if child.asking is not None and child.asking.is_alive():
            return
        child.asking = threading.Thread(target=self._hear, args=(child,), daemon=True)
        child.asking.start()

    def _hear(self, child: _Child) -> None:
        if child.server.answers(5.0, self.path):
            child.answered_at = time.monotonic()
        time.sleep(HEALTH_EVERY_S)
