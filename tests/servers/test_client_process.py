"""The client in a process of its own does what the client does."""

import asyncio
import os
import signal
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

import pytest

pytest.importorskip("aiohttp")

from megatron_jackpot.servers.client import SGLangClient
from megatron_jackpot.servers.client_process import ClientProcess
from megatron_jackpot.servers.protocol import Sampling, ServerError, StaleWeights
from tests.servers.fake_server import VOCAB, FakeServer, error, group, ok

SAMPLING = Sampling(temperature=1.0, max_new_tokens=4, top_k_logp=3)
SETTINGS = dict(vocab_size=VOCAB, context_length=64, retries=1, backoff_s=0.01)


def with_client(url: str, use: Callable[[Any], Coroutine[Any, Any, Any]], expected: int = 0) -> Any:
    client = partial(SGLangClient, [url], **SETTINGS)

    async def run() -> Any:
        async with asyncio.timeout(60), ClientProcess(client) as apart:
            return await use(apart), apart._process

    found, process = asyncio.run(run())
    assert process.returncode == expected, "how it ended when it was left"
    return found


def test_its_groups_and_errors_are_the_clients_and_requests_that_are_tried_again_are_told() -> None:
    async def asked(client: Any) -> list[Any]:
        seen: list[Any] = []
        for prompt in ([1, 2], [1, 2], [VOCAB], [1, 2]):
            retries: list[None] = []
            try:
                got = await client.generate_group(
                    prompt, 2, SAMPLING, retried=lambda told=retries: told.append(None)
                )
                seen.append([[*map(str, vars(one).items())] for one in got])
            except (ServerError, StaleWeights, ValueError) as failure:
                seen.append((type(failure), str(failure)))
            seen.append(len(retries))
        return [*seen, [answer.tolist() for answer in await client.answers([1], 4, n=2)]]

    async def directly(url: str) -> list[Any]:
        async with SGLangClient([url], **SETTINGS) as client:
            return await asked(client)

    def script() -> FakeServer:
        return FakeServer(generate=[ok(group()), error(503), ok(group()), error(400), ok(group())])

    with script() as server:
        apart = with_client(server.url, asked)
        url = server.url
    with script() as server:
        together = asyncio.run(directly(server.url))
        own = server.url
    assert str(apart).replace(url, "URL") == str(together).replace(own, "URL")
    assert apart[1:4:2] == [0, 1] and apart[4][0] is ValueError and apart[6][1].count("HTTP 400") == 1


def test_what_making_the_client_raises_is_raised_here() -> None:
    with pytest.raises(ValueError, match="No server urls"):
        ClientProcess(partial(SGLangClient, [], **SETTINGS))


async def until(there: Callable[[], bool]) -> None:
    while not there():
        await asyncio.sleep(0.01)


def test_none_begins_while_it_is_held_and_one_that_is_cancelled_has_left_its_server() -> None:
    replies, info = [ok(group(), after_s=0.3), ok(group(version="4"), after_s=30)], {"weight_version": "4"}
    with FakeServer(generate=replies, model_info=[ok(info)]) as server:

        async def asked(client: Any) -> list[Any]:
            first = asyncio.ensure_future(client.generate_group([1, 2], 2, SAMPLING))
            await until(lambda: len(server.requests) == 1)
            await client.hold()
            second = asyncio.ensure_future(client.generate_group([1, 2], 2, SAMPLING))
            await client.quiet()
            seen = [len((await first)[0].tokens), len(server.requests)]
            await client.use(4)
            await until(lambda: len(server.asked("generate")) == 2)
            second.cancel()
            await asyncio.gather(second, return_exceptions=True)
            # It counts as in flight until its connection is closed.
            await client.quiet()
            return [*seen, second.cancelled()]

        assert with_client(server.url, asked) == [4, 1, True]
        assert [body["extra_key"] for body in server.asked("generate")] == ["0", "4"]


def test_a_call_that_is_cancelled_while_the_process_still_starts_returns() -> None:
    async def asked(client: ClientProcess) -> list[bool]:
        calls = [asyncio.ensure_future(client.hold()), asyncio.ensure_future(client.use(3))]
        await asyncio.sleep(0.01)
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        return [call.cancelled() for call in calls]

    assert with_client("http://127.0.0.1:1", asked) == [True, True]


@pytest.mark.parametrize("begun", [False, True])
def test_signals_that_ask_a_run_to_save_do_not_end_it(begun: bool) -> None:
    with FakeServer(generate=[ok(group())]) as server:

        async def asked(client: ClientProcess) -> int:
            if begun:
                await client.hold()
                await client.use(0)
            for signum in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
                os.kill(client._process.pid, signum)
            return len(await client.generate_group([1, 2], 2, SAMPLING))

        assert with_client(server.url, asked) == 2


def test_where_the_process_is_killed_all_calls_fail() -> None:
    with FakeServer(generate=[ok(group(), after_s=30)]) as server:

        async def asked(client: ClientProcess) -> None:
            under_way = asyncio.ensure_future(client.generate_group([1, 2], 2, SAMPLING))
            await until(lambda: bool(server.requests))
            os.kill(client._process.pid, signal.SIGKILL)
            for call in (under_way, client.hold()):
                with pytest.raises(RuntimeError, match="is gone .exit code -9"):
                    await call

        with_client(server.url, asked, expected=-signal.SIGKILL)
