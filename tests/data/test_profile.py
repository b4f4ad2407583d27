"""Profiles of chosen steps and ranks, and of no others."""

import gzip
import json

import pytest
import torch

from megatron_jackpot.config import Logging
from megatron_jackpot.monitor.profile import profiled


def written(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def events(path):
    with gzip.open(path, "rt") as file:
        return {event.get("name") for event in json.load(file)["traceEvents"]}


def test_the_chosen_step_of_the_chosen_rank_leaves_a_trace_of_itself_and_no_other_does(tmp_path):
    knobs = Logging(profile_steps=(2,), profile_ranks=(1,))
    for rank in (0, 1):
        for step in (1, 2, 3):
            with profiled(tmp_path, knobs, step, rank):
                torch.ones(3, 3) @ torch.ones(3, 3)
    trace = "profile/step-000002-rank-1/trace.json.gz"
    # Without CUDA there is no allocator to take a snapshot of.
    assert written(tmp_path) == [trace] + ["profile/step-000002-rank-1/memory.pickle"] * cuda()
    assert {"step 2", "aten::mm"} <= events(tmp_path / trace)


def cuda():
    return torch.cuda.is_available()


def test_a_step_that_fails_is_written_too_and_its_error_goes_on(tmp_path):
    with pytest.raises(ZeroDivisionError):
        with profiled(tmp_path, Logging(profile_steps=(1,)), 1, 0):
            torch.zeros(2).exp()
            raise ZeroDivisionError
    assert "aten::exp" in events(tmp_path / "profile/step-000001-rank-0/trace.json.gz")


def test_a_disk_that_refuses_costs_the_profile_and_not_the_run(tmp_path, caplog):
    (tmp_path / "profile").write_text("a file where the folder should be")
    with profiled(tmp_path, Logging(profile_steps=(1,)), 1, 0):
        pass
    assert "the profile of step 1 was not written" in caplog.text


def test_by_default_nothing_is_recorded(tmp_path):
    with profiled(tmp_path, Logging(), 1, 0):
        pass
    assert written(tmp_path) == []
