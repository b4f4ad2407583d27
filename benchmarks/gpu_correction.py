"""What a correction costs: its seconds as a share of the update it precedes, at 16,384 tokens.

    PYTHONPATH=. python benchmarks/gpu_correction.py [--tiny]

Qwen3-0.6B shape and a half-size actor, random weights, bf16, 8 sequences of 2048. `correct` is everything
between the scoring pass and the first update: acceptance, Z, kappa, weights, masks, diagnostics and their
reductions. `score` is shared by every method; an exact Z makes it longer, by recomputing the policy's logits
beside the actor's.
"""

import statistics

from benchmarks.gpu_common import HALF, QWEN3_0_6B, TINY, Report, parser
from benchmarks.gpu_models import close, make_batch, make_config, make_trainer

CORRECTIONS = {
    "none": dict(name="none"),
    "tis": dict(name="tis"),
    "jackpot": dict(name="jackpot"),
    "jackpot, exact Z": dict(name="jackpot", z="exact"),
}


def measure(label: str, shapes: dict, lengths: list[int], dtype: str, repeats: int) -> dict:
    config = make_config(max(lengths), dict(dtype=dtype), algorithm=dict(correction=dict(CORRECTIONS[label])))
    trainer = make_trainer(config, shapes)
    batch = make_batch(trainer, lengths, shapes["policy"]["vocab_size"])
    times: dict[str, list[float]] = {}
    for _ in range(repeats + 1):
        measured = trainer.measurements()
        trainer.learn(batch, measured)
        for key, value in measured.values.items():
            times.setdefault(key, []).append(value)
    median = {key: statistics.median(values[1:]) for key, values in times.items()}
    update_s = sum(median[f"time/update_{name}"] for name in ("policy", "actor"))
    correct_s = median["time/correct"]
    return dict(
        correction=label,
        correct_ms=correct_s * 1e3,
        score_ms=median["time/score"] * 1e3,
        update_ms=update_s * 1e3,
        share_of_update=correct_s / update_s,
    )


def main() -> None:
    args = parser(__doc__).parse_args()
    shapes, lengths, dtype = dict(policy=QWEN3_0_6B, actor=HALF), [2048] * 8, "bfloat16"
    if args.tiny:
        shapes, lengths, dtype = dict(policy=TINY, actor={**TINY, "hidden_size": 32}), [32] * 2, "float32"
    report = Report("gpu_correction", tiny=args.tiny)
    for label in CORRECTIONS:
        report.add(measure(label, shapes, lengths, dtype, repeats=2 if args.tiny else 3))
        close()
    report.close()


if __name__ == "__main__":
    main()
