"""A push as all ranks take part in it: requests are held, weights go out, requests begin again."""

import logging
import uuid
from typing import Protocol

from megatron_jackpot.config import Config
from megatron_jackpot.models.build import DTYPES
from megatron_jackpot.models.weight_ring import WeightRing
from megatron_jackpot.rollout.pipeline import Pipeline
from megatron_jackpot.run.limits import behind, hold_s, push_s
from megatron_jackpot.run.watchdog import Watchdog
from megatron_jackpot.servers.protocol import ServerError
from megatron_jackpot.sync.proof import SyncReport
from megatron_jackpot.sync.retry import PushInterrupted
from megatron_jackpot.sync.stream import WeightStream
from megatron_jackpot.train.state import TrainState

log = logging.getLogger(__name__)


class Push(Protocol):
    """How weights get to the servers, on the main rank."""

    def push(self, named_tensors: WeightStream, version: int, *, attempt: str, mend: bool) -> SyncReport: ...

    def release(self) -> None: ...

    def end_release(self) -> None: ...

    def close(self) -> None: ...


class Pusher:
    """Every rank has one and calls it; `sync` exists on the main rank."""

    def __init__(
        self,
        config: Config,
        state: TrainState,
        pipeline: Pipeline,
        watchdog: Watchdog,
        *,
        sync: Push | None,
        ring: WeightRing | None,
    ) -> None:
        """`ring` keeps what was pushed, where older tokens are scored."""
        self.config, self.state, self.mesh = config, state, state.mesh
        self.pipeline, self.watchdog, self.sync, self.ring = pipeline, watchdog, sync, ring
        self.num_pushes = 0
        self.attempt = ""
        self.renew()

    def renew(self) -> None:
        """From here on versions may come again: at a start, and where the run goes back. Broadcasts: 2 over
        the world."""
        self.attempt = self.mesh.from_main(uuid.uuid4().hex[:8])

    def __call__(self, *, mend: bool) -> dict[str, float]:
        """The served model's weights to the servers, labelled with the number of finished steps and the
        attempt; with the whole proof where it is to `mend` something. Metrics on the main rank, none where
        the run was asked to stop and no server answered."""
        self.num_pushes += 1
        version, servers = self.state.num_steps, self.config.servers
        self.hold(f"hold-{version}-{self.num_pushes}")
        if self.config.parallel.offload_optimizer:
            for model in self.state.models.values():
                model.offload()
        limit_s = push_s(servers.start_timeout_s, self.config.sync.timeout_s)
        with self.watchdog.phase(f"push of version {version}", at_least_s=limit_s):
            weights = WeightStream(
                self.state.served,
                f"export-{self.num_pushes}",
                dtype=servers.dtype and DTYPES[servers.dtype],
                fp8=servers.quantization is not None,
                timeout_s=behind(limit_s),
            )
            if self.mesh.is_main:
                metrics = self.send(weights, version, mend)
                weights.finish()
            else:
                metrics = {}
                weights.take_part()
            if self.ring is not None:
                self.ring.push(version)
            self.mesh.wait_for_leaders(f"sync-{version}-{self.num_pushes}", behind(limit_s))
        self.pipeline.pushed(version, self.attempt)
        return metrics

    def end_release(self) -> None:
        """Before the run ends between a rollout and a push: servers take back what they lent, which nobody
        knows of after it."""
        if self.sync is None:
            return
        try:
            self.sync.end_release()
        except ServerError as error:
            log.warning(f"a server did not take back the memory that it had lent: {error}")

    def hold(self, what: str) -> None:
        """No leader begins a request any more."""
        limit_s = hold_s(self.config.run.phase_timeout_s)
        with self.watchdog.phase("hold requests", at_least_s=limit_s):
            self.pipeline.hold()
            if self.config.rollout.ahead:
                # A push that breaks off leaves mixed weights for a while: nobody may begin a request then.
                self.mesh.wait_for_leaders(what, behind(limit_s))

    def send(self, weights: WeightStream, version: int, mend: bool) -> dict[str, float]:
        """On the main rank."""
        if self.sync is None:
            return {}
        try:
            report = self.sync.push(weights, version=version, attempt=self.attempt, mend=mend)
        except PushInterrupted as error:
            # The step is done; whoever goes on from its checkpoint pushes first.
            log.warning(error)
            return {}
        return {
            "sync/version": float(version),
            "sync/server_version": float(report.version),
            "sync/seconds": report.seconds,
            "sync/bytes": float(report.num_bytes),
        }
