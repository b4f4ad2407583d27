"""The timeline of servers and trainer, against closed forms and against what the pipeline promises."""

import json
from pathlib import Path

import pytest
import yaml

from megatron_jackpot.cli import main
from megatron_jackpot.config import parse_config
from megatron_jackpot.plan.formulas import make_plan
from megatron_jackpot.plan.seconds import Assumptions, total_seconds
from megatron_jackpot.plan.splits import Measured, choose, splits
from megatron_jackpot.plan.timeline import Rates, Work, simulate
from tests.tiny import hf_config

EVEN = Work(sequences=64, mean_tokens=1000.0, spread=0.0, longest=4000.0)
TAIL = Work(sequences=64, mean_tokens=1000.0, spread=1.0, longest=8000.0)
GROUPS = Work(sequences=64, mean_tokens=1000.0, spread=1.0, longest=8000.0, group=8)
RATES = Rates(stream_tps=50.0, server_tps=400.0, learn_s=30.0, push_s=2.0)
ROLLOUT_S = 1000.0 / (400.0 / 16)
"""16 equal responses on each of 4 servers, which share 400 tokens a second."""


def test_taking_turns_a_step_is_rollout_then_learning_then_push() -> None:
    found = simulate(EVEN, RATES, servers=4, slots=16, ahead=0)
    assert found.step_s == pytest.approx(ROLLOUT_S + 30 + 2)
    assert found.idle_trainer == pytest.approx(ROLLOUT_S / found.step_s)
    assert found.idle_servers == pytest.approx(32 / found.step_s)
    assert found.staleness_mean == found.staleness_max == 0


@pytest.mark.parametrize("learn_s", [10.0, 70.0])
def test_a_step_ahead_a_step_is_the_longer_of_rollout_and_learning_and_the_push(learn_s: float) -> None:
    rates = Rates(stream_tps=50.0, server_tps=400.0, learn_s=learn_s, push_s=2.0)
    found = simulate(EVEN, rates, servers=4, slots=16, ahead=1)
    # With the trainer the slower one a batch is sampled within the learning that it was begun before.
    assert found.step_s == pytest.approx(max(ROLLOUT_S, learn_s) + 2)
    # What was said before the push is a version older when it is trained on.
    assert found.staleness_mean == pytest.approx(min(1.0, learn_s / ROLLOUT_S))


def test_a_lone_response_is_no_faster_than_its_stream() -> None:
    lone = Work(sequences=1, mean_tokens=1000.0, spread=0.0, longest=4000.0)
    assert simulate(lone, RATES, servers=4, slots=16, ahead=0).step_s == pytest.approx(1000 / 50 + 32)


def test_no_token_is_older_than_ahead_and_waiting_for_the_tail_shrinks_with_it() -> None:
    found = [simulate(TAIL, RATES, servers=4, slots=32, ahead=ahead) for ahead in (0, 1, 2, 4)]
    for ahead, timeline in zip((0, 1, 2, 4), found, strict=True):
        assert timeline.staleness_mean <= timeline.staleness_max <= ahead
    # Two steps ahead, the servers say others while the longest of a step is still being said.
    assert found[0].step_s > found[1].step_s > found[2].step_s
    assert found[0].idle_servers > found[1].idle_servers > found[2].idle_servers


def test_a_full_server_says_its_rate_whatever_the_lengths_are() -> None:
    rates = Rates(stream_tps=50.0, server_tps=400.0, learn_s=1.0, push_s=0.0)
    found = simulate(TAIL, rates, servers=1, slots=1000, ahead=4, steps=40)
    said = sum(sum(TAIL.lengths(step)) for step in range(1, 201)) / 200
    assert found.step_s == pytest.approx(said / 400, rel=0.05)


def test_a_group_holds_its_slot_until_its_longest_response_has_ended() -> None:
    rates = Rates(stream_tps=50.0, server_tps=8 * 50.0, learn_s=1.0, push_s=0.0)
    found = simulate(GROUPS, rates, servers=1, slots=1, ahead=0, steps=8)
    groups = [group for step in range(4, 12) for group in GROUPS.groups(step)]
    assert [len(group) for group in groups] == [8] * 64
    assert found.step_s == pytest.approx(sum(max(group) for group in groups) / 50 / 8 + 1)


def test_a_server_runs_as_many_groups_at_once_as_the_leaders_have_requests_for_it(tmp_path) -> None:
    assumed = Assumptions(mean_tokens=4000.0)
    measured = Measured(server_tps=4000.0, stream_tps=100.0, push_s=5.0, spread=0.0)
    tree = large_pair(tmp_path)
    tree["rollout"] |= dict(prompts_per_step=16, samples_per_prompt=8, concurrency=2)
    plan = make_plan(parse_config(tree), 8, 4000.0)
    assert plan.dp == 2
    step_s = choose(plan, 2, 0, assumed, measured).timeline.step_s
    # Two leaders' four requests over two servers: 16 responses on each, none slower than alone, 4 times.
    alone_s = 4000.0 * 8192 / plan.longest / 100
    assert step_s == pytest.approx(4 * alone_s + total_seconds(plan, assumed) + 5)


def test_lengths_have_their_mean_and_their_spread() -> None:
    work = Work(sequences=40_000, mean_tokens=1000.0, spread=0.5, longest=1e9)
    lengths = work.lengths(1)
    assert sum(lengths) / len(lengths) == pytest.approx(1000, rel=0.02)
    # One standard deviation above the middle: 0.8413 lie below.
    middle = 1000 * 2.718281828 ** (-0.125)
    below = sum(length < middle * 2.718281828**0.5 for length in lengths) / len(lengths)
    assert below == pytest.approx(0.8413, abs=0.01)


def large_pair(folder: Path) -> dict:
    """A run of 8B parameters and an actor, as `plan` sees it."""
    big = dict(hidden_size=4096, intermediate_size=12288, num_attention_heads=32)
    shape = dict(
        head_dim=128,
        num_key_value_heads=8,
        vocab_size=151936,
        num_hidden_layers=36,
        max_position_embeddings=40960,
    )
    return dict(
        run=dict(folder=str(folder / "run")),
        policy=dict(hf=str(hf_folder(folder / "policy", **big, **shape))),
        actor=dict(hf=str(hf_folder(folder / "actor", num_attention_heads=8, **shape))),
        data=dict(tasks=dict(chain_sum={}), max_prompt_tokens=1024),
        rollout=dict(prompts_per_step=1024, samples_per_prompt=16, max_new_tokens=8192),
        packing=dict(tokens=9216),
        parallel=dict(tp=4),
        cluster=dict(gpus_per_node=8),
    )


def test_the_command_prints_its_own_split_and_the_best_one(tmp_path, capsys) -> None:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(large_pair(tmp_path)))
    few = ["rollout.prompts_per_step=16", "rollout.samples_per_prompt=2", "servers.num=8"]
    given = [*few, "--gpus", "8", "--mean-tokens", "4000"]
    assert main(["plan", str(tmp_path / "run.yaml"), *given, "--server-tps", "4000"]) == 0
    printed = capsys.readouterr().out
    assert "This split" in printed and "splits of 16 GPUs" in printed


def test_no_split_of_4096_gpus_is_faster_than_its_trainers_or_its_servers_alone(tmp_path) -> None:
    config = parse_config(large_pair(tmp_path))
    assumed = Assumptions(mean_tokens=4000.0)
    measured = Measured(server_tps=4000.0, stream_tps=150.0, push_s=5.0, spread=0.5)
    tried = list(splits(config, 4096, assumed))
    assert len(tried) >= 10
    assert all(plan.gpus % 4 == 0 and plan.gpus + servers <= 4096 for plan, servers in tried)
    for plan, servers in tried[::5]:
        step_s = choose(plan, servers, 1, assumed, measured).timeline.step_s
        said = plan.sequences * plan.mean_tokens * 8192 / plan.longest
        assert step_s > total_seconds(plan, assumed) + 5.0
        assert step_s > 0.9 * said / (servers * 4000.0)


def hf_folder(folder: Path, **changes: object) -> Path:
    """A model as `plan` sees it: its config.json."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(hf_config(**changes)))
    return folder
