import io
import json
import re
import resource
import sys
import threading
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from rich.console import Console

from megatron_jackpot.config import parse_config
from megatron_jackpot.monitor.console import StepLogger, final_table, print_report, progress_line
from megatron_jackpot.monitor.equal_rewards import EqualRewards
from megatron_jackpot.monitor.metrics import METRICS, MetricsWriter, read_metrics, series
from megatron_jackpot.run.formats import FORMATS, current


def writer(folder, *, tensorboard=False, wandb=None, **knobs):
    return MetricsWriter(folder, tensorboard, wandb, **knobs)


def test_what_is_written_is_read_back_and_is_on_disk_before_close(tmp_path):
    out = writer(tmp_path / "run")
    out.write(1, {"reward/mean": 0.25, "sync/version": 3})
    assert read_metrics(tmp_path / "run") == [{"step": 1, "reward/mean": 0.25, "sync/version": 3.0}]
    out.close()


def test_values_that_are_not_finite_become_null_and_are_counted(tmp_path):
    with writer(tmp_path) as out:
        out.write(1, {"loss/policy": float("nan"), "jackpot/z": float("inf"), "reward/mean": 1.0})
        assert out.num_nonfinite == 2
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    # Strict JSON: a parser that refuses NaN and Infinity accepts it.
    assert json.loads(line, parse_constant=pytest.fail)["loss/policy"] is None
    assert series(read_metrics(tmp_path), "jackpot/z") == ([], [])


@contextmanager
def full_disk(num_bytes: int) -> Iterator[None]:
    """No file of this process grows beyond `num_bytes`: the last write before that takes a part."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("tensorboard", [False, True])
def test_a_full_disk_holds_rows_back_and_ends_no_run(tmp_path, caplog, monkeypatch, tensorboard):
    monkeypatch.setattr(threading, "excepthook", lambda _: None)  # TensorBoard's own thread ends
    with writer(tmp_path, tensorboard=tensorboard) as out:
        out.write(1, {"reward/mean": 0.5})
        with full_disk(100):
            for step in range(2, 50):
                out.write(step, {"reward/mean": 0.5})
        assert [row["step"] for row in read_metrics(tmp_path)][-1] < 3
        out.write(50, {"reward/mean": 0.5})
    assert [row["step"] for row in read_metrics(tmp_path)] == [*range(1, 51)]
    assert caplog.text.count("lacks rows until the disk takes them again") == 1
    assert caplog.text.count("TensorBoard has no steps from 2 on") == tensorboard


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_a_truncated_last_line_is_passed_over(tmp_path, cut):
    with writer(tmp_path) as out:
        for step in (1, 2):
            out.write(step, {"reward/mean": step / 10})
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    assert read_metrics(path) == [{"step": 1, "reward/mean": 0.1}]
    with writer(tmp_path) as out:
        out.write(2, {"reward/mean": 0.3})
    assert series(read_metrics(path), "reward/mean") == ([1, 2], [0.1, 0.3])


def test_every_line_carries_the_format_also_after_a_resume(tmp_path):
    for resume_step in (None, 1):
        with writer(tmp_path, resume_step=resume_step) as out:
            out.write(1, {"reward/mean": 0.5})
            out.write(2, {"reward/mean": 0.5})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["format"] for line in lines] == [current("metrics")] * 3


@pytest.mark.parametrize("number", [0, *FORMATS["metrics"], current("metrics") + 1, "1"])
def test_rows_of_another_format_are_refused_by_line_and_nothing_of_them_is_changed(tmp_path, number):
    path = tmp_path / "metrics.jsonl"
    row = {"format": number, "step": 1} if number else {"step": 1}
    path.write_text(json.dumps(row) + "\n")
    reader = FORMATS["metrics"].get(number, "A later commit")
    for open_it in (read_metrics, writer):
        with pytest.raises(ValueError, match=f"line 1, has metrics format {number}.*{reader}"):
            open_it(tmp_path)
    assert json.loads(path.read_text()) == row


def test_a_bad_line_elsewhere_is_named(tmp_path):
    good = json.dumps({"format": current("metrics"), "step": 1})
    (tmp_path / "metrics.jsonl").write_text(f'{good}\n{{"step": \n{good}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: not JSON"):
        read_metrics(tmp_path)
    (tmp_path / "metrics.jsonl").write_text(good.replace("step", "loss") + "\n")
    with pytest.raises(ValueError, match="integer 'step'"):
        read_metrics(tmp_path)


def test_a_resumed_run_replaces_the_steps_after_its_checkpoint(tmp_path):
    with writer(tmp_path) as out:
        for step in range(1, 6):
            out.write(step, {"reward/mean": 0.0})
    with writer(tmp_path, resume_step=3) as out:
        out.write(4, {"reward/mean": 1.0})
    assert series(read_metrics(tmp_path), "reward/mean") == ([1, 2, 3, 4], [0.0, 0.0, 0.0, 1.0])


def test_tensorboard_holds_the_same_scalars(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with writer(tmp_path, tensorboard=True) as out:
        out.write(1, {"reward/mean": 0.25, "loss/policy": float("nan")})
        out.write(2, {"reward/mean": 0.5})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("reward/mean")] == [(1, 0.25), (2, 0.5)]
    assert events.Tags()["scalars"] == ["reward/mean"]


def test_a_missing_package_is_refused_at_start_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda package: None)
    with pytest.raises(ValueError, match="needs the wandb package.*logging.wandb_project=null"):
        writer(tmp_path, wandb="jackpot")
    with pytest.raises(ValueError, match="needs the tensorboard package"):
        writer(tmp_path, tensorboard=True)


@pytest.fixture
def wandb(monkeypatch):
    """A package that only notes what it is told: (arguments of `init`, [(step, values)])."""
    starts, logged = [], []
    run = types.SimpleNamespace(log=lambda values, step: logged.append((step, values)), finish=lambda: None)
    fake = types.ModuleType("wandb")
    fake.init = lambda **given: (starts.append(given), run)[1]
    fake.__spec__ = types.SimpleNamespace(name="wandb")
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return starts, logged


def test_wandb_receives_finite_values_when_configured(tmp_path, wandb):
    with writer(tmp_path, wandb="jackpot") as out:
        out.write(7, {"reward/mean": 0.5, "loss/policy": float("nan")})
    assert wandb[1] == [(7, {"reward/mean": 0.5})]


def test_whatever_goes_on_in_a_folder_goes_on_in_one_wandb_run_with_its_configuration(tmp_path, wandb):
    for folder, resume_step, lr in (("a", None, 1), ("a", 3, 2), ("a", -1, 2), ("b", None, 1)):
        writer(tmp_path / folder, wandb="p", resume_step=resume_step, settings={"lr": lr}).close()
    starts, _ = wandb
    assert [start["config"]["lr"] for start in starts] == [1, 2, 2, 1]
    assert {start["resume"] for start in starts} == {"allow"}
    first, second, third, other = (start["id"] for start in starts)
    assert first == second == third != other and len(first) >= 8


def test_the_tools_use_only_stable_metric_names():
    from megatron_jackpot.monitor.console import REPORTED, SHOWN

    assert set(REPORTED) | set(SHOWN) <= set(METRICS)


def test_without_a_terminal_each_step_is_one_plain_line_that_keeps_the_last_accuracy(tmp_path):
    text, clock = io.StringIO(), iter([0.0, 50.0, 52.0, 56.0, 1056.0])
    file = tmp_path / "progress.log"
    with StepLogger(9, console=Console(file=text), file=file, clock=clock.__next__) as log:
        log.log(0, {"eval/policy_accuracy": 0.5})
        log.log(1, {"reward/mean": 0.25, "jackpot/acceptance": 0.9})
        log.log(2, {"reward/mean": 0.75})
        log.log(3, {})
    lines = [
        "step 0/9  policy 0.500",
        "step 1/9  2.0 s/step, 0:16 left  reward 0.250  accept 0.900  policy 0.500",
        "step 2/9  3.0 s/step, 0:21 left  reward 0.750  policy 0.500",
        "step 3/9  335.3 s/step, 33:32 left  policy 0.500",
    ]
    assert text.getvalue().splitlines() == lines
    assert [line.partition("  ")[2] for line in file.read_text().splitlines()] == lines


def test_rewards_that_are_all_equal_are_told_once_after_ten_steps_with_likely_causes(caplog, tmp_path):
    tree = {"run": {"folder": str(tmp_path)}, "policy": {"hf": "p"}, "actor": {"hf": "a"},
            "data": {"tasks": {"chain_sum": {}}, "max_prompt_tokens": 64}, "rollout": {"max_new_tokens": 7},
            }  # fmt: skip
    equal, unequal = {"rollout/equal_rewards": 1.0, "rollout/truncated": 0.9}, {"rollout/equal_rewards": 0.9}
    for steps, told in (([{}, *[equal] * 9], 0), ([{}, *[equal] * 25], 1), ([unequal, *[equal] * 25], 0)):
        caplog.clear()
        watch = EqualRewards(parse_config(tree))
        for step, metrics in enumerate(steps):
            watch.look(step, metrics)
        assert len(caplog.messages) == told
    watch = EqualRewards(parse_config(tree))
    for step in range(10):
        watch.look(step, equal)
    for part in ("data.reward = 'exact'", "rollout.max_new_tokens = 7", "90% were cut", "too hard"):
        assert part in caplog.messages[-1]


def test_on_a_terminal_the_bar_shows_the_step_and_the_metrics():
    text = io.StringIO()
    with StepLogger(9, console=Console(file=text, force_terminal=True, width=160)) as log:
        log.log(4, {"reward/mean": 0.25, "rollout/tokens_per_s": 512.3})
    narrow = io.StringIO()
    with StepLogger(9, console=Console(file=narrow, force_terminal=True, width=60)) as log:
        log.log(4, {"reward/mean": 0.25, "rollout/tokens_per_s": 512.3})
    assert "step 4/9" in narrow.getvalue()
    assert "step 4/9" in text.getvalue() and "reward 0.250  tok/s 512" in text.getvalue()
    assert progress_line({"other": 1.0}) == ""


def test_the_final_table_shows_first_last_and_best(tmp_path):
    with writer(tmp_path) as out:
        for step, accuracy in enumerate((0.2, 0.7, 0.6)):
            kl = 0.1 + step
            out.write(step, {"eval/policy_accuracy": accuracy, "kl/target_server": kl, "time/step": 2})
    text = io.StringIO()
    print_report(tmp_path, Console(file=text, width=100))
    table = [" ".join(line.replace("\u2502", " ").split()) for line in text.getvalue().splitlines()]
    assert "policy accuracy 0.200 0.600 0.700" in table
    assert "KL(policy||server) 0.1000 2.1000 0.1000" in table
    assert "total time 6.0 s" in table
    # What was not measured has no row; the time of all steps has one.
    assert (final_table([]).row_count, final_table(read_metrics(tmp_path)).row_count) == (1, 3)


def test_every_metric_that_tools_rely_on_is_defined_in_the_documents():
    text = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
    assert METRICS.keys() <= set(re.findall(r"`([^`]+)`", text))
