"""What the launcher refuses before it starts anything, and how it copies output."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megatron_jackpot import cli
from megatron_jackpot.config import Servers, parse_config
from megatron_jackpot.launch.local import check, children, num_processes, torchrun
from megatron_jackpot.run.formats import FORMATS
from megatron_jackpot.servers.gpus import Placement, place_servers, visible_gpus
from tests.tiny import hf_config, write_tokenizer


@pytest.fixture
def tree(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(hf_config()))
    (tmp_path / "model" / "model.safetensors").touch()
    write_tokenizer(tmp_path / "model")
    return {
        "run": {"folder": str(tmp_path / "run")},
        "policy": {"hf": str(tmp_path / "model")},
        "actor": {"hf": str(tmp_path / "model")},
        "data": {"tasks": {"chain_sum": {}}, "max_prompt_tokens": 100, "size": 200},
        "evaluation": {"size": 4},
        "rollout": {"max_new_tokens": 64},
    }


def test_a_port_in_use_is_named_and_nothing_is_written(tree, tmp_path, capsys):
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen(1)
        port = holder.getsockname()[1]
        tree["servers"] = {"port": port}
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
        assert cli.main(["launch", str(tmp_path / "run.yaml")]) == 2
    err = capsys.readouterr().err
    assert f"Port {port}" in err and "servers.port" in err and "Traceback" not in err
    assert not (tmp_path / "run").exists()


def test_a_folder_that_holds_a_run_is_refused(tree, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").touch()
    with pytest.raises(ValueError, match=r"already holds a run \(metrics.jsonl\).*set another run.folder"):
        check(parse_config(tree))


def test_a_folder_left_by_a_launch_that_never_trained_is_used_again(tree, tmp_path):
    (tmp_path / "run").mkdir()
    for name in ("config.yaml", "provenance.json", "train.log", "server-0.log", "server-1.log"):
        (tmp_path / "run" / name).touch()
    check(parse_config(tree))


@pytest.mark.parametrize("resume", [True, "auto"])
def test_a_run_of_another_format_is_not_gone_on_with(tree, tmp_path, resume):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "provenance.json").write_text('{"commit": "1234567"}')
    tree["run"]["resume"] = resume
    with pytest.raises(ValueError, match=f"run folder format 0.*Commit {FORMATS['run folder'][0]} reads it"):
        check(parse_config(tree))


def test_a_run_folder_that_is_a_file_is_refused(tree, tmp_path):
    (tmp_path / "run").touch()
    with pytest.raises(ValueError, match="is a file"):
        check(parse_config(tree))


def test_a_missing_model_folder_is_named(tree, tmp_path):
    tree["actor"]["hf"] = str(tmp_path / "none")
    with pytest.raises(ValueError, match=r"actor.hf = .*none holds no config.json"):
        check(parse_config(tree))


def test_weights_that_this_user_may_not_read_are_named_before_a_server_is_started(tree, monkeypatch):
    weights = Path(tree["actor"]["hf"]) / "model.safetensors"
    weights.touch()
    # Root may read everything, and tests often run as root.
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != weights)
    with pytest.raises(
        ValueError, match=r"policy.hf = .* may not read model.safetensors. As their owner: chmod"
    ):
        check(parse_config(tree))


def test_a_layout_that_does_not_divide_a_model_is_refused_before_a_server_is_started(tree):
    tree["parallel"] = {"tp": 3}
    with pytest.raises(ValueError, match=r"policy.hf = .*parallel.tp = 3 does not divide .*heads = 4"):
        check(parse_config(tree))


def test_nproc_is_the_size_of_one_model_unless_given_and_must_be_a_multiple_of_it(tree):
    tree["parallel"] = {"tp": 2, "pp": 2}
    config = parse_config(tree)
    assert (num_processes(config, None), num_processes(config, 8)) == (4, 8)
    with pytest.raises(ValueError, match=r"--nproc 6 is not a multiple of tp \* pp \* cp = 4"):
        check(config, 6)
    with pytest.raises(ValueError, match="--nproc 0"):
        check(config, 0)


def test_server_urls_reach_every_rank_as_an_override_that_reads_back(tree):
    urls = ["http://127.0.0.1:30000", "http://127.0.0.1:30001"]
    argv = torchrun(Path("runs/a/config.yaml"), 2, urls)
    assert yaml.safe_load(argv[-1].partition("=")[2]) == urls
    assert argv[-1].startswith("servers.urls=")


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [(None, ["0", "1"]), ("1", ["1"]), ("", []), ("-1", []), ("GPU-8f, GPU-2c", ["GPU-8f", "GPU-2c"])],
)
def test_visible_gpus_follow_the_environment(chosen, expected, tmp_path, monkeypatch):
    two_gpus(tmp_path, monkeypatch)
    if chosen is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
    assert visible_gpus() == expected


@pytest.mark.parametrize(
    ("chosen", "num", "see_all", "placement"),
    [
        (None, 1, False, Placement("cuda", (1,))),
        (None, 1, True, Placement("cuda", (1,), (0, 1))),
        (None, 3, False, Placement("cuda")),
        ("GPU-8f, GPU-2c", 1, True, Placement("cuda")),
        ("", 1, True, Placement("cpu")),
    ],
)
def test_servers_take_the_last_gpus_where_these_have_numbers(
    chosen, num, see_all, placement, tmp_path, monkeypatch
):
    two_gpus(tmp_path, monkeypatch)
    if chosen is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
    assert place_servers(Servers(num=num), see_all=see_all) == placement


def two_gpus(tmp_path, monkeypatch) -> None:
    """Stand in for nvidia-smi on a machine with two."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'GPU 0: H100 (UUID: GPU-8f)'\necho 'GPU 1: H100 (UUID: GPU-2c)'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_output_reaches_the_terminal_as_it_is_and_the_log_as_it_ends_up(tmp_path, capsys):
    bar = r"print('\r 10%\r 50%\r\x1b[2K100%'); print('\x1b[32mgreen \u2501\x1b[0m'); print('no end', end='')"
    env = {"PYTHONIOENCODING": "utf-8"}
    child = children.Streamed([sys.executable, "-c", bar], log=tmp_path / "log", env=env)
    child.popen.wait(20)
    child.drain(limit_s=5)
    assert child.code() == 0
    assert (tmp_path / "log").read_text() == "100%\ngreen \u2501\nno end"
    assert "\x1b[32mgreen \u2501" in capsys.readouterr().out


@pytest.mark.parametrize("log", ["/dev/full", "no/such/folder/log"])
def test_a_log_that_cannot_be_written_costs_its_lines_and_not_the_child(tmp_path, capsys, log):
    # More than a pipe holds: a child that nobody reads would hang, or end of a broken pipe.
    body = "for n in range(20000): print('line', n, flush=True)"
    child = children.Streamed([sys.executable, "-c", body], log=tmp_path / log, env={})
    child.popen.wait(30)
    child.drain(limit_s=5)
    shown = capsys.readouterr().out
    assert child.code() == 0 and "line 19999\n" in shown
    assert shown.count(f"{tmp_path / log} lacks lines from here on") == 1


def test_a_rank_that_cannot_work_says_why_without_a_traceback(tree, tmp_path):
    tree["servers"] = {"urls": ["http://127.0.0.1:1"]}
    (tmp_path / "model" / "tokenizer.json").unlink()
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    command = [sys.executable, "-m", "megatron_jackpot.cli", "train", str(tmp_path / "run.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "tokenizer" in done.stderr and str(tmp_path / "model") in done.stderr
    assert "Traceback" not in done.stderr
