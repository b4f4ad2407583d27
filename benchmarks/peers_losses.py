"""TRL's own losses and gradients on fixed inputs, the constants of tests/unit/test_aggregation_peers.py.

    python benchmarks/peers_losses.py [--into tests/unit/data/trl_losses.json]

Runs in the environment that benchmarks/peers.py makes for TRL, and starts itself there. What is asked is
GRPOTrainer._compute_loss, as it is: a stand-in for the trainer gives it log-probs in place of a model's.
Results are of float64, the inputs fractions of a power of two, so that every precision reads the same ones.

How TRL divides a micro-batch's sum, whose gradients are then added up:

- grpo, sapo: mean over its responses of their token means; bnpo: over its tokens; dr_grpo: over its responses
  x max_completion_length; luspo: over its responses, of sums. Then by gradient_accumulation_steps.
- dapo, cispo: by num_items_in_batch, the tokens of all that one generation gave, x
  gradient_accumulation_steps / steps_per_generation: the tokens of an average optimizer step on it.

P processes are as P micro-batches: DDP takes the mean of their gradients, and num_items_in_batch is of all of
them, divided by P.
"""

import argparse
import importlib.util
import json
import random
import subprocess
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).parents[1]
LIMIT_S = 600
CLIPS = {"importance_sampling_level": "token", "epsilon": 0.2, "epsilon_high": 0.2}
GSPO = {"importance_sampling_level": "sequence", "epsilon": 0.05, "epsilon_high": 0.08}
CASES: dict[str, dict[str, Any]] = {
    "grpo": {"loss_type": "grpo", **CLIPS},
    "dapo": {"loss_type": "dapo", **CLIPS, "epsilon_high": 0.28},
    "dr_grpo": {"loss_type": "dr_grpo", **CLIPS, "max_completion_length": 20},
    "bnpo": {"loss_type": "bnpo", **CLIPS},
    "gspo": {"loss_type": "grpo", **GSPO},
    "luspo": {"loss_type": "luspo", **GSPO},
    "cispo": {"loss_type": "cispo", **CLIPS, "epsilon_high": 1.25},
    "sapo": {"loss_type": "sapo", **CLIPS, "sapo_temperature_pos": 1.0, "sapo_temperature_neg": 1.05},
    "two-sided": {"loss_type": "grpo", **CLIPS, "delta": 1.375},
    "opsm": {"loss_type": "grpo", **CLIPS, "off_policy_mask_threshold": 0.03},
}
"""Name -> TRL's settings, with which one optimizer step takes all responses in one micro-batch."""
# Halved in their order, the responses are micro-batches with unequal numbers of tokens.
CASES |= {
    f"{name}, accumulated": {**CASES[name], "gradient_accumulation_steps": 2}
    for name in ("grpo", "dapo", "dr_grpo", "bnpo")
}
CASES["dapo, first of two steps"] = {**CASES["dapo"], "steps_per_generation": 2}
REWARDS = ((1.0, 0.0, 0.25, 1.0), (0.0, 0.5, 2.0, 0.0), (3.0, 1.0, 1.0, 1.5))
"""Of the responses of each prompt."""
LENGTHS = (1, 6, 3, 7, 2, 5, 9, 4, 8, 3, 6, 9)

Response = dict[str, Any]


def responses() -> list[Response]:
    """Twelve, with log-probs in 64ths and advantages in 16ths. Ratios of live to old lie in [0.6, 1.65], and
    within a long response a token may be masked, as those that a tool wrote are."""
    draw = random.Random(1)
    made = []
    for prompt, rewards in enumerate(REWARDS):
        for sample, reward in enumerate(rewards):
            length = LENGTHS[4 * prompt + sample]
            old = [-draw.randint(40, 200) for _ in range(length)]
            drift = draw.choice((-4, 0, 4))
            live = [one + drift + draw.randint(-28, 28) for one in old]
            apart = draw.choice((-10, 0, 10))
            server = [one + apart + draw.randint(-6, 6) for one in old]
            made.append(
                dict(
                    advantage=reward - sum(rewards) / len(rewards),
                    mask=[int(length < 5 or t != 2) for t in range(length)],
                    old=[one / 64 for one in old],
                    live=[one / 64 for one in live],
                    server=[one / 64 for one in server],
                )
            )
    return made


def trainer(settings: dict[str, Any], live_BT: Tensor) -> Any:
    """_compute_loss and what it asks of its trainer, in one process that trains; what it measures is
    dropped."""
    from trl import GRPOTrainer

    def model(*_: Any, **__: Any) -> tuple[Tensor, Tensor, None]:
        return live_BT, torch.zeros_like(live_BT), None

    return SimpleNamespace(
        _compute_loss=GRPOTrainer._compute_loss,
        _get_per_token_logps_and_entropies=model,
        get_off_policy_mask=GRPOTrainer.get_off_policy_mask,
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(
            num_processes=1, gather=lambda value: value, reduce=lambda value, reduction: value
        ),
        args=SimpleNamespace(
            delta=settings.get("delta"),
            sapo_temperature_pos=settings.get("sapo_temperature_pos"),
            sapo_temperature_neg=settings.get("sapo_temperature_neg"),
            steps_per_generation=settings["steps_per_generation"],
        ),
        loss_type=settings["loss_type"],
        importance_sampling_level=settings["importance_sampling_level"],
        epsilon_low=settings["epsilon"],
        epsilon_high=settings["epsilon_high"],
        max_completion_length=settings.get("max_completion_length"),
        off_policy_mask_threshold=settings.get("off_policy_mask_threshold"),
        current_gradient_accumulation_steps=settings["gradient_accumulation_steps"],
        beta=0.0,
        top_entropy_quantile=1.0,
        use_vllm=False,
        aux_loss_enabled=False,
        _entropy_bonus_enabled=False,
        _metrics={"train": defaultdict(list)},
    )


def micro_batch(part: list[Response], settings: dict[str, Any], num_items: int) -> tuple[float, list[float]]:
    """(loss, its gradient in the live log-probs of one response after the other) of B responses, padded to
    T tokens."""
    width = max(len(one["mask"]) for one in part)

    def padded(name: str, padding: float, dtype: torch.dtype) -> Tensor:
        rows = [one[name] + [padding] * (width - len(one[name])) for one in part]
        return torch.tensor(rows, dtype=dtype)

    live_BT = padded("live", -1.0, torch.float64).requires_grad_()
    length_B = torch.tensor([len(one["mask"]) for one in part])
    inputs = {
        "prompt_ids": torch.zeros(len(part), 1, dtype=torch.long),
        "prompt_mask": torch.ones(len(part), 1, dtype=torch.long),
        "completion_ids": torch.zeros(len(part), width, dtype=torch.long),
        "completion_mask": (torch.arange(width) < length_B[:, None]).long(),
        "tool_mask": padded("mask", 0, torch.long),
        "advantages": torch.tensor([one["advantage"] for one in part], dtype=torch.float64),
        "old_per_token_logps": padded("old", -2.0, torch.float64),
        "sampling_per_token_logps": padded("server", -3.0, torch.float64),
        "num_items_in_batch": torch.tensor(num_items),
    }
    asked = trainer(settings, live_BT)
    loss = asked._compute_loss(asked, asked.model, inputs)
    (gradient_BT,) = torch.autograd.grad(loss, live_BT)
    rows = [row[: len(one["mask"])] for row, one in zip(gradient_BT.tolist(), part, strict=True)]
    return loss.item(), [value for row in rows for value in row]


def result(name: str, every: list[Response]) -> dict[str, Any]:
    """Of the first optimizer step on these responses: the losses of its micro-batches added up, and the
    gradient."""
    settings = {"gradient_accumulation_steps": 1, **CASES[name]}
    # TRL's default: one optimizer step on what a generation gives.
    settings.setdefault("steps_per_generation", settings["gradient_accumulation_steps"])
    num_items = sum(sum(one["mask"]) for one in every)
    size = len(every) // settings["steps_per_generation"]
    loss, gradient = 0.0, []
    for number in range(settings["gradient_accumulation_steps"]):
        own, own_gradient = micro_batch(every[number * size : (number + 1) * size], settings, num_items)
        loss += own
        gradient += own_gradient
    return {"settings": settings, "loss": short(loss), "gradient": [short(value) for value in gradient]}


def short(value: float) -> float:
    return float(f"{value:.10g}")


def written(version: str, every: list[Response]) -> str:
    """JSON with a response or a result a line."""
    rows = ",\n".join(json.dumps(one) for one in every)
    results = ",\n".join(f"{json.dumps(name)}: {json.dumps(result(name, every))}" for name in CASES)
    return (
        f'{{"trl": {json.dumps(version)}, "made_by": "python benchmarks/peers_losses.py",\n'
        f'"responses": [\n{rows}\n],\n"results": {{\n{results}\n}}}}\n'
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--into", type=Path, default=ROOT / "tests" / "unit" / "data" / "trl_losses.json")
    into = parser.parse_args().into
    if importlib.util.find_spec("trl") is None:
        from benchmarks.peers import peers_python

        command = [str(peers_python()), "-W", "ignore", __file__, "--into", str(into)]
        raise SystemExit(subprocess.run(command, timeout=LIMIT_S).returncode)
    import trl

    into.write_text(written(trl.__version__, responses()), encoding="utf-8")
    print(f"TRL {trl.__version__}: {into}")


if __name__ == "__main__":
    main()
