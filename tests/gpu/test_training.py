"""On a CUDA device: logits in blocks, deterministic mode, offload, and the ways of weights out of the
trainer."""

import hashlib
import pickle
from base64 import b64decode
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.multiprocessing as mp
from torch.multiprocessing import reductions

from megatron_jackpot.config import Optimizer, Precision
from megatron_jackpot.models import build
from megatron_jackpot.models.deterministic import be_deterministic
from megatron_jackpot.models.engine import MegatronModel
from megatron_jackpot.models.mesh import destroy_mesh
from megatron_jackpot.sync.fp8 import quantise
from megatron_jackpot.sync.ipc import serialise
from megatron_jackpot.sync.prefetcher import BucketPrefetcher, FlatBucket
from megatron_jackpot.sync.stream import export, exported
from megatron_jackpot.train.curator import Trained
from tests.gpu.test_models import SHAPE
from tests.loading import load_model
from tests.parallel.layouts import NUM_PROMPTS, TOP_K, Layout, collected, load_trainer, make_config
from tests.tiny import groups, write_model

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda", 0)
WHOLE = dict(correction=(("name", "jackpot"), ("z", "exact")), distill="forward_full")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("gpu")
    write_model(folder / "policy", 0, **SHAPE)
    write_model(folder / "actor", 1, **SHAPE, tie_word_embeddings=True)
    return folder


def trainer_of(folder: Path, layout: Layout, **precision):
    config = make_config(layout, folder)
    return load_trainer(
        config.model_copy(update={"precision": config.precision.model_copy(update=precision)})
    )


def learn(trainer, steps: int = 1) -> dict[str, float]:
    for _ in range(steps):
        measured = trainer.measurements()
        trained = Trained(groups=groups(range(NUM_PROMPTS)), pruned=[])
        measured.note_rollouts(collected(trained.groups), trained, trainer.mesh.dp)
        trainer.learn(trainer.packer.pack(trained.groups, TOP_K), measured)
    return measured.reduced(trainer.mesh)


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-3), ("bfloat16", 5e-2)])
@pytest.mark.parametrize("methods", [{}, WHOLE], ids=["top-k", "whole vocabulary"])
def test_logits_in_blocks_train_as_logits_that_exist(folder, dtype, bound, methods) -> None:
    found = []
    for fused in (True, False):
        trainer = trainer_of(folder, Layout(fused=fused, **methods), dtype=dtype)
        try:
            found.append(learn(trainer))
        finally:
            destroy_mesh()
    blocks, whole = found
    for name in ("loss/policy", "loss/actor", "loss/distill", "grad_norm/policy", "grad_norm/actor"):
        assert blocks[name] == pytest.approx(whole[name], rel=bound), name


def main_gradients(folder: Path) -> dict[str, torch.Tensor]:
    """Of the policy after a step: DDP's fp32 buffers."""
    trainer = trainer_of(folder, Layout(), dtype="bfloat16")
    try:
        assert trainer.packer.pack(groups(range(NUM_PROMPTS)), TOP_K).num_microbatches >= 2
        learn(trainer)
        parameters = trainer.policy.chunks[0].module.named_parameters()
        return {name: parameter.main_grad.clone() for name, parameter in parameters}
    finally:
        destroy_mesh()


def test_weight_gradients_added_by_the_product_are_those_added_after_it(folder) -> None:
    ours = main_gradients(folder)
    with mock.patch.object(build, "add_weight_gradients_in_place", lambda chunk: None):
        added = main_gradients(folder)
    for name, gradient in added.items():
        error = (ours[name] - gradient).norm() / gradient.norm()
        # The second are rounded to bf16 once per micro-batch.
        assert 0 < gradient.norm() and error <= 1e-2, f"{name}: {error}"


def test_optimizer_state_goes_to_the_host_and_training_does_not_notice(folder) -> None:
    results = []
    for offload in (False, True):
        trainer = trainer_of(folder, Layout(), dtype="bfloat16")
        try:
            for _ in range(2):
                learn(trainer)
                if offload:
                    before = torch.cuda.memory_allocated()
                    for model in (trainer.policy, trainer.actor):
                        model.offload()
                    freed = before - torch.cuda.memory_allocated()
                    count = sum(p.numel() for p in trainer.policy.chunks[0].module.parameters())
                    # Gradients and both moments and the master copy, fp32, of the policy alone.
                    assert freed >= 16 * count
                    for model in (trainer.policy, trainer.actor):
                        model.reload()
            results.append(export(trainer.policy))
        finally:
            destroy_mesh()
    assert all(torch.equal(results[1][name], tensor) for name, tensor in results[0].items())


def _digest(folder: str, found: mp.SimpleQueue) -> None:
    be_deterministic()
    trainer = trainer_of(Path(folder), Layout(**WHOLE), dtype="bfloat16", deterministic=True)
    learn(trainer, steps=2)
    digest = hashlib.sha256()
    for model in (trainer.policy, trainer.actor):
        for name, tensor in export(model).items():
            digest.update(name.encode() + tensor.view(torch.uint8).numpy().tobytes())
    found.put(digest.hexdigest())


def in_processes(work, *args, count: int = 1) -> list:
    """What `work` puts into its queue, in `count` new processes at a time; CUDA starts there for the first
    time."""
    context = mp.get_context("spawn")
    queues = [context.SimpleQueue() for _ in range(count)]
    children = [context.Process(target=work, args=(*args, queue), daemon=True) for queue in queues]
    for child in children:
        child.start()
    try:
        for child in children:
            child.join(90)
            assert child.exitcode == 0, f"exit code {child.exitcode}"
        return [queue.get() for queue in queues]
    finally:
        for child in children:
            if child.is_alive():
                child.kill()


def test_deterministic_mode_gives_the_same_bits_in_two_processes(folder) -> None:
    one, other = in_processes(_digest, str(folder), count=2)
    assert one == other


def actor(folder: Path, **precision) -> MegatronModel:
    model = load_model(folder / "actor", name="actor", precision=Precision(**precision))
    model.add_optimizer(Optimizer(lr=0.0), 10)
    return model


def test_an_export_stays_on_the_device_and_its_buckets_made_ahead_hold_the_same_bits(folder) -> None:
    model = actor(folder, dtype="bfloat16")
    try:
        host = export(model)
        start = {name: 0 for name in host}
        with BucketPrefetcher(exported(model, device=CUDA), 20_000, CUDA, 30) as made:
            for bucket in made:
                assert bucket.flat.device == CUDA
                end = 0
                for name, shape in zip(bucket.names, bucket.shapes, strict=True):
                    size = torch.Size(shape).numel() * 2
                    piece = bucket.flat[end : end + size].view(torch.bfloat16).view(shape)
                    assert torch.equal(piece.cpu(), host[name])
                    end += size
                    del start[name]
        assert not start
    finally:
        destroy_mesh()


def test_fp8_weights_are_the_same_on_the_device() -> None:
    weight = torch.randn(300, 200, generator=torch.Generator().manual_seed(0)).bfloat16()
    for ours, theirs in zip(quantise(weight.to(CUDA)), quantise(weight), strict=True):
        assert torch.equal(ours.cpu().view(torch.uint8), theirs.view(torch.uint8))


def _map_and_sum(payload: str, found: mp.SimpleQueue) -> None:
    """What SGLang does with a request: its rebuild function takes the device's UUID in place of a number."""
    rebuild = reductions.rebuild_cuda_tensor

    def by_uuid(*args):
        uuids = [str(torch.cuda.get_device_properties(i).uuid) for i in range(torch.cuda.device_count())]
        return rebuild(*args[:6], uuids.index(args[6]), *args[7:])

    reductions.rebuild_cuda_tensor = by_uuid
    content = pickle.loads(b64decode(payload))
    found.put((content["flattened_tensor"].long().sum().item(), [m.name for m in content["metadata"]]))
    del content


def test_a_bucket_is_mapped_by_another_process_through_its_handle() -> None:
    bucket = FlatBucket.of(
        [("a", torch.randn(1000, 30, device=CUDA)), ("b", torch.randn(7, device=CUDA))], CUDA
    )
    [(total, names)] = in_processes(_map_and_sum, serialise(bucket))
    assert total == bucket.flat.long().sum().item() and names == ["a", "b"]
