import pytest

from megatron_jackpot.config import Data
from megatron_jackpot.data.problems import reasoning_gym_problems
from megatron_jackpot.rewards import exact, math_verify, reasoning_gym


def test_exact_ignores_surrounding_white_space_only():
    assert exact.score(" 12\n", {"answer": "12"}) == exact.score("12", "12 ") == 1.0
    assert exact.score("1 2", {"answer": "12"}) == exact.score("12.0", {"answer": "12"}) == 0.0


@pytest.mark.parametrize("label", [{"answer": 12}, {}, None, {"answer": " "}])
def test_exact_refuses_a_label_without_a_text_answer(label):
    with pytest.raises(ValueError, match="answer"):
        exact.check(label)


def label_of(task, options=None, which=0):
    return list(reasoning_gym_problems({task: options or {}}, seed=3, limit=which + 1))[which].label


def test_partial_credit_is_not_correct():
    from reasoning_gym import get_score_answer_fn

    label = label_of("gsm_symbolic")
    assert 0 < get_score_answer_fn("gsm_symbolic")("1 apple", label["entry"]) < 1
    assert reasoning_gym.score("1 apple", label) == 0.0
    assert reasoning_gym.score(label["answer"], label) == 1.0


def test_the_last_answer_tag_counts_where_there_is_one():
    label = label_of("gcd")
    gold = label["answer"]
    assert reasoning_gym.score(f"<answer>-1</answer> no: <answer> {gold} </answer>", label) == 1.0
    assert reasoning_gym.score(f"{gold} <answer>-1</answer>", label) == 0.0
    assert reasoning_gym.score(f"\n{gold} ", label) == 1.0


@pytest.mark.parametrize("response", ["", "<answer></answer>", "\x00", "9" * 5000, "1/0", "[(", "\ud800"])
@pytest.mark.parametrize("task", ["chain_sum", "gcd", "time_intervals", "countdown", "complex_arithmetic"])
def test_no_response_makes_a_task_raise_or_score(task, response):
    assert reasoning_gym.score(response, label_of(task)) == 0.0


def test_every_task_of_a_mix_scores_its_own_answer_through_json():
    tasks = {"chain_sum": {}, "gsm_symbolic": {}, "decimal_arithmetic": {"max_num_decimal_places": 4}}
    for problem in reasoning_gym_problems(tasks, seed=1, limit=12):
        reasoning_gym.check(problem.label)


def test_scorers_see_the_options_of_the_data():
    label = label_of("decimal_arithmetic", {"max_num_decimal_places": 5})
    assert label["options"] == {"max_num_decimal_places": 5}
    scorer = reasoning_gym._scorer_of(label)
    assert scorer.__self__.config.max_num_decimal_places == 5


def test_a_task_that_does_not_accept_its_own_answer_is_refused():
    label = label_of("rearc")
    with pytest.raises(ValueError, match=r"'rearc' scores its own answer .* Remove it from data\.tasks"):
        reasoning_gym.check(label)
    with pytest.raises(ValueError, match=r"labels made by data\.source=reasoning_gym"):
        reasoning_gym.check({"answer": "12"})


@pytest.mark.parametrize(
    ("response", "gold"),
    [
        ("so it is \\boxed{42}", "42"),
        ("$\\frac{1}{2}$", "0.5"),
        ("#### 72", "72"),
        ("#### 72", "#### 72"),
        ("$\\{2, 1\\}$", "\\{1,2\\}"),
        ("\\boxed{0.1}", "10\\%"),
        ("1234", "1,234"),
        ("$2\\sqrt{2}$", "\\sqrt{8}"),
        ("\\boxed{-1+x^2}", "x^2-1"),
        ("\\boxed{1+3x}", "3x+1"),
        ("$(1,2)$", "(1,2)"),
        ("$x^2-1$", "$x^2-1$"),
    ],
)
def test_math_verify_accepts_equal_answers_in_other_forms(response, gold):
    math_verify.check({"answer": gold})
    assert math_verify.score(response, {"answer": gold}) == 1.0


@pytest.mark.parametrize(
    ("response", "gold"),
    [("\\boxed{41}", "42"), ("3", "3x+1"), ("2", "2\\sqrt2"), ("no idea", "42"), ("", "42"), ("1", "x^2-1")],
)
def test_math_verify_refuses_other_answers_also_those_a_bare_reference_would_parse_to(response, gold):
    assert math_verify.score(response, {"answer": gold}) == 0.0


@pytest.mark.parametrize("gold", ["", "  ", "\\boxed{}", "$$"])
def test_a_reference_that_says_nothing_is_refused(gold):
    with pytest.raises(ValueError, match="parses to nothing|is prose"):
        math_verify.check({"answer": gold})


def test_the_names_in_the_configuration_are_the_rewards_there_are():
    from megatron_jackpot.rewards.worker import REWARDS, find_reward

    label = {"answer": "12", "task": "none", "entry": {}, "tests": ["assert True"]}
    code = {**Data().code.model_dump(), "timeout_s": 10.0}
    for name in REWARDS:
        assert name in Data.model_fields["reward"].description
        assert find_reward(name, code)[0]("12", label) in (0.0, 1.0)
