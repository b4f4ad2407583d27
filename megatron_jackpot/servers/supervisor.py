"""Watching over the servers of one launch: those that end or hang are started again, with a growing pause."""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from megatron_jackpot.config import Servers
from megatron_jackpot.servers.process import ServerProcess

HEALTH_EVERY_S = 5.0
FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 60.0


@dataclass
class _Patient:
    server: ServerProcess
    restarts: int = 0
    start_at: float | None = None
    """When it is to be started again; None while it is meant to run."""
    answered_at: float = field(default_factory=time.monotonic)
    asking: threading.Thread | None = None


class ServerCare:
    """`look()` again and again, a few times a second; nothing in it waits for a server.

    A server that was started anew holds the first weights and samples nothing before the trainer has sent it
    new ones: that is the trainer's part (servers/client.py, sync/retry.py).
    """

    def __init__(self, servers: Sequence[ServerProcess], knobs: Servers, say: Callable[[str], None]):
        self.knobs, self.say = knobs, say
        self.patients = [_Patient(server) for server in servers]

    def look(self) -> bool:
        """Start again what ended or hangs. False when a server has used up servers.max_restarts."""
        return all([self._look_at(patient) for patient in self.patients])

    def _look_at(self, patient: _Patient) -> bool:
        server, now = patient.server, time.monotonic()
        if patient.start_at is not None and now < patient.start_at:
            return True
        if patient.start_at is not None:
            # While it starts, the time of its start limit counts.
            patient.start_at, patient.answered_at = None, now + self.knobs.start_timeout_s
            try:
                server.start()
            except RuntimeError as error:
                return self._restart(patient, f"could not be started: {error}")
            return True
        if not server.running:
            code = server.process.returncode if server.process else None
            return self._restart(patient, f"ended with exit code {code}. {server.log_end()}")
        if now - patient.answered_at > self.knobs.hang_s:
            return self._restart(
                patient, f"has not answered /health for {self.knobs.hang_s:g} s (servers.hang_s)"
            )
        self._ask(patient)
        return True

    def _restart(self, patient: _Patient, why: str) -> bool:
        server = patient.server
        self.say(f"server {server.url} {why}")
        server.stop(grace_s=0)
        if patient.restarts >= self.knobs.max_restarts:
            self.say(f"server {server.url} was started again {patient.restarts} times (servers.max_restarts)")
            return False
        pause = min(FIRST_PAUSE_S * 2**patient.restarts, LONGEST_PAUSE_S)
        patient.restarts += 1
        patient.start_at = time.monotonic() + pause
        self.say(
            f"server {server.url}: restart {patient.restarts} of {self.knobs.max_restarts} in {pause:g} s"
        )
        return True

    def _ask(self, patient: _Patient) -> None:
        if patient.asking is not None and patient.asking.is_alive():
            return
        patient.asking = threading.Thread(target=self._hear, args=(patient,), daemon=True)
        patient.asking.start()

    def _hear(self, patient: _Patient) -> None:
        if patient.server.answers(limit_s=5.0):
            patient.answered_at = time.monotonic()
        time.sleep(HEALTH_EVERY_S)
