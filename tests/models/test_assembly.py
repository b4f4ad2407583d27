"""What is opened while a run is put together is closed when it comes to nothing."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_jackpot.config import parse_config
from megatron_jackpot.run.interrupt import StopRequest, was_stopped, write_stop
from megatron_jackpot.train import assembly, run
from tests.tiny import write_models, write_tokenizer


@pytest.mark.parametrize(
    ("late", "expected"), [("check_labels", ["source"]), ("Trainer", ["sync", "source"])]
)
def test_a_source_and_a_sync_are_closed_where_a_later_part_refuses(
    late: str, expected: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_models(tmp_path)
    for name in ("policy", "actor"):
        write_tokenizer(tmp_path / name)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}\n')
    tree = dict(
        run=dict(folder=tmp_path),
        policy=dict(hf=tmp_path / "policy"),
        actor=dict(hf=tmp_path / "actor"),
        data=dict(source="jsonl", path=tmp_path / "rows.jsonl", max_prompt_tokens=16),
        rollout=dict(max_new_tokens=16, prompts_per_step=1),
        evaluation=dict(size=0),
    )
    closed: list[str] = []

    def refuse(*args: object, **kwargs: object) -> None:
        raise ValueError("no")

    def opened(name: str) -> SimpleNamespace:
        check = refuse if late == "check_labels" else lambda *_: None
        return SimpleNamespace(close=lambda: closed.append(name), check_labels=check)

    mesh = SimpleNamespace(is_main=True, is_leader=True, dp=1, dp_rank=0, tp=1, from_main=lambda value: value)
    monkeypatch.setattr(assembly, "load_model", lambda *_: SimpleNamespace())
    monkeypatch.setattr(assembly, "make_source", lambda *_: opened("source"))
    monkeypatch.setattr(assembly, "make_sync", lambda *_: opened("sync"))
    monkeypatch.setattr(assembly, "Trainer", refuse)
    with pytest.raises(ValueError, match="no"):
        assembly.assemble(parse_config(tree), mesh)
    assert closed == expected


@pytest.mark.parametrize("ahead", [0, 2])
def test_ahead_of_training_the_client_expects_the_versions_of_every_token(
    ahead: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = dict(
        run=dict(folder=tmp_path),
        policy=dict(hf=tmp_path),
        actor=dict(hf=tmp_path),
        data=dict(tasks={"chain_sum": {}}, max_prompt_tokens=16),
        rollout=dict(ahead=ahead, max_staleness=2, max_new_tokens=16),
        servers=dict(urls=["http://127.0.0.1:1"]),
    )
    monkeypatch.setattr(assembly, "ServerSource", lambda process, *_, **settings: process)
    families = dict.fromkeys(("policy", "actor"), SimpleNamespace(vocab_size=61, context_length=64))
    process = assembly.make_source(parse_config(tree), families, (), str)
    (client,) = process.args
    assert client().through_pushes is (ahead > 0)


def test_a_rank_that_was_told_to_stop_while_it_waited_loads_no_model(tmp_path: Path, monkeypatch) -> None:
    def load(*_: object) -> None:
        raise AssertionError("models are loaded")

    tree = dict(
        run=dict(folder=tmp_path),
        policy=dict(hf=tmp_path),
        actor=dict(hf=tmp_path),
        data=dict(tasks={"chain_sum": {}}, max_prompt_tokens=16),
        rollout=dict(max_new_tokens=16),
    )
    config = parse_config(tree)
    monkeypatch.setattr(run, "assemble", load)
    # This rank has heard nothing yet; another one has.
    mesh = SimpleNamespace(is_main=True, largest=lambda asked: 1)
    stop = StopRequest(config.run)
    assert run.run(config, mesh, stop) is False and was_stopped(tmp_path) == "stop"
    write_stop(tmp_path, "SIGTERM")
    mesh.largest = lambda asked: asked
    assert run.run(config, mesh, stop) is False and was_stopped(tmp_path) == "SIGTERM"
