"""Several rewards: which a row gets, their weighted sum, and what is said of mistakes."""

import asyncio

import pytest

from megatron_jackpot.records import Prompt
from megatron_jackpot.rewards.parts import Part
from megatron_jackpot.rewards.pool import RewardPool
from megatron_jackpot.rewards.returned import numbers_of


def parts(functions, **changes):
    chosen = {
        "answer": dict(reward="exact", weight=1.0, rows="all"),
        "length": dict(reward=f"{functions}.length_of", weight=0.25, rows="all"),
        "tokens": dict(reward=f"{functions}.tokens", weight=-2.0, rows="named"),
    }
    return {name: Part(**{**part, **changes.get(name, {})}) for name, part in chosen.items()}


@pytest.fixture
def several(functions, tmp_path, monkeypatch):
    """A module of two more rewards beside the tests' own."""
    name = f"{functions}_more"
    (tmp_path / f"{name}.py").write_text(
        "def length_of(text, label):\n    return len(text)\n"
        "def tokens(text, label, *, num_tokens):\n    return num_tokens / 4\n"
        "def odd(text, label):\n    return None\n"
        "def named(text, label):\n    return {'score': len(text), 'format': 0.5, 'lines': 1}\n"
        "def ends(text, label):\n    import os\n    os._exit(3)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


def judged(pool, text, label, **seen):
    return asyncio.run(pool(text, label, seen=seen))


def test_a_row_gets_the_rewards_it_names_or_those_of_all_rows_and_the_first_says_what_is_correct(several):
    with RewardPool(parts(several), 1, 10.0) as pool:
        assert pool.asks == ["num_tokens"]
        cases = {
            None: (1.0 + 0.25 * 3, True, {"answer": 1.0, "length": 3.0}),
            "length": (0.75, False, {"length": 3.0}),
            "tokens": (-2.0 * 2, False, {"tokens": 2.0}),
        }
        for named, wanted in cases.items():
            row = {"answer": "yes"} if named is None else {"answer": "yes", "reward": named}
            assert judged(pool, "yes", row, num_tokens=8) == wanted
        # In the order of the configuration, whatever the row's.
        row = {"answer": "yes", "reward": ["tokens", "answer"]}
        assert judged(pool, "yes", row, num_tokens=4) == (1.0 - 2.0, True, {"answer": 1.0, "tokens": 1.0})
        assert judged(pool, "no", {"answer": "yes"}, num_tokens=1) == (
            0.5,
            False,
            {"answer": 0.0, "length": 2.0},
        )


def test_a_row_that_names_no_reward_is_refused_by_line(several, tmp_path):
    rows = [{"answer": "1"}, {"answer": "1", "reward": "lenght"}, {"answer": "1", "reward": []}]
    prompts = [Prompt(index, (), row) for index, row in enumerate(rows)]
    with RewardPool(parts(several), 1, 10.0) as pool, pytest.raises(ValueError) as caught:
        asyncio.run(pool.check_labels(prompts, tmp_path / "rows.jsonl"))
    head, *lines = str(caught.value).splitlines()
    assert head == "data.rewards (answer, length, tokens): 2 of 3 labels cannot be scored."
    assert "line 2: its 'reward' names 'lenght', must be of data.rewards: answer, length, tokens." in lines[0]
    assert "line 3: no reward is for this row" in lines[1]


def test_the_part_that_is_no_number_is_named_and_one_that_ends_its_worker_leaves_every_part_at_0(several):
    odd = parts(several, length=dict(reward=f"{several}.odd"))
    with (
        RewardPool(odd, 1, 10.0) as pool,
        pytest.raises(ValueError, match=r"length, tokens\) length: returned None"),
    ):
        judged(pool, "yes", {"answer": "yes"}, num_tokens=1)
    ends = parts(several, length=dict(reward=f"{several}.ends"))
    with RewardPool(ends, 1, 10.0) as pool:
        assert judged(pool, "yes", {"answer": "yes"}, num_tokens=1) == (
            0.0,
            False,
            {"answer": 0.0, "length": 0.0},
        )
        assert pool.counters == {"scored": 0, "timed_out": 0, "crashed": 1}


def test_a_reward_that_cannot_be_found_is_refused_when_the_pool_starts(several):
    with pytest.raises(ValueError, match="no 'lenght'"):
        RewardPool(parts(several, length=dict(reward=f"{several}:lenght")), 1, 10.0)


def test_of_several_numbers_score_is_the_reward_and_the_others_are_measured_by_name(several):
    with RewardPool(f"{several}:named", 1, 10.0) as pool:
        assert judged(pool, "y", None) == (1.0, True, {"format": 0.5, "lines": 1.0})
        assert judged(pool, "yes", None)[:2] == (3.0, False)
    named = parts(several, length=dict(reward=f"{several}.named"))
    with RewardPool(named, 1, 10.0) as pool:
        wanted = {"answer": 1.0, "length": 3.0, "length/format": 0.5, "length/lines": 1.0}
        assert judged(pool, "yes", {"answer": "yes"}, num_tokens=1) == (1.75, True, wanted)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ({"format": 1.0}, "whose keys have no 'score', which is the reward"),
        ({"score": float("nan")}, "not a finite float under 'score'"),
        ({"score": 1.0, "format": "good"}, "not a finite float under 'format'"),
        ({"score": 1.0, "for mat": 1.0}, "'for mat' makes no metric: use letters"),
        ({"score": 1.0, 3: 1.0}, "3 makes no metric"),
        ({"score": 1.0, **{f"n{i}": 0 for i in range(33)}}, "of 33 numbers beside 'score', must be"),
        ([1.0], "not a finite float"),
    ],
)  # fmt: skip
def test_what_is_no_reward_or_makes_no_metric_is_an_error_that_says_so(returned, message):
    with pytest.raises(ValueError, match=message):
        numbers_of(returned)
