"""The families of problems: what each asks, what its careless pupil writes, and how both fit the models."""

import hashlib
import itertools
import random
from collections import Counter

import pytest

from benchmarks.study_parts import task
from benchmarks.study_parts.families import FAMILIES
from benchmarks.study_parts.plan import BASE
from benchmarks.study_parts.warmup import examples, quickstart
from megatron_jackpot.config.yaml_tree import read_tree

FAMILY = pytest.mark.parametrize("family", FAMILIES.values(), ids=list(FAMILIES))


@pytest.mark.parametrize(
    ("name", "item", "right", "careless"),
    [
        ("sums", "47+38", "00085", "00075"),
        ("sums", "99+99", "00198", "00188"),
        ("sums", "92-19", "00073", "00087"),
        ("sums", "64-23", "00041", "00041"),
        ("sorting", "hfjhh", "fhhhj", "fhj--"),
        ("sorting", "pcafe", "acefp", "acefp"),
        ("sorting", "aaaaa", "aaaaa", "a----"),
    ],
)
def test_answers_written_by_hand(name: str, item: str, right: str, careless: str) -> None:
    assert (FAMILIES[name].right(item), FAMILIES[name].careless(item)) == (right, careless)


def test_sorted_letters_are_the_items_own_in_order() -> None:
    for items in itertools.islice(FAMILIES["sorting"].problems("any"), 300):
        for item, answer in zip(items, FAMILIES["sorting"].answer(items).split(","), strict=True):
            assert Counter(answer) == Counter(item)
            assert all(one <= other for one, other in itertools.pairwise(answer))


def test_sums_are_the_ones_that_the_finished_runs_were_asked(tmp_path) -> None:
    """Data and corpus of before there were families, by their hashes."""
    sums = FAMILIES["sums"]
    sums.write_problems(tmp_path)
    made = {path.name: hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in tmp_path.iterdir()}
    assert made == {
        "train.jsonl": "25dd09fbc71ce3fe",
        "heldout.jsonl": "d0c8dd6dec6e79e6",
        "development.jsonl": "970d168f13244295",
    }
    tokenizer = quickstart()[-1]
    pairs = itertools.islice(examples(sums, tokenizer, 0.65, "2/far", frozenset(), 0.4), 500)
    text = "".join(tokenizer.decode([*pair.prompt.tokens, *pair.tokens.tolist()]) for pair in pairs)
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "ccf5dc78038c7f60"


@FAMILY
def test_a_careless_pupil_is_right_in_about_half_of_the_items(family) -> None:
    problems = [*itertools.islice(family.problems("any"), 1000)]
    chance = random.Random(0)
    scores = [
        task.score(family.answer(items, chance, 1.0), {"answer": family.answer(items)}) for items in problems
    ]
    assert 0.45 < sum(scores) / len(scores) < 0.6
    answers = {len(answer) for items in problems for answer in map(family.careless, items)}
    assert answers == {task.WIDTH}


@FAMILY
def test_questions_and_answers_fit_the_settings_and_are_a_token_a_character(family) -> None:
    base, tokenizer = read_tree(BASE), quickstart()[-1]
    assert task.RESPONSE_TOKENS == base["rollout"]["max_new_tokens"] == base["evaluation"]["max_new_tokens"]
    for pair in itertools.islice(examples(family, tokenizer, 0.65, "any", frozenset(), 0.4), 300):
        assert len(pair.tokens) == task.RESPONSE_TOKENS
        assert len(pair.prompt.tokens) <= base["data"]["max_prompt_tokens"]
        assert tokenizer.unk_token_id not in {*pair.prompt.tokens, *pair.tokens.tolist()}


def test_a_familys_files_have_no_question_in_common_and_score_1_by_their_own_answers(tmp_path) -> None:
    FAMILIES["sorting"].write_problems(tmp_path)
    each = [task.read_questions(tmp_path, name) for name in task.SIZES]
    assert len(frozenset().union(*each)) == sum(map(len, each)) == sum(task.SIZES.values())


def test_families_have_homes_of_their_own_and_sums_the_folder_itself(tmp_path) -> None:
    homes = [task.home(tmp_path, name) for name in FAMILIES]
    assert len(set(homes)) == len(FAMILIES) and task.home(tmp_path, "sums") == tmp_path
