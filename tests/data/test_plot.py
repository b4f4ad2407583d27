import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megatron_jackpot.monitor.metrics import MetricsWriter

SCRIPT = Path(__file__).parents[2] / "tools" / "plot.py"


@pytest.fixture(scope="module")
def plot_runs():
    spec = importlib.util.spec_from_file_location("jackpot_plot", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.plot_runs


def make_run(folder, *, skipped=()):
    with MetricsWriter(folder, False, None) as out:
        out.write(0, {"eval/policy_accuracy": 0.3, "eval/actor_accuracy": 0.1})
        for step in range(1, 6):
            names = {"reward/mean", "jackpot/acceptance", "jackpot/z", "kl/target_server"} - set(skipped)
            out.write(step, {name: step / 10 for name in sorted(names)})
        out.write(5, {"eval/policy_accuracy": 0.5, "eval/actor_accuracy": 0.4})
    return folder


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def num_lines(figure):
    return [len(axes.lines) for axes in figure.axes]


def test_one_run_draws_two_accuracies_reward_acceptance_z_and_kl(tmp_path, plot_runs):
    figure = plot_runs([make_run(tmp_path / "run")], tmp_path / "new" / "curves.png")
    assert num_lines(figure) == [2, 1, 2, 1]
    assert figure.axes[0].lines[0].get_xydata().tolist() == [[0.0, 0.3], [5.0, 0.5]]
    assert (tmp_path / "new" / "curves.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_three_seeds_are_overlaid_and_the_control_adds_one_line(tmp_path, plot_runs):
    runs = [make_run(tmp_path / "pair" / f"seed{seed}") for seed in range(3)]
    control = make_run(tmp_path / "control") / "metrics.jsonl"
    figure = plot_runs(runs, tmp_path / "curves.png", control)
    assert num_lines(figure) == [7, 3, 6, 3]
    assert legend(figure) == ["seed0", "seed1", "seed2", "control"]
    assert all(axes.get_legend() is None for axes in figure.axes)
    assert len({line.get_color() for line in figure.axes[0].lines}) == 4


def test_runs_of_one_name_in_two_places_are_both_drawn(tmp_path, plot_runs):
    figure = plot_runs(
        [make_run(tmp_path / "a" / "run"), make_run(tmp_path / "b" / "run")], tmp_path / "c.png"
    )
    assert legend(figure) == ["a/run", "b/run"]


def test_a_label_is_what_differs_between_the_runs(tmp_path, plot_runs):
    runs = [make_run(tmp_path / name) for name in ("first", "second", "third")]
    for run, seed, threads in zip(runs, (0, 1, 1), (1, 1, 2), strict=True):
        config = {
            "run": {"folder": str(run), "seed": seed, "steps": 5},
            "parallel": {"threads": threads, "tp": 1},
        }
        (run / "config.yaml").write_text(yaml.safe_dump(config))
    expected = [f"threads={t}, seed={s}" for s, t in ((0, 1), (1, 1), (1, 2))]
    assert legend(plot_runs(runs, tmp_path / "curves.png")) == expected


def test_of_paths_that_differ_only_what_differs_is_told_and_long_names_stay_in_the_picture(
    tmp_path, plot_runs
):
    runs = [make_run(tmp_path / name) for name in ("first", "second")]
    for run, where in zip(runs, ("/one/of/models/policy", "/two/models/policy"), strict=True):
        names = {f"setting_with_a_long_name_{i}": f"{run.name} {i}" for i in range(5)}
        (run / "config.yaml").write_text(yaml.safe_dump({"policy": {"hf": where}, "run": names}))
    figure = plot_runs(runs, tmp_path / "curves.png")
    assert [text.split(", ")[0] for text in legend(figure)] == ["hf=one/of", "hf=two"]
    box = figure.legends[0].get_window_extent()
    assert box.x0 >= 0 and box.x1 <= figure.bbox.x1 and box.y0 >= 0


def test_the_picture_of_several_runs_must_be_named(tmp_path):
    runs = [make_run(tmp_path / name) for name in ("a", "b")]
    done = subprocess.run([sys.executable, SCRIPT, *runs], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "--out" in done.stderr
    assert not list(tmp_path.rglob("*.png"))


def test_a_metric_that_was_never_measured_leaves_its_panel_empty(tmp_path, plot_runs):
    figure = plot_runs([make_run(tmp_path / "run", skipped=["kl/target_server"])], tmp_path / "curves.png")
    assert num_lines(figure) == [2, 1, 2, 0]
    assert figure.axes[3].texts[0].get_text() == "not measured"


def test_the_command_line_writes_the_picture(tmp_path):
    run, out = make_run(tmp_path / "run"), tmp_path / "curves.png"
    subprocess.run(
        [sys.executable, SCRIPT, run, "--control", run / "metrics.jsonl", "--out", out],
        check=True,
        timeout=60,
    )
    assert out.stat().st_size > 10_000
