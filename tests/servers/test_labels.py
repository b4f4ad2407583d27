"""What servers call their weights: a version comes again after a rollback or a restart, a label does not."""

import asyncio
from http.server import BaseHTTPRequestHandler
from typing import Any

import pytest

pytest.importorskip("aiohttp")

from megatron_jackpot.servers.client import SGLangClient
from megatron_jackpot.servers.protocol import BadReply, Label, Sampling, StaleWeights
from megatron_jackpot.servers.reply import parse_label
from tests.servers.fake_server import VOCAB, FakeServer, group, ok

SAMPLING = Sampling(temperature=1.0, max_new_tokens=4, top_k_logp=3)


@pytest.mark.parametrize("label", [Label(7, "3f2a91c0"), Label(0, "a"), Label(12)])
def test_a_label_is_read_as_it_was_written(label: Label) -> None:
    assert parse_label(str(label)) == label


def test_a_server_that_nobody_updated_has_version_0_of_no_attempt() -> None:
    assert parse_label("default") == Label(0) != Label(0, "a")
    for wrong in ("x@a", "-1@a", "@a", None, 1.5, str(2**31)):
        with pytest.raises(BadReply, match="weight_version"):
            parse_label(wrong)


@pytest.mark.parametrize("what", ["rollouts", "answers"])
def test_where_version_numbers_begin_again_a_server_with_weights_from_before_is_never_asked(what: str):
    """It is left out of the push that goes back and of all later ones, until its number comes again."""

    now = ["7@a"]

    async def go_back(urls: list[str]) -> None:
        settings = {"request_timeout_s": 5, "backoff_s": 0.01}
        async with SGLangClient(urls, vocab_size=VOCAB, context_length=64, **settings) as client:
            for version, attempt in ((7, "a"), (5, "b"), (6, "b"), (7, "b"), (8, "b")):
                now[0] = f"{version}@{attempt}"
                await client.use(version, attempt)
                if what == "rollouts":
                    asked = [client.generate_group([1, 2], 2, SAMPLING) for _ in urls]
                else:
                    asked = [client.answers([1, 2], 4, n=2) for _ in urls]
                await asyncio.gather(*asked)

    def pushed_last(handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        ok({"weight_version": now[0]})(handler, body)

    def sampled(handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        ok(group(version=body["extra_key"]))(handler, body)

    with (
        FakeServer(
            generate=[ok(group(version="7@a"))], model_info=[ok({"weight_version": "7@a"})]
        ) as left_out,
        FakeServer(generate=[sampled], model_info=[pushed_last]) as pushed,
    ):
        asyncio.run(go_back([left_out.url, pushed.url]))
        assert {body["extra_key"] for body in left_out.asked("generate")} == {"7@a"}
        later = [body["extra_key"] for body in pushed.asked("generate")][-8:]
        assert later == [f"{version}@b" for version in (5, 6, 7, 8) for _ in range(2)]
        # A server that did not fail has nothing else to show: a start and a rollback take no token.
        assert not pushed.asked("health_generate")


@pytest.mark.parametrize("what", ["rollouts", "answers"])
def test_tokens_of_another_attempt_or_of_older_weights_are_refused(what: str):
    """Of a server that nobody suspects: it was told of a push and took none."""

    async def asked(urls: list[str]) -> None:
        settings = {"retries": 0, "vocab_size": VOCAB, "context_length": 64}
        async with SGLangClient(urls, **settings) as client:
            await client.use(7, "b")
            if what == "rollouts":
                await client.generate_group([1], 2, SAMPLING)
            else:
                await client.answers([1], 4, n=2)

    now = ok({"weight_version": "7@b"})
    for said, words in (("9@a", "weights 9@a, not of attempt 'b'"), ("6@b", "= 6, older than version 7")):
        with FakeServer(generate=[ok(group(version=said))], model_info=[now]) as server:
            with pytest.raises(StaleWeights, match=words):
                asyncio.run(asked([server.url]))
