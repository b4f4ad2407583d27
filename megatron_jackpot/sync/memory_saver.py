"""The servers' GPU memory, lent to the trainer on the same GPUs while it learns."""

from megatron_jackpot.servers.admin import ServerAdmin
from megatron_jackpot.servers.protocol import ServerError
from megatron_jackpot.sync.proof import wait
from megatron_jackpot.sync.retry import answering

WEIGHTS, CACHE = ("weights", "cuda_graph"), ("kv_cache",)
"""Tags of what is given back first, to be written to, and of what only sampling needs."""


class MemorySaver:
    """Servers started with --enable-memory-saver: `release` once they sample nothing, both `resume_*` in a
    push.

    Without `enabled` nothing is asked of them. The state is this process's: SGLang ends a server that is told
    to resume what it never released.
    """

    def __init__(self, admin: ServerAdmin, *, enabled: bool) -> None:
        self.admin, self.enabled = admin, enabled
        self.away: dict[str, set[str]] = {}
        """Tags that a server has released, by URL."""

    def release(self) -> None:
        """Everything, on the servers that answer; they are paused until the next push. Raises ServerError.

        One that has ended holds nothing; what it was asked for is written off elsewhere.
        """
        if not self.enabled:
            return
        present = wait(answering(self.admin.urls))
        self.away = {}
        if present:
            servers = ServerAdmin(list(present), timeout_s=self.admin.timeout_s)
            wait(servers.pause("abort"))
            wait(servers.release_memory((*CACHE, *WEIGHTS)))
        self.away = {url: {*CACHE, *WEIGHTS} for url in present}

    def end(self) -> None:
        """All of it, before this process ends: nobody after it would know. Raises ServerError."""
        self.resume_weights()
        self.resume_cache()

    def resume_weights(self) -> None:
        self._resume(WEIGHTS)

    def resume_cache(self) -> None:
        """After the weights have arrived: their old and new copies and the cache need not fit together."""
        self._resume(CACHE)

    def _resume(self, tags: tuple[str, ...]) -> None:
        for url in self.admin.urls:
            mine = [tag for tag in tags if tag in self.away.get(url, ())]
            if not mine:
                continue
            try:
                wait(ServerAdmin([url], timeout_s=self.admin.timeout_s).resume_memory(mine))
            except ServerError:
                # It was started anew meanwhile and has released nothing, or it ends now: either way it holds
                # all.
                del self.away[url]
                raise
            self.away[url] -= set(mine)
