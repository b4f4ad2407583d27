"""The quickstart's work by TRL and by this project, in one run on one machine: seconds a step, and ratios.

    python benchmarks/peers.py MODELS_FOLDER [--steps 8] [--rounds 2]
    torchrun --nproc-per-node 2 benchmarks/peers.py MODELS_FOLDER parallel.threads=1

The same policy, problems, samples, lengths, optimizer and clips. TRL (GRPO, one model, generation by
transformers in the training process) runs in an environment of its own, made once from
requirements/peers.txt; ours are the joint run with its SGLang server and actor, and a run of one model
(rollout.model=policy). Rounds take turns, medians are over all of them, and TRL has as many threads as our
ranks have together: parallel.threads each. TRL's reward compares the answer's text, ours is that of the run.
"""

import argparse
import contextlib
import hashlib
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from typing import Any

import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from benchmarks.step import RUN, RUNS, assembled, beside, from_first
from megatron_jackpot.config import Config, load_config
from megatron_jackpot.data.problems import reasoning_gym_problems
from megatron_jackpot.home import home
from megatron_jackpot.models.mesh import init_mesh
from megatron_jackpot.servers.environment import own_environment

ROOT = Path(__file__).parents[1]
PINS = ROOT / "requirements" / "peers.txt"
LIMIT_S = 1800
"""Of one round of TRL."""
WARM = 2
"""Steps of TRL that are not counted; of ours the first is not."""
Steps = dict[str, list[float]]


def peers_python() -> Path:
    """The interpreter of the peers' environment, made where it is not there: this one's packages and
    peers.txt."""
    key = hashlib.sha256(PINS.read_bytes() + sys.prefix.encode()).hexdigest()[:12]
    folder = home() / f"peers-{key}"
    python = folder / "bin" / "python"
    if (folder / "ready").exists():
        return python
    print(f"making {folder}", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    venv.create(folder, with_pip=True)
    paths = [f"{scheme}/lib/python{sys.version_info[0]}.{sys.version_info[1]}/site-packages"
             for scheme in (folder, sys.prefix)]  # fmt: skip
    # By addsitedir, so that the .pth files of the other environment count too.
    Path(paths[0], "ours.pth").write_text(f"import site; site.addsitedir({paths[1]!r})\n", encoding="utf-8")
    subprocess.run(
        [python, "-m", "pip", "install", "--quiet", "--no-deps", "-r", str(PINS)], check=True, timeout=LIMIT_S
    )
    (folder / "ready").touch()
    return python


def work(config: Config, steps: int) -> dict[str, Any]:
    """What the run asks for, as peers_trl.py reads it."""
    data, rollout, policy = config.data, config.rollout, config.policy.optimizer
    clips = config.algorithm.objective.model_dump()
    count = rollout.prompts_per_step * steps
    problems = reasoning_gym_problems(data.tasks, data.seed, count)
    return dict(
        prompts_per_step=rollout.prompts_per_step,
        samples_per_prompt=rollout.samples_per_prompt,
        max_new_tokens=rollout.max_new_tokens,
        temperature=rollout.temperature,
        lr=policy.lr,
        clip_low=clips["clip_low"],
        clip_high=clips["clip_high"],
        threads=config.parallel.threads * dist.get_world_size(),
        steps=steps,
        problems=[
            dict(prompt=data.template.format(question=p.question), answer=p.label["answer"]) for p in problems
        ],
    )


def trl(python: Path, policy: Path, asked: dict[str, Any], folder: Path) -> Steps:
    """A round of TRL: seconds, rollout, tokens, rewards of each step that counts."""
    written = folder / "work.json"
    written.write_text(json.dumps(asked), encoding="utf-8")
    command = [
        str(python),
        "-W",
        "ignore",
        str(ROOT / "benchmarks" / "peers_trl.py"),
        str(policy),
        str(written),
    ]
    environment = {**own_environment(), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(asked["threads"])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LIMIT_S)
    if done.returncode:
        raise SystemExit(f"TRL ended with exit code {done.returncode}:\n{done.stderr[-3000:]}")
    found: Steps = json.loads(done.stdout.splitlines()[-1])
    return {name: values[WARM:] for name, values in found.items()}


def ours(folder: Path, overrides: list[str], steps: int, mesh: Any) -> dict[str, Steps]:
    """A round of both of our runs, step by step in turns; on the first rank alone."""
    with contextlib.ExitStack() as stack:
        trainers = {
            name: stack.enter_context(
                assembled(folder / name.replace(" ", "-"), [*overrides, *changes], mesh)
            ).trainer
            for name, changes in {"joint": (), "one model": RUNS["one model"]}.items()
        }
        found = beside(trainers, steps)
    return {
        name: dict(
            seconds=steps_of["time/step"],
            rollout=steps_of["time/rollout"],
            update_policy=steps_of["time/update_policy"],
            tokens=steps_of["train/tokens"],
            rewards=steps_of["reward/mean"],
        )
        for name, steps_of in found.items()
        if steps_of
    }


def report(arms: dict[str, Steps]) -> None:
    table = Table(title="medians; ratio to TRL")
    for column in ("arm", "steps", "s/step", "ratio", "rollout s", "the rest s", "tokens/s", "reward"):
        table.add_column(column, justify="left" if column == "arm" else "right")
    base = statistics.median(arms["TRL"]["seconds"])
    for name, steps in arms.items():
        seconds, rollout = (statistics.median(steps[key]) for key in ("seconds", "rollout"))
        rate = statistics.median(t / s for t, s in zip(steps["tokens"], steps["seconds"], strict=True))
        table.add_row(
            name,
            str(len(steps["seconds"])),
            f"{seconds:.3f}",
            f"{seconds / base:.2f}",
            f"{rollout:.3f}",
            f"{seconds - rollout:.3f}",
            f"{rate:.0f}",
            f"{statistics.mean(steps['rewards']):.3f}",
        )
    Console().print(table)
    update = statistics.median(arms["one model"]["update_policy"])
    theirs = statistics.median(
        s - r for s, r in zip(arms["TRL"]["seconds"], arms["TRL"]["rollout"], strict=True)
    )
    print(
        f"update of the policy: {update:.3f} s, TRL's step without rollout {theirs:.3f} s, "
        f"ratio {update / theirs:.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--steps", type=int, default=8, help="steps that count, of each arm and round")
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_intermixed_args()
    # Other ranks wait for the first one's TRL, and for its environment.
    waits = f"parallel.timeout_s={3 * LIMIT_S}"
    overrides = [waits, f"policy.hf={args.models}/policy", f"actor.hf={args.models}/actor", *args.overrides]
    config = load_config(RUN, overrides)
    mesh = init_mesh(config.parallel, config.run.seed)
    python = from_first(peers_python)
    asked = work(config, args.steps + WARM)
    arms: dict[str, Steps] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(args.rounds):
            folder = Path(from_first(lambda: scratch), f"round-{number}")
            folder.mkdir(exist_ok=True)
            found = {"TRL": from_first(lambda: trl(python, args.models / "policy", asked, folder))}  # noqa: B023
            found |= ours(folder, overrides, args.steps, mesh)
            for name, steps in found.items():
                for key, values in steps.items():
                    arms.setdefault(name, {}).setdefault(key, []).extend(values)
            if dist.get_rank() == 0:
                print(f"round {number + 1} of {args.rounds}:", flush=True)
                report(arms)


if __name__ == "__main__":
    main()
