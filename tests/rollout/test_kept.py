"""Finished groups of steps that are not trained yet go to disk and back unchanged, without pickle."""

import dataclasses

import numpy as np
import pytest

from megatron_jackpot.rollout.finished_groups import load_groups, save_groups
from tests.tiny import groups


def test_groups_come_back_as_they_were(tmp_path):
    made = groups(range(3))
    made[1] = [dataclasses.replace(rollout, parts={"answer": 1.0, "short": 0.1}) for rollout in made[1]]
    kept = {(group[0].epoch, group[0].prompt.id): group for group in made}
    # Of the next epoch, so that a prompt is there twice.
    again = [dataclasses.replace(rollout, epoch=1) for rollout in made[0]]
    kept[1, made[0][0].prompt.id] = again
    prompts = {group[0].prompt.id: group[0].prompt for group in made}
    save_groups(tmp_path / "rollouts-0.npz", kept)
    back = load_groups(tmp_path / "rollouts-0.npz", prompts)
    assert list(back) == list(kept)
    for group, again in zip(kept.values(), back.values(), strict=True):
        for one, other in zip(group, again, strict=True):
            for field in dataclasses.fields(one):
                left, right = getattr(one, field.name), getattr(other, field.name)
                if isinstance(left, np.ndarray):
                    assert left.dtype == right.dtype and np.array_equal(left, right), field.name
                else:
                    assert left == right and type(left) is type(right), field.name


def test_nothing_is_written_where_nothing_was_finished(tmp_path):
    save_groups(tmp_path / "rollouts-0.npz", {})
    assert not (tmp_path / "rollouts-0.npz").exists()


def test_other_prompts_are_refused(tmp_path):
    save_groups(tmp_path / "rollouts-0.npz", {(0, 7): groups([7])[0]})
    with pytest.raises(ValueError, match="prompt 7, which data"):
        load_groups(tmp_path / "rollouts-0.npz", {})
