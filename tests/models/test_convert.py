"""The converters as programs: exact, streaming, all or nothing; and every wrong input by name."""

import json
import os
import runpy
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_jackpot.models import convert
from megatron_jackpot.models.convert import (
    checksums,
    hf_to_megatron,
    megatron_to_hf,
    open_model,
    published,
)
from megatron_jackpot.models.hf_folder import INDEX, HFFolder
from megatron_jackpot.monitor.peak_memory import PeakAnonymous
from megatron_jackpot.run.manifest import digest
from megatron_jackpot.run.provenance import find_model
from tests.models.hf_models import write_hf

ROOT = Path(__file__).parents[2]


@pytest.fixture
def tool(capsys, monkeypatch):
    """Run a script of tools/ as __main__, in this process; the import of Megatron takes longer than the
    work."""

    def run(name: str, *args: object) -> SimpleNamespace:
        monkeypatch.syspath_prepend(ROOT / "tools")
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, args)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / "tools" / f"{name}.py"), run_name="__main__")
        printed = capsys.readouterr()
        return SimpleNamespace(returncode=ended.value.code, stdout=printed.out, stderr=printed.err)

    return run


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    folder = write_hf(tmp_path / "hf", "qwen2")
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture
def megatron(hf: Path, tmp_path: Path) -> Path:
    hf_to_megatron(hf, tmp_path / "megatron")
    return tmp_path / "megatron"


def left(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def rewrite(folder: Path, change) -> None:
    """Change one safetensors file of the folder, the first that holds what `change` asks for."""
    for path in sorted(folder.glob("*.safetensors")):
        tensors = load_file(path)
        if change(tensors):
            save_file(tensors, path, metadata={"format": "pt"})
            return
    raise AssertionError("nothing was changed")


# As programs.


def test_the_three_tools_convert_there_and_back_and_show_that_nothing_changed(
    tool, hf: Path, tmp_path: Path
) -> None:
    there = tool("hf_to_megatron", "--hf", hf, "--out", tmp_path / "m", "--verify")
    assert there.returncode == 0, there.stderr
    tensors = len(HFFolder(hf).names)
    assert f"{tensors} tensors" in there.stdout and "read back: every tensor equal" in there.stdout
    assert "anonymous memory at its peak" in there.stdout
    back = tool(
        "megatron_to_hf", "--checkpoint", tmp_path / "m", "--out", tmp_path / "back", "--shard-bytes", 30000
    )
    assert back.returncode == 0, back.stderr
    names = left(tmp_path / "back")
    assert {"config.json", "generation_config.json", "tokenizer.json", INDEX, "conversion.json"} <= names
    assert len([name for name in names if name.endswith(".safetensors")]) > 3
    assert not any(name.endswith(".distcp") or name == "metadata.json" for name in names)
    same = tool("inspect_checkpoint", tmp_path / "back", hf)
    assert same.returncode == 0 and "0 differences" in same.stdout, same.stdout + same.stderr


def of_the_norm(folder: Path) -> bytes:
    """The bytes of one tensor, as the file holds them."""
    _, source = open_model(folder)
    return source.read("model.norm.weight").numpy().tobytes()


def flip_a_bit(folder: Path) -> None:
    """Of a weight in a folder in Megatron's format."""
    value = of_the_norm(folder)
    path, place = next(
        (file, place)
        for file in sorted(folder.glob("*.distcp"))
        if (place := file.read_bytes().find(value)) >= 0
    )
    held = bytearray(path.read_bytes())
    held[place] ^= 1
    path.write_bytes(held)


def test_weights_that_changed_since_they_were_converted_are_refused(
    tool, megatron: Path, tmp_path: Path
) -> None:
    flip_a_bit(megatron)
    back = tool("megatron_to_hf", "--checkpoint", megatron, "--out", tmp_path / "back")
    assert back.returncode == 2 and "has other weights than when it was made" in back.stderr
    assert not (tmp_path / "back").exists()
    (megatron / "conversion.json").unlink()
    assert tool("megatron_to_hf", "--checkpoint", megatron, "--out", tmp_path / "back").returncode == 0


def test_verify_reads_a_checkpoints_files_as_its_manifest_has_them(
    tool, megatron: Path, tmp_path: Path
) -> None:
    step = tmp_path / "run/checkpoints/step-000003"
    step.mkdir(parents=True)
    policy = megatron.rename(step / "policy")
    (policy / "conversion.json").unlink()  # A checkpoint has none.
    files = {str(path.relative_to(step)): digest(path) for path in policy.iterdir()}
    (step / "manifest.json").write_text(json.dumps({"files": files}))
    arguments = ("megatron_to_hf", "--checkpoint", tmp_path / "run", "--model", "policy", "--verify", "--out")
    good = tool(*arguments, tmp_path / "good")
    assert good.returncode == 0 and "every file as its checkpoint's manifest has it" in good.stdout
    flip_a_bit(policy)
    bad = tool(*arguments, tmp_path / "bad")
    assert bad.returncode == 2 and "policy is damaged: policy/" in bad.stderr, bad.stderr
    assert not (tmp_path / "bad").exists()


def test_inspect_shows_every_tensor_and_the_differences_of_two_folders(
    tool, megatron: Path, tmp_path: Path
) -> None:
    other = write_hf(tmp_path / "other", "qwen2", rope_theta=5e5)
    rewrite(other, lambda t: "model.norm.weight" in t and t["model.norm.weight"].add_(1) is not None)
    shown = tool("inspect_checkpoint", megatron)
    assert "Megatron distributed checkpoint" in shown.stdout and "step: none" in shown.stdout
    crc = checksums(megatron).tensors["model.norm.weight"]["crc32"]
    assert any("model.norm.weight" in line and crc in line for line in shown.stdout.splitlines())
    differing = tool("inspect_checkpoint", megatron, other)
    assert differing.returncode == 1 and "2 differences" in differing.stdout, differing.stdout
    assert "config.json rope_parameters" in differing.stdout and "model.norm.weight: {" in differing.stdout


def test_a_refusal_is_one_line_and_exit_code_2(tool, hf: Path, tmp_path: Path) -> None:
    refused = tool("hf_to_megatron", "--hf", hf, "--out", hf)
    assert refused.returncode == 2 and "is there already" in refused.stderr
    assert "Traceback" not in refused.stderr and refused.stdout == ""


# All or nothing.


def test_a_conversion_holds_a_few_tensors_at_a_time(tmp_path: Path) -> None:
    sizes = dict(
        hidden_size=512, num_attention_heads=8, num_key_value_heads=4, head_dim=64, intermediate_size=2048
    )
    folder = write_hf(tmp_path / "hf", "llama", num_hidden_layers=8, vocab_size=512, **sizes)
    # Once before: what the libraries allocate at their first use is not the conversion's.
    hf_to_megatron(write_hf(tmp_path / "small", "llama", num_hidden_layers=1), tmp_path / "small megatron")
    megatron_to_hf(tmp_path / "small megatron", tmp_path / "small back")
    with PeakAnonymous() as there:
        report = hf_to_megatron(folder, tmp_path / "megatron")
    with PeakAnonymous() as back:
        megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    assert report.num_bytes > 120e6
    for memory in (there, back):
        assert memory.added < 0.4 * report.num_bytes, (memory.added, report.num_bytes)
    with PeakAnonymous() as whole:  # and the measure sees a model that is held
        held = torch.ones(report.num_bytes // 4)
    assert whole.added > 0.9 * held.nbytes


def test_an_output_that_is_there_is_left_alone(hf: Path, megatron: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in megatron.iterdir()}
    with pytest.raises(ValueError, match="is there already. Name a new folder"):
        hf_to_megatron(hf, megatron)
    with pytest.raises(ValueError, match="is there already"):
        megatron_to_hf(megatron, hf)
    assert before == {path: path.read_bytes() for path in megatron.iterdir()}


def test_too_little_room_is_refused_before_anything_is_written(hf: Path, tmp_path: Path, monkeypatch) -> None:
    usage = namedtuple("usage", "total used free")(10**9, 10**9, 1000)
    monkeypatch.setattr(convert.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ValueError, match="has 1,000 bytes free"):
        hf_to_megatron(hf, tmp_path / "out")
    assert left(tmp_path) == {"hf"}


@pytest.fixture
def small_disk(tmp_path: Path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=120k", "none", str(disk)], capture_output=True
    )
    if not mounted or mounted.returncode:
        pytest.skip("mounting a tmpfs is not allowed here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_fills_up_in_the_middle_leaves_nothing(
    hf: Path, megatron: Path, small_disk, monkeypatch
) -> None:
    usage = namedtuple("usage", "total used free")(10**12, 0, 10**12)
    monkeypatch.setattr(convert.shutil, "disk_usage", lambda path: usage)
    for work, source in ((hf_to_megatron, hf), (megatron_to_hf, megatron)):
        with pytest.raises(ValueError, match="is full. Nothing was left there"):
            work(source, small_disk / "out")
        assert left(small_disk) == set()


def test_an_interrupted_conversion_leaves_nothing(hf: Path, tmp_path: Path) -> None:
    def interrupted(num_bytes: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        megatron_to_hf(_converted(hf, tmp_path), tmp_path / "out", interrupted)
    with pytest.raises(BaseException) as error:
        hf_to_megatron(hf, tmp_path / "out", interrupted)
    assert error.type is not SystemExit and left(tmp_path) == {"hf", "m"}


def _converted(hf: Path, tmp_path: Path) -> Path:
    hf_to_megatron(hf, tmp_path / "m")
    return tmp_path / "m"


# Wrong inputs.


def _drop_shard(folder: Path) -> None:
    sorted(folder.glob("*.safetensors"))[1].unlink()


def _truncate(folder: Path) -> None:
    path = sorted(folder.glob("*.safetensors"))[0]
    path.write_bytes(path.read_bytes()[:-100])


def _config(**changes):
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def _extra_tensor(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update(stray=torch.zeros(2)) is None)


def _mixed_dtypes(folder: Path) -> None:
    name = "model.layers.0.self_attn.k_proj.weight"
    rewrite(folder, lambda tensors: name in tensors and tensors.update({name: tensors[name].half()}) is None)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_drop_shard, r"lacks model-00002-of-\d+.safetensors, which model.safetensors.index.json names"),
        (_truncate, "safetensors is truncated or not a safetensors file"),
        (
            _config(architectures=["MambaForCausalLM"]),
            "architecture MambaForCausalLM is not supported. Known, the nearest first: ",
        ),
        (_config(hidden_size=48), r"has shape \(61, 36\), config.json asks for \(61, 48\)"),
        (_config(num_hidden_layers=5), "tensor 'model.layers.4.input_layernorm.weight' is in no safetensors"),
        (_config(num_hidden_layers=3), "tensors are not of the model in config.json: model.layers.3"),
        (
            _config(tie_word_embeddings=True),
            "tie_word_embeddings = true, but lm_head.weight is not the embedding",
        ),
        (
            _config(architectures=["Qwen3ForCausalLM"], model_type="qwen3"),
            "k_norm.weight' is in no safetensors",
        ),
        (_extra_tensor, "1 tensors are not of the model in config.json: stray"),
        (_mixed_dtypes, "differ in dtype"),
        (lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
        (lambda folder: (folder / INDEX).write_text("{"), "is not an index of safetensors files"),
    ],
)
def test_an_hf_folder_that_is_wrong_is_refused_by_name(hf: Path, tmp_path: Path, spoil, message: str) -> None:
    spoil(hf)
    with pytest.raises(ValueError, match=message):
        hf_to_megatron(hf, tmp_path / "out")
    assert left(tmp_path) == {"hf"}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: next(f.glob("*.distcp")).unlink(), "distcp is missing"),
        (lambda f: os.truncate(next(f.glob("*.distcp")), 1000), r"distcp is truncated: 1000 of \d+ bytes"),
        (lambda f: (f / ".metadata").unlink(), ".metadata cannot be read"),
        (lambda f: (f / ".metadata").write_bytes(b"no"), ".metadata cannot be read"),
        (_config(num_hidden_layers=3), r"has shape \(4, .*config.json asks for \(3,"),
        (_config(vocab_size=70), r"has shape \(61, 36\), config.json asks for \(70, 36\)"),
        (
            _config(architectures=["Qwen3ForCausalLM"], model_type="qwen3"),
            "does not hold the model in its config",
        ),
    ],
)
def test_a_megatron_folder_that_is_wrong_is_refused_by_name(
    megatron: Path, tmp_path: Path, spoil, message: str
) -> None:
    spoil(megatron)
    with pytest.raises(ValueError, match=message):
        megatron_to_hf(megatron, tmp_path / "out")
    assert left(tmp_path) == {"hf", "megatron"}


def test_a_tied_model_may_hold_its_embedding_twice_and_loses_the_copy(tmp_path: Path) -> None:
    folder = write_hf(tmp_path / "hf", "qwen2", tie_word_embeddings=True)
    embedding = HFFolder(folder).read("model.embed_tokens.weight")
    rewrite(folder, lambda tensors: tensors.update({"lm_head.weight": embedding.clone()}) is None)
    assert "lm_head.weight" not in hf_to_megatron(folder, tmp_path / "out").tensors
    rewrite(folder, lambda tensors: tensors.update({"lm_head.weight": embedding + 1}) is None)
    with pytest.raises(ValueError, match="lm_head.weight is not the embedding"):
        open_model(folder)


def test_the_model_of_a_run_is_found_and_must_be_chosen(megatron: Path, tmp_path: Path) -> None:
    for step in ("step-000002", "step-000010"):
        for name in ("policy", "actor"):
            shutil.copytree(megatron, tmp_path / "run" / "checkpoints" / step / name)
    newest = tmp_path / "run" / "checkpoints" / "step-000010"
    assert find_model(tmp_path / "run", "actor") == newest / "actor"
    assert find_model(newest, "policy") == newest / "policy"
    assert find_model(newest / "policy", None) == newest / "policy"
    with pytest.raises(ValueError, match=r"holds policy and actor. Choose one with --model policy\|actor"):
        find_model(tmp_path / "run", None)
    with pytest.raises(ValueError, match="neither a model"):
        find_model(tmp_path, None)


def test_what_is_in_the_format_asked_for_already_is_refused(hf: Path, megatron: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is in Megatron's format already"):
        hf_to_megatron(megatron, tmp_path / "out")
    with pytest.raises(ValueError, match="is an HF folder already"):
        megatron_to_hf(hf, tmp_path / "out")


def test_an_error_inside_removes_the_unfinished_folder(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), published(tmp_path / "out", 10) as folder:
        (folder / "file").write_text("x")
        raise RuntimeError
    assert left(tmp_path) == set()
