"""TRL's GRPO on the quickstart's work, for benchmarks/peers.py, which makes the environment this runs in.

    python benchmarks/peers_trl.py POLICY_FOLDER WORK.json

WORK.json: prompts and answers, samples per prompt, lengths, learning rate, clips, threads, steps. Generation
is TRL's own by transformers, in the training process: what a user without a server would run. The last line
of the output is one JSON object of lists with a number per step: seconds, rollout (those of generation and
rewards), tokens (prompt and response, without padding) and the mean reward.
"""

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer


class Timed(GRPOTrainer):
    """Notes the seconds of generation and rewards."""

    rollout_s: list[float]

    def _generate_and_score_completions(self, *args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        made = super()._generate_and_score_completions(*args, **kwargs)
        self.rollout_s.append(time.perf_counter() - started)
        return made


class Clock(TrainerCallback):
    """Seconds of every optimizer step, generation included."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.started = 0.0

    def on_step_begin(self, *_args: Any, **_kwargs: Any) -> None:
        self.started = time.perf_counter()

    def on_step_end(self, *_args: Any, **_kwargs: Any) -> None:
        self.seconds.append(time.perf_counter() - self.started)


def settings(work: dict[str, Any], folder: str) -> GRPOConfig:
    rollouts = work["prompts_per_step"] * work["samples_per_prompt"]
    return GRPOConfig(
        output_dir=folder,
        per_device_train_batch_size=rollouts,
        num_generations=work["samples_per_prompt"],
        max_completion_length=work["max_new_tokens"],
        max_steps=work["steps"],
        temperature=work["temperature"],
        top_k=0,
        top_p=1.0,
        learning_rate=work["lr"],
        lr_scheduler_type="constant",
        adam_beta2=0.95,
        max_grad_norm=1.0,
        beta=0.0,
        epsilon=work["clip_low"],
        epsilon_high=work["clip_high"],
        loss_type="dapo",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        dataloader_num_workers=0,
        logging_steps=10**6,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        shuffle_dataset=False,
    )


def main() -> None:
    policy, work = sys.argv[1], json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))
    torch.set_num_threads(work["threads"])
    tokenizer = AutoTokenizer.from_pretrained(policy)
    tokens: list[int] = []
    rewards: list[float] = []

    def right(
        prompts: list[str],
        completions: list[str],
        completion_ids: list[list[int]],
        answer: list[str],
        **_: Any,
    ) -> list[float]:
        scores = [float(text.strip() == wanted) for text, wanted in zip(completions, answer, strict=True)]
        tokens.append(sum(map(len, tokenizer(prompts)["input_ids"])) + sum(map(len, completion_ids)))
        rewards.append(sum(scores) / len(scores))
        return scores

    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Timed(
            model=AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32),
            reward_funcs=right,
            args=settings(work, folder),
            train_dataset=Dataset.from_list(work["problems"]),
            processing_class=tokenizer,
            callbacks=[clock],
        )
        trainer.rollout_s = []
        trainer.train()
    print(json.dumps(dict(seconds=clock.seconds, rollout=trainer.rollout_s, tokens=tokens, rewards=rewards)))


if __name__ == "__main__":
    main()
