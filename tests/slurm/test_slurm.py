"""Jobs that `launch --slurm` renders and refuses, and what their scripts do, without a cluster."""

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from megatron_jackpot.cli import main
from megatron_jackpot.config import Config, load_config
from megatron_jackpot.config.placement import trainer_procs, training_processes
from tests.slurm.jobs import config_for, job_environment, tree
from tests.tiny import write_tokenizer

ROOT = Path(__file__).parents[2]
GPUS = dict(gpus_per_node=8, nodes=2)


@pytest.fixture
def sbatch(tmp_path, monkeypatch):
    """A program `sbatch` that notes its arguments, numbers jobs from 100 on and keeps their scripts."""
    calls = tmp_path / "calls"
    program = tmp_path / "bin" / "sbatch"
    program.parent.mkdir()
    program.write_text(
        f'#!/bin/bash\necho "$@" >>{calls}\njob=$(expr 99 + $(wc -l <{calls})); echo $job\n'
        f'cp "${{!#}}" {tmp_path}/$job.sbatch\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    return lambda: calls.read_text().splitlines() if calls.exists() else []


def launch_slurm(folder: Path, *arguments: str, **sections: dict) -> int:
    path = folder / "run.yaml"
    path.write_text(json.dumps(tree(folder, **sections)))  # JSON is YAML
    for name in ("policy", "actor"):
        write_tokenizer(folder / name)
    return main(["launch", str(path), "--slurm", *arguments])


def directives(script: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH")]


def test_a_dry_run_prints_the_job_and_leaves_nothing(tmp_path, capsys, sbatch) -> None:
    cluster = dict(
        GPUS,
        layout="disaggregated",
        nodes=3,
        minutes=90,
        signal_s=120,
        partition="h100",
        sbatch=["--qos=high"],
    )
    assert launch_slurm(tmp_path, "--dry-run", cluster=cluster, parallel=dict(tp=2)) == 0
    script = capsys.readouterr().out
    assert {
        "--nodes=3",
        "--gpus-per-node=8",
        "--time=90",
        "--partition=h100",
        "--qos=high",
        "--requeue",
        "--signal=B:USR1@120",
        "--open-mode=append",
    } <= set(directives(script))
    assert "2 training nodes x 8 = tp 2 x pp 1 x cp 1 x dp 8; servers: 1 nodes x 1 x tp 1" in script
    assert 'run_job "$JACKPOT_SERVER_NODES" "$trainers" "$trainers" 0 "$@"' in script
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0
    assert sbatch() == [] and not (tmp_path / "run").exists()


def test_slurms_options_without_slurm_are_refused(capsys) -> None:
    with pytest.raises(SystemExit):
        main(["launch", "run.yaml", "--dry-run"])
    assert "go with --slurm" in capsys.readouterr().err


def run_script(script: Path, job: str, restarts: str = "0") -> tuple[str, Config]:
    """What a job's script gives the steps: the file's name and its configuration."""
    seen = script.with_name("seen")
    checkout = script.with_name("checkout") / "megatron_jackpot/launch/jobs"
    checkout.mkdir(parents=True, exist_ok=True)
    (checkout / "common.sh").write_text(f'run_job() {{ echo "$5" >{seen}; cp "$5" {seen}.yaml; exit 3; }}')
    text = re.sub("JACKPOT_REPO=[^ ]*", f"JACKPOT_REPO={checkout.parents[2]}", script.read_text(), count=1)
    environment = job_environment(SLURM_JOB_ID=job, SLURM_RESTART_COUNT=restarts, PATH=os.environ["PATH"])
    assert subprocess.run(["bash"], input=text, text=True, env=environment).returncode == 3
    return Path(seen.read_text().strip()).name, load_config(seen.with_suffix(".yaml"))


def test_a_job_keeps_what_it_was_submitted_with_whatever_is_submitted_later(tmp_path, sbatch) -> None:
    folder = str(tmp_path / "run")
    assert launch_slurm(tmp_path, cluster=GPUS, run=dict(folder=folder, steps=100)) == 0
    assert launch_slurm(tmp_path, cluster=dict(GPUS, nodes=5), run=dict(folder=folder, steps=400)) == 0
    (tmp_path / "run/slurm/100-0.yaml").write_text("of an attempt that was killed")
    for job, restarts, steps, nodes in (("101", "0", 400, 5), ("100", "1", 100, 2)):
        name, config = run_script(tmp_path / f"{job}.sbatch", job, restarts)
        assert (name, config.run.steps, config.cluster.nodes) == (f"{job}-{restarts}.yaml", steps, nodes)
    # What ended jobs leave is no file of their own.
    assert [path.name for path in (tmp_path / "run/slurm").iterdir()] == ["job.sbatch"]


def test_a_chain_of_jobs_keeps_script_and_configuration(tmp_path, capsys, sbatch) -> None:
    assert launch_slurm(tmp_path, "--chain", "3", cluster=dict(GPUS, seeds=[3, 5])) == 0
    job = tmp_path / "run/slurm/job.sbatch"
    after = ("", "--dependency=afterany:100 ", "--dependency=afterany:100:101 ")
    assert sbatch() == [f"--parsable {dependency}{job}" for dependency in after]
    assert "--array=3,5" in directives(job.read_text())
    assert "Submitted job 102 after 101" in capsys.readouterr().out
    assert run_script(tmp_path / "101.sbatch", "101")[1].cluster.seeds == (3, 5)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            dict(cluster=GPUS, parallel=dict(pp=4)),
            r"2 training nodes x 7 processes = 14. 14 training .* = 1 \* 4 \* 1",
        ),
        (dict(cluster=GPUS, servers=dict(num=2, tp=4)), r"2 \* 4 = 8 GPUs .* one must be left for training"),
        (
            dict(cluster=dict(GPUS, trainer_procs=8)),
            r"trainer_procs = 8 exceeds the 8 GPUs of a node - 1 .* = 7",
        ),
        (dict(cluster=dict(GPUS, gpu_memory_gib=4.1), packing=dict(tokens=65536)), r"needs .* GiB = policy"),
        (dict(cluster=dict(GPUS, server_nodes=3)), "leaves -1 for training"),
        (
            dict(cluster=dict(GPUS, nodes=1, layout="disaggregated")),
            "leaves 0 for training",
        ),
        (dict(cluster=dict(GPUS, gpus_per_node=0)), "Set cluster.trainer_procs"),
        (dict(cluster=dict(GPUS, runtime="pyxis")), "Set both or neither"),
        (dict(cluster=dict(GPUS, partition="a;rm -rf")), "cluster.partition"),
        (dict(cluster=dict(GPUS, sbatch=["--qos=x\n#SBATCH --uid=0"])), "cluster.sbatch"),
        (dict(cluster=GPUS, servers=dict(urls=["http://n:1"])), "a Slurm job starts its own"),
    ],
)
def test_an_impossible_job_is_refused_before_submission(tmp_path, capsys, sbatch, sections, message) -> None:
    assert launch_slurm(tmp_path, **sections) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert sbatch() == [] and not (tmp_path / "run").exists()


def test_what_is_wrong_with_the_job_is_told_with_all_the_rest(tmp_path, capsys, sbatch) -> None:
    wrong = dict(cluster=dict(GPUS, server_nodes=3), algorithm=dict(correction=dict(name="tiss")))
    for option in ([], ["--dry-run"]):
        assert launch_slurm(tmp_path, "--chain", "0", *option, **wrong) == 2
        told = capsys.readouterr().err.splitlines()
        for part in ("leaves -1 for training", "--chain 0 must be at least 1", "'tiss' is unknown"):
            assert sum(part in line for line in told) == 1, told
    assert sbatch() == [] and not (tmp_path / "run").exists()


def test_processes_of_both_layouts(tmp_path) -> None:
    colocated = config_for(tmp_path, cluster=dict(nodes=4), servers=dict(num=1, tp=2), parallel=dict(tp=2))
    assert (trainer_procs(colocated), training_processes(colocated)) == (6, 24)
    apart = config_for(
        tmp_path, cluster=dict(nodes=4, layout="disaggregated", server_nodes=2), servers=dict(num=8)
    )
    assert (trainer_procs(apart), training_processes(apart)) == (8, 16)


def test_words_of_the_configuration_never_reach_a_shell_as_code(tmp_path, capsys, sbatch) -> None:
    mark = tmp_path / "executed"
    cluster = dict(
        GPUS,
        setup=f"$(touch {mark})",
        mounts=[f"/a:`touch${{IFS}}{mark}`"],
        runtime="apptainer",
        image="i;id",
    )
    assert launch_slurm(tmp_path, "--dry-run", cluster=cluster) == 0
    script = capsys.readouterr().out.split("source ")[0]
    (tmp_path / "run/slurm").mkdir(parents=True)
    environment = {"SLURM_SUBMIT_DIR": "/", "SLURM_JOB_NUM_NODES": "2", "PATH": os.environ["PATH"]}
    script += 'printf "%s\\n" "$JACKPOT_SETUP" "$JACKPOT_IMAGE"'
    shown = subprocess.run(
        ["bash"], input=script, text=True, capture_output=True, env=environment, cwd=tmp_path
    )
    assert shown.stdout == f"$(touch {mark})\ni;id\n" and not mark.exists()


@pytest.mark.parametrize("runtime", ["bare", "pyxis", "apptainer"])
def test_the_step_of_each_runtime(tmp_path, runtime) -> None:
    script = f'''
    export SLURM_JOB_ID=1 JACKPOT_REPO={ROOT} JACKPOT_RUNTIME={runtime}
    export JACKPOT_IMAGE=repo/image:1 JACKPOT_MOUNTS=/d:/d
    source {ROOT}/megatron_jackpot/launch/jobs/common.sh; cd /tmp
    make_step serve "a b.yaml" 'x=[1, 2]'
    printf '%s|' "${{step[@]}}"'''
    words = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout.split(
        "|"
    )[:-1]
    assert words[-6:] == ["python", "-m", "megatron_jackpot.cli", "serve", "a b.yaml", "x=[1, 2]"]
    if runtime == "pyxis":
        assert words[:3] == [
            "--container-image=repo/image:1",
            "--container-workdir=/tmp",
            "--container-mounts=/d:/d",
        ]
    if runtime == "apptainer":
        assert words[:6] == ["apptainer", "exec", "--pwd", "/tmp", "--bind", "/d:/d"]


SRUN = """#!/bin/bash
while [[ $1 == -* ]]; do shift; done
exec "$@"
"""
PYTHON = """#!/bin/bash
if [[ $3 == join ]]; then echo python >>"$SEEN"; sleep 8; fi
trap 'exit 0' USR2
for _ in $(seq 200); do sleep 0.1; done
"""


@pytest.mark.parametrize("where", ["setup", "python"])
def test_a_stop_before_a_node_listens_queues_the_job_again(tmp_path, where) -> None:
    """In the shell that sources the setup file, and in an interpreter that still loads."""
    setup, seen, programs = tmp_path / "setup.sh", tmp_path / "seen", tmp_path / "bin"
    slow = "if [[ $* == *join* ]]; then echo setup >>$SEEN; sleep 8; fi"
    setup.write_text(slow if where == "setup" else "")
    programs.mkdir()
    for name, text in (
        ("srun", SRUN),
        ("python", PYTHON),
        ("scontrol", '#!/bin/bash\necho "$@" >>"$SEEN"; kill -9 $PPID'),
    ):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"
    environment = dict(job_environment(), PATH=path, SEEN=str(seen), SLURM_JOB_NODELIST="n[1-2]")
    environment |= dict(JACKPOT_REPO=str(ROOT), JACKPOT_SETUP=str(setup))
    body = 'source "$JACKPOT_REPO/megatron_jackpot/launch/jobs/common.sh"; run_job 1 0 2 0 run.yaml'
    with (tmp_path / "out").open("w") as out:
        job = subprocess.Popen(["bash", "-c", body], env=environment, stdout=out, stderr=out)
        deadline = time.monotonic() + 10
        while not seen.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        job.send_signal(signal.SIGUSR1)
        job.wait(timeout=15)
    said = (tmp_path / "out").read_text()
    assert seen.read_text().split("\n")[:-1] == [where, "requeue 17"], said
    assert "training ended with code 75" in said
