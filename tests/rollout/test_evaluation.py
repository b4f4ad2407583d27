"""What an evaluation makes of verdicts: avg@k, pass@k, tasks, named sets, the answers it keeps."""

import itertools
from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from megatron_jackpot.config import Evaluation, Sync
from megatron_jackpot.records import Prompt
from megatron_jackpot.rollout.outcome import StopRun
from megatron_jackpot.train.evaluation import Evaluated, Evaluator, Scored, pass_at, tasks_of
from megatron_jackpot.train.run import _judge


def prompts(*tasks: str | None) -> list[Prompt]:
    return [Prompt(i, (i,), {"answer": str(i), "task": task}) for i, task in enumerate(tasks)]


@pytest.mark.parametrize(("samples", "right", "k"), [(4, 1, 2), (5, 2, 3), (6, 0, 2), (6, 6, 6), (5, 4, 2)])
def test_pass_at_k_is_the_share_of_all_draws_of_k_answers_with_a_right_one(samples, right, k) -> None:
    verdicts = [True] * right + [False] * (samples - right)
    draws = [any(draw) for draw in itertools.combinations(verdicts, k)]
    assert pass_at(k, samples, right) == pytest.approx(sum(draws) / len(draws))


def test_accuracy_is_the_mean_of_all_answers_and_pass_goes_up_to_all_of_them() -> None:
    scored = Scored("eval/aime/actor", prompts("a", "b"), [[True, False, False], [True, True, True]])
    found = {name: tuple(map(float, pair)) for name, pair in scored.metrics(["a", "b"]).items()}
    assert found == {
        "eval/aime/actor_accuracy": (4, 6),
        "eval/aime/actor_accuracy/a": (1, 3),
        "eval/aime/actor_accuracy/b": (3, 3),
    }
    passed = {name: tuple(map(float, pair)) for name, pair in scored.passes(3).items()}
    assert passed == {
        "eval/aime/actor_pass@2": (pytest.approx(pass_at(2, 3, 1) + 1), 2),
        "eval/aime/actor_pass@3": (2, 2),
    }
    # A leader without a problem reports the same names.
    assert Scored("eval/aime/actor", [], []).passes(3).keys() == passed.keys()
    assert scored.passes(1) == {}


def test_tasks_count_where_there_are_several_and_not_too_many() -> None:
    assert tasks_of(prompts("b", "a", "b", None)) == ["a", "b"]
    assert (
        tasks_of(prompts("a", "a"))
        == tasks_of(prompts(*map(str, range(40))))
        == tasks_of(prompts(None))
        == []
    )


class Judge:
    """A server whose i-th answer to a prompt is (id, i), right where i is at least the prompt's id."""

    def answers(self, prompts, max_new_tokens, *, samples, temperature, stop=None):
        self.asked = (max_new_tokens, samples, temperature)
        return [[[prompt.id, i] for i in range(samples)] for prompt in prompts]

    def verdicts(self, answers, prompts, stop=None):
        assert [answer[0] for answer in answers] == [prompt.id for prompt in prompts]
        return [answer[1] >= answer[0] for answer in answers], 0.0

    def text(self, tokens):
        return str(list(tokens))

    def server_gib(self):
        return 1.5


def test_every_set_is_asked_for_its_samples_and_keeps_its_first_answers() -> None:
    served = SimpleNamespace(name="actor")
    mesh = SimpleNamespace(
        dp=1,
        dp_rank=0,
        is_leader=True,
        is_main=True,
        dp_group=None,
        wait_for_leaders=lambda *_: None,
        largest=lambda value: value,
    )
    state = SimpleNamespace(mesh=mesh, served=served, models={"actor": served, "policy": None}, num_steps=3)
    evaluation = Evaluation(samples=4, temperature=0.6, policy="off", keep=1, max_new_tokens=7)
    config = SimpleNamespace(evaluation=evaluation, run=SimpleNamespace(phase_timeout_s=1))
    judge = Judge()
    sets = {"": prompts("a", "a", "a"), "hard": prompts(None, None, None, None, None), "none": []}
    metrics, samples = Evaluator(config, state, judge, sets, stop_ids=(), packing_tokens=8)()
    assert judge.asked == (7, 4, 0.6)
    assert metrics == {
        "eval/actor_accuracy": pytest.approx((4 + 3 + 2) / 12),
        "eval/actor_pass@2": pytest.approx((1 + 1 + pass_at(2, 4, 2)) / 3),
        "eval/actor_pass@4": 1.0,
        "eval/hard/actor_accuracy": pytest.approx((4 + 3 + 2 + 1 + 0) / 20),
        "eval/hard/actor_pass@2": pytest.approx((1 + 1 + pass_at(2, 4, 2) + pass_at(2, 4, 1)) / 5),
        "eval/hard/actor_pass@4": pytest.approx(4 / 5),
        "eval/failed_rewards": 0.0,
        "memory/server_gib": 1.5,
    }
    assert [(row["set"], row["model"], row["text"], row["correct"]) for row in samples] == [
        ("", "actor", "[0, 0]", True),
        ("hard", "actor", "[0, 0]", True),
    ]


def test_a_bare_off_in_yaml_is_off() -> None:
    assert Evaluation(policy=False).policy == "off"


def test_a_step_whose_evaluation_a_stop_ended_is_reported_without_it_and_says_how_it_is_made_up_for(
    caplog,
) -> None:
    def stopped() -> Evaluated:
        raise StopRun

    stopped.sets, stopped.limit_s = {"": prompts("a")}, 1.0
    config = SimpleNamespace(
        evaluation=Evaluation(every=2), sync=Sync(probe_every=2), run=SimpleNamespace(folder="RUN")
    )
    watchdog = SimpleNamespace(phase=lambda what, at_least_s=0.0: nullcontext())
    trainer = SimpleNamespace(config=config, mesh=SimpleNamespace(is_main=True), watchdog=watchdog)
    assembly = SimpleNamespace(trainer=trainer, probe=lambda: {"probe/max": 0.5}, evaluate=stopped)
    assert _judge(assembly, 2, last=False) == (({"probe/max": 0.5}, []), True)
    assert "step 2 has no evaluation. `megatron-jackpot evaluate RUN` makes up for it" in caplog.text
    assert _judge(assembly, 3, last=False) == (({}, []), False)
