"""Doctor gives every line a status, and a remedy wherever something is not as it should be."""

import sys
from pathlib import Path

import pytest

from megatron_jackpot.launch import doctor as module
from megatron_jackpot.launch.doctor import Check, doctor


def put(folder, name: str, files: dict[str, str]) -> None:
    for relative, text in files.items():
        path = folder / name / relative
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_a_broken_line_makes_the_command_fail_and_a_warning_does_not(monkeypatch, capsys):
    for name in (
        "torch",
        "backends",
        "megatron",
        "transformer_engine",
        "apex",
        "sglang",
        "same_nccl",
        "tokenizers",
    ):
        monkeypatch.setattr(module, name, lambda *_: Check("stub", "ok", ""))
    monkeypatch.setattr(module, "disk", lambda: Check("disk", "warn", "1 GB", "free some"))
    assert doctor() == 0
    monkeypatch.setattr(module, "disk", lambda: Check("disk", "broken", "0 GB", "free some"))
    assert doctor(None, Path("run.yaml")) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[13].split()[:3] == ["ok", "configuration", "run.yaml:"]
    assert (
        len(lines) == 27
        and lines[-2].split()[:2] == ["broken", "disk"]
        and lines[-2].endswith("-> free some")
    )


@pytest.mark.parametrize(
    "check", [module.python, module.ports, module.memory, module.disk, module.open_files, module.apex]
)
def test_anything_short_of_ok_comes_with_a_remedy(check):
    result = check()
    assert result.detail and (result.status == "ok" or result.remedy)


def test_an_apex_that_is_not_nvidias_is_found_out(tmp_path, monkeypatch):
    put(tmp_path, "apex", {"__init__.py": "", "models.py": ""})
    monkeypatch.syspath_prepend(str(tmp_path))
    result = module.apex()
    assert result.status == "broken" and "pip uninstall apex" in result.remedy


def test_a_half_installed_transformer_engine_is_broken_and_names_what_to_uninstall(tmp_path, monkeypatch):
    put(tmp_path, "transformer_engine", {"__init__.py": "raise ImportError('no core library')"})
    put(
        tmp_path,
        "transformer_engine-2.20.2.dist-info",
        {"METADATA": "Metadata-Version: 2.1\nName: transformer-engine\n"},
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    result = module.transformer_engine()
    assert result.status == "broken"
    assert "no core library" in result.detail and "pip uninstall transformer-engine" in result.remedy


def test_a_server_interpreter_without_sglang_is_broken(tmp_path):
    interpreter = tmp_path / "python"
    interpreter.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    interpreter.chmod(0o755)
    result = module.sglang(interpreter)
    assert (
        result.status == "broken"
        and "No module named 'sglang'" in result.detail
        and "servers.python" in result.remedy
    )


def test_a_missing_interpreter_is_broken_not_a_traceback(tmp_path):
    result = module.sglang(tmp_path / "none")
    assert result.status == "broken" and "No such file" in result.detail


def test_an_import_that_hangs_is_given_up(monkeypatch):
    monkeypatch.setattr(module, "IMPORT_LIMIT_S", 0.5)
    assert module.attempt("import time; time.sleep(60)") == (False, "no answer within 0.5 s")


def test_trainer_and_server_need_one_nccl_where_there_are_gpus(monkeypatch):
    found = iter(("2.30.7", "none", "2.30.7", "2.27.5", "2.30.7", "2.30.1"))
    monkeypatch.setattr(module, "attempt", lambda code, interpreter: (True, next(found)))
    for gpus, status in (([], "ok"), (["0"], "broken"), (["0"], "ok")):
        monkeypatch.setattr("megatron_jackpot.servers.gpus.visible_gpus", lambda gpus=gpus: gpus)
        assert module.same_nccl(Path("python")).status == status
