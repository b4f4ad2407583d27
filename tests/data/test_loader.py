import pytest

from megatron_jackpot.data.loader import PromptLoader, epoch_order, prompt_digest
from megatron_jackpot.records import Prompt

PROMPTS = [Prompt(id=10 + i, tokens=(1, i), label={"answer": str(i)}) for i in range(23)]


def loader(*, per_step=6, dp_rank=0, dp_size=1, seed=5, prompts=PROMPTS):
    return PromptLoader(prompts, per_step, dp_rank, dp_size, seed)


def ids(step):
    epoch, prompts = step
    return epoch, [prompt.id for prompt in prompts]


@pytest.mark.parametrize("dp_size", [2, 3, 4, 6])
def test_the_leaders_of_any_dp_size_see_together_what_one_leader_sees(dp_size):
    one, leaders = loader(), [loader(dp_rank=rank, dp_size=dp_size) for rank in range(dp_size)]
    for _ in range(9):
        epoch, want = ids(one.next())
        shares = [ids(leader.next()) for leader in leaders]
        assert {share[0] for share in shares} == {epoch}
        assert sorted(id for share in shares for id in share[1]) == sorted(want)


def test_minibatches_hold_the_same_prompts_for_any_dp_size():
    whole = ids(loader(per_step=8).next())[1]
    shares = [ids(loader(per_step=8, dp_rank=rank, dp_size=2).next())[1] for rank in range(2)]
    for mini in range(2):
        want = whole[4 * mini : 4 * mini + 4]
        assert sorted(id for share in shares for id in share[2 * mini : 2 * mini + 2]) == sorted(want)


def test_no_prompt_comes_twice_in_an_epoch_and_epochs_differ():
    one = loader()
    first, second = [[ids(one.next()) for _ in range(3)] for _ in range(2)]
    for epoch, steps in enumerate((first, second)):
        seen = [id for _, step in steps for id in step]
        assert {step[0] for step in steps} == {epoch}
        assert len(seen) == len(set(seen)) == 18
    assert first != [(0, step) for _, step in second]


def test_the_order_is_a_permutation_fixed_by_seed_and_epoch():
    numbers = list(range(100))
    order = epoch_order(numbers, seed=1, epoch=0)
    assert sorted(order) == numbers
    assert order == epoch_order(numbers, seed=1, epoch=0)
    assert order != epoch_order(numbers, seed=2, epoch=0)
    assert order != epoch_order(numbers, seed=1, epoch=1)
    # Written down once: a change of the order would break every resume.
    assert epoch_order(list(range(6)), seed=0, epoch=0) == [0, 1, 5, 3, 4, 2]


@pytest.mark.parametrize("ahead", [0, 3])
@pytest.mark.parametrize("steps_before", [0, 1, 3, 4, 7])
def test_a_resumed_loader_continues_exactly_also_on_another_dp_size(steps_before, ahead):
    """At the first step that is not taken, however many were given out."""
    first = loader()
    for _ in range(steps_before):
        first.next()
        first.taken()
    given = [ids(first.next()) for _ in range(ahead)]
    resumed, halves = loader(), [loader(dp_rank=rank, dp_size=2) for rank in range(2)]
    for other in (resumed, *halves):
        other.load_state_dict(first.state_dict())
    for want in [*given, *(ids(first.next()) for _ in range(8))]:
        assert ids(resumed.next()) == want
        assert sorted(id for half in halves for id in ids(half.next())[1]) == sorted(want[1])


def mended(prompts: list[Prompt], *ids: int) -> list[Prompt]:
    return [Prompt(p.id, (9, 9), p.label) if p.id in ids else p for p in prompts]


def after(steps: int) -> tuple[dict, set[int]]:
    """A loader's state after so many steps of its first epoch, and the ids it has given."""
    one = loader()
    seen = {id for _ in range(steps) for id in ids(one.next())[1]}
    for _ in range(steps):
        one.taken()
    return one.state_dict(), seen


def test_a_row_that_was_not_trained_on_may_be_mended_or_left_out_before_a_resume():
    state, seen = after(2)
    later = [prompt.id for prompt in PROMPTS if prompt.id not in seen]
    resumed = loader(prompts=mended(PROMPTS, later[0]))
    assert resumed.load_state_dict(state) == {later[0]}
    assert not {id for id in ids(resumed.next())[1]} & seen
    fewer = loader(prompts=[prompt for prompt in PROMPTS if prompt.id != later[1]])
    assert fewer.load_state_dict(state) == {later[1]}


def test_a_row_that_was_trained_on_is_named_and_may_change_where_data_changed_rows_has_it():
    state, seen = after(2)
    row = min(seen)
    with pytest.raises(ValueError, match=rf"other prompts.*1 differ, rows \[{row}\].*changed_rows=\[{row}\]"):
        loader(prompts=mended(PROMPTS, row)).load_state_dict(state)
    allowed = PromptLoader(mended(PROMPTS, row), 6, 0, 1, 5, may_change=[row])
    assert allowed.load_state_dict(state) == {row}


def test_in_a_later_epoch_every_row_was_trained_on():
    state, _ = after(4)
    with pytest.raises(ValueError, match="1 differ"):
        loader(prompts=mended(PROMPTS, 15)).load_state_dict(state)


def test_rows_that_move_what_was_passed_and_another_seed_are_refused():
    state, seen = after(2)
    with pytest.raises(ValueError, match=rf"gone \[{min(seen)}\], new \[\]"):
        loader(prompts=[p for p in PROMPTS if p.id != min(seen)]).load_state_dict(state)
    with pytest.raises(ValueError, match=r"run\.seed = 6 differs from the checkpoint's 5"):
        loader(seed=6).load_state_dict(state)


def test_the_digest_sees_ids_tokens_and_labels():
    base = Prompt(1, (2, 3), {"answer": "4"})
    others = [
        Prompt(0, (2, 3), base.label),
        Prompt(1, (2, 4), base.label),
        Prompt(1, (2, 3), {"answer": "5"}),
    ]
    assert len({prompt_digest(prompt) for prompt in (base, *others)}) == 4


def test_a_step_that_cannot_be_filled_is_refused():
    with pytest.raises(ValueError, match="prompts_per_step = 24 is larger than the 23 usable"):
        loader(per_step=24)
    with pytest.raises(ValueError, match="without a prompt"):
        loader(per_step=2, dp_size=3)
