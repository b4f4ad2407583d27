"""All mistakes of a configuration at once, before anything starts."""

import json
import os
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import yaml

from megatron_jackpot import cli
from megatron_jackpot.config import load_config
from megatron_jackpot.config.model_folder import stop_token_ids
from megatron_jackpot.data.loader import prompt_digest
from megatron_jackpot.data.prompts import training_prompts
from megatron_jackpot.data.tokenizer import Vocabulary
from megatron_jackpot.data.value_table import ValueTable, source_of
from megatron_jackpot.home import home
from megatron_jackpot.launch import local
from megatron_jackpot.launch import preflight as module
from megatron_jackpot.launch.cached import cached, content
from megatron_jackpot.launch.preflight import Subject, preflight
from megatron_jackpot.run.interrupt import EXIT_REQUEUE, write_stop
from tests.tiny import hf_config, write_tokenizer
from tools.refused import PAGE, page

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    """A run over 40 rows of a file, of two models of 61 ids without weights."""
    for name in ("policy", "actor"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(hf_config()))
        (tmp_path / name / "model.safetensors").touch()
        write_tokenizer(tmp_path / name)
    write_rows(tmp_path / "rows.jsonl", [{"prompt": f"{i}+{i}=", "answer": str(2 * i)} for i in range(40)])
    tree = dict(
        run=dict(folder=str(tmp_path / "run")),
        policy=dict(hf=str(tmp_path / "policy")),
        actor=dict(hf=str(tmp_path / "actor")),
        data=dict(source="jsonl", path=str(tmp_path / "rows.jsonl"), max_prompt_tokens=100),
        rollout=dict(max_new_tokens=100, prompts_per_step=4),
        packing=dict(tokens=256),
        evaluation=dict(size=0),
    )
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    return tmp_path / "run.yaml"


def write_rows(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def add_tokens(folder: Path, upto: int) -> None:
    tree = json.loads((folder / "tokenizer.json").read_text())
    for id in range(len(tree["model"]["vocab"]), upto):
        tree["added_tokens"].append(
            dict(id=id, content=f"<x{id}>", single_word=False, lstrip=False, rstrip=False, normalized=False,
                 special=True)
        )  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(tree))


def mistakes(run_file: Path, *overrides: str, command: module.Command = "launch") -> list[str]:
    return preflight(Subject(load_config(run_file, overrides), command))


def test_a_run_that_can_start_has_no_mistake(run_file: Path) -> None:
    assert mistakes(run_file) == []


def test_so_has_one_without_an_actor_of_which_no_folder_is_looked_at(
    run_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(tmp_path / "actor")
    asked: list[object] = []
    monkeypatch.setattr(module, "_ask_methods", lambda config: asked.append(config.actor) or [])
    monkeypatch.setenv("JACKPOT_HOME", str(tmp_path / "home"))
    assert mistakes(run_file, "actor=null", "rollout.model=policy") == [] and asked == [None]


def test_mistakes_of_every_kind_are_told_together_and_nothing_is_left_behind(
    run_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run_file.parent
    rows = [{"prompt": "1+1=", "answer": "2"}, {"prompt": "1+1="}, "no row"]
    write_rows(folder / "rows.jsonl", rows)
    (folder / "actor" / "model.safetensors").unlink()
    overrides = [
        "rollout.topk=3", "parallel.tp=3", "packing.tokens=150", "algorithm.correction.name=tiss",
        "algorithm.objective={name: ppo, clip_lo: 1}", "data.reward=foo", "evaluation.size=3",
    ]  # fmt: skip
    assert cli.main(["launch", str(run_file), *overrides]) == 2
    said = capsys.readouterr().err.splitlines()
    for part in (
        "'rollout.topk'. Did you mean 'rollout.top_k_logp'", "packing.tokens = 150", "data.heldout_path",
        "parallel.tp = 3", "'tiss'", "'algorithm.objective.clip_lo'", "data.reward = 'foo'",
        "actor.hf = ", "rows.jsonl, line 2: 'answer'", "rows.jsonl, line 3: a row must be an object",
    ):  # fmt: skip
        assert sum(part in line for line in said) >= 1, (part, said)
    assert all(line.startswith("megatron-jackpot: ") for line in said)
    assert not (folder / "run").exists()


def test_a_token_outside_either_embedding_is_named_with_its_row(run_file: Path) -> None:
    folder = run_file.parent
    for name in ("policy", "actor"):
        add_tokens(folder / name, 64)
    rows = [{"prompt": f"{i}+{i}=", "answer": str(2 * i)} for i in range(40)]
    rows[33]["prompt"] = "1+<x63>="
    write_rows(folder / "rows.jsonl", rows)
    for small in ("policy", "actor"):
        for name in ("policy", "actor"):
            config = hf_config(vocab_size=61 if name == small else 64)
            (folder / name / "config.json").write_text(json.dumps(config))
        (found,) = mistakes(run_file)
        assert f"rows.jsonl, line 34: token 63 is outside {small}.hf, whose embedding has 61 rows" in found


def test_the_servers_margin_counts_and_so_does_evaluation(run_file: Path) -> None:
    longest = ["data.max_prompt_tokens=256", "packing.tokens=1024"]
    assert mistakes(run_file, *longest, "rollout.max_new_tokens=254") == []
    (found,) = mistakes(run_file, *longest, "rollout.max_new_tokens=255")
    assert "actor.hf: max_position_embeddings = 512 - 2" in found and "256 + 255 = 511" in found
    heldout = f"data.heldout_path={run_file.parent / 'rows.jsonl'}"
    with pytest.raises(ValueError, match=r"packing.tokens = 256 .* evaluation.max_new_tokens = 400"):
        load_config(run_file, [heldout, "evaluation.size=4", "evaluation.max_new_tokens=300"])
    assert load_config(run_file, ["evaluation.max_new_tokens=300"]).evaluation.size == 0


def test_more_candidates_than_ids_and_more_prompts_than_rows_are_refused(run_file: Path) -> None:
    (found,) = mistakes(run_file, "rollout.top_k_logp=62")
    assert "rollout.top_k_logp = 62 exceeds the actor's vocabulary of 61" in found
    (found,) = mistakes(run_file, "rollout.prompts_per_step=41")
    assert "rollout.prompts_per_step = 41 is larger than the 40 usable prompts" in found


def test_a_table_of_values_that_does_not_cover_the_prompts_is_refused_by_their_ids(run_file: Path) -> None:
    path = run_file.parent / "values.json"

    def told() -> list[str]:
        return list(module._prompts(Subject(load_config(run_file, chosen))))

    chosen = (
        f"algorithm.objective={{name: a_star_po, values: {path}}}",
        *("algorithm.correction=none", "algorithm.advantage=reward", "policy.reference={}"),
    )
    (line,) = told()
    assert line.startswith(f"algorithm.objective.values = {path} is not there. Make it with")
    config = load_config(run_file, chosen)
    prompts = training_prompts(config.data, Vocabulary.read(config.policy.hf)).prompts
    table = ValueTable(source=source_of(config, "9f86", samples=8, beta=0.5))
    for prompt in prompts:
        table.values[prompt.id], table.digests[prompt.id] = 0.5, prompt_digest(prompt)
    table.write(path)
    assert told() == []
    chosen += ("rollout.temperature=0.5",)
    (line,) = told()
    assert "is of other samples: temperature = 0.5, was 1.0. Set what it was; or delete it" in line
    chosen = chosen[:-1]
    for number in (3, 17):
        del table.values[number], table.digests[number]
    table.write(path)
    (line,) = told()
    assert "has no value for 2 of 40 prompts as they are: ids 3, 17. Add them with" in line


def test_stop_ids_are_those_of_both_folders_and_of_generation_config_and_lie_inside(run_file: Path) -> None:
    folders = [run_file.parent / "policy", run_file.parent / "actor"]
    assert stop_token_ids(2, folders) == (2,)
    (folders[0] / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    (folders[1] / "generation_config.json").write_text('{"eos_token_id": 9}')
    assert stop_token_ids(2, folders) == (2, 7, 9)
    # "=" ends every prompt here: what may end a response may well stand before one.
    (folders[1] / "generation_config.json").write_text('{"eos_token_id": 17}')
    assert mistakes(run_file) == []
    (folders[0] / "generation_config.json").write_text('{"eos_token_id": [2, 61]}')
    (found, *_) = mistakes(run_file)
    assert "policy.hf has an embedding of 61 rows" in found and "61. Mend eos_token_id" in found


def test_a_tokenizer_and_a_file_of_settings_that_cannot_be_read_are_told(run_file: Path) -> None:
    for name in ("policy", "actor"):
        (run_file.parent / name / "generation_config.json").write_text("[]")
    (found,) = mistakes(run_file)
    assert "generation_config.json must hold a JSON object, got list" in found
    for name in ("policy", "actor"):
        (run_file.parent / name / "tokenizer.json").write_text("{")
    (found,) = mistakes(run_file)
    assert "tokenizer.json cannot be read" in found


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["data.source=jsonls"], "data.source = 'jsonls'"),
        (["data.path=~no-such-user/rows.jsonl"], "'~no-such-user/rows.jsonl'"),
        (["data.path=[1]"], "data.path = \\[1\\]"),
        (["servers.port=65535", "servers.num=2"], "servers.port = 65535 leaves no room for servers.num = 2"),
        (
            ["servers.port=39999", "servers.host=no-such-host.invalid"],
            "servers.host = 'no-such-host.invalid'",
        ),
        (["servers.port=39999", "servers.host=203.0.113.9"], "servers.host = '203.0.113.9' is no address"),
        (["logging.prometheus_port=39999", "logging.prometheus_host=203.0.113.9"], "logging.prometheus_port"),
        (["run.folder=/dev/null/x"], "run.folder = /dev/null/x: /dev/null is a file"),
        (["run.folder=" + 300 * "x"], "File name too long. Set another one."),
    ],
)
def test_what_cannot_be_is_refused_by_name_and_not_by_a_traceback(
    run_file: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], told: str
) -> None:
    assert cli.main(["launch", str(run_file), *overrides]) == 2
    said = capsys.readouterr().err
    assert re.search(told, said) and "Traceback" not in said, said


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_during_the_checks_ends_the_launch_as_one_to_be_queued_again(
    run_file: Path, monkeypatch: pytest.MonkeyPatch, signum: int
) -> None:
    monkeypatch.setattr(cli, "_preflight", lambda *_: os.kill(os.getpid(), signum))
    before = signal.getsignal(signum)
    with pytest.raises(SystemExit) as ended:
        cli.main(["launch", str(run_file)])
    assert ended.value.code == EXIT_REQUEUE and signal.getsignal(signum) == before


def test_a_stop_asked_during_the_checks_counts_and_one_from_before_does_not(
    run_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = run_file.parent / "run"
    folder.mkdir()
    found: list[bool] = []
    monkeypatch.setattr(local, "launch", lambda *_, **__: found.append((folder / "stop").exists()) or 0)
    write_stop(folder, "asked of the run before")
    assert cli.main(["launch", str(run_file)]) == 0
    monkeypatch.setattr(cli, "_preflight", lambda *_: write_stop(folder, "asked of this one") or [])
    assert cli.main(["launch", str(run_file)]) == 0
    assert found == [False, True]


def test_rows_are_read_again_only_when_something_changed(run_file: Path, monkeypatch) -> None:
    seen = []
    read = module.training_prompts
    monkeypatch.setattr(module, "training_prompts", lambda *a, **k: seen.append(1) or read(*a, **k))
    mistakes(run_file)
    mistakes(run_file)
    assert len(seen) == 1
    with (run_file.parent / "rows.jsonl").open("a") as file:
        file.write("{}\n")
    assert len(mistakes(run_file)) == len(seen) - 1 == 1
    mistakes(run_file, "data.max_prompt_tokens=99")
    assert len(seen) == 3


def test_methods_are_asked_again_only_when_they_change_and_always_where_they_are_ones_own(
    run_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(
        module, "_ask_methods", lambda config: asked.append(config.algorithm.correction.name) or []
    )
    for folder in ("policy", "actor"):  # Of another model it is the same question.
        mistakes(
            run_file, "algorithm.correction={name: tis, cap: 2.25}", f"actor.hf={run_file.parent / folder}"
        )
    assert asked == ["tis"]
    mistakes(run_file, "algorithm.correction={name: tis, cap: 2.5}")
    mistakes(run_file, "algorithm.correction={name: tis, cap: 2.25}", "actor.distill_weight=0.25")
    assert asked == ["tis"] * 3
    for _ in range(2):
        mistakes(run_file, "algorithm.correction.name=mine:Own")
    assert asked == [*["tis"] * 3, *["mine:Own"] * 2]
    # Allocators stand beside the other settings of rollouts, and look at one of them.
    chosen = ("algorithm.correction={name: tis, cap: 2.25}", "rollout.allocator=vip")
    for more in ((), ("rollout.samples_per_prompt=16",), ("rollout.allocator={name: vip, least: 3}",), ()):
        mistakes(run_file, *chosen, *more)
    for _ in range(2):
        mistakes(run_file, chosen[0], "rollout.allocator=mine:Own")
    assert asked[5:] == ["tis"] * 5


def test_a_cache_that_cannot_be_written_or_read_keeps_nothing(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("JACKPOT_HOME", str(tmp_path / "file" / "below"))
    assert [cached("x", "k", iter([n]).__next__) for n in (1, 2)] == [1, 2]
    assert content(1, files=[tmp_path / "none"]) != content(1, files=[tmp_path / "file"])


def test_who_has_no_home_folder_keeps_it_in_a_temporary_one(tmp_path: Path, monkeypatch) -> None:
    def nobody(uid: int) -> None:
        raise KeyError(f"uid not found: {uid}")

    for name in ("JACKPOT_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", nobody)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert cached("x", "k", lambda: 1) == cached("x", "k", lambda: 2) == 1
    assert home().parent == tmp_path


def test_rows_are_checked_at_5000_a_second_of_processor_time(run_file: Path) -> None:
    rows = [
        {"prompt": f"{i} + {i} = what, when all is said and done?", "answer": str(i)} for i in range(5000)
    ]
    write_rows(run_file.parent / "rows.jsonl", rows)
    mistakes(run_file)  # The methods, in a child.
    seconds = []
    while len(seconds) < 3 and min(seconds, default=1) >= 1:  # Work beside it costs processor time too.
        write_rows(run_file.parent / "rows.jsonl", rows[len(seconds) + 1 :])
        told: list[tuple[str, int]] = []
        subject = Subject(load_config(run_file), progress=lambda *said, told=told: told.append(said))
        start = time.process_time()
        assert preflight(subject) == []
        seconds.append(time.process_time() - start)
        assert told == [("rows", 1000), ("rows", 2000), ("rows", 3000), ("rows", 4000)]
    assert min(seconds) < 1, seconds


def test_labels_are_told_with_the_rows_and_are_asked_once(run_file: Path, monkeypatch) -> None:
    rows: list = [{"prompt": f"{i}+{i}=", "answer": str(2 * i)} for i in range(2000)]
    rows[1], rows[3], rows[4] = "no row", {"prompt": "5=", "answer": "$$"}, {"prompt": "6=", "answer": "x^{"}
    write_rows(run_file.parent / "rows.jsonl", rows)
    told: list[tuple[str, int]] = []
    config = load_config(run_file, ["data.reward=math_verify"])
    found = "\n".join(preflight(Subject(config, progress=lambda *said: told.append(said))))
    for part in (
        "line 2: a row must be an object",
        "2 of 1999 labels",
        "line 4: the answer '$$'",
        "line 5: ",
    ):
        assert part in found, found
    assert ("labels", 1000) in told
    write_rows(run_file.parent / "rows.jsonl", [row for i, row in enumerate(rows) if i not in (1, 3, 4)])
    monkeypatch.setattr("megatron_jackpot.launch.labels._pool", None)  # Nothing is left to ask.
    assert mistakes(run_file, "data.reward=math_verify") == []


def test_a_reward_that_no_worker_can_load_is_told_before_anything_starts(run_file: Path, monkeypatch) -> None:
    (run_file.parent / "own_reward.py").write_text("def length(response_text):\n    return 1.0\n")
    monkeypatch.syspath_prepend(run_file.parent)
    (found,) = mistakes(run_file, "data.reward=own_reward:lenght")
    assert "Did you mean 'length'?" in found
    (found,) = mistakes(run_file, "data.reward=own_reward:length")
    assert "must be called with (response_text, label)" in found
    (run_file.parent / "torn_reward.py").write_text("import no_such_package\n")
    found = "\n".join(mistakes(run_file, "data.reward=torn_reward:length"))
    assert "Mend it there" in found and "torn_reward.py" in found and "importlib" not in found, found


def test_the_table_of_what_is_refused_is_that_of_the_checks() -> None:
    assert PAGE.read_text() == page(), "python tools/refused.py writes it"
