"""Finished groups of an interrupted step go to disk and back unchanged, without pickle."""

import dataclasses

import numpy as np
import pytest

from megatron_jackpot.rollout.finished_groups import load_groups, save_groups
from tests.tiny import groups


def test_groups_come_back_as_they_were(tmp_path):
    kept = {group[0].prompt.id: group for group in groups(range(3))}
    prompts = {i: group[0].prompt for i, group in kept.items()}
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
    save_groups(tmp_path / "rollouts-0.npz", {7: groups([7])[0]})
    with pytest.raises(ValueError, match="prompt 7, which data"):
        load_groups(tmp_path / "rollouts-0.npz", {})
