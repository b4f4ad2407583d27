"""Runs of the study: the same numbers whether interrupted or not, and results that know when they are old."""

import json
import math
import re
import shutil
from dataclasses import replace

import pytest

from benchmarks.study_parts import revalidate as revalidation
from benchmarks.study_parts import task
from benchmarks.study_parts.families import FAMILIES
from benchmarks.study_parts.kept import keep, take_out
from benchmarks.study_parts.plan import BASE, ROOT, Plan, fingerprint, read_plan, run_folder, watched
from benchmarks.study_parts.report import blocks, finished, put_into, write_report
from benchmarks.study_parts.revalidate import revalidate
from benchmarks.study_parts.runner import LINES, ORIGIN, Stale, perform

SAMPLING = sorted((ROOT / "benchmarks" / "plans").glob("aero*.yaml"))
SECOND = ROOT / "benchmarks" / "plans" / "second.yaml"
REMEDY = sorted((ROOT / "benchmarks" / "plans").glob("remedy*.yaml"))
PLANS = [*sorted((ROOT / "benchmarks" / "plans").glob("stage_*.yaml")), *REMEDY, *SAMPLING, SECOND]
LATER = math.inf


@pytest.fixture
def plan() -> Plan:
    small = {"rollout.max_new_tokens": 6, "evaluation.size": 24, "packing.tokens": 512}
    jackpot = {"algorithm.correction": {"name": "jackpot"}, "rollout.prompts_per_step": 2, **small}
    return Plan(
        stage="test",
        question="?",
        steps=4,
        every=2,
        mismatches=("near",),
        warmups=1,
        seeds=(0,),
        lrs=(1e-3,),
        actor_lr_factor=1.0,
        arms={"on_policy": {**jackpot, "actor": None, "rollout.model": "policy"}, "jackpot": jackpot},
        reference="on_policy",
        contrasts=(("jackpot", "on_policy"),),
        assumed_sd=0.05,
        decision="!",
        budget_h=1.0,
    )


def lines(folder, run) -> list[dict]:
    rows = (run_folder(folder, run) / LINES).read_text().splitlines()
    return [{k: v for k, v in json.loads(row).items() if not k.startswith("time/")} for row in rows]


def test_a_run_that_was_interrupted_goes_on_to_the_same_lines(plan, folder, mesh) -> None:
    run = plan.runs[1]
    assert perform(plan, run, folder, mesh, LATER)
    whole = lines(folder, run)
    shutil.rmtree(folder / "stage_test")
    assert not perform(plan, run, folder, mesh, 0.0)
    assert [line["step"] for line in lines(folder, run)] == [0, 2]
    assert perform(plan, run, folder, mesh, LATER)
    assert lines(folder, run) == whole and [line["step"] for line in whole] == [0, 2, 4]
    assert whole[-1]["reward/mean"] is not None and len(whole[-1]["code"]) == 16


def test_finished_runs_form_a_block_once_every_arm_is_there_and_changed_models_make_them_stale(
    plan, folder, mesh
) -> None:
    assert perform(plan, plan.runs[0], folder, mesh, LATER)
    assert not blocks(plan, finished(plan, folder))
    assert not perform(plan, plan.runs[1], folder, mesh, 0.0)
    assert "1 of 2 runs" in write_report(plan, folder)
    models = folder / "models" / "warmup-0"
    held = models.resolve()
    models.unlink()
    shutil.copytree(held, models)
    weights = models / "policy" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert "STALE" in write_report(plan, folder)
    with pytest.raises(Stale, match="other models"):
        perform(plan, plan.runs[1], folder, mesh, LATER)
    weights.write_bytes(bytes([*content[:-1], content[-1] ^ 1]))
    assert perform(plan, plan.runs[1], folder, mesh, LATER)
    text = write_report(plan, folder)
    assert len(blocks(plan, finished(plan, folder))) == 1 and "STALE" not in text and "NOT WHOLE" not in text


def test_arms_end_at_the_same_number_of_rollouts_whatever_a_step_takes(plan, folder, mesh) -> None:
    """Models of random weights are always wrong: aero rescues each of 2 prompts with 8 more rollouts."""
    base = {**plan.arms["on_policy"], "data.reward": "benchmarks.study_parts.task:exact"}
    base |= {"evaluation.samples": 8, "evaluation.temperature": 1.0}
    arms = {"grpo": base, "aero": {**base, "rollout.allocator": {"name": "aero"}}}
    asked = {"samples": 64, "problems": 3, "reference": "grpo", "contrasts": (("aero", "grpo"),)}
    plan = replace(plan, arms=arms, **asked)
    for run in plan.runs:
        assert perform(plan, run, folder, mesh, LATER)
    whole, rescued = (lines(folder, run) for run in plan.runs)
    assert [(row["step"], row["spent/samples"]) for row in whole] == [(0, 0), (2, 32), (4, 64)]
    assert [(row["step"], row["spent/samples"]) for row in rescued] == [(0, 0), (2, 64)]
    assert whole[-1]["eval/policy_pass@8"] == 0 and whole[-1]["spent/tokens"] > 0
    assert len((folder / "data" / "train-3.jsonl").read_text().splitlines()) == 3
    row = next(line for line in write_report(plan, folder).splitlines() if line.startswith("| aero | 2 |"))
    assert row.split(" | ")[1:4] == ["2", "64", "1.000"]


def test_code_counts_by_what_it_does_not_by_what_it_says(tmp_path) -> None:
    for name in {name for family in FAMILIES for name in watched(family)}:
        source, to = ROOT / name, tmp_path / name
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(source, to) if source.is_dir() else shutil.copyfile(source, to)
    (tmp_path / BASE.relative_to(ROOT)).parent.mkdir(parents=True)
    shutil.copyfile(BASE, tmp_path / BASE.relative_to(ROOT))
    assert fingerprint("sums", tmp_path) == fingerprint("sums")
    losses = tmp_path / "megatron_jackpot" / "train" / "losses.py"
    losses.write_text("# Another comment.\n" + losses.read_text())
    assert fingerprint("sums", tmp_path) == fingerprint("sums")
    obrs = tmp_path / "megatron_jackpot" / "algorithm" / "obrs.py"
    obrs.write_text(obrs.read_text().replace("LOG_RATIO_LIMIT = 20", "LOG_RATIO_LIMIT = 21"))
    assert fingerprint("sums", tmp_path) != fingerprint("sums")


def test_a_familys_file_makes_the_runs_of_that_family_alone_stale(tmp_path) -> None:
    shutil.copytree(ROOT / "benchmarks" / "study_parts", tmp_path / "benchmarks" / "study_parts")
    shutil.copytree(ROOT / "benchmarks" / "plans", tmp_path / "benchmarks" / "plans")
    (tmp_path / "megatron_jackpot").symlink_to(ROOT / "megatron_jackpot")
    sorting = tmp_path / "benchmarks" / "study_parts" / "tasks" / "sorting.py"
    sorting.write_text(sorting.read_text().replace('EMPTY = "-"', 'EMPTY = "."'))
    assert fingerprint("sums", tmp_path) == fingerprint("sums")
    assert fingerprint("sorting", tmp_path) != fingerprint("sorting")


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)
def test_every_arm_of_a_committed_plan_is_a_configuration(path, folder) -> None:
    plan = read_plan(path)
    models = task.home(folder, plan.task) / "models"
    for warmup in {run.warmup for run in plan.runs} - {0}:
        (models / f"warmup-{warmup}").symlink_to(models / "warmup-0")
    first = [run for run in plan.runs if (run.lr, run.seed) == (plan.lrs[0], plan.seeds[0])]
    for run in first:
        config = plan.config(run, folder)
        alone = path in SAMPLING or run.arm == "on_policy"
        assert (config.actor is None) == (config.rollout.model == "policy") == alone
        assert config.evaluation.size >= 1000 and config.run.steps == plan.steps
        place = folder if plan.task == "sums" else folder / plan.task
        assert config.policy.hf.parents[2] == config.data.path.parents[1] == place


def test_a_plan_with_an_unknown_arm_or_key_is_refused(tmp_path) -> None:
    text = PLANS[0].read_text()
    for old, new, what in (
        ("reference: on_policy", "reference: nobody", "nobody"),
        ("every: ", "evry: ", "evry"),
        ("stage: a", "stage: a\ntask: chess", "'chess' is none of"),
    ):
        path = tmp_path / "plan.yaml"
        path.write_text(text.replace(old, new))
        with pytest.raises(ValueError, match=what):
            read_plan(path)


def test_runs_whose_first_steps_repeat_are_stamped_anew_and_others_stay_stale(
    plan, folder, mesh, monkeypatch
) -> None:
    for run in plan.runs:
        assert perform(plan, run, folder, mesh, LATER)
    made = json.loads((run_folder(folder, plan.runs[1]) / ORIGIN).read_text())
    monkeypatch.setattr("benchmarks.study_parts.runner.fingerprint", lambda family: "written otherwise")
    with monkeypatch.context() as other:
        other.setattr("benchmarks.study_parts.sampler.STREAM", 1 << 61)
        assert revalidate(plan, folder, mesh, 2) >= 1
        assert finished(plan, folder)[1].stale == ["code"]
    assert revalidate(plan, folder, mesh, 2) == 0
    assert "STALE" not in write_report(plan, folder)
    stamped = json.loads((run_folder(folder, plan.runs[1]) / ORIGIN).read_text())
    assert stamped["code"] == "written otherwise" and stamped["made"]["code"] == made["code"]


@pytest.mark.parametrize("differ, stays", [([], 0), ([0], 0), ([0, 1], 1), ([0, 2], 1), ([1], 0)])
def test_where_one_run_does_not_repeat_two_others_decide(
    plan, folder, mesh, monkeypatch, differ, stays
) -> None:
    runs = [replace(plan.runs[0], seed=seed) for seed in range(4)]
    names = [runs[number].name for number in differ]
    monkeypatch.setattr(
        revalidation, "_repeat", lambda plan, run, *_: "step 6, grad_norm" if run.name in names else ""
    )
    repeated, differed = revalidation._witnesses(plan, runs, folder, mesh, 2)
    assert (len(repeated) <= len(differed)) == bool(stays)
    assert len(repeated) + len(differed) == (1 if 0 not in differ else 2 if 1 in differ else 3)


def test_a_report_takes_the_place_between_its_stages_marks_and_no_other(plan, tmp_path) -> None:
    document = tmp_path / "evidence.md"
    document.write_text("above\n<!-- stage test: begin -->\nold\n<!-- stage test: end -->\nbelow\n")
    for text in ("first", "second\n"):
        put_into(document, plan, text)
    assert (
        document.read_text() == "above\n<!-- stage test: begin -->\nsecond\n<!-- stage test: end -->\nbelow\n"
    )
    document.write_text("above\n<!-- stage b: begin -->\n<!-- stage b: end -->\n")
    with pytest.raises(ValueError, match="Write both"):
        put_into(document, plan, "third")


def _numbers(text: str) -> tuple[list[float], str]:
    """The decimal numbers in a text, and the text without them."""
    return [float(number) for number in re.findall(r"\d+\.\d+", text)], re.sub(r"\d+\.\d+", "#", text)


def test_finished_runs_that_are_kept_make_the_same_report_elsewhere_and_are_not_dropped(
    plan, folder, mesh, tmp_path, monkeypatch
) -> None:
    kept, other = tmp_path / "kept", tmp_path / "other"
    for run in plan.runs:
        assert perform(plan, run, folder, mesh, LATER)
    shutil.copytree((folder / "models").resolve(), kept / "models")
    keep(plan, folder, kept)
    assert take_out(other, kept) == 2 and take_out(other, kept) == 0
    shutil.copytree(folder / "data", other / "data")
    # A number that was cut to its first digits may be rounded to the other side.
    (one, text), (two, as_text) = (_numbers(write_report(plan, place)) for place in (other, folder))
    assert text == as_text and one == pytest.approx(two, abs=1.1e-3)
    monkeypatch.setattr("benchmarks.study_parts.runner.fingerprint", lambda family: "written otherwise")
    assert revalidate(plan, other, mesh, 2) == 0 and finished(plan, other)[0].stale == []
    shutil.rmtree(run_folder(other, plan.runs[0]))
    with pytest.raises(ValueError, match="lacks 1 runs"):
        keep(plan, other, kept)


def test_a_run_without_an_actor_is_done_once_for_all_mismatches(plan, folder, mesh) -> None:
    models = folder / "models" / "warmup-0"
    (models.resolve() / "far").exists() or (models.resolve() / "far").symlink_to(models.resolve() / "near")
    plan = replace(plan, mismatches=("near", "far"))
    alone, joint = ([run for run in plan.runs if run.arm == arm] for arm in ("on_policy", "jackpot"))
    for run in (*alone, joint[0]):
        assert perform(plan, run, folder, mesh, LATER)
    near, far = (lines(folder, run) for run in alone)
    assert [{**row, "mismatch": "far"} for row in near] == far
    assert not (run_folder(folder, alone[1]) / "provenance.json").exists()
    assert not perform(plan, joint[1], folder, mesh, 0.0), "another actor makes another run"
