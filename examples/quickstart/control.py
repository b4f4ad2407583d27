"""The control: continue the policy's supervised warm-up for as many tokens as the run trained it on.

    python examples/quickstart/control.py MODELS_FOLDER RUN_FOLDER

Writes RUN_FOLDER/control.jsonl with eval/policy_accuracy, its step axis stretched to that of the run.
"""

import argparse
from pathlib import Path

from common import accuracy, heldout, make_mesh_and_packer, make_model, read_run, read_warmup
from corpus import examples
from rich.console import Console
from supervised import train
from tokenizer import build

from megatron_jackpot.config import Optimizer
from megatron_jackpot.config.model_folder import read_hf_config
from megatron_jackpot.monitor.metrics import JsonLines, read_metrics

EVALUATIONS = 6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", type=Path, help="folder that shipped.py prints")
    parser.add_argument("run", type=Path, help="run folder whose tokens are matched")
    args = parser.parse_args()
    rows = read_metrics(args.run)
    budget = int(sum(row.get("train/tokens", 0) for row in rows))
    last_step = max(row["step"] for row in rows)
    if budget == 0:
        raise ValueError(f"{args.run}/metrics.jsonl has no train/tokens: the run trained on nothing.")
    config, warmup, tokenizer = read_run([]), read_warmup(), build()
    mesh, packer = make_mesh_and_packer(warmup)
    optimizer = Optimizer(lr=warmup["policy"]["lr"] / 10, warmup_steps=50, weight_decay=0.01)
    folder = args.models / "policy"
    model = make_model("policy", read_hf_config(folder), folder, mesh, optimizer, 10**6)
    test, development = heldout(config, tokenizer)
    corpus = examples(
        config.data,
        tokenizer,
        carelessness=warmup["carelessness"],
        seed=warmup["seed"],
        forbidden=test.texts | development.texts,
        part=1,
    )
    console = Console(stderr=True)
    out = JsonLines(args.run / "control.jsonl", resume_step=-1)

    def note(tokens: int) -> None:
        score = accuracy(model, test, tokenizer, config, packer)
        step = round(min(tokens / budget, 1.0) * last_step)
        out.write({"step": step, "eval/policy_accuracy": score, "train/tokens": tokens})
        console.print(f"control: {tokens:,} of {budget:,} tokens, policy accuracy {score:.3f}")

    note(0)
    due = [budget * (i + 1) / EVALUATIONS for i in range(EVALUATIONS)]

    def on_step(progress) -> bool:
        if progress.tokens >= due[0]:
            due.pop(0)
            note(progress.tokens)
        return not due

    train(model, corpus, packer, batch=warmup["batch"], steps=10**6, on_step=on_step)


if __name__ == "__main__":
    main()
