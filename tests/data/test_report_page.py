"""What the report says of runs, and how the page holds it; without a browser."""

import contextlib
import html.parser
import json
import os
import re
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_jackpot.monitor.differences import groups
from megatron_jackpot.monitor.evaluations import write_evaluations
from megatron_jackpot.monitor.metrics import METRICS, MetricsWriter
from megatron_jackpot.monitor.report import serve as serving
from megatron_jackpot.monitor.report.content import content
from megatron_jackpot.monitor.report.curves import CHARTS, points
from megatron_jackpot.monitor.report.page import write_report
from megatron_jackpot.monitor.report.serve import ReportServer
from megatron_jackpot.run.watchdog import Watchdog
from tests.data.runs import EVIL, make_run, tree_of


class Elements(html.parser.HTMLParser):
    """Tags of a page with their text, as a parser sees them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list) -> None:
        self.found.append((tag, dict(attributes)))


def test_the_page_is_one_file_of_known_elements_whatever_the_run_says(tmp_path: Path) -> None:
    page = write_report([make_run(tmp_path / "run")]).read_text()
    found = Elements(page).found
    assert [tag for tag, _ in found if tag in ("header", "main", "noscript")] == [
        "noscript",
        "header",
        "main",
    ]
    assert [one.get("id") for tag, one in found if tag == "script"] == ["data", *[None] * 5]
    assert not [one for _, one in found if "src" in one or "href" in one]
    assert "img" not in dict(found) and EVIL not in page
    policy = next(one["content"] for tag, one in found if tag == "meta" and "http-equiv" in one)
    assert "default-src 'none'" in policy and "connect-src 'none'" in policy and "unsafe" not in policy
    tree = tree_of(page)
    assert tree["runs"][0]["facts"][1] == ["actor", EVIL]
    assert tree["samples"][0]["text"].startswith(EVIL) and "letters more" in tree["samples"][0]["text"]


def test_what_was_evaluated_afterwards_is_a_table_of_one_run_and_of_several(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name, seed=seed) for seed, name in enumerate("ab")]
    assert tree_of(write_report(runs[:1]).read_text())["evaluations"] is None
    settings = {"model": "policy", "problems": 3, "samples": 2, "temperature": 1.0, "truncated": 0.5}
    for step, name in ((20, "hard"), (10, "")):
        metrics = {f"eval/{name}/policy_accuracy".replace("//", "/"): 0.25, "eval/hard/policy_pass@2": 0.5}
        answer = {"kind": "evaluation", "model": "policy", "prompt": "1", "answer": "2", "text": EVIL}
        row = {"step": step, "set": name, "metrics": metrics, **settings}
        write_evaluations(runs[1], [row], [{"step": step, "set": name, "correct": False, **answer}])
    assert tree_of(write_report(runs, tmp_path / "both.html").read_text())["evaluations"] == {
        "heads": ["run", "step", "model", "set", "avg", "pass@2", "cut", "problems", "answers", "T"],
        "rows": [
            ["seed=1", "20", "policy", "hard", "0.250", "0.500", "50.0%", "3", "2", "1"],
            ["seed=1", "10", "policy", "held out", "0.250", "-", "50.0%", "3", "2", "1"],
        ],
    }
    shown = tree_of(write_report(runs[1:]).read_text())["samples"]
    assert [row["step"] for row in shown] == sorted(row["step"] for row in shown)
    assert sum(row["text"] == EVIL for row in shown) == 2


def test_what_an_allocator_did_stands_by_step_and_by_prompt_of_one_run(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name) for name in "ab"]
    told = tree_of(write_report(runs[:1]).read_text())["allocated"]
    newest = [1, *range(19, 31)]
    assert told["steps"] == [[step, 3, 1, 24, 20, 9, 1, 2] for step in newest]
    assert [*told["prompts"]] == [str(step) for step in newest]
    assert told["prompts"]["30"] == [
        [4, 0, 8, 8, 1, 8, False, True],
        [7, 0, 8, 12, 3, 1, True, True],
        [31, 2, 8, 0, 0, 0, False, False],
    ]
    assert tree_of(write_report(runs, tmp_path / "both.html").read_text())["allocated"] is None
    row = '{"format": 1, "step": 1, "epoch": 0, "trained": [4], "lost": []}\n'
    (runs[0] / "prompts.jsonl").write_text(row)
    assert tree_of(write_report(runs[:1]).read_text())["allocated"] is None


def test_what_is_not_finite_or_not_drawable_is_missing(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"format": 1, "step": 31, "loss/policy": NaN, "weight/ess": -Infinity, "odd": "text"}\n')
    (tree,) = content([run])["runs"]
    json.dumps(tree, allow_nan=False)
    steps, values = tree["points"]["loss/policy"]
    assert {step for step, value in zip(steps, values, strict=True) if value is None} == {5, 31}
    assert dict(zip(*tree["points"]["grad_norm/policy"], strict=True))[6] is None
    assert tree["points"]["weight/ess"][1][-1] is None and "odd" not in tree["points"]


def test_every_charted_metric_is_one_that_tools_may_rely_on() -> None:
    derived = {"train/tokens_per_s", "train/mfu", "is/kept"}
    assert {name for _, _, names in CHARTS for name in names} <= METRICS.keys() | derived


def test_a_long_run_is_thinned_and_keeps_its_ends_and_evaluations() -> None:
    rows = [{"step": step, "reward/mean": 0.5} for step in range(5001)]
    rows[777] |= {"eval/policy_accuracy": 0.1}
    found = points(rows)
    steps = found["reward/mean"][0]
    assert len(steps) <= 1002 and steps[0] == 0 and steps[-1] == 5000 and 777 in steps
    assert found["eval/policy_accuracy"] == ([777], [0.1])


def test_a_healthy_run_is_said_to_be_healthy_and_where_it_stands(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    (folder / "x").mkdir(parents=True)
    (folder / "config.yaml").write_text("run: {steps: 4}\n")
    with MetricsWriter(folder, False, None) as out:
        for step in range(5):
            out.write(step, {"eval/policy_accuracy": (0.2, 0.5, 0.9, 0.4, 0.6)[step], "time/step": 30.0})
            if step == 2:
                (half,) = content([folder])["runs"]
    (whole,) = content([folder])["runs"]
    assert half["verdict"]["state"] == "running"
    assert half["verdict"]["text"].startswith("Running: 2 of 4 steps, about 1 min 0 s left.")
    assert whole["verdict"]["state"] == "good" and whole["findings"] == []
    assert whole["verdict"]["text"].startswith("Finished: 4 of 4 steps in 2 min 30 s.")
    assert "0.200 \u2192 0.600 (best 0.900 at step 2)" in whole["verdict"]["text"]
    assert "Healthy" in whole["verdict"]["text"]


def silent_run(folder: Path, *, rows: int, row_s: float) -> Path:
    """Rows of 30-s steps from 0 on, the newest of them `row_s` old, and nothing else."""
    folder.mkdir()
    (folder / "config.yaml").write_text("run: {steps: 100}\n")
    with MetricsWriter(folder, False, None) as out:
        for step in range(rows):
            out.write(step, {"time/step": 30.0} if step else {"eval/policy_accuracy": 0.5})
    age(folder / "metrics.jsonl", row_s)
    return folder


def age(path: Path, seconds: float) -> None:
    """With most of a second until it is rounded to the next."""
    os.utime(path, (time.time() - seconds + 0.4,) * 2)


FIRST, EVALUATION, LATER = ("step of step 1", "rollout of step 1"), ("evaluation",), "about 30 min 0 s left."
SAYS = "rank 0 was last heard of"


@pytest.mark.parametrize(
    ("rows", "row_s", "phases", "begun_s", "said"),
    [
        (1, 150, (), None, "Stopped after 0 of 100 steps; the last was written 2 min 30 s ago. Healthy"),
        (1, 150, FIRST, 140, f"Running: 0 of 100 steps. No row for 2 min 30 s; {SAYS} 2 min 20 s ago, in "),
        (1, 150, FIRST, 140, "'rollout of step 1', which may take 12 min 0 s. Healthy"),
        (41, 140, EVALUATION, 135, f"Running: 40 of 100 steps, {LATER} Healthy"),
        (41, 200, EVALUATION, 195, f"{LATER} No row for 3 min 20 s; {SAYS} 3 min 15 s ago, in 'evaluation'"),
        (41, 2000, EVALUATION, 1995, "in 'evaluation', which may take 52 min 0 s. Healthy"),
        (41, 7210, EVALUATION, 7200, "Stopped after 40 of 100 steps; the last was written 2 h 0 min ago. Ra"),
        (41, 7210, EVALUATION, 7200, "Rank 0 was last heard of 2 h 0 min ago, in 'evaluation'. Healthy"),
        (
            41,
            7210,
            (),
            9,
            f"Running: 40 of 100 steps, {LATER} No row for 2 h 0 min; its folder has news of 9 s",
        ),
        (41, 7210, (), 7200, "Stopped after 40 of 100 steps; the last was written 2 h 0 min ago. Healthy"),
    ],
)
def test_a_run_has_stopped_when_its_ranks_are_silent_too(
    tmp_path: Path, rows: int, row_s: float, phases: tuple[str, ...], begun_s: float | None, said: str
) -> None:
    """A phase may last for its own time limit, and a run that was killed has left its last word."""
    folder = silent_run(tmp_path / "run", rows=rows, row_s=row_s)
    dog = Watchdog(folder, 0, 600.0)
    with contextlib.ExitStack() as within:
        if begun_s is not None:
            with dog.phase("the one before"):
                pass
            for phase in phases:
                within.enter_context(dog.phase(phase, at_least_s=3000.0 if phase == "evaluation" else 0.0))
            age(dog.doing, begun_s)
        verdict = content([folder])["runs"][0]["verdict"]
    assert said in verdict["text"]
    assert verdict["state"] == ("running" if verdict["text"].startswith("Running") else "warn")


@pytest.mark.parametrize("file", ["provenance.json", "train.log", "train-1.log", "servers/b/server-0.log"])
def test_a_run_that_begins_again_is_not_one_that_has_stopped(tmp_path: Path, file: str) -> None:
    folder = silent_run(tmp_path / "run", rows=41, row_s=7210)
    (folder / file).parent.mkdir(parents=True, exist_ok=True)
    (folder / file).write_text('{"format": 1}\n')
    assert content([folder])["runs"][0]["verdict"]["text"].startswith("Running: 40 of 100 steps")


TROUBLES = {
    "3 requests tried again": {"rollout/retries": 0.75},
    "2 rewards timed out": {"reward/timed_out": 0.25},
    "1 reward crashed": {"reward/crashed": 0.125},
    "1 step of the policy skipped": {"guard/skipped_policy": 1.0},
    "1 checkpoint could not be saved": {"save/failed": 1.0},
    "policy paused in 1 step": {"guard/paused": 1.0},
    "loss/actor not finite in 1 row": {"loss/actor": float("nan")},
    "95% of the last groups have equal rewards": {"rollout/equal_rewards": 0.95},
    "30% of the last responses were cut": {"rollout/truncated": 0.3},
    "effective sample size is 5%": {"weight/ess": 0.05},
    "up to 2.0% of an evaluation's rewards failed": {"eval/failed_rewards": 0.02},
}


@pytest.mark.parametrize("said", TROUBLES)
def test_trouble_in_the_metrics_is_counted_and_named_in_the_verdict(tmp_path: Path, said: str) -> None:
    (tmp_path / "config.yaml").write_text(
        "run: {steps: 1}\nrollout: {prompts_per_step: 4, samples_per_prompt: 2}\n"
    )
    with MetricsWriter(tmp_path, False, None) as out:
        out.write(1, TROUBLES[said])
    (tree,) = content([tmp_path])["runs"]
    assert len(tree["findings"]) == 1 and said in tree["verdict"]["text"]
    assert tree["verdict"]["state"] in ("warn", "bad") and "Healthy" not in tree["verdict"]["text"]


def test_restarts_and_warnings_are_read_from_the_logs(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, False, None) as out:
        out.write(1, {"reward/mean": 0.1})
    (tmp_path / "server-0.log").write_bytes(b"\xff x\n[supervisor] restart 1 of 5 in 1 s\n" * 2)
    (tmp_path / "train.log").write_text(
        "resumed after step 4\nWARNING: a disk is full\nstep 5/9 WARNING: no\n"
    )
    (tree,) = content([tmp_path])["runs"]
    assert [one["text"] for one in tree["findings"]] == [
        "2 restarts of a server",
        "training went on from a checkpoint 1 time",
        "train.log: a disk is full",
    ]


def test_runs_that_differ_in_their_seed_alone_are_one_group(tmp_path: Path) -> None:
    made = [("a", 0, "jackpot"), ("b", 1, "jackpot"), ("c", 0, "tis"), ("d", 1, "tis")]
    runs = [make_run(tmp_path / name, seed=seed, correction=which) for name, seed, which in made]
    assert [(group.label, group.members) for group in groups(runs)] == [
        ("correction=jackpot", (0, 1)),
        ("correction=tis", (2, 3)),
    ]
    assert [group.members for group in groups(runs[:2])] == [(0, 1)]
    # Twice the same seed is no spread of seeds.
    assert [group.members for group in groups([runs[0], runs[0]])] == [(0,), (1,)]


def test_the_page_of_several_runs_must_be_named_and_overwrites_none(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name, seed=seed) for seed, name in enumerate(("a", "b"))]
    with pytest.raises(ValueError, match="--out FILE"):
        write_report(runs)
    tree = tree_of(write_report(runs, tmp_path / "both.html").read_text())
    assert [run["label"] for run in tree["runs"]] == ["seed=0", "seed=1"]
    assert not list(tmp_path.glob("*/report.html"))


def test_a_folder_without_a_run_or_of_another_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=r"metrics.jsonl"):
        write_report([tmp_path])
    (tmp_path / "provenance.json").write_text('{"commit": "1234567"}')
    with pytest.raises(ValueError, match="provenance.json has run folder format 0.*Commit 8170530 reads it"):
        write_report([tmp_path])


def test_the_served_page_follows_the_run_and_answers_to_this_machine_alone(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=3)
    with ReportServer([run], 0) as report:
        thread = threading.Thread(target=report.serve_forever, daemon=True)
        thread.start()

        def get(path: str, **headers: str) -> tuple[int, str]:
            request = urllib.request.Request(report.url + path, headers=headers)
            try:
                with urllib.request.urlopen(request, timeout=10) as reply:
                    return reply.status, reply.read().decode()
            except urllib.error.HTTPError as error:
                return error.code, error.read().decode()

        status, page = get("")
        first = tree_of(page)
        assert status == 200 and first["live_s"] > 0 and "connect-src 'self'" in page
        with open(run / "metrics.jsonl", "a") as file:
            file.write('{"format": 1, "step": 4, "reward/mean": 0.75}\n')
        status, data = get(f"data?than={first['version']}")
        second = json.loads(data)
        assert status == 200 and second["runs"][0]["points"]["reward/mean"][1][-1] == 0.75
        assert get(f"data?than={second['version']}")[0] in (204, 200)
        assert get("data", Host="evil.example:80")[0] == 403
        assert get("../etc/passwd")[0] == 404
        with open(run / "metrics.jsonl", "a") as file:
            file.write("broken\n")
        status, said = get("data?than=old")
        assert status == 503 and re.search("line 6: not JSON", said)
        report._server.shutdown()
        thread.join(timeout=10)
    assert report.url.startswith("http://127.0.0.1:")


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    """What a launch has written before its servers and models are up."""
    (tmp_path / "config.yaml").write_text("run: {steps: 4}\n")
    (tmp_path / "provenance.json").write_text('{"format": 1}\n')
    return tmp_path


@pytest.mark.parametrize("rows", [None, ""])
def test_a_run_that_has_begun_is_served_from_its_first_row_on(
    begun: Path, rows: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    if rows is not None:
        (begun / "metrics.jsonl").write_text(rows)
    served: list[str] = []
    waits = iter([lambda: None, lambda: MetricsWriter(begun, False, None).write(0, {"reward/mean": 0.5})])
    monkeypatch.setattr(serving, "time", SimpleNamespace(sleep=lambda _: next(waits)()))
    monkeypatch.setattr(ReportServer, "serve_forever", lambda self: served.append(self.tree()["made"]))
    serving.serve([begun], 0)
    assert len(served) == 1 and next(waits, None) is None
    assert capsys.readouterr().out.startswith(f"{begun} has begun and has no row yet: waiting for the first")


def test_a_run_without_a_row_is_waited_for_as_long_as_it_lives(
    begun: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0 is in its first evaluation, then nothing more is heard: that is said. Ctrl-C ends it before."""

    def killed(_: float) -> None:
        age(dog.doing, 3901)

    def interrupted(_: float) -> None:
        raise KeyboardInterrupt

    age(begun / "provenance.json", 5000)
    dog = Watchdog(begun, 0, 3600.0)
    monkeypatch.setattr(serving, "time", SimpleNamespace(sleep=killed))
    with dog.phase("evaluation"):
        age(dog.doing, 3600)
        with pytest.raises(ValueError, match="no row in metrics.jsonl.*silent for 1 h 5 min. They say"):
            serving.serve([begun], 0)
        age(dog.doing, 3600)
        monkeypatch.setattr(serving, "time", SimpleNamespace(sleep=interrupted))
        serving.serve([begun], 0)


def test_a_folder_that_no_launch_wrote_is_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("run: {steps: 4}\n")
    for folder, said in ((tmp_path, "has no rows in metrics.jsonl"), (tmp_path / "none", "is no folder")):
        with pytest.raises(ValueError, match=said):
            serving.serve([folder], 0)
    (tmp_path / "provenance.json").write_text('{"commit": "1234567"}')
    with pytest.raises(ValueError, match="has run folder format 0"):
        serving.serve([tmp_path], 0)


def test_a_port_that_is_taken_is_refused_with_the_remedy(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=3)
    with (
        ReportServer([run], 0) as first,
        pytest.raises(ValueError, match=f"--port {first.port}.*Name another"),
    ):
        ReportServer([run], first.port)
