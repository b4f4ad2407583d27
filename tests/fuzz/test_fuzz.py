"""Whatever comes from outside ends in a value or in the error that is meant for it: no crash, no hang, no
bloat."""

import json
import math
import resource
import string
import time

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_jackpot.config import describe, load_config, parse_config
from megatron_jackpot.data.problems import file_problems
from megatron_jackpot.rewards.exact import score
from megatron_jackpot.rewards.pool import RewardPool
from megatron_jackpot.servers.protocol import BadReply, Sampling
from megatron_jackpot.servers.reply import parse_group
from tests.rewards.test_pool import score_all
from tests.servers.fake_server import VOCAB, group

pytestmark = pytest.mark.timeout(280)

SLOWEST_S = 20.0
MOST_BYTES = 2**30
KEYS = [key for key, _, _ in describe()]


def cases(number: int) -> settings:
    quiet = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.large_base_example]
    return settings(
        max_examples=number, deadline=SLOWEST_S * 1000, derandomize=True, suppress_health_check=quiet
    )


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=30),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)


@pytest.fixture(autouse=True, scope="module")
def bounded_memory():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown < MOST_BYTES, f"peak memory grew by {grown / 2**20:.0f} MiB"


NEEDED = {
    "evaluation.sets.NAME": {"path": "set.jsonl"},
    "data.rewards.NAME": {"reward": "exact"},
    "algorithm.overlong": {"buffer": 8},
}
"""What a section that may be left out must have where it is not."""


def smallest() -> dict:
    return {
        "run": {"folder": "runs/a"},
        "policy": {"hf": "models/policy"},
        "actor": {"hf": "models/actor"},
        "data": {"tasks": {"chain_sum": {}}, "max_prompt_tokens": 64},
        "rollout": {"prompts_per_step": 8, "max_new_tokens": 64},
    }


@cases(2500)
@given(st.sampled_from(KEYS), JSON)
def test_any_value_of_any_knob_is_taken_or_refused_by_name(key: str, value: object) -> None:
    tree = smallest()
    section = tree
    *parents, last = key.split(".")
    for parent in parents:
        section = section.setdefault(parent, {})
    section |= NEEDED.get(".".join(parents), {})
    section[last] = value
    try:
        parse_config(tree)
    except ValueError as error:
        assert any(part in str(error) for part in (key, last)), error


@cases(1000)
@given(JSON, st.lists(st.text(string.printable, max_size=40), max_size=3))
def test_any_yaml_and_any_override_is_a_config_or_a_value_error(
    tmp_path, tree: object, overrides: list
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    with pytest.raises(ValueError) as caught:
        load_config(path, overrides)
    assert str(caught.value)


@cases(1500)
@given(st.lists(st.binary(max_size=60) | JSON.map(lambda x: json.dumps(x).encode()), max_size=4))
def test_any_file_is_rows_or_an_error_that_names_the_line(tmp_path, lines: list) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"\n".join(lines))
    try:
        for problem in file_problems(path):
            assert problem.label["answer"]
    except ValueError as error:
        assert "line " in str(error)


SAMPLING = Sampling(temperature=1.0, max_new_tokens=4, top_k_logp=3)


def paths(value: object, at: tuple = ()) -> list[tuple]:
    """Every place inside a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at] * bool(at) + [p for key, below in inner for p in paths(below, (*at, key))]


PATHS = paths(group())


@cases(3000)
@given(st.sampled_from(PATHS), JSON)
def test_a_reply_with_anything_in_any_place_is_whole_or_a_bad_reply(path: tuple, value: object) -> None:
    reply = group()
    place = reply
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    try:
        completions = parse_group(json.dumps(reply).encode(), 2, SAMPLING, vocab_size=VOCAB)
    except BadReply:
        return
    for completion in completions:
        assert ((completion.tokens >= 0) & (completion.tokens < VOCAB)).all()
        assert all(math.isfinite(x) and x <= 1e-3 for x in completion.server_logp)
        assert completion.topk_ids.shape == completion.topk_logp.shape == (len(completion.tokens), 3)


@cases(1000)
@given(st.binary(max_size=200) | JSON.map(lambda x: json.dumps(x).encode()), st.integers(1, 3))
def test_any_body_is_whole_or_a_bad_reply(body: bytes, n: int) -> None:
    with pytest.raises(BadReply):
        parse_group(body, n, SAMPLING, vocab_size=VOCAB)


@cases(1000)
@given(st.text(max_size=200), st.text(min_size=1, max_size=20))
def test_any_answer_has_a_score(response: str, answer: str) -> None:
    assert score(response, {"answer": answer}) in (0.0, 1.0) or 0 <= score(response, {"answer": answer}) <= 1


NASTY = [
    *("9^9^9^9", "9**9**9**9", "\\boxed{9^{9^{9^9}}}", "1e999999999", "-" * 5000 + "1", "10000!!", "0/0"),
    *("(" * 20_000, "[" * 100_000 + "]" * 100_000, "\\frac{1}{" * 400 + "1" + "}" * 400, "{" * 3000),
    *(
        "1" * 1_000_000,
        "x" * 1_000_000,
        "\\boxed{" + "1+" * 50_000 + "1}",
        "\x00\u202e\ud800",
        "\n" * 500_000,
    ),
    *("\\sum_{n=1}^{10^9} n^{10^9}", "\\int_0^\\infty e^{x^x} dx", "sqrt(" * 500 + "2" + ")" * 500),
]


@pytest.mark.parametrize("reward", ["exact", "reasoning_gym", "math_verify"])
def test_answers_made_to_hurt_cost_their_time_limit_at_most(reward: str) -> None:
    label = {
        "answer": "7",
        "task": "chain_sum",
        "options": {},
        "entry": {"answer": "7", "question": "", "metadata": {}},
    }
    with RewardPool(reward, 2, 2.0) as pool:
        started = time.monotonic()
        rewards = score_all(pool, *((answer, label) for answer in NASTY))
        assert time.monotonic() - started < 2.0 * len(NASTY) + 60
        assert all(0.0 <= value <= 1.0 and not correct for value, correct in rewards)
        assert sum(pool.counters.values()) == len(NASTY)
        assert score_all(pool, ("7" if reward != "math_verify" else "\\boxed{7}", label)) == [(1.0, True)]
