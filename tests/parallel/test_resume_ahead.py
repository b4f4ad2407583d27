"""With rollouts ahead of training N steps are k steps, a checkpoint, a new process and N - k steps: bit for
bit where what servers answer is the same, and with the same prompts in the same order in any case."""

from pathlib import Path

import pytest

from tests.parallel.layouts import NUM_PROMPTS, Layout
from tests.parallel.resuming import BEGUN_ANEW, STEERED, same, train

STEPS, SAVED = 6, 2
"""Of each run, and of those of which a checkpoint is made."""
TWO_LEADERS = Layout(dp=2, correction=STEERED.correction)
FULL = pytest.mark.full


def broken_off(how: str, folder: Path, run: Path, layout: Layout, **options) -> tuple:
    """A run that a stop ends in step SAVED + 1, or of which no more than the checkpoint of SAVED is left. Of
    every step in flight each leader has one group, and the others are under way."""
    options |= {"run_steps": STEPS}
    if how == "stopped":
        return train(folder, run, layout, STEPS, stop_at=SAVED, **options)
    return train(folder, run, layout, SAVED, slow_after=SAVED, save="now", save_at=[SAVED], **options)


@pytest.mark.parametrize(
    ("ahead", "how", "layout"),
    [
        pytest.param(0, "stopped", STEERED, marks=FULL),
        pytest.param(1, "stopped", STEERED, marks=FULL),
        (1, "killed", STEERED),
        (3, "stopped", STEERED),
        pytest.param(3, "killed", STEERED, marks=FULL),
        pytest.param(3, "stopped", TWO_LEADERS, marks=FULL),
    ],
    ids=lambda value: "two leaders" if value is TWO_LEADERS else "" if value is STEERED else str(value),
)
def test_broken_off_in_mid_flight_it_is_the_uninterrupted_run_bit_for_bit_where_the_answers_are(
    folder, tmp_path, ahead, how, layout
) -> None:
    """Answers and their versions are recorded from that run; at 3 ahead steps of two epochs are in flight."""
    how_far = dict(ahead=ahead, per_epoch=4)
    whole = train(folder, tmp_path / "whole", layout, STEPS, versioned=True, record=str(tmp_path), **how_far)
    assert [row["staleness/max"] for row in whole[0]] == [min(i, ahead) for i in range(STEPS)]
    run, played = tmp_path / "run", dict(recorded=str(tmp_path), **how_far)
    first = broken_off(how, folder, run, layout, **played)
    second = train(folder, run, layout, STEPS, resume=True, **played)
    same(first, (whole[0][:SAVED], *first[1:]), exact=True, steps=SAVED)
    same(second, whole, exact=True, steps=STEPS - SAVED)
    # Of each step that had been begun one group of each leader was there, and is not asked for again.
    kept, begun = layout.dp / NUM_PROMPTS, ahead + (how == "stopped")
    anew = [row.get(BEGUN_ANEW) for row in second[0]]
    assert anew == [1 - kept] * begun + [None] * (STEPS - SAVED - begun)
    assert not {*first[4]} & {*second[4]}


def test_at_0_ahead_a_broken_off_step_is_sampled_anew_with_the_weights_it_had(folder, tmp_path) -> None:
    """Tokens depend on the weights, and these are the checkpoint's."""
    whole = train(folder, tmp_path / "whole", STEERED, 4, versioned=True)
    run = tmp_path / "run"
    train(folder, run, STEERED, 4, versioned=True, stop_at=2)
    same(train(folder, run, STEERED, 4, versioned=True, resume=True), whole, exact=True, steps=2)


def test_where_tokens_depend_on_the_weights_what_was_begun_anew_is_younger_and_nothing_else_is_other(
    folder, tmp_path
) -> None:
    """The groups that were there at the stop are as old as in the uninterrupted run."""
    how = dict(ahead=3, versioned=True, per_epoch=4)
    whole = train(folder, tmp_path / "whole", STEERED, STEPS, **how)
    run = tmp_path / "run"
    first = broken_off("stopped", folder, run, STEERED, **how)
    second = train(folder, run, STEERED, STEPS, resume=True, **how)
    same(first, (whole[0][:SAVED], *first[1:]), exact=True, steps=SAVED)
    pairs = list(zip(second[0], whole[0][SAVED:], strict=True))
    assert [mine["account"] for mine, _ in pairs] == [theirs["account"] for _, theirs in pairs]
    assert all(mine["staleness/max"] == theirs["staleness/max"] for mine, theirs in pairs)
    # Step SAVED + 1 of the uninterrupted run has tokens of the first weights, those of SAVED later ones.
    younger = [mine["staleness/mean"] < theirs["staleness/mean"] for mine, theirs in pairs]
    assert younger == [True, True, True, False]


@pytest.mark.parametrize("ahead", [pytest.param(1, marks=pytest.mark.full), 3])
def test_with_rollouts_ahead_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(
    folder, tmp_path, ahead
) -> None:
    """Tokens depend on the weights that sampled them: those in flight at the save are in the checkpoint."""
    how = dict(ahead=ahead, versioned=True)
    whole = train(folder, tmp_path / "whole", STEERED, 6, **how)
    assert [row["staleness/max"] for row in whole[0]] == [min(i, ahead) for i in range(6)]
    run = tmp_path / "run"
    train(folder, run, STEERED, 2, save="now", save_at=[2], **how)
    newest = run / "checkpoints" / "step-000002"
    assert list(newest.glob("rollouts-*.npz"))
    same(train(folder, run, STEERED, 6, resume=True, **how), whole, exact=True, steps=4)


def test_with_rollouts_ahead_an_interrupted_run_keeps_what_was_finished_of_every_step_in_flight(
    folder, tmp_path
) -> None:
    """Tokens are the same whoever samples them; of two epochs' steps in flight nothing is mixed up."""
    how = dict(ahead=3, run_steps=6)
    run = tmp_path / "run"
    first = train(folder, run, STEERED, 6, stop_at=2, per_epoch=4, **how)
    second = train(folder, run, STEERED, 6, resume=True, per_epoch=4, **how)
    assert len(first[0]) == 2 and len(second[0]) == 4
    anew = [row.get(BEGUN_ANEW) for row in second[0]]
    assert anew == [1 - 1 / NUM_PROMPTS] * 4  # All four had been begun, and each had one group.
    # Two steps, and a group of each of the four in flight, of two epochs.
    assert len(first[4]) == 2 * NUM_PROMPTS + 4
    asked = [*first[4], *second[4]]
    assert len(asked) == len(set(asked)) == 6 * NUM_PROMPTS
