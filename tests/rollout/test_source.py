"""The real source's waits over stand-ins of a client and a pool: stops, and starts that take too long."""

import asyncio
import socket
import subprocess
import time
from functools import partial
from typing import Any

import pytest

pytest.importorskip("aiohttp")

from megatron_jackpot.records import Prompt
from megatron_jackpot.rollout import loop_thread, source
from megatron_jackpot.rollout.collect import Interrupted
from megatron_jackpot.rollout.source import ServerSource
from megatron_jackpot.servers import client_process
from megatron_jackpot.servers.client import SGLangClient
from megatron_jackpot.servers.client_process import ClientProcess
from megatron_jackpot.servers.protocol import Sampling

PROMPTS = [Prompt(i, (1, i), None) for i in range(3)]


class Waits:
    """A client whose servers, and a pool whose workers, answer prompt 0 at once and no other."""

    counters = begin = lambda self: None
    asks = ()

    def __init__(self) -> None:
        self.failures, self.ended = self, 0

    async def __aenter__(self) -> "Waits":
        return self

    async def __aexit__(self, *error: object) -> None: ...

    async def answers(self, prompt: tuple, *given: Any, **options: Any) -> list:
        await self._answer(prompt[-1])
        return []

    async def judge(self, text: str, *given: Any) -> tuple[float, bool]:
        await self._answer(int(text))
        return 1.0, True

    async def _answer(self, number: int) -> None:
        try:
            await asyncio.sleep(600 * (number > 0))
        finally:
            self.ended += number > 0

    def close(self) -> None: ...


def made(client: Any, pool: Any) -> ServerSource:
    return ServerSource(
        client,
        pool,
        urls=["http://127.0.0.1:1"],
        sampling=Sampling(temperature=1.0, max_new_tokens=4, top_k_logp=0),
        samples_per_prompt=2,
        num_ids=9,
        max_failed_groups=0.0,
        decode=lambda tokens: str(tokens[-1]),
        limit_s=600,
    )


def test_an_evaluation_hears_a_stop_while_it_waits_for_answers_and_for_verdicts() -> None:
    waits = Waits()
    judge, began = made(lambda: waits, lambda: waits), time.monotonic()

    def stop() -> str | None:
        return "SIGTERM" if time.monotonic() > began + 0.3 else None

    try:
        with pytest.raises(Interrupted, match="SIGTERM"):
            judge.answers(PROMPTS, 4, samples=1, temperature=0.0, stop=stop)
        assert waits.ended == 2, "requests ended before it returned"
        with pytest.raises(Interrupted, match="SIGTERM"):
            judge.verdicts([prompt.tokens for prompt in PROMPTS], PROMPTS, stop)
        assert waits.ended == 4
        assert judge.verdicts([(1, 0)], PROMPTS[:1], stop) == ([True], 0)
    finally:
        judge.close()
    assert time.monotonic() - began < 20


def test_answers_and_verdicts_that_take_too_long_say_by_which_setting() -> None:
    judge = made(Waits, Waits)
    judge.limit_s = 0.1
    try:
        with pytest.raises(TimeoutError, match=r"0.1 s for answers to 3 prompts \(run.phase_timeout_s\)"):
            judge.answers(PROMPTS, 4, samples=1, temperature=0.0)
        with pytest.raises(TimeoutError, match=r"0.1 s for verdicts on 3 answers \(run.phase_timeout_s\)"):
            judge.verdicts([prompt.tokens for prompt in PROMPTS], PROMPTS)
    finally:
        judge.close()


@pytest.mark.parametrize("close_s", [30.0, 0.1], ids=["soon", "after all waits"])
def test_a_client_whose_start_takes_too_long_leaves_no_process(monkeypatch, close_s) -> None:
    begun: list[subprocess.Popen] = []
    start = client_process._started

    def slow(theirs: socket.socket) -> subprocess.Popen:
        time.sleep(1.0)
        begun.append(start(theirs))
        return begun[0]

    monkeypatch.setattr(source, "OPEN_LIMIT_S", 0.2)
    monkeypatch.setattr(loop_thread, "CLOSE_LIMIT_S", close_s)
    monkeypatch.setattr(client_process, "_started", slow)
    client = partial(ClientProcess, partial(SGLangClient, ["http://x"], vocab_size=9, context_length=9))
    with pytest.raises(TimeoutError, match="Waited 0.2 s for the servers' client to start"):
        made(client, Waits)
    deadline = time.monotonic() + 20
    while not begun or begun[0].returncode is None:
        assert time.monotonic() < deadline, "the process goes on"
        time.sleep(0.05)
    assert begun[0].returncode == -9
