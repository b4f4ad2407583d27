"""Rewards of a service on the loopback: batches, limits of time, and what is a mistake of the service."""

import asyncio
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

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
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) + 1000 * ("cut" in texts)))
        self.end_headers()
        self.wfile.write(body[:5] if "cut" in texts else body)
        if "drip" in texts:
            while not self.server.over.wait(0.1):
                self.wfile.write(b" ")

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def service():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.seen, server.over = [], threading.Event()
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
        assert service.seen[0][0] == {"response": "", "label": 4, "prompt": "p", "num_tokens": 3}
        assert score_all(pool, ("xx", 4)) == [(0.5, False)]  # Another event loop.
        assert pool.counters == {"scored": 11, "timed_out": 0, "crashed": 0}


@pytest.mark.parametrize("text", ["slow", "drip"])
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
