"""`launch --slurm`: the cluster section of a configuration as a Slurm job.

A job is one of the scripts in jobs/ with its #SBATCH lines, settings and the resolved configuration filled
in, kept in RUN/slurm. Slurm has a copy, so that a job that waits, runs or is queued again goes by what it was
submitted with, whatever is submitted later. Nothing of the configuration is left for a shell to interpret.
"""

import re
import shlex
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml

from megatron_jackpot.config import Config
from megatron_jackpot.config.placement import trainer_procs, training_processes
from megatron_jackpot.plan.formulas import make_plan
from megatron_jackpot.plan.microbatch import settled
from megatron_jackpot.plan.tables import memory_troubles, turns_advice

REPO = Path(__file__).resolve().parents[2]
"""What PYTHONPATH needs: a clone, or the site-packages that the package was installed into."""
JOBS = Path(__file__).resolve().parent / "jobs"
JOB_FILE = "job.sbatch"
END_OF_CONFIG = "END_OF_CONFIG"
"""A line that no YAML of a configuration has: at its left margin stand the sections' names."""
SBATCH_LIMIT_S = 60


def submit(config: Config, *, dry_run: bool, chain: int = 1) -> int:
    """Render, keep, submit a job that has no `job_mistakes`, and say how to follow; `dry_run` prints it and
    writes nothing. Returns 0, or sbatch's exit code."""
    folder = (config.run.folder / "slurm").absolute()
    script = render(config, folder)
    if dry_run:
        print(script, end="")
        return 0
    folder.mkdir(parents=True, exist_ok=True)
    job = folder / JOB_FILE
    job.write_text(script, encoding="utf-8")
    if advice := turns_advice(config):
        print(f"advice: {advice}")
    numbers: list[str] = []
    for _ in range(chain):
        # Each is told all jobs before it: a lock that one of them left is then known to be no one's.
        after = [f"--dependency=afterany:{':'.join(numbers)}"] if numbers else []
        done = _sbatch([*after, str(job)])
        if done.returncode:
            print(f"sbatch refused {job}: {done.stderr.strip()}")
            return done.returncode
        number = done.stdout.strip().split(";")[0]
        print(f"Submitted job {number}{' after ' + numbers[-1] if numbers else ''}: {job}")
        numbers.append(number)
    pattern = (
        "%A_%a.out".replace("%A", number).replace("%a", "*") if config.cluster.seeds else f"{number}.out"
    )
    print(f"  squeue -j {number}                where it stands; scancel {number} ends it")
    print(f"  tail -F {folder / pattern}        both roles, and what the job does")
    print(f"  ls {config.run.folder.absolute()}     metrics.jsonl, train-NODE.log, servers/NODE/server-N.log")
    return 0


def job_mistakes(config: Config, chain: int = 1) -> Iterator[str]:
    """What is wrong with a job: no script, a layout that does not come out or does not fit, a chain of 0."""
    if chain < 1:
        yield f"--chain {chain} must be at least 1."
    if not script_of(config).is_file():
        yield (
            f"{script_of(config)} is missing: Slurm jobs are rendered from a checkout. Run "
            "`python -m megatron_jackpot.cli launch` with PYTHONPATH set to one."
        )
    if config.servers.urls:
        yield f"servers.urls = {list(config.servers.urls)}: a Slurm job starts its own. Set servers.urls=[]."
    try:
        gpus = training_processes(config)
        troubles = memory_troubles(make_plan(settled(config, gpus), gpus))
    except ValueError as error:
        yield from str(error).splitlines()
    except OSError:
        return  # A folder that is missing, which is said already.
    else:
        if troubles:
            yield "Does not fit: " + " Also: ".join(troubles)


def script_of(config: Config) -> Path:
    return JOBS / f"{config.cluster.layout}.sbatch"


def render(config: Config, folder: Path) -> str:
    """The job script: #SBATCH lines, settings, the configuration, then the body of the script in jobs/.

    Each attempt writes the configuration to folder/JOB-REQUEUES.yaml, and removes it at its end; one that was
    killed leaves it to the job's next attempt.
    """
    template = script_of(config).read_text(encoding="utf-8").splitlines()
    body = [line for line in template[1:] if not line.startswith("#")]
    settings = [f"{name}={shlex.quote(value)}" for name, value in settings_of(config).items()]
    return "\n".join(
        [
            "#!/usr/bin/env bash",
            f"# Rendered from launch/jobs/{script_of(config).name}: {layout_line(config)}",
            *(f"#SBATCH {option}" for option in options(config, folder)),
            f"export {' '.join(settings)}",
            f"cd -- {shlex.quote(str(Path.cwd()))} || exit 1",
            f"folder={shlex.quote(str(folder))}",
            'config="$folder/$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}.yaml"',
            'rm -f -- "$folder/$SLURM_JOB_ID"-*.yaml',
            """trap 'rm -f -- "$config"' EXIT""",
            f"""cat >"$config" <<'{END_OF_CONFIG}' || exit 1""",
            yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False) + END_OF_CONFIG,
            'set -- "$config"',
            *body,
            "",
        ]
    )


def layout_line(config: Config) -> str:
    """Example: "2 training nodes x 6 = tp 2 x pp 1 x cp 1 x dp 6; servers: 2 nodes x 1 x tp 2"."""
    c, p = config.cluster, config.parallel
    total = training_processes(config)
    return (
        f"{c.num_trainer_nodes} training nodes x {trainer_procs(config)} = tp {p.tp} x pp {p.pp} x cp {p.cp} "
        "x dp "
        f"{total // (p.tp * p.pp * p.cp)}; servers: {c.num_server_nodes} nodes x {config.servers.num} x tp "
        f"{config.servers.tp}"
    )


def options(config: Config, folder: Path) -> list[str]:
    """#SBATCH options. Raises ValueError for a folder that Slurm's output pattern cannot spell."""
    c = config.cluster
    if not re.fullmatch(r"[\w./@:+=-]+", str(folder)):
        raise ValueError(
            f"run.folder = {config.run.folder}: a #SBATCH line takes letters, digits and ./@:+=_- only. "
            "Rename it."
        )
    chosen = [
        "--job-name=jackpot",
        f"--nodes={c.nodes}",
        "--ntasks-per-node=1",
        *([f"--gpus-per-node={c.gpus_per_node}", "--exclusive"] if c.gpus_per_node else []),
        f"--time={c.minutes}",
        *([f"--partition={c.partition}"] if c.partition else []),
        *([f"--account={c.account}"] if c.account else []),
        "--requeue",
        f"--signal=B:USR1@{c.signal_s}",
        "--open-mode=append",
        f"--output={folder}/{'%A_%a' if c.seeds else '%j'}.out",
    ]
    if c.seeds:
        chosen.append(f"--array={','.join(map(str, c.seeds))}")
    return chosen + list(c.sbatch)


def settings_of(config: Config) -> dict[str, str]:
    """The environment of jobs/common.sh."""
    c = config.cluster
    return {
        "JACKPOT_REPO": str(REPO),
        "JACKPOT_SERVER_NODES": str(c.num_server_nodes),
        "JACKPOT_RUNTIME": c.runtime,
        "JACKPOT_IMAGE": c.image or "",
        "JACKPOT_MOUNTS": ",".join(c.mounts),
        "JACKPOT_SETUP": str(c.setup or ""),
        "JACKPOT_MAX_REQUEUES": str(c.max_requeues),
    }


def _sbatch(arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
    command = ["sbatch", "--parsable", *arguments]
    try:
        return subprocess.run(
            command,
            capture_output=True,
            text=True,
            encoding="utf-8",
            errors="replace",
            timeout=SBATCH_LIMIT_S,
        )
    except FileNotFoundError as error:
        raise ValueError(
            "sbatch is not here: --slurm submits from a login node. --dry-run prints the job."
        ) from error
    except subprocess.TimeoutExpired as error:
        raise ValueError(f"sbatch did not answer within {SBATCH_LIMIT_S} s: see `scontrol ping`.") from error
