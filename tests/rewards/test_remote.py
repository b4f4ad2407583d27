"""Rewards of a service on the loopback: batches, limits of time, and what is a mistake of the service."""

import asyncio
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from megatron_jackpot.rewards import remote
from megatron_jackpot.rewards.parts import Part
from megatron_jackpot.rewards.pool import RewardPool
from megatron_jackpot.rewards.remote import address_mistake


class Handler(BaseHTTPRequestHandler):
    """Scores a response with its length over the label; some responses ask for trouble."""

    def do_POST(self) -> None:
        items = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["items"]
        self.server.seen.append(items)
        texts = {item["response"] for item in items}
        status, body = 200, json.dumps({"rewards": [len(i["response"]) / i["label"] for i in items]}).encode()
        if "slow" in texts:
            self.server.over.wait(30)
        if "steady" in texts:
            self.server.now += 1
            self.server.most = max(self.server.most, self.server.now)
            time.sleep(0.3)
            self.server.now -= 1
        if "broken" in texts:
            status = 503
        if "unknown" in texts:
            status = 404
        if "few" in texts:
            body = b'{"rewards": []}'
        if "named" in texts:
            body = json.dumps({"rewards": [{"score": 1.0, "style": 0.25}] * len(items)}).encode()
        if "nan" in texts:
            body = b'{"rewards": [NaN]}'
        if "head" in texts:
            self.wfile.write(b"HTTP/1.0 200 OK\r\nX-Late: ")
            while not self.server.over.wait(0.1):
                self.wfile.write(b"x")
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) + 1000 * ("cut" in texts)))
        self.end_headers()
        self.wfile.write(body[:5] if "cut" in texts else body)
        if "drip" in texts:
            while not self.server.over.wait(0.1):
                self.wfile.write(b" ")

    def log_message(self, *args: object) -> None:
        pass


class Service(ThreadingHTTPServer):
    request_queue_size = 2 * remote.AT_ONCE


@pytest.fixture
def service():
    server = Service(("127.0.0.1", 0), Handler)
    server.seen, server.over, server.now, server.most = [], threading.Event(), 0, 0
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.over.set()
    server.shutdown()
    server.server_close()
    thread.join(10)


def address(server, path="/score"):
    return f"http://127.0.0.1:{server.server_address[1]}{path}"


def score_all(pool, *items, **seen):
    async def gather():
        counts = pool.failures.begin()
        return await asyncio.gather(*(pool(text, label, counts, seen) for text, label in items))

    return asyncio.run(gather())


def test_calls_that_are_made_together_travel_in_batches_and_come_back_in_order(service):
    with RewardPool(address(service), 3, 10.0, batch=4) as pool:
        assert pool.asks == ["prompt", "num_tokens", "finish_reason"]
        found = score_all(pool, *[("x" * i, 4) for i in range(10)], prompt="p", num_tokens=3)
        assert found == [(i / 4, i == 4) for i in range(10)]
        assert sorted(len(items) for items in service.seen) == [2, 4, 4]
        # Which of those that travel beside each other comes first is the machine's.
        first = {"response": "", "label": 4, "prompt": "p", "num_tokens": 3}
        assert first in [items[0] for items in service.seen]
        assert score_all(pool, ("xx", 4)) == [(0.5, False)]  # Another event loop.
        assert pool.counters == {"scored": 11, "timed_out": 0, "crashed": 0}


def waiting_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("reward-service")]


def wait_until(fulfilled):
    deadline = time.monotonic() + 10
    while not fulfilled():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_more_requests_than_a_service_takes_at_once_wait_outside_of_their_limit(service, monkeypatch):
    monkeypatch.setattr(remote, "AT_ONCE", 3, raising=False)

    async def judged(pool):
        # As on a machine of few cores, of which other work has some.
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(2))
        counts = pool.failures.begin()
        return await asyncio.gather(*(pool("steady", 6, counts) for _ in range(24)))

    with RewardPool(address(service), 1, 1.5, batch=1) as pool:
        assert asyncio.run(judged(pool)) == [(1.0, True)] * 24
        assert pool.counters == {"scored": 24, "timed_out": 0, "crashed": 0}
    assert service.most == 3


def test_whoever_has_gone_before_the_turn_came_is_not_asked_for(service, monkeypatch):
    monkeypatch.setattr(remote, "AT_ONCE", 1, raising=False)

    async def stopped(pool):
        counts = pool.failures.begin()
        calls = [asyncio.ensure_future(pool("steady", 6, counts)) for _ in range(5)]
        await calls[0]
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        await asyncio.sleep(0.5)

    with RewardPool(address(service), 1, 10.0, batch=1) as pool:
        asyncio.run(stopped(pool))
    assert len(service.seen) <= 2


def test_a_pool_that_is_closed_ends_its_requests_and_their_threads_whatever_the_service_does(service):
    async def closed(pool):
        calls = [asyncio.ensure_future(pool("slow", 1)) for _ in range(40)]
        await asyncio.to_thread(wait_until, lambda: len(service.seen) == remote.AT_ONCE)
        pool.close()
        return await asyncio.gather(*calls, return_exceptions=True)

    pool, begun = RewardPool(address(service), 1, 300.0, batch=1), time.monotonic()
    assert {str(error) for error in asyncio.run(closed(pool))} == {
        "The reward pool was closed during a call."
    }
    wait_until(lambda: not waiting_threads())
    assert time.monotonic() - begun < 20 and not service.over.is_set()


@pytest.mark.parametrize("text", ["slow", "drip", "head"])
def test_what_does_not_come_in_time_is_reward_0_and_counted_and_the_next_one_is_scored(service, text):
    with RewardPool(address(service), 1, 0.5, batch=1) as pool:
        # A reply that is whole and goes on: only its end is missing.
        start = time.monotonic()
        if text == "drip":
            service.RequestHandlerClass = type("Drip", (Handler,), {"send_header": lambda *args: None})
        assert score_all(pool, (text, 1)) == [(0.0, False)]
        assert time.monotonic() - start < 10
        service.RequestHandlerClass = Handler
        assert score_all(pool, ("x", 1)) == [(1.0, True)]
        assert pool.counters == {"scored": 1, "timed_out": 1, "crashed": 0}
    wait_until(lambda: not waiting_threads())


@pytest.mark.parametrize("text", ["broken", "cut", "refused"])
def test_a_service_that_breaks_off_or_is_not_there_is_counted(service, text):
    url = address(service)
    if text == "refused":
        other = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        url = address(other)
        other.server_close()
    with RewardPool(url, 1, 5.0) as pool:
        assert score_all(pool, (text, 1)) == [(0.0, False)]
        assert pool.counters == {"scored": 0, "timed_out": 0, "crashed": 1}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("unknown", "status 404, must be 200"),
        ("few", r'must be {"rewards": \[...\]} with 1 numbers'),
        ("nan", "gave nan, not a finite float"),
    ],
)
def test_a_reply_of_another_form_ends_the_run_and_is_shown(service, text, said):
    url = address(service)
    with RewardPool(url, 1, 5.0) as pool, pytest.raises(ValueError, match=f"data.reward = '{url}' .*{said}"):
        score_all(pool, (text, 1))


def test_a_service_may_reply_with_several_numbers_of_which_score_is_the_reward(service):
    with RewardPool(address(service), 1, 5.0) as pool:
        assert score_all(pool, ("named", 1)) == [(1.0, True, {"style": 0.25})]


def test_a_service_is_one_of_several_rewards_beside_those_of_the_workers(service, functions):
    several = {
        "own": Part(f"{functions}.length", 1.0, "all"),
        "far": Part(address(service), 0.5, "all"),
    }
    with RewardPool(several, 1, 10.0) as pool:
        # Both are asked with the whole label, which here is a number.
        assert score_all(pool, ("xx", 2)) == [(1.5, True, {"own": 1.0, "far": 1.0})]
        assert score_all(pool, ("broken", 6)) == [(0.0, False, {"own": 0.0, "far": 0.0})]


def test_addresses_that_no_request_could_be_sent_to_are_refused():
    assert address_mistake("http://judge:8000/score") is None and address_mistake("https://[::1]/") is None
    for wrong in ("http://", "http://judge:99999", "http://judge:0", "http://::1:8000/", "http://me@judge/"):
        assert "must be http://HOST:PORT/PATH" in address_mistake(wrong), wrong
