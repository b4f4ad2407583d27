"""Every bad input of a server ends in a clear error or a counted skip, in bounded time."""

import asyncio
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("aiohttp")

from megatron_jackpot.servers.admin import ServerAdmin
from megatron_jackpot.servers.client import SGLangClient
from megatron_jackpot.servers.protocol import BadReply, Completion, Sampling, ServerError, StaleWeights
from megatron_jackpot.servers.reply import parse_group
from tests.servers.fake_server import (
    VOCAB,
    FakeServer,
    cut_off,
    error,
    flat_topk,
    group,
    ok,
    raw,
    sample,
)

SAMPLING = Sampling(temperature=1.0, max_new_tokens=4, top_k_logp=3)


def ask(
    servers: Sequence[FakeServer],
    *,
    n: int = 2,
    prompt: Sequence[int] = (1, 2),
    sampling: Sampling = SAMPLING,
    **knobs: Any,
) -> Any:
    """(completions, how often it was tried again) of one group request."""

    async def run() -> Any:
        settings = {"request_timeout_s": 5, "backoff_s": 0.01} | knobs
        urls = [server.url for server in servers]
        async with SGLangClient(urls, vocab_size=VOCAB, context_length=64, **settings) as client:
            retries: list[None] = []
            group = await client.generate_group(prompt, n, sampling, retried=lambda: retries.append(None))
            return group, len(retries)

    return asyncio.run(run())


def parse(reply: list[dict[str, Any]], *, spans: bool = False) -> list[Completion]:
    return parse_group(json.dumps(reply).encode(), len(reply), SAMPLING, vocab_size=VOCAB, spans=spans)


def test_flat_base64_top_k_equals_nested_json():
    (flat,), (nested,) = parse([sample(seed=7)]), parse([sample(seed=7, flat=False)])
    np.testing.assert_array_equal(flat.topk_ids, nested.topk_ids)
    np.testing.assert_array_equal(flat.topk_logp, nested.topk_logp)
    np.testing.assert_array_equal(flat.server_logp, flat.topk_logp[:, 0])
    assert flat.topk_ids.shape == (4, 3)


@pytest.mark.parametrize(("prefix_cache", "copies", "each"), [(True, 1, 2), (False, 2, 1)])
def test_a_group_is_one_request_to_one_server_without_truncation_of_the_distribution(
    prefix_cache: bool, copies: int, each: int
):
    with FakeServer(generate=[ok(group())]) as one, FakeServer(generate=[ok(group())]) as other:
        completions, _ = ask([one, other], prefix_cache=prefix_cache)
        (body,) = one.asked("generate") + other.asked("generate")
    assert len(completions) == 2
    params = body["sampling_params"]
    assert (params["n"], params["top_p"], params["top_k"], params["repetition_penalty"]) == (
        each,
        1.0,
        -1,
        1.0,
    )
    assert body["input_ids"] == [[1, 2]] * copies and len(set(body["rid"])) == copies


def test_without_top_k_none_is_asked_for_and_none_expected() -> None:
    """SGLang then leaves all of its fields out."""
    bare = group()
    for one in bare:
        meta = one["meta_info"]
        one["meta_info"] = {name: value for name, value in meta.items() if "top_logprobs" not in name}
    with FakeServer(generate=[ok(bare)]) as server:
        completions, retries = ask([server], sampling=replace(SAMPLING, top_k_logp=0))
        (body,) = server.asked("generate")
    assert retries == 0 and body["return_logprob"] is True and body["top_logprobs_num"] == 0
    assert not [name for name in body if "flat" in name]
    for completion in completions:
        assert completion.topk_ids.shape == completion.topk_logp.shape == (4, 0)
        assert completion.valid.all() and (completion.server_logp < 0).all()
    with pytest.raises(ValueError, match="top_k_logp = -1: must be >= 0"):
        replace(SAMPLING, top_k_logp=-1)


@pytest.mark.parametrize("not_finite", [None, float("nan"), float("-inf")])
def test_a_sampled_logp_that_is_not_finite_is_masked_and_the_rest_kept(not_finite):
    reply = sample()
    reply["meta_info"]["output_token_logprobs"][1][0] = not_finite
    (completion,) = parse([reply])
    assert completion.valid.tolist() == [True, False, True, True]
    assert completion.server_logp[1] == 0.0


def test_nan_in_the_top_k_becomes_padding_and_is_counted():
    reply = sample()
    logp = np.array([[-1, np.nan, -2], [-1, -2, -np.inf], [-1, -2, -3], [-1, -2, -3]], np.float32)
    reply["meta_info"] |= flat_topk(np.tile(np.array([4, 5, 6]), (4, 1)), logp)
    (completion,) = parse([reply])
    assert completion.topk_ids[:2].tolist() == [[4, -1, 6], [4, 5, -1]]
    assert np.isneginf(completion.topk_logp[completion.topk_ids == -1]).all()
    assert completion.num_dropped_topk == 1


def test_weight_versions_are_per_token():
    reply = sample()
    spans = [{"version": "default", "start": 0, "end": 1}, {"version": "6", "start": 1, "end": 4}]
    reply["meta_info"]["weight_versions"] = spans
    assert parse([reply])[0].weight_version.tolist() == [0, 6, 6, 6]


def test_a_reply_without_spans_is_of_one_version_or_an_error_where_a_push_may_fall_within_it():
    """What a server names then is the version at the end of the response. An aborted one is not read."""
    bare, aborted = sample(version="6"), sample(version="6", finish="abort")
    for one in (bare, aborted):
        del one["meta_info"]["weight_versions"]
    assert parse([bare])[0].weight_version.tolist() == [6] * 4
    assert parse([aborted], spans=True)[0].finish == "abort"
    with pytest.raises(BadReply, match="no weight_versions.* SGLang 0.5.23 sends them.* rollout.ahead=0"):
        parse([bare], spans=True)
    with FakeServer(generate=[ok([bare])]) as server:
        completions, _ = ask([server], n=1, version=6)
        assert completions[0].weight_version.tolist() == [6] * 4
        with pytest.raises(ServerError, match=f"{server.url}: meta_info has no weight_versions"):
            ask([server], n=1, version=6, through_pushes=True, retries=0)


def change(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def apply(reply: dict[str, Any]) -> None:
        (reply["meta_info"] if path != "output_ids" else reply)[path] = value

    return apply


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (change("output_ids", [1, 2]), "2 tokens but finished by length, expected max_new_tokens = 4"),
        (change("output_ids", [1, 2, 3, 4, 5]), "5 tokens, expected 1 .. 4"),
        (change("output_ids", [1, 2, 3, -1]), "output_ids holds -1"),
        (change("output_ids", [1, 2, 3, VOCAB]), f"output_ids holds {VOCAB}"),
        (change("output_ids", [1, 2, 3, 2**40]), "list of int32"),
        (change("output_ids", [1, 2, 3, -(2**63)]), "list of int32"),
        (change("output_token_logprobs", [[[-1.0], 1, None]] * 4), "[logp, id, text] entries"),
        (change("output_token_logprobs", [[-(10**400), 1, None]] * 4), "[logp, id, text] entries"),
        (change("output_ids", None), "list of int32"),
        (change("output_ids", [7, 7, 7, 7]), "other ids than output_ids"),
        (change("output_token_logprobs", [[-1.0, 1, None]] * 3), "3 entries, expected 4"),
        (change("output_token_logprobs", "x"), "expected 4"),
        (change("output_top_logprobs_shape", [4, 2]), "expected [4, 3]"),
        (change("output_top_logprobs_null_prefix", 1), "null prefix of 1"),
        (change("output_top_logprobs_val_flat_b64", "AAAA"), "3 bytes, expected 48"),
        (change("output_top_logprobs_idx_flat_b64", "***"), "not base64"),
        (change("output_top_logprobs_idx_flat_b64_dtype", "int64"), "expected 'int32'"),
        (change("weight_versions", [{"version": "1", "start": 1, "end": 4}]), "must cover 0 .. 4"),
        (change("weight_versions", [{"version": "x", "start": 0, "end": 4}]), "'x'"),
        (change("finish_reason", {"type": "???"}), "stop, length or abort"),
    ],
)
def test_a_reply_that_breaks_the_protocol_is_an_error_that_names_the_field(break_it, words):
    reply = sample()
    break_it(reply)
    with pytest.raises(BadReply) as caught:
        parse([reply])
    assert words in str(caught.value)


def test_a_positive_logp_and_a_top_k_id_outside_the_vocabulary_are_errors():
    sampled, flat = sample(), sample()
    sampled["meta_info"]["output_token_logprobs"][0][0] = 0.5
    flat["meta_info"] |= flat_topk(np.full((4, 3), VOCAB), np.full((4, 3), -1.0))
    with pytest.raises(BadReply, match="not positive"):
        parse([sampled])
    with pytest.raises(BadReply, match=f"holds {VOCAB}"):
        parse([flat])


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (cut_off(group()), "broke off"),
        (raw(json.dumps(group()).encode()[:-30]), "is not JSON"),
        (ok(group(n=3)), "3 completions, expected 2"),
        (ok(group(length=3)), "3 tokens but finished by length"),
        (error(500), "HTTP 500"),
    ],
)
def test_a_failing_server_is_left_for_another_and_alone_it_is_an_error_that_names_it(answer, words):
    with FakeServer(generate=[answer]) as bad, FakeServer(generate=[ok(group())]) as good:
        completions, retries = ask([bad, good])
        assert len(completions) == 2 and retries == 1
        with pytest.raises(ServerError) as caught:
            ask([bad], retries=2)
        assert len(bad.asked("generate")) == 1 + 3
        assert words in str(caught.value) and bad.url in str(caught.value)


def test_a_server_that_hangs_is_given_up_after_the_time_limit_and_asked_to_abort():
    with FakeServer(generate=[ok(group(), after_s=60)]) as slow:
        with pytest.raises(ServerError, match=f"{slow.url}: no reply to /generate within 0.3 s"):
            ask([slow], request_timeout_s=0.3, retries=0, prefix_cache=False)
        assert slow.in_flight >= 1  # its answer is still to come
        (asked,), ended = slow.asked("generate"), slow.asked("abort_request")
        assert len(asked["rid"]) == 2
        assert sorted(one["rid"] for one in ended) == sorted(asked["rid"])


def test_nobody_listening_is_an_error_that_names_the_address():
    with FakeServer() as gone:
        pass
    with pytest.raises(ServerError, match=f"{gone.url}: GET /model_info failed"):
        ask([gone], retries=1)


def test_a_server_with_old_weights_is_not_asked_again_until_it_holds_new_ones():
    old, new = ok({"weight_version": "3"}), ok({"weight_version": "5"})
    with FakeServer(
        generate=[ok(group(version="3")), ok(group(version="5"))], model_info=[old, new]
    ) as server:
        with pytest.raises(StaleWeights, match="holds weight version 3, not version 5, the last one pushed"):
            ask([server], version=5, retries=1)
        assert len(server.asked("generate")) == 1
        completions, _ = ask([server], version=5)
        assert completions[0].weight_version.tolist() == [5, 5, 5, 5]


def test_a_server_that_was_started_anew_is_left_out_for_one_with_new_weights(monkeypatch):
    # Without its rest after a failure it is the least loaded and would be asked first.
    monkeypatch.setattr("megatron_jackpot.servers.client.REST_S", 0.0)

    async def three_groups(urls: list[str]) -> None:
        settings = {"request_timeout_s": 5, "backoff_s": 0.01, "version": 5}
        async with SGLangClient(urls, vocab_size=VOCAB, context_length=64, **settings) as client:
            for _ in range(3):
                await client.generate_group([1, 2], 2, SAMPLING)

    with (
        FakeServer(generate=[error(500), ok(group(version="0"))]) as anew,
        FakeServer(generate=[ok(group(version="5"))]) as good,
    ):
        asyncio.run(three_groups([anew.url, good.url]))
        assert len(anew.asked("generate")) == 1 and len(anew.asked("model_info")) == 2
        assert len(good.asked("generate")) == 3


def test_a_refused_request_is_not_repeated():
    with FakeServer(generate=[error(400)]) as server:
        with pytest.raises(ServerError, match="HTTP 400"):
            ask([server])
        assert len(server.asked("generate")) == 1


@pytest.mark.parametrize("prompt", [(), (1, VOCAB), (1, -1), tuple([1] * 60)])
def test_a_prompt_that_would_harm_the_server_is_never_sent(prompt):
    with FakeServer(generate=[ok(group())]) as server:
        with pytest.raises(ValueError):
            ask([server], prompt=prompt)
        assert server.requests == []


def test_load_is_spread_bounded_and_a_failed_server_rests():
    async def run(servers: list[FakeServer]) -> None:
        urls = [server.url for server in servers]
        settings = {"vocab_size": VOCAB, "context_length": 64, "concurrency": 4, "backoff_s": 0.01}
        async with SGLangClient(urls, **settings) as client:
            await asyncio.gather(*(client.generate_group((1, 2), 2, SAMPLING) for _ in range(12)))

    slow = ok(group(), after_s=0.05)
    with FakeServer(generate=[slow]) as one, FakeServer(generate=[slow]) as two:
        asyncio.run(run([one, two]))
        assert len(one.asked("generate")) == len(two.asked("generate")) == 6
        assert one.most_in_flight == two.most_in_flight == 2
    with FakeServer(generate=[error(503)]) as dead, FakeServer(generate=[slow]) as alive:
        asyncio.run(run([dead, alive]))
        assert len(dead.asked("generate")) <= 2 and len(alive.asked("generate")) == 12


@pytest.mark.parametrize(("n", "temperature"), [(1, 0.0), (3, 0.6)])
def test_answers_are_tokens_of_as_many_samples_as_were_asked_for(n: int, temperature: float):
    async def run(url: str) -> list[np.ndarray]:
        settings = {"vocab_size": VOCAB, "context_length": 64, "prefix_cache": False}
        async with SGLangClient([url], **settings) as client:
            return await client.answers((1, 2), 4, n=n, temperature=temperature)

    with FakeServer(generate=[ok(sample() if n == 1 else [sample()] * n)]) as server:
        assert [one.tolist() for one in asyncio.run(run(server.url))] == [sample()["output_ids"]] * n
        (asked,) = server.asked("generate")
        assert asked["input_ids"] == [[1, 2]] * n and asked["sampling_params"]["temperature"] == temperature


def test_a_control_call_names_the_server_that_refuses_or_is_late():
    refusal = ok({"success": False, "message": "no such group"}, status=400)
    with FakeServer() as fine, FakeServer(pause_generation=[refusal]) as bad:
        with pytest.raises(
            ServerError, match=f"{bad.url}: POST /pause_generation was refused.*no such group"
        ):
            asyncio.run(ServerAdmin([fine.url, bad.url]).pause())
    with FakeServer(model_info=[ok({}, after_s=2)]) as late:
        with pytest.raises(ServerError, match=f"{late.url}: no reply to GET /model_info within 0.2 s"):
            asyncio.run(ServerAdmin([late.url], timeout_s=0.2).model_info())


def test_requests_carry_the_version_they_begin_with_and_none_begins_while_it_is_held():
    async def push_in_between(url: str) -> list[bool]:
        async with SGLangClient([url], vocab_size=VOCAB, context_length=64, version=3) as client:
            under_way = asyncio.ensure_future(client.generate_group([1, 2], 2, SAMPLING))
            await asyncio.sleep(0.1)
            await client.hold()
            held = asyncio.ensure_future(client.generate_group([1, 2], 2, SAMPLING))
            await client.quiet()
            await under_way
            seen = [held.done()]
            await client.use(4)
            await held
            return seen

    replies = [ok(group(version="3"), after_s=0.3), ok(group(version="4"))]
    with FakeServer(generate=replies, model_info=[ok({"weight_version": "4"})]) as server:
        assert asyncio.run(push_in_between(server.url)) == [False]
        assert [body["extra_key"] for body in server.asked("generate")] == ["3", "4"]


@pytest.mark.parametrize("what", ["an evaluation's answers", "a probe's groups"])
def test_what_the_main_thread_waits_for_does_not_queue_behind_rollouts(what: str):
    async def beside(url: str) -> list[bool]:
        settings = {"vocab_size": VOCAB, "context_length": 64, "concurrency": 1, "prefix_cache": False}
        async with SGLangClient([url], **settings) as client:
            rollouts = [asyncio.ensure_future(client.generate_group([1, 2], 2, SAMPLING)) for _ in range(2)]
            while not server.requests:
                await asyncio.sleep(0.01)
            if what == "a probe's groups":
                await client.generate_group([1, 2], 2, SAMPLING, aside=True)
            else:
                await client.answers((1, 2), 4, n=2)
            done = [rollout.done() for rollout in rollouts]
            for rollout in rollouts:
                rollout.cancel()
            return done

    with FakeServer(generate=[ok(group(), after_s=3), ok(group())]) as server:
        assert asyncio.run(beside(server.url)) == [False, False]


def test_an_abort_reaches_every_server_that_answers_though_another_refuses_at_once() -> None:
    slow = ok({}, after_s=0.3)
    with FakeServer(abort_request=[error(500)]) as dead, FakeServer(abort_request=[slow]) as alive:
        with pytest.raises(ServerError, match="HTTP 500"):
            asyncio.run(ServerAdmin([dead.url, alive.url], timeout_s=5).abort_all())
        assert alive.asked("abort_request") == [{"abort_all": True}]
