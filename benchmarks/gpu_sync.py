"""Weights out of the trainer: seconds and GB/s of the export, of the buckets, and of a hand-over by shared memory.

    PYTHONPATH=. python benchmarks/gpu_sync.py [--tiny]

Qwen3-0.6B and -1.7B shapes, random bf16 weights, one rank. `export` is sync/export.py: HF names, padding removed, on
the CPU. `buckets` flattens it into buckets of 512 MB on the device, as the broadcast sends them. `hand-over` maps
those buckets into another process and copies them there: CUDA IPC where they lie on a GPU, shared memory on a CPU; it
is the floor of a sync to a colocated server, not a sync: no server takes part. An NCCL broadcast needs a second GPU.
"""

import time

import torch
import torch.multiprocessing as mp
from torch import Tensor

from benchmarks.gpu_common import DEVICE, QWEN3_0_6B, QWEN3_1_7B, TINY, parser, report, seconds
from benchmarks.gpu_models import close, make_config, make_trainer
from megatron_jackpot.hf_folder import buckets
from megatron_jackpot.sync.export import export

BUCKET_BYTES = 512 * 2**20
TIMEOUT_S = 120


def flatten(tensors: dict[str, Tensor]) -> list[Tensor]:
    return [
        torch.cat([tensor.to(DEVICE).contiguous().view(-1).view(torch.uint8) for _, tensor in bucket])
        for bucket in buckets(tensors.items(), BUCKET_BYTES)
    ]


def receive(inbox: mp.Queue, outbox: mp.Queue) -> None:
    """Copy every bucket and answer with the sum of its bytes; None ends the process."""
    while (flat := inbox.get(timeout=TIMEOUT_S)) is not None:
        mine = flat.clone()
        if mine.is_cuda:
            torch.cuda.synchronize()
        outbox.put(None)
        del flat
        outbox.put(int(mine[: 2**20].long().sum()))


def hand_over(flats: list[Tensor]) -> float:
    """Seconds until the other process has copied all buckets. Raises RuntimeError where a copy differs."""
    context = mp.get_context("spawn")
    inbox, outbox = context.Queue(), context.Queue()
    child = context.Process(target=receive, args=(inbox, outbox), daemon=True)
    child.start()
    try:
        total = 0.0
        # The first bucket twice: the child's start and its CUDA context are not counted.
        for number, flat in enumerate([flats[0], *flats]):
            start = time.perf_counter()
            inbox.put(flat)
            outbox.get(timeout=TIMEOUT_S)
            total += time.perf_counter() - start if number else 0.0
            if outbox.get(timeout=TIMEOUT_S) != int(flat[: 2**20].long().sum()):
                raise RuntimeError("the other process holds other bytes than this one")
        inbox.put(None)
        child.join(TIMEOUT_S)
        return total
    finally:
        if child.is_alive():
            child.kill()
            child.join()


def measure(label: str, shape: dict, dtype: str) -> list[dict]:
    small = {**TINY, "hidden_size": 32}
    trainer = make_trainer(make_config(64, dict(dtype=dtype)), dict(policy=small, actor=shape))
    tensors = export(trainer.actor)
    num_bytes = sum(tensor.nbytes for tensor in tensors.values())
    export_s = seconds(lambda: export(trainer.actor), repeats=3)
    buckets_s = seconds(lambda: flatten(tensors), repeats=3)
    parts = {"export": export_s, "buckets": buckets_s, "hand-over": hand_over(flatten(tensors))}
    return [
        dict(shape=label, what=what, gb=num_bytes / 1e9, s=time_s, gb_s=num_bytes / time_s / 1e9)
        for what, time_s in parts.items()
    ]


def main() -> None:
    args = parser(__doc__).parse_args()
    shapes, dtype = {"0.6B": QWEN3_0_6B, "1.7B": QWEN3_1_7B}, "bfloat16"
    if args.tiny:
        shapes, dtype = {"tiny": TINY}, "float32"
    rows = []
    for label, shape in shapes.items():
        rows += measure(label, shape, dtype)
        close()
    report("gpu_sync", rows, tiny=args.tiny)


if __name__ == "__main__":
    main()
