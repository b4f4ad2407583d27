"""A run from folders in Megatron's format, servers and all; what it exports is what it trained, and only
that."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_jackpot.models.convert import checksums, hf_to_megatron
from megatron_jackpot.models.hf_folder import HFFolder
from megatron_jackpot.monitor.metrics import read_metrics
from tests.models.hf_models import write_hf
from tests.tiny import write_tokenizer

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(500)]


@pytest.fixture(scope="module")
def run(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One step with an untied Qwen2 policy and a tied, frozen Llama actor, both in Megatron's format."""
    place = tmp_path_factory.mktemp("formats")
    # The server on a CPU wants head dimensions that its kernels know.
    shape = dict(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
    for name, kind, tied in (("policy", "qwen2", False), ("actor", "llama", True)):
        hf = write_hf(place / f"{name} hf", kind, tie_word_embeddings=tied, **shape)
        write_tokenizer(hf)
        hf_to_megatron(hf, place / name)
    overrides = [
        f"policy.hf={place / 'policy'}",
        f"actor.hf={place / 'actor'}",
        f"run.folder={place / 'run'}",
        "run.steps=1",
        "run.save_every=1",
        "algorithm.train_actor=false",
        "data.reward=tests.e2e.rewards.by_text",
        "evaluation.size=0",
    ]
    command = [sys.executable, "-m", "megatron_jackpot.cli", "launch", str(folder / "run.yaml"), *overrides]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return place / "run"


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    source = HFFolder(folder)
    return {name: source.read(name) for name in source.names}


def test_servers_started_without_weights_got_them_by_the_first_push(run: Path) -> None:
    rows = read_metrics(run)
    assert len(rows) == 2 and all(row["probe/max"] <= 1e-3 for row in rows)
    assert rows[1]["grad_norm/policy"] > 0


def test_the_export_differs_from_the_import_exactly_where_training_touched_it(run: Path) -> None:
    final = run / "hf" / "step-000001"
    before, after = tensors(run.parent / "actor hf"), tensors(final / "actor")
    assert before.keys() == after.keys() and "lm_head.weight" not in after
    assert all(torch.equal(before[name], after[name]) for name in before)
    before, after = tensors(run.parent / "policy hf"), tensors(final / "policy")
    assert before.keys() == after.keys() and "lm_head.weight" in after
    for name in before:
        changed = (before[name] != after[name]).flatten(1).any(-1) if before[name].dim() > 1 else None
        if name == "model.embed_tokens.weight":
            # Untied: only rows of tokens that were read have a gradient.
            assert 0 < int(changed.sum()) < len(changed)
        else:
            assert not torch.equal(before[name], after[name]), name


def test_the_checkpoint_and_the_export_hold_the_same_model(run: Path) -> None:
    for name in ("policy", "actor"):
        saved = checksums(run / "checkpoints" / "step-000001" / name)
        assert saved.differences(checksums(run / "hf" / "step-000001" / name)) == []


def test_transformers_loads_the_export_as_it_is(run: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for name, kind in (("policy", "Qwen2ForCausalLM"), ("actor", "LlamaForCausalLM")):
        final = run / "hf" / "step-000001" / name
        model = AutoModelForCausalLM.from_pretrained(final)
        assert type(model).__name__ == kind and model.dtype == torch.float32
        exported = tensors(final)
        for key, parameter in model.named_parameters():
            assert torch.equal(parameter, exported[key]), key
        assert AutoTokenizer.from_pretrained(final).eos_token_id == 2
        assert json.loads((final / "config.json").read_text())["architectures"] == [kind]
