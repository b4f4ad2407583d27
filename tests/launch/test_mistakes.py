"""A list of the mistakes of a first day: each is told before anything starts, with field, value, where it
stands and what to do, and leaves nothing behind."""

import json
import os
import signal
from pathlib import Path

import pytest
import yaml

from megatron_jackpot import cli
from megatron_jackpot.config import ConfigError, describe
from megatron_jackpot.config.schema import METHOD_KEYS
from megatron_jackpot.config.suggest import SYNONYMS
from megatron_jackpot.launch.folder import finished, folder_mistakes, missing, own_folder, take_back
from megatron_jackpot.run.provenance import checkpoints, step_of
from tests.launch.mistakes import MISTAKES, Spoil, run_that_could_start, write_rows

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    run_that_could_start(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("spoil", "words", "parts"), [case[1:] for case in MISTAKES], ids=[c[0] for c in MISTAKES]
)
def test_a_mistake_is_told_with_field_value_place_and_remedy_and_leaves_nothing(
    spoil: Spoil, words: list[str], parts: list[str], folder: Path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(folder)
    spoil(folder)
    before = sorted(folder.rglob("*"))
    assert cli.main(["launch", "run.yaml", *words]) == cli.EXIT_REFUSED
    said = capsys.readouterr()
    lines = said.err.splitlines()
    assert any(all(part in line for part in parts) for line in lines), said.err
    assert all(line.startswith("megatron-jackpot: ") for line in lines) and said.out == ""
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["launch", "run.yaml", "--run.steps=5"], "--run.steps=5. Settings are written so: run.steps=5"),
        (["launch", "run.yaml", "--steps", "5"], "--steps 5. Settings are written so: run.steps=5"),
        (["plan", "run.yaml", "--gpus", "0"], "'0' is no whole number from 1 on"),
        (["plan", "run.yaml", "--tflops", "0"], "'0' is no number above 0"),
        (["plan", "run.yaml", "--acceptance", "1.5"], "'1.5' is no number above 0, at most 1"),
        (["plan", "run.yaml", "--server-tps", "nan"], "'nan' is no number above 0"),
        (["launch", "run.yaml/run.yaml"], "a part of the path is a file"),
        (["launch"], "required: CONFIG\n"),
        (
            ["launch", "--help", "algorithm.correction.cap"],
            "one of its methods: --help algorithm.correction",
        ),
        (
            ["report", "runs/none", "--serve", "--out", "x.html"],
            "--port goes with --serve",
        ),
        (["report", "runs/none"], "runs/none is no folder. Name the folder of a run"),
    ],
)
def test_words_of_other_commands_that_are_wrong_are_told_too(
    words: list[str], part: str, folder: Path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(folder)
    try:
        code = cli.main(words)
    except SystemExit as ended:
        code = ended.code
    assert code == cli.EXIT_REFUSED and part in capsys.readouterr().err


@pytest.mark.parametrize("command", ["launch", "train", "plan", "doctor"])
def test_every_command_makes_the_same_checks_first_and_tells_all_at_once(
    command: str, folder: Path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr("megatron_jackpot.launch.doctor.doctor", lambda *given: 0)
    monkeypatch.setattr("megatron_jackpot.run.interrupt.die_with_parent", lambda signum: None)
    monkeypatch.setattr("megatron_jackpot.run.interrupt.StopRequest.listen", lambda self: None)
    words = ["run.steps=0", "policy.lr=1", "data.template=x", "policy.hf=none", "data.reward=a:b"]
    assert cli.main([command, "run.yaml", *words]) == 2
    said = capsys.readouterr().err
    for part in ("run.steps = 0", "'policy.optimizer.lr'", "{question}", "policy.hf = none", "'a:b'"):
        assert part in said, said


def test_a_method_may_be_its_name_in_yaml_in_a_base_and_on_the_command_line(
    folder: Path, monkeypatch
) -> None:
    monkeypatch.chdir(folder)
    names = {"algorithm.correction": "tis", "algorithm.objective": "gspo", "algorithm.advantage": "rloo",
             "algorithm.aggregation": "sequence", "algorithm.selector": "nonzero_std",
             "rollout.allocator": "aero", "actor.objective": "reinforce",
             "actor.distill": "forward_topk"}  # fmt: skip
    assert sorted(names) == sorted(METHOD_KEYS)
    tree = yaml.safe_load((folder / "run.yaml").read_text())
    for key, name in names.items():
        section, _, method = key.partition(".")
        tree.setdefault(section, {})[method] = name
    (folder / "base.yaml").write_text(yaml.safe_dump(tree))
    (folder / "over.yaml").write_text("base: base.yaml\nalgorithm: {correction: {cap: 3.0}}\n")
    on_line = [f"{key}={name}" for key, name in names.items()]
    for file, overrides, cap in (
        ("base.yaml", [], {}), ("run.yaml", on_line, {}), ("over.yaml", [], {"cap": 3.0}),
        ("base.yaml", ["algorithm.correction.cap=3.0"], {"cap": 3.0}),
        ("over.yaml", ["algorithm.correction=tis"], {}),
    ):  # fmt: skip
        config, mistakes = cli.examine_config(Path(file), overrides)
        assert config is not None and mistakes == []
        found = {key: getattr(getattr(config, key.split(".")[0]), key.split(".")[1]) for key in names}
        assert {key: method.name for key, method in found.items()} == names
        assert found["algorithm.correction"].settings == cap


def test_what_other_trainers_call_a_key_is_a_key_here() -> None:
    known = {key for key, _, _ in describe()}
    # Of a mapping whose names are the user's own, the settings of each are listed.
    known |= {key.partition(".NAME")[0] for key in known}
    assert {key for keys in SYNONYMS.values() for key in keys} <= known
    assert not known & set(SYNONYMS)


@pytest.mark.parametrize("key", METHOD_KEYS)
def test_help_of_a_method_lists_every_choice_with_its_settings(key: str, capsys) -> None:
    from dataclasses import fields

    from megatron_jackpot.train.method_help import CHOICES, choices

    with pytest.raises(SystemExit) as ended:
        cli.main(["launch", "--help", key])
    assert ended.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert set(CHOICES) == set(METHOD_KEYS)
    for choice, method in zip(choices(key), CHOICES[key].values(), strict=True):
        assert f" {choice.name} " in shown and choice.meaning and choice.meaning in shown
        listed = [name for name, _, _ in choice.settings if name != "preset"]
        assert listed == [field.name for field in fields(method)]
        # A field without a text of its own stands in a group that has one.
        assert not listed or any(not meaning.startswith("(") for _, _, meaning in choice.settings)


def test_help_of_a_section_is_that_section_and_a_word_that_is_none_is_refused(capsys) -> None:
    with pytest.raises(SystemExit):
        cli.main(["plan", "--help", "evaluation"])
    shown = capsys.readouterr().out
    assert "evaluation.every = 10" in shown and "rollout." not in shown
    with pytest.raises(SystemExit) as ended:
        cli.main(["plan", "--help", "evaluations"])
    assert ended.value.code == 2 and "Did you mean 'evaluation'?" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["plan", "--help", "algorithm.corection"])
    assert "Did you mean 'algorithm.correction'?" in capsys.readouterr().err


def test_after_an_end_without_a_checkpoint_both_refusals_name_a_way_that_is_accepted(
    folder: Path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(folder)
    (folder / "runs" / "first").mkdir(parents=True)
    (folder / "runs" / "first" / "metrics.jsonl").touch()
    started = []
    monkeypatch.setattr("megatron_jackpot.launch.local.launch", lambda *a, **k: started.append(a) or 0)
    for resume in ("true", "false"):
        assert cli.main(["launch", "run.yaml", f"run.resume={resume}"]) == 2
        assert "run.resume=auto" in capsys.readouterr().err
    assert cli.main(["launch", "run.yaml", "run.resume=auto"]) == 0 and len(started) == 1


def test_a_run_whose_steps_are_all_done_starts_nothing_and_says_how_to_train_on(
    folder: Path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(folder)
    saved, exported = folder / "runs/first/checkpoints/step-000003", folder / "runs/first/hf/step-000003"
    started = []
    monkeypatch.setattr("megatron_jackpot.launch.local.run_job", lambda *a, **k: started.append(a) or 0)
    for model in ("policy", "actor"):
        (saved / model).mkdir(parents=True)
        (exported / model).mkdir(parents=True)
    launch = ["launch", "run.yaml", "run.resume=true"]
    # Not yet: the models are not written, or steps are left.
    assert cli.main(launch) == 0 and len(started) == 1
    for model in ("policy", "actor"):
        (exported / model / "config.json").touch()
    assert cli.main([*launch, "run.steps=4"]) == 0 and len(started) == 2
    assert cli.main(launch) == 0 and len(started) == 2
    (said,) = capsys.readouterr().out.splitlines()
    assert "nothing to do: runs/first/checkpoints/step-000003 is after step 3" in said
    assert "run.steps = 3" in said and said.endswith("raise it: run.steps=6.")


def rows(folder: Path, steps: int) -> None:
    """Metrics of a run up to a step, and the beginning of another row."""
    lines = [json.dumps({"format": 1, "step": step}) for step in range(steps + 1)]
    (folder / "metrics.jsonl").write_text("\n".join([*lines, '{"format": 1, "st']))


def test_a_run_that_is_over_and_saved_nothing_is_not_begun_anew_over_its_records(
    folder: Path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(folder)
    run = folder / "runs/first"
    for model in ("policy", "actor"):
        (run / "hf/step-000003" / model).mkdir(parents=True)
        (run / "hf/step-000003" / model / "config.json").touch()
    config, _ = cli.examine_config(Path("run.yaml"), [])
    rows(run, 2)
    assert finished(config) is None
    rows(run, 3)
    said = finished(config)
    assert said is not None and "has metrics up to step 3, its models in runs/first/hf/step-000003" in said
    monkeypatch.setattr("megatron_jackpot.launch.local.run_job", lambda *a, **k: pytest.fail("it began"))
    assert cli.main(["launch", "run.yaml", "run.resume=auto"]) == 0
    assert "Nothing was saved to train on from" in capsys.readouterr().out


def test_a_job_is_not_submitted_over_the_records_of_a_run_that_saved_nothing(folder: Path) -> None:
    config, _ = cli.examine_config(folder / "run.yaml", [f"run.folder={folder}/runs/first"])
    (folder / "runs/first").mkdir(parents=True)
    rows(folder / "runs/first", 2)
    (mistake,) = folder_mistakes(config, new=False)
    assert "holds 2 steps of a run that saved nothing" in mistake and "run.resume=auto" in mistake
    asked = config.model_copy(update={"run": config.run.model_copy(update={"resume": "auto"})})
    assert not [*folder_mistakes(asked, new=False)]
    # One that is over is not begun anew.
    rows(folder / "runs/first", 3)
    for model in ("policy", "actor"):
        (folder / "runs/first/hf/step-000003" / model).mkdir(parents=True)
        (folder / "runs/first/hf/step-000003" / model / "config.json").touch()
    assert not [*folder_mistakes(config, new=False)]


def test_a_folder_that_is_named_like_a_checkpoint_is_none(folder: Path) -> None:
    saved = folder / "checkpoints"
    for name in ("step-000003", "step-1000000", "step-999999", "step-000030-paper", "step-3"):
        (saved / name).mkdir(parents=True)
    (saved / "step-000040.tar").touch()
    (saved / "step-000050").touch()
    assert [step_of(path) for path in checkpoints(folder)] == [3, 999999, 1000000]


def test_a_checkpoint_that_was_copied_in_part_says_nothing_of_the_runs_models(folder: Path) -> None:
    config, _ = cli.examine_config(folder / "run.yaml", [f"run.folder={folder}", "run.resume=auto"])
    for name, models in (("step-000003", ("policy", "actor")), ("step-000006", ("policy",))):
        for model in models:
            (folder / "checkpoints" / name / model).mkdir(parents=True)
    (folder / "checkpoints/step-000003/manifest.json").write_text("{}")
    assert not [*folder_mistakes(config, new=True)]


def test_what_a_refused_start_made_is_taken_back_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    run = tmp_path / "runs" / "new" / "first"
    for wrote, left in (("config.yaml", False), ("metrics.jsonl", True)):
        made = missing(run)
        assert made == [run, run.parent]
        run.mkdir(parents=True)
        (run / wrote).touch()
        take_back(made)
        assert run.exists() == run.parent.exists() == left and (tmp_path / "runs").exists()
    take_back(missing(run))
    assert run.exists()


def test_a_launch_that_is_refused_because_another_has_the_folder_takes_nothing_back(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with own_folder(run):
        (run / "config.yaml").touch()
        with pytest.raises(ConfigError, match="is in use"), own_folder(run):
            raise AssertionError
        assert (run / "config.yaml").exists()
    with pytest.raises(ConfigError, match="refused"), own_folder(tmp_path / "new" / "run"):
        raise ConfigError("refused")
    assert not (tmp_path / "new").exists() and run.exists()


def test_a_filter_may_be_its_name_in_a_list(folder: Path) -> None:
    config, mistakes = cli.examine_config(
        folder / "run.yaml", ["algorithm.filters=[mis, {name: icepop, low: 0.1}]"]
    )
    assert config is not None and mistakes == []
    assert [(one.name, one.settings) for one in config.algorithm.filters] == [
        ("mis", {}),
        ("icepop", {"low": 0.1}),
    ]


def test_ctrl_c_before_anything_started_is_a_line_and_no_traceback(folder: Path, monkeypatch, capsys) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("megatron_jackpot.launch.preflight.preflight", interrupted)
    assert cli.main(["launch", str(folder / "run.yaml")]) == 130
    assert capsys.readouterr().err == "megatron-jackpot: interrupted; nothing was started\n"


def test_a_reader_that_goes_away_ends_help_without_a_complaint(monkeypatch, capsys) -> None:
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as output:  # Ends without a BrokenPipeError: nothing is left in it.
        monkeypatch.setattr("sys.stdout", output)
        assert cli.main(["launch", "--help"]) == 128 + signal.SIGPIPE
    assert capsys.readouterr().err == ""


def test_plan_says_what_it_assumes_and_takes_as_many_processes_as_launch(
    folder: Path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(folder)
    write_rows(folder, *({"prompt": f"{i}+{i}=", "answer": "1"} for i in range(40)))
    for words, said in (
        (["parallel.pp=2"], "2 training GPU(s) or processes, as `launch` starts"),
        (["cluster.nodes=2"], "14 training GPU(s) or processes, of the cluster section"),
        (["--gpus", "3"], "3 training GPU(s) or processes, --gpus"),
    ):
        cli.main(["plan", "run.yaml", "rollout.prompts_per_step=28", *words])
        out = capsys.readouterr()
        assert said in out.out and "200 tokens a sequence, the longest allowed" in out.out, out
