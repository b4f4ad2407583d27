"""Start-up failures of a server are told at once, and stopping one ends all of its processes and no other."""

import os
import socket
import sys
import time
from pathlib import Path

import pytest

from megatron_jackpot.config import Servers
from megatron_jackpot.servers import process as server_module
from megatron_jackpot.servers.address import free_port
from megatron_jackpot.servers.gpus import Placement
from megatron_jackpot.servers.process import (
    ServerProcess,
    server_command,
    server_environment,
    start_servers,
    stop_servers,
)

HEALTHY = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.send_header("Content-Length", "0"); self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""
STUBBORN_FAMILY = """
import os, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
os.fork()
print("alive", flush=True)
time.sleep(60)
"""


def python_server(tmp_path: Path, code: str, name: str = "server") -> ServerProcess:
    port = free_port()
    return ServerProcess(
        [sys.executable, "-c", code, str(port)], port=port, log_path=tmp_path / f"{name}.log"
    )


def alive_in_group(group: int) -> int:
    count = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, member_of = stat.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        count += int(member_of) == group and state != "Z"
    return count


def test_a_port_in_use_is_named_before_anything_is_spawned(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        server = ServerProcess(["must-not-run"], port=port, log_path=tmp_path / "log")
        with pytest.raises(RuntimeError, match=f"Port {port} on 127.0.0.1 is in use.*servers.port"):
            server.start()
    assert server.process is None


def test_a_server_that_dies_while_starting_is_told_at_once_with_its_last_words(tmp_path):
    server = python_server(tmp_path, "print('loading'); raise SystemExit('no such model')")
    server.start()
    # Not the TimeoutError of a wait to its end.
    with pytest.raises(RuntimeError, match="exit code 1 while starting(.|\n)*no such model"):
        server.wait_healthy(120)
    server.stop()


def test_a_server_that_never_answers_ends_at_the_time_limit_with_its_log(tmp_path):
    server = python_server(tmp_path, "import time; print('thinking', flush=True); time.sleep(60)")
    server.start()
    try:
        while "thinking" not in server.log_path.read_text():
            time.sleep(0.05)  # the interpreter's own start is no part of the limit
        with pytest.raises(TimeoutError, match="did not answer /health within 1 s(.|\n)*thinking"):
            server.wait_healthy(1)
    finally:
        server.stop(1)


def test_stop_ends_the_whole_group_even_members_that_ignore_sigterm_and_no_other(tmp_path):
    family, neighbour = (
        python_server(tmp_path, STUBBORN_FAMILY),
        python_server(tmp_path, HEALTHY, "neighbour"),
    )
    family.start()
    neighbour.start()
    group = family.process.pid
    while family.log_path.read_text().count("alive") < 2:
        time.sleep(0.02)
    family.stop(0.5)
    assert alive_in_group(group) == 0
    neighbour.wait_healthy(60)
    stop_servers([neighbour])
    assert not neighbour.running


def test_when_one_of_several_servers_fails_the_others_are_stopped(tmp_path, monkeypatch):
    made: list[ServerProcess] = []

    def command(servers: Servers, model: Path, *, port: int, **others: object) -> list[str]:
        code = HEALTHY if not made else "raise SystemExit('out of memory')"
        return [sys.executable, "-c", code, str(port)]

    start = ServerProcess.start
    monkeypatch.setattr(server_module, "server_command", command)
    monkeypatch.setattr(ServerProcess, "start", lambda server: (made.append(server), start(server)))
    with pytest.raises(RuntimeError, match="out of memory"):
        settings = Servers(num=2, start_timeout_s=20)
        start_servers(settings, Path("model"), Placement("cpu"), tmp_path, dtype="float32")
    assert len(made) == 2 and not any(server.running for server in made)


def test_the_environment_drops_torchrun_and_puts_the_stand_ins_first_only_without_cuda(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("PYTHONPATH", "mine")
    where = (tmp_path, "http://10.0.0.1:1")
    cpu, cuda = (
        server_environment("cpu", *where, tp=2),
        server_environment("cuda", *where, tp=2, gpus=(4, 5)),
    )
    assert "RANK" not in cpu and "TORCHELASTIC_RUN_ID" not in cuda
    assert cpu["PYTHONPATH"].split(os.pathsep) == [str(server_module.CPU_SHIMS), "mine"]
    assert cuda["PYTHONPATH"] == "mine" and cuda["CUDA_VISIBLE_DEVICES"] == "4,5"
    assert len(cpu["SGLANG_CPU_OMP_THREADS_BIND"].split("|")) == 2


def test_cpu_flags_appear_on_cpu_only_and_extra_arguments_come_last():
    settings = Servers(extra_args=("--x",))
    shared = dict(port=1, dtype="float32", flags=("--y",))
    cpu, cuda = (server_command(settings, Path("m"), device=d, **shared) for d in ("cpu", "cuda"))
    assert "torch_native" in cpu and "torch_native" not in cuda
    assert cpu[-2:] == cuda[-2:] == ["--y", "--x"]
    without = server_command(Servers(prefix_cache=False), Path("m"), device="cuda", **shared)
    assert "--disable-radix-cache" in without and "--disable-radix-cache" not in cuda


def test_servers_of_ipc_see_every_gpu_and_those_that_lend_memory_answer_health_without_sampling(
    tmp_path, monkeypatch
):
    made: list[ServerProcess] = []
    monkeypatch.setattr(ServerProcess, "start", lambda server: made.append(server))
    monkeypatch.setattr(ServerProcess, "wait_healthy", lambda server, limit_s, stopped: None)
    settings, gpus, model = Servers(num=2, tp=2), (4, 5, 6, 7), tmp_path
    lending = settings.model_copy(update={"release_memory": True})
    start_servers(lending, model, Placement("cuda", gpus, tuple(range(8))), tmp_path, dtype="bfloat16")
    for server, base in zip(made, ("4", "6"), strict=True):
        assert server.environment["CUDA_VISIBLE_DEVICES"] == "0,1,2,3,4,5,6,7"
        assert server.command[server.command.index("--base-gpu-id") + 1] == base
        assert "--enable-memory-saver" in server.command
        assert server.command[server.command.index("--load-format") + 1] == "dummy"  # no weights there
    made.clear()
    (model / "model.safetensors").touch()
    start_servers(settings, model, Placement("cuda", gpus), tmp_path, dtype="bfloat16")
    assert [server.environment["CUDA_VISIBLE_DEVICES"] for server in made] == ["4,5", "6,7"]
    assert not {"--base-gpu-id", "--enable-memory-saver", "--load-format"} & set(made[0].command)
    # One /health a push: it must not sample a token, which takes a second.
    assert made[0].environment["SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION"] == "0"


def test_a_rank_beside_its_servers_waits_once_until_all_answer_and_any_other_not_at_all(monkeypatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(server_module, "answers", lambda url, limit_s: asked.append(url) or len(asked) > 2)
    monkeypatch.setattr(server_module.time, "sleep", lambda seconds: None)
    servers = Servers(urls=("http://a:1", "http://b:2"))
    server_module.await_servers(servers, lambda: None)
    assert asked == []
    monkeypatch.setenv(server_module.AWAIT_VARIABLE, "1")
    for _ in range(2):
        server_module.await_servers(servers, lambda: None)
    assert asked == ["http://a:1"] * 3 + ["http://b:2"]
    monkeypatch.setenv(server_module.AWAIT_VARIABLE, "1")
    monkeypatch.setattr(server_module, "answers", lambda url, limit_s: False)
    with pytest.raises(TimeoutError, match=r"servers.start_timeout_s\) for server http://a:1"):
        server_module.await_servers(servers.model_copy(update={"start_timeout_s": 0.01}), lambda: None)
    monkeypatch.setenv(server_module.AWAIT_VARIABLE, "1")
    server_module.await_servers(servers, lambda: "stop")
