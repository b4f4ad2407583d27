"""Runs launch() in a process of its own with small stand-ins for the server and for torchrun.

    python tests/launch/driver.py FOLDER SERVER TRAINER [N]

Every stand-in writes its process id to FOLDER/../pids, so that a test can see whether all of them are gone.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path

from megatron_jackpot.config import parse_config
from megatron_jackpot.launch.local import Begin, launch, torchrun
from megatron_jackpot.servers.address import free_port
from megatron_jackpot.servers.process import ServerProcess

COMMON = """
import os, pathlib, signal, subprocess, sys, time
pids = pathlib.Path(sys.argv[1])
def note(name): (pids / f"{name}-{os.getpid()}").touch()
def child(name, **kwargs):
    touch = f"(pathlib.Path({str(pids)!r}) / f'{name}-{{os.getpid()}}').touch()"
    body = f"import os, pathlib, time; {touch}; time.sleep(300)"
    return subprocess.Popen([sys.executable, "-c", body], **kwargs)
def wait_for(name):
    while not list(pids.glob(name + "-*")): time.sleep(0.02)
"""
SERVERS = {
    "beside": "note('server'); child('scheduler'); wait_for('trainer'); time.sleep(300)",
    "steady": "note('server'); child('scheduler'); wait_for('scheduler'); time.sleep(300)",
    "dying": """
note("server"); child("scheduler"); wait_for("worker")
print("out of memory, said the server", flush=True); sys.exit(9)
""",
    "silent": "note('server'); child('scheduler'); wait_for('scheduler'); time.sleep(300)",
    "mortal": """
note("server"); child("scheduler"); wait_for("worker")
if len(list(pids.glob("server-*"))) == 1: print("a bad moment", flush=True); sys.exit(9)
time.sleep(300)
""",
    "slow beside": "note('server'); time.sleep(300)",
    "slow": "note('server'); child('scheduler'); wait_for('scheduler'); time.sleep(300)",
    "stillborn": "print('no such model', flush=True); sys.exit(4)",
}
OWN_SESSION = "note('trainer'); child('worker', start_new_session=True); wait_for('worker');"
TRAINERS = {
    "exits": "note('trainer'); print('step 1'); sys.exit(int(sys.argv[2]))",
    "refuses": "print('megatron-jackpot: actor.hf = x: no. Set it.', flush=True); sys.exit(2)",
    "saves": """
note("trainer"); run = pids.parent / "run"; child("worker"); wait_for("worker")
while not (run / "stop").exists(): time.sleep(0.02)
(run / "checkpoints" / "step-000007").mkdir(parents=True)
(run / "stop").rename(run / "stopped")
""",
    "waits": """
note("trainer"); child("worker"); wait_for("worker")
from megatron_jackpot.config.run import Run
from megatron_jackpot.run.interrupt import StopRequest
run = pids.parent / "run"
stop = StopRequest(Run(folder=run, time_limit_s=float(sys.argv[2]), stop_margin_s=3)); stop.listen()
(run / "checkpoints" / "step-000007").mkdir(parents=True, exist_ok=True)
note("listens")
while stop.reason() is None: time.sleep(0.02)
stop.done(); sys.exit(int(sys.argv[3]))
""",
    "fails when asked": """
note("trainer"); run = pids.parent / "run"; child("worker"); wait_for("worker")
(run / "checkpoints" / "step-000007").mkdir(parents=True, exist_ok=True)
while not (run / "stop").exists(): time.sleep(0.02)
sys.exit(7)
""",
    "fails": """
note("trainer"); run = pids.parent / "run"
(run / "checkpoints" / "step-000007").mkdir(parents=True, exist_ok=True)
print("arguments:", sys.argv[2:], flush=True); child("worker"); wait_for("worker"); sys.exit(int(sys.argv[2]))
""",
    "works": f"{OWN_SESSION} time.sleep(300)",
    "crashes": f"{OWN_SESSION} os.kill(os.getpid(), signal.SIGKILL)",
    "stubborn": """
signal.signal(signal.SIGTERM, signal.SIG_IGN); signal.signal(signal.SIGHUP, signal.SIG_IGN)
note("trainer"); child("worker"); wait_for("worker"); time.sleep(300)
""",
}
RANK = """
import torch, torch.distributed as dist
from megatron_jackpot.run.interrupt import die_with_parent
die_with_parent(signal.SIGTERM)
dist.init_process_group("gloo"); total = torch.ones(1); dist.all_reduce(total)
if dist.get_rank() == 0: print("ranks:", int(total), flush=True)
note("worker"); time.sleep(300)
"""


def main() -> int:
    folder, server, trainer, *rest = sys.argv[1:]
    pids = Path(folder).parent / "pids"
    pids.mkdir()

    def start(config: object, stopped: Callable[[], bool], begin: Begin) -> list[ServerProcess]:
        command = [sys.executable, "-c", COMMON + SERVERS[server], str(pids)]
        process = ServerProcess(command, port=free_port(), log_path=Path(folder) / "server-0.log")
        process.start()
        if server in ("beside", "slow beside"):
            begin([process.url])
        while server == "beside" and not list(pids.glob("trainer-*")):
            time.sleep(0.02)
        if server in ("stillborn", "slow", "slow beside"):
            process.wait_healthy(60, stopped)
        while not list(pids.glob("scheduler-*")):
            time.sleep(0.02)
        return [process]

    def command(config_file: Path, nproc: int, urls: object) -> list[str]:
        if trainer != "torchrun":
            return [sys.executable, "-c", COMMON + TRAINERS[trainer], str(pids), *rest]
        script = Path(folder).parent / "rank.py"
        script.write_text(COMMON + RANK)
        argv = torchrun(config_file, 2, [])
        return [*argv[: argv.index("megatron_jackpot.cli") - 1], str(script), str(pids)]

    limit = {"time_limit_s": float(rest[0]), "stop_margin_s": 3} if trainer == "waits" else {}
    tree = {
        "run": {"folder": folder, "max_restarts": 2, **limit},
        "servers": {
            "max_restarts": 0 if server == "dying" else 2,
            "hang_s": 2 if server == "silent" else 1000,
        },
        "policy": {"hf": folder},
        "actor": {"hf": folder},
        "data": {"tasks": {"chain_sum": {}}, "max_prompt_tokens": 64},
        "rollout": {"max_new_tokens": 64},
    }
    return launch(parse_config(tree), start=start, trainer_command=command)


if __name__ == "__main__":
    sys.exit(main())
