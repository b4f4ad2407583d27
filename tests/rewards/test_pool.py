import asyncio
import logging
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_jackpot.config import describe
from megatron_jackpot.monitor.metrics import METRICS
from megatron_jackpot.records import Prompt
from megatron_jackpot.rewards import failures
from megatron_jackpot.rewards.failures import KINDS, RewardsFailing, failure_sums
from megatron_jackpot.rewards.pool import RewardPool

pytestmark = pytest.mark.timeout(60)


def score_all(pool, *items, counts=None):
    async def gather():
        return await asyncio.gather(*(pool(text, label, counts) for text, label in items))

    return asyncio.run(gather())


def running(pid):
    """Whether a process runs; one that only waits to be reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_rewards_come_back_in_order_and_only_one_is_correct(functions):
    with RewardPool(f"{functions}.length", 2, 10.0) as pool:
        items = [("x" * i, 4) for i in range(9)]
        assert score_all(pool, *items) == [(i / 4, i == 4) for i in range(9)]
        assert pool.counters == {"scored": 9, "timed_out": 0, "crashed": 0}


def test_large_texts_and_odd_characters_pass():
    with RewardPool("exact", 1, 10.0) as pool:
        texts = ["ab\n" * 400_000, "\x00\u2028\ud800", ""]
        assert score_all(pool, *((text, {"answer": text.strip()}) for text in texts)) == [(1.0, True)] * 3


def test_the_time_limit_kills_the_worker_and_its_children_and_the_others_still_count(functions, tmp_path):
    with RewardPool(f"{functions}.hang", 2, 2.0) as pool:
        start = time.monotonic()
        results = score_all(pool, ("hang", str(tmp_path / "pids")), *[("fine", "")] * 6)
        assert time.monotonic() - start < 20
        assert results == [(0.0, False)] + [(1.0, True)] * 6
        assert pool.counters == {"scored": 6, "timed_out": 1, "crashed": 0}
        deadline = time.monotonic() + 10
        while any(running(int(pid)) for pid in (tmp_path / "pids").read_text().split()):
            assert time.monotonic() < deadline, "the kernel has not ended what was killed 10 s ago"
            time.sleep(0.02)
        # The replaced worker works, and so does a new event loop.
        assert score_all(pool, *[("fine", "")] * 4) == [(1.0, True)] * 4


def test_a_worker_that_ends_is_counted_and_replaced(functions):
    with RewardPool(f"{functions}.crash", 1, 10.0) as pool:
        results = score_all(pool, ("fine", ""), ("crash", ""), ("fine", ""), ("kill", ""), ("fine", ""))
        assert [reward for reward, _ in results] == [1.0, 0.0, 1.0, 0.0, 1.0]
        assert pool.counters == {"scored": 3, "timed_out": 0, "crashed": 2}


@pytest.mark.parametrize("text", ["nan", "inf", "text", "none"])
def test_a_result_that_is_not_a_finite_float_is_an_error(functions, text):
    with RewardPool(f"{functions}.odd", 1, 10.0) as pool:
        with pytest.raises(ValueError, match=r"odd' returned .* for label 'gold', not a finite float"):
            score_all(pool, (text, "gold"))
        assert score_all(pool, ("int", "gold")) == [(1.0, True)]


def test_an_exception_in_the_reward_is_an_error_with_its_traceback(functions):
    with RewardPool(f"{functions}:odd", 1, 10.0) as pool:
        with pytest.raises(ValueError, match="(?s)raised an exception:.*KeyError: 'other'"):
            score_all(pool, ("other", ""))


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ("exakt", "'exakt' is unknown. Use exact, reasoning_gym, math_verify, code or package"),
        ("no_such_package.reward", "No module named 'no_such_package'"),
        ("jackpot_test_rewards.missing", "module jackpot_test_rewards has no 'missing'"),
        ("jackpot_test_rewards:missing", "module jackpot_test_rewards has no 'missing'"),
        ("jackpot_test_rewards:", "must be package.module:Name"),
        (
            "jackpot_test_rewards.not_a_function",
            "must be called with .response_text, label.*: .* not a callable",
        ),
        ("jackpot_test_rewards:of_one", "must be called with .response_text, label.*: too many positional"),
    ],
)
def test_a_reward_that_is_not_there_is_refused_at_start(functions, reward, message):
    with pytest.raises(ValueError, match=message):
        RewardPool(reward, 2, 10.0)


def test_a_tower_of_powers_does_not_hang_math_verify():
    with RewardPool("math_verify", 1, 4.0) as pool:
        start = time.monotonic()
        results = score_all(pool, ("$9^{9^{9^{9}}}$", {"answer": "5"}), ("\\boxed{5}", {"answer": "5"}))
        assert time.monotonic() - start < 30
        assert results == [(0.0, False), (1.0, True)]


def test_labels_that_cannot_be_scored_are_named_by_prompt():
    prompts = [Prompt(i, (1,), {"answer": answer}) for i, answer in enumerate(["x^2-1", "", "7", "$$"])]
    with RewardPool("math_verify", 2, 10.0) as pool:
        asyncio.run(pool.check_labels(prompts[::2]))
        with pytest.raises(ValueError, match=r"(?s)2 of 4 labels.*prompt 1: .*parses to nothing.*prompt 3: "):
            asyncio.run(pool.check_labels(prompts))
        with pytest.raises(ValueError, match=r"data/a\.jsonl, line 2: the answer '' parses to nothing"):
            asyncio.run(pool.check_labels(prompts, Path("data/a.jsonl")))


def test_labels_found_right_are_not_checked_again_and_wrong_or_new_ones_are(monkeypatch):
    asked = []
    ask = RewardPool._ask

    async def counting(pool, kind, text, label):
        asked.extend(label)
        return await ask(pool, kind, text, label)

    monkeypatch.setattr(RewardPool, "_ask", counting)
    prompts = [Prompt(i, (1,), {"answer": answer}) for i, answer in enumerate(["2", "7", ""])]
    with RewardPool("exact", 1, 20.0) as pool:
        for _ in range(2):
            with pytest.raises(ValueError, match="1 of 3 labels"):
                asyncio.run(pool.check_labels(prompts))
        assert [label["answer"] for label in asked] == ["2", "7", "", ""]
        asked.clear()
        asyncio.run(pool.check_labels([Prompt(5, (1,), {"answer": "8"}), *prompts[:2]]))
        assert asked == [{"answer": "8"}]
        asked.clear()
        monkeypatch.setenv("JACKPOT_HOME", "/proc/nowhere")
        for _ in range(2):
            asyncio.run(pool.check_labels(prompts[:1]))
        assert asked == [{"answer": "2"}] * 2


def test_a_label_whose_check_takes_too_long_is_found_among_the_others():
    with RewardPool("exact", 1, 20.0) as pool:
        ask = pool._ask

        async def slow(kind, text, labels):
            if {"answer": "hang"} in labels:
                return {"failed": "timed_out", "why": "no reply within 1 s"}
            return await ask(kind, text, labels)

        pool._ask = slow
        prompts = [Prompt(i, (1,), {"answer": answer}) for i, answer in enumerate(["1", "2", "hang", "3"])]
        with pytest.raises(
            ValueError, match=r"(?s)1 of 4 labels.*prompt 2: its check failed: no reply within"
        ):
            asyncio.run(pool.check_labels(prompts))
    assert pool.counters == {"scored": 0, "timed_out": 0, "crashed": 0}


def test_labels_of_a_custom_reward_are_not_judged(functions):
    with RewardPool(f"{functions}.length", 1, 10.0) as pool:
        asyncio.run(pool.check_labels([Prompt(0, (1,), None)]))


def test_a_cancelled_call_does_not_leave_its_reply_to_the_next_one(functions):
    async def cancel_then_score(pool):
        first = asyncio.create_task(pool("x", None))
        waiting = asyncio.create_task(pool("y", None))
        await asyncio.sleep(0.1)
        waiting.cancel()
        first.cancel()
        await asyncio.gather(first, waiting, return_exceptions=True)
        return await pool("z", None)

    with RewardPool(f"{functions}.slow", 1, 10.0) as pool:
        assert asyncio.run(cancel_then_score(pool)) == (1.0, True)
        assert pool.counters["scored"] == 1


def test_a_reply_that_came_while_the_event_loop_was_busy_still_counts(functions):
    async def score_in_a_busy_loop(pool):
        task = asyncio.create_task(pool("x", None))
        await asyncio.sleep(0.1)
        time.sleep(2.0)
        return await task

    with RewardPool(f"{functions}.slow", 1, 1.5) as pool:
        assert asyncio.run(score_in_a_busy_loop(pool)) == (1.0, True)


def test_a_worker_that_died_while_idle_costs_no_item(functions):
    with RewardPool(f"{functions}.pid", 1, 10.0) as pool:
        ((pid, _),) = score_all(pool, ("", None))
        os.kill(int(pid), 9)
        time.sleep(0.2)
        assert score_all(pool, ("", None))[0][0] != pid
        assert pool.counters == {"scored": 2, "timed_out": 0, "crashed": 0}


def test_close_ends_its_own_workers_and_leaves_those_of_another_pool(functions):
    with RewardPool(f"{functions}.pid", 1, 10.0) as other:
        pool = RewardPool(f"{functions}.pid", 2, 10.0)
        pids = {int(reward) for reward, _ in score_all(pool, *[("", None)] * 20)}
        pool.close()
        assert len(pids) == 2 and not any(running(pid) for pid in pids)
        assert score_all(other, ("", None))[0][0] > 0
        with pytest.raises(RuntimeError, match="closed"):
            score_all(pool, ("", None))


def test_workers_in_the_middle_of_an_item_end_with_a_trainer_that_is_killed(functions, tmp_path):
    program = f"""
import asyncio, os
from megatron_jackpot.rewards.pool import RewardPool
async def main():
    asyncio.ensure_future(RewardPool("{functions}.hang", 1, 60.0)("hang", "{tmp_path}/pids"))
    while not os.path.exists("{tmp_path}/pids"):
        await asyncio.sleep(0.05)
    os.kill(os.getpid(), 9)
asyncio.run(main())
"""
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])
    trainer = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": path}, timeout=40
    )
    assert trainer.returncode == -9
    worker, child = (int(pid) for pid in (tmp_path / "pids").read_text().split())
    deadline = time.monotonic() + 60
    while running(worker) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(child, 9)
    assert not running(worker)


def test_close_during_calls_ends_them(functions):
    async def close_in_between(pool):
        tasks = [asyncio.create_task(pool("x", None)) for _ in range(3)]
        await asyncio.sleep(0.1)
        pool.close()
        return await asyncio.gather(*tasks, return_exceptions=True)

    results = asyncio.run(close_in_between(RewardPool(f"{functions}.slow", 1, 10.0)))
    assert all(isinstance(result, RuntimeError) for result in results)


def test_an_item_that_takes_all_memory_or_depth_costs_itself_alone(functions):
    with RewardPool(f"{functions}.greedy", 1, 10.0, memory_bytes=2**28) as pool:
        results = score_all(pool, ("memory", ""), ("depth", ""), ("fine", ""))
        assert [reward for reward, _ in results] == [0.0, 0.0, 1.0]
        assert pool.counters == {"scored": 1, "timed_out": 0, "crashed": 2}


def test_a_time_out_inside_a_reward_is_counted_as_one(functions):
    with RewardPool(f"{functions}.late", 1, 10.0) as pool:
        assert score_all(pool, ("x", "")) == [(0.0, False)]
        assert pool.counters == {"scored": 0, "timed_out": 1, "crashed": 0}
        assert asyncio.run(pool.judge("x", "", pool.failures.begin(), {})) is None


def test_the_log_of_many_failures_is_short(functions, caplog):
    with RewardPool(f"{functions}.late", 1, 10.0) as pool, caplog.at_level(logging.WARNING):
        score_all(pool, *[("x" * 10_000, "gold" * 1000)] * 200)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 8 and sum(map(len, lines)) < 8 * 600
    assert "the judge did not answer" in lines[0] and "(10000 characters)" in lines[0]
    assert "the 128. of this kind" in lines[-1]


def test_too_large_a_share_of_failures_ends_the_call_with_what_to_look_at(functions):
    with RewardPool(f"{functions}.greedy", 1, 10.0, memory_bytes=2**28, max_failed=0.25) as pool:
        score_all(pool, *[("fine", "")] * 100)
        counts = pool.failures.begin()
        score_all(pool, *[("memory", "")] * (failures.MIN_FAILED - 1), counts=counts)
        message = (
            r"20 of 20 rewards failed \(0 timed out, 20 crashed\), more than data.max_failed_rewards = 0.25"
        )
        with pytest.raises(RewardsFailing, match=message):
            score_all(pool, ("memory", ""), counts=counts)
        assert failure_sums(counts) == {"reward/timed_out": (0.0, 20.0), "reward/crashed": (20.0, 20.0)}
        other = pool.failures.begin()
        score_all(pool, *[("fine", "")] * 100, counts=other)
        score_all(pool, *[("memory", "")] * (failures.MIN_FAILED + 5), counts=other)
        assert counts == {"scored": 0, "timed_out": 0, "crashed": 20}


def test_every_count_that_the_configuration_promises_is_shown():
    """A setting whose text says "counted" names here where the count is seen."""
    shown = {
        "data.reward_timeout_s": "reward/timed_out",
        "data.reward_memory_gb": "reward/crashed",
        "data.max_prompt_tokens": "a line of the log: tests/data/test_prompts.py",
    }
    promised = {key for key, _, text in describe() if re.search(r"(?:is|are|and) counted", str(text))}
    assert promised == shown.keys()
    documented = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
    for name in [*(f"reward/{kind}" for kind in KINDS), "eval/failed_rewards"]:
        assert name in METRICS and f"`{name}`" in documented
    with RewardPool("exact", 1, 10.0) as pool:
        counted = {f"reward/{name}" for name in pool.counters if name != "scored"}
        assert failure_sums(pool.failures.begin()).keys() == counted <= METRICS.keys()


HARD_LIMITED = """
import resource
resource.setrlimit(resource.RLIMIT_AS, (40 * 2**30, 40 * 2**30))
resource.setrlimit(resource.RLIMIT_CPU, (900, 900))
from megatron_jackpot.rewards.confine import confine, cpu_left, limit_cpu
confine(2**50, True)
limit_cpu(10.0)
assert resource.getrlimit(resource.RLIMIT_AS) == (40 * 2**30, 40 * 2**30)
soft, hard = resource.getrlimit(resource.RLIMIT_CPU)
assert 10 <= soft <= 20 and hard == 900, (soft, hard)
limit_cpu(1e6)
assert resource.getrlimit(resource.RLIMIT_CPU) == (900, 900)
assert 800 < cpu_left() <= 900
"""

NEAR_THE_END = """
import asyncio, resource
from megatron_jackpot.rewards.pool import RewardPool
resource.setrlimit(resource.RLIMIT_CPU, (30, 30))
async def main():
    with RewardPool("REWARD", 1, 10.0) as pool:
        pids = [(await pool("", None))[0] for _ in range(3)]
        assert len(set(pids)) == 3 and pool.counters == {"scored": 3, "timed_out": 0, "crashed": 0}, pids
asyncio.run(main())
"""


def test_limits_stay_below_the_hard_limits_which_are_never_touched():
    subprocess.run([sys.executable, "-c", HARD_LIMITED], check=True, timeout=60)


def test_a_worker_near_its_hard_limit_of_cpu_time_is_replaced_between_items(functions):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, os.getcwd()])}
    program = NEAR_THE_END.replace("REWARD", f"{functions}.pid")
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60, env=environment)


def test_cpu_time_is_limited_by_item_and_not_by_the_worker_s_life(functions):
    with RewardPool(f"{functions}.greedy", 1, 0.6) as pool:
        pool.timeout_s = (
            30  # The wall limit is out of the way: the kernel ends the worker after 4 * 0.6 s of CPU.
        )
        started = time.monotonic()
        assert score_all(pool, ("cpu", ""))[0] == (0.0, False)
        assert pool.counters["crashed"] == 1 and time.monotonic() - started < 25
        assert score_all(pool, ("fine", "")) == [(1.0, True)]


def test_a_reward_has_no_network_unless_it_is_given_one(functions):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        with RewardPool(f"{functions}.greedy", 1, 10.0) as pool:
            if pool._idle[0].exposed:
                pytest.skip(f"this machine allows no network namespace: {pool._idle[0].exposed}")
            assert score_all(pool, ("network", port)) == [(0.5, False)]
        with RewardPool(f"{functions}.greedy", 1, 10.0, network=True) as pool:
            assert score_all(pool, ("network", port)) == [(0.25, False)]
