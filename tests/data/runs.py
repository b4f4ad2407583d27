"""Run folders with everything that a report shows, and with texts that want to break the page."""

import json
import math
from pathlib import Path

import numpy as np
import yaml

from megatron_jackpot.monitor.metrics import JsonLines, MetricsWriter
from megatron_jackpot.monitor.token_log import TokenRecord, save

EVIL = (
    "</script><script>document.title='broken'</script>"
    "<img src=x onerror=\"document.title='broken'\">\u2028\u202e"
)
LONG = "x" * 5000
ALLOCATED = {
    "round": [0, 0, 2],
    "prompt": [4, 7, 31],
    "planned": [8, 8, 8],
    "rollouts": [8, 12, 0],
    "rounds": [1, 3, 0],
    "correct": [8, 1, 0],
    "live": [False, True, False],
    "trained": [True, True, False],
}


def make_run(
    folder: Path, *, seed: int = 0, correction: str = "jackpot", steps: int = 30, offset: float = 0.0
):
    """`steps` steps of 31, an evaluation every ten; a policy that gets better."""
    config = {
        "run": {"folder": str(folder), "seed": seed, "steps": 31},
        "policy": {"hf": "/gone"},
        "actor": {"hf": EVIL},
        "algorithm": {"correction": {"name": correction}},
        "rollout": {"prompts_per_step": 4, "samples_per_prompt": 2},
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    with MetricsWriter(folder, False, None) as out:
        for step in range(steps + 1):
            values = {}
            if step % 10 == 0:
                values |= {"eval/policy_accuracy": 0.3 + 0.01 * step + offset, "eval/actor_accuracy": 0.2}
                values |= {f"eval/policy_accuracy/{task}": 0.01 * step for task in ("sum", EVIL)}
            if step:
                values |= {"reward/mean": 0.25, "time/step": 2.0, "time/rollout": 1.25, "time/score": 0.5}
                values |= {"loss/policy": math.nan if step == 5 else 0.1 * step, "weight/ess": 0.8}
                values |= {"train/tokens": 500.0, "grad_norm/policy": 1e300 if step == 6 else 1.0}
            out.write(step, values)
    prompts = JsonLines(folder / "prompts.jsonl")
    for step in range(1, steps + 1):
        prompts.write({"step": step, "epoch": 0, "trained": [4, 7], "lost": [], "allocated": ALLOCATED})
    prompts.close()
    samples = JsonLines(folder / "samples.jsonl")
    for step, right in ((0, False), (30, True)):
        for model in ("policy", "actor"):
            problem = {"kind": "evaluation", "model": model, "prompt": "2+3", "answer": "5", "task": "sum"}
            samples.write({"step": step, **problem, "text": EVIL + LONG, "correct": right})
    wrong = {"kind": "rollout", "prompt": EVIL, "answer": "7", "text": "6", "finish": "length", "reward": 0.0}
    samples.write({"step": 30, **wrong, "right": "the seven"})
    samples.close()
    for step in (1, 11):
        save(folder / "tokens" / f"step-{step:06d}.npz", record(step))
    (folder / "train.log").write_text(f"WARNING: {EVIL}\n")
    return folder


def record(step: int) -> TokenRecord:
    """Two rollouts of 2 prompt and 4 response tokens: a right one of large weights, one mostly rejected."""
    keep = np.array([0, 0, 1, 1, 1, 1, 0, 0, 0, 0, 1, 0], bool)
    response = np.tile([False, False, True, True, True, True], 2)
    return TokenRecord(
        step=step,
        length_S=np.array([6, 6]),
        rollout_S3=np.array([[0, 1, 0], [0, 2, 1]]),
        advantage_S=np.array([1.0, -1.0], np.float32),
        correct_S=np.array([True, False]),
        token_N=np.tile([1, 2, 3, 4, 5, 6], 2),
        response_N=response,
        trained_N=response,
        keep_N=keep,
        weight_N=np.where(keep, [1.5] * 6 + [0.25] * 6, 0).astype(np.float32),
        target_logp_N=np.where(response, -1.0, 0).astype(np.float32),
        server_logp_N=np.where(response, -0.5, 0).astype(np.float32),
        actor_logp_N=np.where(response, -0.5, 0).astype(np.float32),
    )


def tree_of(page: str) -> dict:
    """The data in a page, as a browser takes it out."""
    start = page.index('id="data">') + len('id="data">')
    return json.loads(page[start : page.index("</script>", start)])
