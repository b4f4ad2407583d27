"""The same weights in several precisions: how far the log-probs move, and what that does to acceptance.

    PYTHONPATH=. python benchmarks/gpu_numerics.py [--tiny] [--precision bf16 tensorwise ...]

A Qwen3-shaped model of 8 layers and width 1024 with seeded random weights, loaded from one folder into every
precision; the reference is fp32 (Transformer Engine's layers where they are there, Megatron's local ones
elsewhere).
`gap` is |logp - reference's logp| at the labels; `kl` the mean KL(reference || it) over the vocabulary;
`overlap` the mean acceptance of a server with the reference's numbers (Z at lam 1): 1 - overlap is what
rounding alone rejects.
`first_minibatch` is the mean |log s| = |trained logp - scored logp| of the first mini-batch, `later` the same
after one optimizer step at learning rate 0: under delayed scaling the scales have moved.
"""

import tempfile
from pathlib import Path

import torch

from benchmarks.gpu_common import DEVICE, Report, parser
from benchmarks.gpu_models import close, make_batch, make_config, make_trainer
from benchmarks.gpu_trainer import PRECISIONS
from megatron_jackpot.parallel.divergence import vocab_parallel_kl, vocab_parallel_overlap
from megatron_jackpot.parallel.vocab import vocab_parallel_logp
from megatron_jackpot.parallel.vocab_spec import VocabSpec
from tests.tiny import write_model

SHAPE = dict(
    hidden_size=1024,
    intermediate_size=3072,
    num_hidden_layers=8,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=64,
    vocab_size=32_768,
    max_position_embeddings=4096,
)


def read(precision: str, folder: Path, shape: dict, lengths: list[int]) -> dict[str, torch.Tensor]:
    """Logits and log-probs at the labels of a scoring pass, of the first update and of the second."""
    config = make_config(max(lengths), PRECISIONS[precision], actor=dict(optimizer=dict(lr=0.0)))
    shapes = dict(policy=shape, actor=shape)
    trainer = make_trainer(config, shapes, dict.fromkeys(shapes, folder))
    batch = make_batch(trainer, lengths, shape["vocab_size"])
    vocab = trainer.scorer.vocab(trainer.actor)
    scored = trainer.actor.score(batch, lambda logits, m: dict(logits=logits[:].float().cpu()))
    mask = batch.mask_MT.flatten().cpu()
    found = dict(logits=scored["logits"].flatten(0, 1)[mask])
    for name in ("first", "second"):
        before = trainer.scorer.logp(trainer.actor, batch).flatten()
        trained: list[torch.Tensor] = []

        def loss(logits, m, trained=trained):
            logp_T = vocab_parallel_logp(logits, batch.labels_MT[m], vocab)
            trained.append(logp_T.detach())
            value = -torch.where(batch.mask_MT[m], logp_T, 0.0).sum()
            return value, {"loss": value.detach()}

        trainer.actor.update(batch, loss)
        found[name] = (torch.cat(trained) - before).abs().cpu()[mask]
    found["labels"] = batch.labels_MT.flatten().cpu()[mask]
    close()
    return found


def compare(precision: str, found: dict, reference: dict) -> dict:
    vocab = VocabSpec(reference["logits"].shape[1], None)
    logits, wanted = (x["logits"].to(DEVICE) for x in (found, reference))
    labels = reference["labels"].to(DEVICE)
    gap = (vocab_parallel_logp(logits, labels, vocab) - vocab_parallel_logp(wanted, labels, vocab)).abs()
    quantiles = torch.quantile(gap, torch.tensor([0.5, 0.99], device=DEVICE)).tolist()
    return dict(
        precision=precision,
        gap_mean=gap.mean().item(),
        gap_median=quantiles[0],
        gap_99=quantiles[1],
        gap_max=gap.max().item(),
        kl=vocab_parallel_kl(logits, wanted, vocab, direction="forward").mean().item(),
        overlap=vocab_parallel_overlap(logits, wanted, vocab, lam=1.0).mean().item(),
        first_minibatch=found["first"].mean().item(),
        later=found["second"].mean().item(),
    )


def main() -> None:
    made = parser(__doc__)
    choices = [name for name in PRECISIONS if name != "fp32"]
    made.add_argument(
        "--precision", nargs="+", choices=choices, default=choices if DEVICE.type == "cuda" else ["bf16"]
    )
    args = made.parse_args()
    shape, lengths = SHAPE, [512] * 8
    if args.tiny:
        shape, lengths = (
            dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, vocab_size=61),
            [32] * 4,
        )
    report = Report("gpu_numerics", tiny=args.tiny)
    with tempfile.TemporaryDirectory() as scratch:
        folder = write_model(Path(scratch) / "model", 0, **shape)
        shape = {"tie_word_embeddings": False, **shape}
        reference = read("fp32", folder, shape, lengths)
        for precision in ["fp32", *args.precision]:
            found = reference if precision == "fp32" else read(precision, folder, shape, lengths)
            report.add(compare(precision, found, reference))
    report.close()


if __name__ == "__main__":
    main()
