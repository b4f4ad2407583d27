"""One real SGLang server on a tiny random model: log-probs, and weights moved by disk and by broadcast."""

import asyncio
import importlib.util
import runpy
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp
import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file

from megatron_jackpot.config import Servers
from megatron_jackpot.servers import api_key
from megatron_jackpot.servers.admin import ServerAdmin
from megatron_jackpot.servers.client import SGLangClient
from megatron_jackpot.servers.gpus import Placement
from megatron_jackpot.servers.process import CPU_SHIMS, start_servers, stop_servers
from megatron_jackpot.servers.protocol import Completion, Sampling, ServerError
from megatron_jackpot.sync.broadcast import BroadcastSync
from megatron_jackpot.sync.disk import DiskSync
from megatron_jackpot.sync.ipc import IPCSync
from megatron_jackpot.sync.proof import SyncError
from tests.tiny import write_model

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.timeout(240),
    pytest.mark.skipif(importlib.util.find_spec("sglang") is None, reason="needs the sglang package"),
]

VOCAB, CONTEXT = 61, 2048
PROMPT = list(range(10, 34))
TOLERANCE = 1e-3


class Model:
    """A HF folder, its tensors, and the truth about its log-probs."""

    def __init__(self, folder: Path, seed: int) -> None:
        # transformers imports torchvision as well, and meets the same missing operators as the server.
        runpy.run_path(str(CPU_SHIMS / "torchvision_operators.py"))
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

        self.folder = write_model(folder, seed, max_position_embeddings=CONTEXT)
        words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
        words.pre_tokenizer = pre_tokenizers.Whitespace()
        PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w2", pad_token="w0").save_pretrained(
            folder
        )
        self.tensors = load_file(folder / "model.safetensors")
        self.hf = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def logp(self, response: np.ndarray, temperature: float = 1.0) -> np.ndarray:
        """[R, V] log-probs at each position of a response to PROMPT."""
        with torch.no_grad():
            logits = self.hf(torch.tensor([PROMPT + response.tolist()])).logits[0, len(PROMPT) - 1 : -1]
        return (logits.float() / temperature).log_softmax(-1).numpy()


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("server")
    a, b = Model(folder / "a", 0), Model(folder / "b", 1)
    settings = Servers(max_total_tokens=8192, start_timeout_s=180, release_memory=True)
    servers = start_servers(settings, a.folder, Placement("cpu"), folder, dtype="float32")
    group = servers[0].process.pid
    sync = BroadcastSync(
        [servers[0].url],
        hf_folder=a.folder,
        proof_folder=folder,
        backend="gloo",
        bucket_bytes=40_000,
        timeout_s=20,
    )
    try:
        yield SimpleNamespace(a=a, b=b, url=servers[0].url, group=group, folder=folder, sync=sync, version=0)
    finally:
        sync.close()
        stop_servers(servers, grace_s=2)
    assert not any(_group_of(stat) == group for stat in Path("/proc").glob("[0-9]*/stat"))


def _group_of(stat: Path) -> int | None:
    try:
        state, _, group = stat.read_text().rpartition(")")[2].split()[:3]
    except OSError:
        return None
    return int(group) if state != "Z" else None


def sampling(max_new_tokens: int = 24, temperature: float = 1.0) -> Sampling:
    return Sampling(temperature=temperature, max_new_tokens=max_new_tokens, top_k_logp=20, ignore_eos=True)


def client(rig: SimpleNamespace, **knobs: Any) -> SGLangClient:
    settings = {"vocab_size": VOCAB, "context_length": CONTEXT, "request_timeout_s": 60, "retries": 0}
    return SGLangClient([rig.url], **settings | knobs)


def generate(rig: SimpleNamespace, n: int, how: Sampling, **knobs: Any) -> list[Completion]:
    async def run() -> list[Completion]:
        async with client(rig, **knobs) as open_client:
            return await open_client.generate_group(PROMPT, n, how)

    return asyncio.run(run())


def assert_logp(completion: Completion, truth_RV: np.ndarray, rows: slice = slice(None)) -> None:
    """Sampled and top-k log-probs agree with the truth, and the top-k are its k largest."""
    sampled = np.take_along_axis(truth_RV, completion.tokens[:, None].astype(int), 1)[:, 0]
    topk = np.take_along_axis(truth_RV, completion.topk_ids.astype(int), 1)
    largest = -np.sort(-truth_RV, axis=1)[:, : topk.shape[1]]
    assert np.abs(completion.server_logp - sampled)[rows].max() <= TOLERANCE
    assert np.abs(completion.topk_logp - topk)[rows].max() <= TOLERANCE
    assert np.abs(completion.topk_logp - largest)[rows].max() <= TOLERANCE


def next_version(rig: SimpleNamespace) -> int:
    rig.version += 1
    return rig.version


def test_on_a_cpu_the_detokenizer_is_forked_from_the_front_and_imports_nothing(rig):
    front = psutil.Process(rig.group)
    (detokenizer,) = [child for child in front.children() if "detokenizer" in " ".join(child.cmdline())]
    # Spawned, it takes as long as the front: both import all of SGLang.
    assert detokenizer.cpu_times().user < front.cpu_times().user / 4


@pytest.mark.parametrize(("temperature", "prefix_cache"), [(1.0, True), (0.7, False)])
def test_server_logp_of_sampled_and_top_k_tokens_equals_hf_transformers(rig, temperature, prefix_cache):
    """In one request of n, and in n copies of the prompt."""
    completions = generate(rig, 6, sampling(temperature=temperature), prefix_cache=prefix_cache)
    assert len({tuple(completion.tokens) for completion in completions}) == 6
    for completion in completions:
        assert completion.valid.all() and (completion.weight_version == 0).all()
        assert_logp(completion, rig.a.logp(completion.tokens, temperature))


def test_greedy_follows_the_most_probable_token(rig):
    async def run() -> np.ndarray:
        async with client(rig) as open_client:
            (answer,) = await open_client.answers(PROMPT, 12)
            return answer

    tokens = asyncio.run(run())
    truth_RV = rig.a.logp(tokens)
    assert np.abs(truth_RV.max(-1) - truth_RV[range(len(tokens)), tokens]).max() <= TOLERANCE


def test_disk_sync_moves_the_weights_stamps_the_version_and_keeps_two_folders(rig):
    sync = DiskSync([rig.url], folder=rig.folder / "weights", hf_folder=rig.a.folder, bucket_bytes=40_000)
    reports = []
    for model in (rig.b, rig.a, rig.b):
        reports.append(sync.push(model.tensors.items(), next_version(rig)))
        (completion,) = generate(rig, 1, sampling())
        assert_logp(completion, model.logp(completion.tokens))
        assert (completion.weight_version == rig.version).all()
    assert reports[0].checksum == reports[2].checksum != reports[1].checksum
    kept = sorted(path.name for path in (rig.folder / "weights").iterdir())
    assert kept == [f"weights-v{rig.version - 1}", f"weights-v{rig.version}"]


def test_broadcast_moves_the_weights_and_its_first_push_equals_a_load_from_disk(rig):
    first = rig.sync.push(rig.a.tensors.items(), next_version(rig))
    assert first.proved and first.num_bytes == sum(tensor.nbytes for tensor in rig.a.tensors.values())
    for model in (rig.b, rig.a):
        report = rig.sync.push(model.tensors.items(), next_version(rig))
        (completion,) = generate(rig, 1, sampling())
        assert_logp(completion, model.logp(completion.tokens))
        assert (completion.weight_version == rig.version).all() and not report.proved
    assert report.checksum == first.checksum


def test_buckets_in_a_request_move_the_weights_as_a_broadcast_does(rig):
    """The path of CUDA IPC; without CUDA the request holds the values."""
    knobs = dict(hf_folder=rig.a.folder, proof_folder=rig.folder, bucket_bytes=40_000, timeout_s=20)
    sync = IPCSync([rig.url], **knobs)
    first = sync.push(rig.b.tensors.items(), next_version(rig))
    assert first.proved  # against a load from disk
    for model in (rig.a, rig.b):
        sync.push(model.tensors.items(), next_version(rig))
        (completion,) = generate(rig, 1, sampling())
        assert_logp(completion, model.logp(completion.tokens))
        assert (completion.weight_version == rig.version).all()


def test_a_server_lends_its_memory_and_serves_the_next_push(rig):
    """Without the memory saver nothing is freed here, but the server's own states and refusals are the real
    ones."""
    sync = IPCSync([rig.url], hf_folder=rig.a.folder, proof_folder=None, timeout_s=20, release_memory=True)
    for model in (rig.a, rig.b):
        sync.release()
        asyncio.run(sync.admin.alive(timeout_s=30))  # with its memory lent
        sync.push(model.tensors.items(), next_version(rig))
        (completion,) = generate(rig, 1, sampling())
        assert_logp(completion, model.logp(completion.tokens))


def test_a_push_in_the_middle_of_a_generation_splits_it_at_a_token(rig):
    length = 800
    rig.sync.push(rig.a.tensors.items(), next_version(rig))
    old = rig.version
    started = time.monotonic()
    generate(rig, 2, sampling(length // 8))
    time_of_an_eighth = time.monotonic() - started

    async def run() -> list[Completion]:
        async with client(rig) as open_client:
            running = asyncio.create_task(open_client.generate_group(PROMPT, 2, sampling(length)))
            await asyncio.sleep(2 * time_of_an_eighth)
            await asyncio.to_thread(rig.sync.push, rig.b.tensors.items(), next_version(rig))
            return await running

    for completion in asyncio.run(run()):
        split = int((completion.weight_version == old).sum())
        assert completion.weight_version.tolist() == [old] * split + [rig.version] * (length - split)
        assert 0 < split < length
        assert_logp(completion, rig.a.logp(completion.tokens), slice(0, split))
        # The paused requests were prefilled again: no key or value of the old weights is left.
        assert_logp(completion, rig.b.logp(completion.tokens), slice(split, None))


def test_a_refused_update_raises_at_once_and_the_next_push_heals_it(rig, monkeypatch):
    async def forgotten() -> None: ...

    with monkeypatch.context() as patch:
        patch.setattr(rig.sync.admin, "begin_update", forgotten)
        # Not the SyncError of a broadcast that waits for the server until its limit.
        with pytest.raises(
            ServerError, match="update_weights_from_distributed was refused.*begin_weight_update"
        ):
            rig.sync.push(rig.a.tensors.items(), next_version(rig))
    rig.sync.push(rig.a.tensors.items(), next_version(rig))
    (completion,) = generate(rig, 1, sampling())
    assert_logp(completion, rig.a.logp(completion.tokens))


def test_a_tensor_left_out_and_weights_that_did_not_arrive_are_errors(rig, monkeypatch):
    without_norm = {name: tensor for name, tensor in rig.b.tensors.items() if name != "model.norm.weight"}
    with pytest.raises(SyncError, match="model.norm.weight was not sent"):
        rig.sync.push(without_norm.items(), next_version(rig))
    rig.sync.push(rig.b.tensors.items(), next_version(rig))
    with monkeypatch.context() as patch:
        patch.setattr(rig.sync, "_send", lambda bucket, **_: None)
        with pytest.raises(SyncError, match="checksums did not move"):
            rig.sync.push(rig.a.tensors.items(), next_version(rig))


async def until_running(rig: SimpleNamespace, num: int) -> None:
    """Returns when the server runs `num` requests."""
    async with asyncio.timeout(60), aiohttp.ClientSession(rig.url, headers=api_key.headers()) as session:
        while True:
            async with session.get("/v1/loads") as answer:
                if [load["num_running_reqs"] for load in (await answer.json())["loads"]] == [num]:
                    return
            await asyncio.sleep(0.02)


def test_a_request_given_up_is_ended_while_an_older_one_of_its_length_still_runs(rig):
    async def run() -> None:
        async with client(rig) as patient, client(rig, request_timeout_s=0.5) as hasty:
            older = asyncio.create_task(patient.generate_group(PROMPT, 1, sampling(1900)))
            await until_running(rig, 1)
            with pytest.raises(ServerError, match="no reply to /generate within 0.5 s"):
                await hasty.generate_group(PROMPT, 1, sampling(1900))
            await until_running(rig, 1)
            assert not older.done()
            older.cancel()
            await until_running(rig, 0)
            await ServerAdmin([rig.url])._all(
                "POST", "/flush_cache"
            )  # Refused while a request holds a prefix.

    asyncio.run(run())


def test_a_sample_that_was_asked_for_as_a_copy_is_ended_by_its_own_id(rig, monkeypatch):
    posted: list[dict[str, Any]] = []
    post = aiohttp.ClientSession.post

    def noted(session: aiohttp.ClientSession, url: str, **how: Any) -> Any:
        posted.append(how["json"])
        return post(session, url, **how)

    monkeypatch.setattr(aiohttp.ClientSession, "post", noted)

    async def run() -> list[Completion]:
        async with client(rig, prefix_cache=False) as open_client:
            group = asyncio.create_task(open_client.generate_group(PROMPT, 3, sampling(400)))
            await until_running(rig, 3)
            await ServerAdmin([rig.url]).abort(posted[0]["rid"][1])
            return await group

    assert [completion.finish for completion in asyncio.run(run())] == ["length", "abort", "length"]
