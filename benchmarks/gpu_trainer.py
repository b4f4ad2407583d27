"""Training tokens per second, MFU and peak memory: a policy alone, and the joint step with a half-size actor.

    PYTHONPATH=. python benchmarks/gpu_trainer.py [--tiny] [--precision bf16 tensorwise ...]

Qwen3-0.6B shape with random weights, 16,384 tokens a step: 8 sequences of 2048 in one micro-batch and in 8,
and one sequence of 16,384; then 1.7B with an actor of 0.6B, 8 x 2048 in one. `update` is forward, backward
and optimizer step of the policy on Jackpot's loss; `joint` scores both models, corrects, and updates both.
MFU = useful FLOPs / seconds / peak: gpu_common.Shape.train_flops (6 per matrix weight and token, output
layer included, and causal attention's pairs; no recomputation), peak 989 TFLOP/s in bf16 and 1979 in fp8
for the whole step, although its attention and output layer run in bf16. A joint step's useful FLOPs are
forward (scoring) and training of both models.
"bf16 logits" is precision.fused_linear=false: logits exist.

`--profile` adds a row per case: how long the device is busy in an update, its kernels, how often the host
waits for the device (per micro-batch it must be 0), and prints the dearest kernels and operators before it.
"""

import gc
import statistics
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu_common import (
    DEVICE,
    HALF,
    PEAK_TFLOPS,
    QWEN3_0_6B,
    QWEN3_1_7B,
    TINY,
    Report,
    Shape,
    parser,
    seconds,
)
from benchmarks.gpu_models import close, correct, make_batch, make_config, make_trainer, update_policy
from tests.tiny import hf_config

PRECISIONS = {
    "fp32": dict(dtype="float32"),
    "bf16": dict(dtype="bfloat16"),
    "bf16 logits": dict(dtype="bfloat16", fused_linear=False),
    **{
        recipe: dict(dtype="bfloat16", fp8="hybrid", fp8_recipe=recipe)
        for recipe in ("delayed", "tensorwise", "blockwise")
    },
}
PHASES = ("score", "correct", "update_actor", "update_policy")
PRINTED = 16
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


def measure(
    report: Report,
    precision: str,
    lengths: list[int],
    shapes: dict[str, dict],
    tokens: int,
    *,
    profiled: bool,
) -> None:
    """Adds a row of the policy's update, with `profiled` one of its profile, and one of the joint step."""
    trainer = make_trainer(make_config(tokens, PRECISIONS[precision]), shapes)
    vocab = shapes["policy"]["vocab_size"]
    batch = make_batch(trainer, lengths, vocab)
    # As a run does before its first step (train/run.py).
    gc.collect()
    gc.freeze()
    forms = {name: Shape.of(hf_config(**shape)) for name, shape in shapes.items()}
    peak = PEAK_TFLOPS["fp8" if PRECISIONS[precision].get("fp8") else "bfloat16"] * 1e12
    common: dict = dict(
        hidden="/".join(str(form.hidden) for form in forms.values()),
        precision=precision,
        sequences=f"{len(lengths)} x {lengths[0]}",
        microbatches=batch.num_microbatches,
    )
    mini, *_ = corrected = correct(trainer, batch)
    update_s = _with_peak(lambda: update_policy(trainer, *corrected), common)
    flops = forms["policy"].train_flops(lengths)
    report.add(
        dict(
            what="update", **common, s=update_s, tokens_s=sum(lengths) / update_s, mfu=flops / update_s / peak
        )
    )
    if profiled and DEVICE.type == "cuda":
        report.add(dict(what="profile", **common, **_profile(lambda: update_policy(trainer, *corrected))))
        report.add(dict(what="profile correct", **common, **_profile(lambda: trainer.correct(mini.scores))))
    parts: dict[str, list[float]] = {phase: [] for phase in PHASES}

    def joint() -> None:
        measured = trainer.measurements()
        trainer.learn(batch, measured)
        for phase in PHASES:
            parts[phase].append(measured.values[f"time/{phase}"])

    joint_s = _with_peak(joint, common)
    flops = sum(form.train_flops(lengths) + form.forward_flops(lengths) for form in forms.values())
    breakdown = {f"{phase}_s": statistics.median(times[1:]) for phase, times in parts.items()}
    row = dict(what="joint", **common, s=joint_s, tokens_s=sum(lengths) / joint_s, mfu=flops / joint_s / peak)
    report.add(row | breakdown)


def _with_peak(call, common: dict) -> float:
    """Seconds of `call`; the peak of all memory, weights and optimizer included, goes into `common`."""
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    time_s = seconds(call, repeats=3)
    if DEVICE.type == "cuda":
        common["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
    return time_s


def _profile(call: Callable[[], None]) -> dict:
    """Numbers of a row, the profile's table printed: device seconds, kernels, waits of the host."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recording:
        call()
        torch.cuda.synchronize()
    found = recording.key_averages()
    on_device = [event for event in found if event.self_device_time_total and not event.self_cpu_time_total]
    kernels = sorted(on_device, key=lambda event: -event.self_device_time_total)
    busy_us = sum(event.self_device_time_total for event in kernels)
    for event in kernels[:PRINTED]:
        print(
            f"  {event.self_device_time_total / busy_us:6.1%} {event.self_device_time_total / 1e3:8.2f} ms "
            f"{event.count:6d} x {event.key[:90]}",
            flush=True,
        )
    for event in sorted(found, key=lambda event: -event.self_cpu_time_total)[:PRINTED]:
        print(
            f"  host {event.self_cpu_time_total / 1e3:8.2f} ms {event.count:6d} x {event.key[:90]}",
            flush=True,
        )
    return dict(
        busy_s=busy_us / 1e6,
        kernels=sum(event.count for event in kernels),
        # One of them is the wait that ends the measurement.
        waits=sum(event.count for event in found if event.key in WAITS),
        copies=sum(event.count for event in found if event.key == "cudaMemcpyAsync"),
    )


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--profile", action="store_true", help="where an update's time goes on the device")
    made.add_argument("--cases", nargs="+", type=int, default=[0, 1, 2, 3], help="of the four, by number")
    made.add_argument(
        "--precision", nargs="+", choices=PRECISIONS, default=["bf16", "bf16 logits", "tensorwise"]
    )
    args = made.parse_args()
    shapes = dict(policy=QWEN3_0_6B, actor=HALF)
    pair = dict(policy=QWEN3_1_7B, actor=QWEN3_0_6B)
    cases = [
        ([2048] * 8, 16_384, shapes),
        ([2048] * 8, 2048, shapes),
        ([16_384], 16_384, shapes),
        ([2048] * 8, 16_384, pair),
    ]
    if args.tiny:
        shapes = dict(policy=TINY, actor={**TINY, "hidden_size": 32})
        cases = [([32] * 2, 64, shapes), ([32] * 2, 32, shapes)]
    report = Report("gpu_trainer", tiny=args.tiny)
    for precision in args.precision:
        for lengths, tokens, models in (cases[case] for case in args.cases if case < len(cases)):
            measure(report, precision, lengths, models, tokens, profiled=args.profile)
            close()
            gc.unfreeze()
    report.close()


if __name__ == "__main__":
    main()
