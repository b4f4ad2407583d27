"""A run's day is the one on which it began."""

import datetime

import pytest

from megatron_jackpot.run.clock import STARTED_FILE, started_at, write_start


def test_a_run_that_goes_on_keeps_the_day_it_began_and_a_new_one_has_its_own(tmp_path):
    began = datetime.datetime(2024, 2, 29, 23, 59, tzinfo=datetime.UTC)
    write_start(tmp_path, began)
    assert started_at(tmp_path, True) == started_at(tmp_path, "auto") == began
    now = datetime.datetime.now().astimezone()
    assert abs(started_at(tmp_path, False) - now) < datetime.timedelta(minutes=5)
    assert started_at(tmp_path / "none", "auto") >= now


def test_a_time_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / STARTED_FILE).write_text("[]")
    with pytest.raises(ValueError, match=f"{STARTED_FILE} does not hold a time"):
        started_at(tmp_path, True)
