"""A server imports the files of its own model, or all where it is not known that this is enough."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

from megatron_jackpot.config import Servers
from megatron_jackpot.config.model_shape import ARCHITECTURES
from megatron_jackpot.servers import model_files
from megatron_jackpot.servers.gpus import Placement
from megatron_jackpot.servers.process import ServerProcess, start_servers

pytestmark = pytest.mark.skipif(find_spec("sglang") is None, reason="needs SGLang")


def model_of(folder: Path, name: str) -> Path:
    (folder / "config.json").write_text(json.dumps({"architectures": [name]}))
    return folder


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_of_sglangs_models_all_but_the_file_of_the_own_one_and_the_fallback_are_left_out(tmp_path, name):
    folder = Path(find_spec("sglang").submodule_search_locations[0], "srt", "models")
    files = {path.stem for path in folder.glob("*.py")}
    out = set(model_files.other_models(model_of(tmp_path, name)).split(","))
    (own,) = files - out - {"transformers"}
    assert out < files and len(out) > 100
    assert f"class {name}(" in (folder / f"{own}.py").read_text()


def test_none_is_left_out_for_a_model_of_no_file(tmp_path):
    assert model_files.other_models(tmp_path) == ""
    assert model_files.other_models(model_of(tmp_path, "ForCausalLM")) == ""


@pytest.mark.parametrize(
    ("device", "settings", "theirs"),
    [
        ("cpu", {}, None),
        ("cpu", {}, "mine"),
        ("cpu", {"extra_args": ("--speculative-draft-model-path", "d")}, None),
        ("cpu", {"python": "/elsewhere/python"}, None),
        ("cuda", {}, None),
    ],
    ids=["on a CPU", "set by the user", "extra arguments", "another Python", "on GPUs"],
)
def test_only_cpu_servers_of_this_sglang_and_one_model_leave_files_out(
    device, settings, theirs, tmp_path, monkeypatch
):
    made: list[ServerProcess] = []
    monkeypatch.setattr(ServerProcess, "start", lambda server: made.append(server))
    monkeypatch.setattr(ServerProcess, "wait_healthy", lambda server, limit_s, stopped: None)
    monkeypatch.setenv(model_files.VARIABLE, theirs or "")
    if theirs is None:
        monkeypatch.delenv(model_files.VARIABLE)
    model = model_of(tmp_path, "Qwen2ForCausalLM")
    start_servers(Servers(**settings), model, Placement(device), tmp_path, dtype="float32")
    left_out = made[0].environment.get(model_files.VARIABLE)
    if theirs is not None:
        assert left_out == theirs
    elif device == "cpu" and not settings:
        assert left_out == model_files.other_models(model) and "llama" in left_out.split(",")
    else:
        assert left_out is None
