"""Weights out of the trainer: seconds and GB/s of the export, of the buckets, and of a hand-over by shared
memory.

    PYTHONPATH=. python benchmarks/gpu_sync.py [--tiny]

Qwen3-0.6B and -1.7B shapes, random bf16 weights, one rank. `export` is sync/stream.py as a push reads it: HF
names, padding removed, on the device; `to host` the same for a folder on disk; `fp8` quantised on the way.
`buckets` is sync/prefetcher.py: the export in flat buckets of 512 MB, made in its thread. `hand-over` maps
those buckets into another process and copies them there: CUDA IPC where they lie on a GPU, shared memory on a
CPU; `push` is all of it, export, buckets and hand-over overlapping. Both are the floor of a sync to a
colocated server, not a sync: no server takes part.
An NCCL broadcast needs a second GPU. `offload` and `reload` are those of the optimizer state and gradient
buffers (CUDA alone has anything to move).
"""

import time
from collections.abc import Iterable

import torch
import torch.multiprocessing as mp
from torch import Tensor

from benchmarks.gpu_common import DEVICE, QWEN3_0_6B, QWEN3_1_7B, TINY, Report, parser, seconds
from benchmarks.gpu_models import close, make_config, make_trainer
from megatron_jackpot.sync.fp8 import quantised
from megatron_jackpot.sync.prefetcher import BucketPrefetcher
from megatron_jackpot.sync.stream import export, exported

BUCKET_BYTES = 512 * 2**20
TIMEOUT_S = 120


def prefetcher(named_tensors: Iterable[tuple[str, Tensor]]) -> BucketPrefetcher:
    return BucketPrefetcher(named_tensors, BUCKET_BYTES, DEVICE, TIMEOUT_S)


def flatten(named_tensors: Iterable[tuple[str, Tensor]]) -> list[Tensor]:
    with prefetcher(named_tensors) as made:
        return [bucket.flat for bucket in made]


def receive(inbox: mp.Queue, outbox: mp.Queue) -> None:
    """Copy every bucket and answer with the sum of its bytes; None ends the process."""
    while (flat := inbox.get(timeout=TIMEOUT_S)) is not None:
        mine = flat.clone()
        if mine.is_cuda:
            torch.cuda.synchronize()
        outbox.put(None)
        del flat
        outbox.put(int(mine[: 2**20].long().sum()))


def hand_over(first: Tensor, flats: Iterable[Tensor]) -> float:
    """Seconds until the other process has copied all buckets. Raises RuntimeError where a copy differs."""
    context = mp.get_context("spawn")
    inbox, outbox = context.Queue(), context.Queue()
    child = context.Process(target=receive, args=(inbox, outbox), daemon=True)
    child.start()

    def give(flat: Tensor) -> None:
        inbox.put(flat)
        outbox.get(timeout=TIMEOUT_S)
        if outbox.get(timeout=TIMEOUT_S) != int(flat[: 2**20].long().sum()):
            raise RuntimeError("the other process holds other bytes than this one")

    try:
        # The child's start and its CUDA context are not counted.
        give(first)
        start = time.perf_counter()
        for flat in flats:
            give(flat)
        total = time.perf_counter() - start
        inbox.put(None)
        child.join(TIMEOUT_S)
        return total
    finally:
        if child.is_alive():
            child.kill()
            child.join()


def push(model, first: Tensor) -> float:
    """Export, buckets and hand-over together: the next bucket is made while one is copied."""
    with prefetcher(exported(model, device=DEVICE)) as made:
        return hand_over(first, (bucket.flat for bucket in made))


def measure(label: str, shape: dict, dtype: str) -> list[dict]:
    small = {**TINY, "hidden_size": 32}
    trainer = make_trainer(make_config(64, dict(dtype=dtype)), dict(policy=small, actor=shape))
    actor = trainer.actor
    on_device = list(exported(actor, device=DEVICE))
    num_bytes = sum(tensor.nbytes for _, tensor in on_device)
    flats = flatten(on_device)
    parts = {
        "export": seconds(lambda: list(exported(actor, device=DEVICE)), repeats=3),
        "to host": seconds(lambda: export(actor), repeats=3),
        "fp8": seconds(lambda: list(quantised(on_device)), repeats=3),
        "buckets": seconds(lambda: flatten(exported(actor, device=DEVICE)), repeats=3),
        "hand-over": hand_over(flats[0], flats),
        "push": push(actor, flats[0]),
    }
    rows = [
        dict(shape=label, what=what, gb=num_bytes / 1e9, s=time_s, gb_s=num_bytes / time_s / 1e9)
        for what, time_s in parts.items()
    ]
    return rows + measure_offload(label, actor)


def measure_offload(label: str, actor) -> list[dict]:
    """The second time, when the state exists and the host's memory is warm."""
    times: dict[str, float] = {}
    # A step without gradients: Adam's moments are made by the first one.
    for chunk in actor.chunks:
        chunk.zero_grad_buffer()
    actor.optimizer.prepare_grads()
    actor.optimizer.step()
    for _ in range(2):
        for what, call in (("offload", actor.offload), ("reload", actor.reload)):
            start = time.perf_counter()
            call()
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()
            times[what] = time.perf_counter() - start
    count = sum(parameter.numel() for parameter in actor.chunks[0].module.parameters())
    return [dict(shape=label, what=what, gb=12 * count / 1e9, s=time_s) for what, time_s in times.items()]


def main() -> None:
    args = parser(__doc__).parse_args()
    shapes, dtype = {"0.6B": QWEN3_0_6B, "1.7B": QWEN3_1_7B}, "bfloat16"
    if args.tiny:
        shapes, dtype = {"tiny": TINY}, "float32"
    report = Report("gpu_sync", tiny=args.tiny)
    for label, shape in shapes.items():
        report.add(*measure(label, shape, dtype))
        close()
    report.close()


if __name__ == "__main__":
    main()
