"""megatron-jackpot doctor: is this machine fit for a run? One line for each thing, with the remedy.

Libraries are imported in processes of their own, side by side: a broken one may hang or crash.
"""

import importlib.metadata
import importlib.util
import os
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

MIN_PYTHON = (3, 11)
IMPORT_LIMIT_S = 180
MIN_MEMORY_GB = 6
MIN_SHM_GB = 1
MIN_DISK_GB = 5
MIN_OPEN_FILES = 4096


@dataclass(frozen=True)
class Check:
    """One line. `broken` makes the command fail; `warn` is a thing to know before a large run."""

    name: str
    status: Literal["ok", "warn", "broken"]
    detail: str
    remedy: str = ""

    def __str__(self) -> str:
        line = f"{self.status:6}  {self.name:20}  {self.detail}"
        return f"{line}  -> {self.remedy}" if self.remedy else line


def doctor(server_python: Path | None = None, config: Path | None = None) -> int:
    """Print every check; 1 if something that a run needs is broken, else 0. `config`: a file in which no
    mistake was found."""
    if config is not None:
        print(Check("configuration", "ok", f"{config}: nothing a start would refuse"), flush=True)
    checks: list[Callable[[], Check]] = [
        python,
        torch,
        backends,
        megatron,
        transformer_engine,
        apex,
        lambda: sglang(server_python),
        lambda: same_nccl(server_python),
        tokenizers,
        ports,
        memory,
        disk,
        open_files,
    ]
    with ThreadPoolExecutor(max_workers=max(2, (os.cpu_count() or 2) // 2)) as pool:
        results = []
        for result in pool.map(lambda check: check(), checks):
            print(result, flush=True)
            results.append(result)
    return int(any(result.status == "broken" for result in results))


def python() -> Check:
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info < MIN_PYTHON:
        return Check(
            "python", "broken", version, "Python 3.11 or newer is needed: source tools/env.sh makes one."
        )
    return Check("python", "ok", f"{version}, {sys.executable}")


def torch() -> Check:
    code = (
        "import torch; c = torch.cuda; n = c.device_count() if c.is_available() else 0; "
        "print(torch.__version__, f'{n} x {c.get_device_name()}' if n else "
        "f'no device (built for CUDA {torch.version.cuda})' if torch.version.cuda else 'CPU build', sep=', ')"
    )
    fine, text = attempt(code)
    if not fine:
        return Check("torch", "broken", text, "Install torch: source tools/env.sh makes a CPU environment.")
    if "no device" in text and shutil.which("nvidia-smi"):
        return Check(
            "torch", "warn", text, "nvidia-smi is there but torch sees no device: compare driver and CUDA."
        )
    return Check("torch", "ok", text)


def backends() -> Check:
    code = (
        "import torch, torch.distributed as d; "
        "nccl = d.is_nccl_available() and '.'.join(map(str, torch.cuda.nccl.version())); "
        "print('gloo', d.is_gloo_available(), 'nccl', nccl)"
    )
    fine, text = attempt(code)
    if not fine or "gloo True" not in text:
        return Check("gloo, NCCL", "broken", text, "This torch has no gloo: install an official build.")
    return Check("gloo, NCCL", "ok", text.replace("True", "yes").replace("False", "no"))


def megatron() -> Check:
    fine, text = attempt(
        "import megatron.core as m; from megatron.core.models.gpt import GPTModel; print(m.__version__)"
    )
    if not fine:
        remedy = "Install megatron-core >= 0.16.1; if transformer_engine or apex fails, see their lines."
        return Check("megatron-core", "broken", text, remedy)
    return Check("megatron-core", "ok", text)


def transformer_engine() -> Check:
    installed = [
        dist.metadata["Name"] for dist in importlib.metadata.distributions() if _is_transformer_engine(dist)
    ]
    if not installed and importlib.util.find_spec("transformer_engine") is None:
        return Check("Transformer Engine", "ok", "not installed: no fp8, Megatron's local layers")
    fine, text = attempt("import transformer_engine.pytorch, transformer_engine as t; print(t.__version__)")
    if fine:
        return Check("Transformer Engine", "ok", text)
    names = " ".join(sorted(installed))
    remedy = f"Half installed, which breaks Megatron's import: pip uninstall {names}, or install all of it."
    return Check("Transformer Engine", "broken", text, remedy)


def apex() -> Check:
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return Check("apex", "ok", "not installed: torch's optimizers are used")
    folder = Path(next(iter(spec.submodule_search_locations or ()), "."))
    if not (folder / "optimizers").is_dir():
        remedy = (
            "That is another project of the same name: pip uninstall apex. NVIDIA's is built from its source."
        )
        return Check("apex", "broken", f"{folder} is not NVIDIA's", remedy)
    fine, text = attempt("import apex.optimizers, amp_C; print('with CUDA extensions')")
    if fine:
        return Check("apex", "ok", text)
    return Check(
        "apex",
        "warn",
        text,
        "Built without its CUDA extensions: rebuild it with them, or pip uninstall apex.",
    )


def sglang(server_python: Path | None = None) -> Check:
    """SGLang in the servers' own environment, imported the way the launcher starts it."""
    from megatron_jackpot.servers.gpus import visible_gpus
    from megatron_jackpot.servers.process import server_environment

    interpreter = str(server_python or sys.executable)
    code = "import sglang, sglang.srt.entrypoints.http_server; print(sglang.__version__)"
    device = "cuda" if visible_gpus() else "cpu"
    with tempfile.TemporaryDirectory() as folder:
        environment = server_environment(device, Path(folder), "http://127.0.0.1")
        fine, text = attempt(code, interpreter=interpreter, env=environment)
    if fine:
        return Check("sglang", "ok", text)
    remedy = (
        "Servers need it: source tools/env.sh (CPU), or name an environment that has it with servers.python."
    )
    return Check("sglang", "broken", f"{interpreter}: {text}", remedy)


def same_nccl(server_python: Path | None = None) -> Check:
    """The weight group joins trainer and servers: on GPUs their NCCL must have one major.minor."""
    from megatron_jackpot.servers.gpus import visible_gpus

    name = "NCCL on both sides"
    code = (
        "import torch; print('.'.join(map(str, torch.cuda.nccl.version())) if torch.version.cuda else 'none')"
    )
    found = {}
    for side, interpreter in (("trainer", sys.executable), ("server", str(server_python or sys.executable))):
        fine, found[side] = attempt(code, interpreter=interpreter)
        if not fine:
            return Check(name, "broken", f"{side}: {found[side]}", "torch must import in both environments.")
    detail = f"trainer {found['trainer']}, server {found['server']}"
    if found["trainer"].split(".")[:2] == found["server"].split(".")[:2]:
        return Check(name, "ok", detail)
    if not visible_gpus():
        # A CUDA build of torch, as pip's default index has it, trains without a GPU too.
        return Check(name, "ok", f"{detail}; without a GPU gloo joins them")
    return Check(
        name,
        "broken",
        detail,
        "Pin torch in one environment to the other's NCCL, or set sync.backend=gloo or sync.method=disk.",
    )


def tokenizers() -> Check:
    fine, text = attempt(
        "import tokenizers, transformers, safetensors.torch; from transformers import AutoTokenizer; "
        "print('transformers', transformers.__version__, 'tokenizers', tokenizers.__version__)"
    )
    if not fine:
        return Check("tokenizer libraries", "broken", text, "pip install transformers tokenizers safetensors")
    return Check("tokenizer libraries", "ok", text)


def ports() -> Check:
    try:
        with socket.socket() as server, socket.socket() as client:
            server.bind(("127.0.0.1", 0))
            server.listen(1)
            client.settimeout(5)
            client.connect(server.getsockname())
    except OSError as error:
        remedy = "Ranks and servers talk over loopback: allow it in the container or firewall."
        return Check("loopback", "broken", str(error), remedy)
    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
    except OSError:
        remedy = "gloo looks it up: add it to /etc/hosts, or set GLOO_SOCKET_IFNAME=lo on one machine."
        return Check("loopback", "warn", f"127.0.0.1 works, the host name {name} does not resolve", remedy)
    return Check("loopback", "ok", f"127.0.0.1 works, {name} is {address}")


def memory() -> Check:
    free = psutil.virtual_memory().available / 2**30
    shm = shutil.disk_usage("/dev/shm").free / 2**30 if Path("/dev/shm").is_dir() else None
    detail = f"{free:.1f} GB free" + ("" if shm is None else f", /dev/shm {shm:.1f} GB free")
    if free < MIN_MEMORY_GB:
        return Check("memory", "warn", detail, f"The quickstart needs about {MIN_MEMORY_GB} GB.")
    if shm is not None and shm < MIN_SHM_GB:
        return Check(
            "memory", "warn", detail, "NCCL and torch share memory there: docker run --shm-size=16g."
        )
    return Check("memory", "ok", detail)


def disk() -> Check:
    free = shutil.disk_usage(".").free / 2**30
    if free < MIN_DISK_GB:
        return Check(
            "disk", "warn", f"{free:.1f} GB free here", "Runs and weights are written here: free some."
        )
    return Check("disk", "ok", f"{free:.1f} GB free here")


def open_files() -> Check:
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    detail = "unlimited" if limit == resource.RLIM_INFINITY else str(limit)
    if limit != resource.RLIM_INFINITY and limit < MIN_OPEN_FILES:
        return Check("ulimit -n", "warn", detail, "Each request in flight holds a socket: ulimit -n 65536.")
    return Check("ulimit -n", "ok", detail)


def attempt(
    code: str, *, interpreter: str = sys.executable, env: dict[str, str] | None = None
) -> tuple[bool, str]:
    """Run a few lines in a fresh interpreter: (True, what they printed) or (False, the error's last line)."""
    try:
        done = subprocess.run(
            [interpreter, "-W", "ignore", "-c", code],
            capture_output=True,
            text=True,
            encoding="utf-8",
            errors="replace",
            timeout=IMPORT_LIMIT_S,
            env=env,
        )
    except subprocess.TimeoutExpired:
        return False, f"no answer within {IMPORT_LIMIT_S} s"
    except OSError as error:
        return False, str(error)
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    return done.returncode == 0, lines[-1].strip() if lines else f"exit code {done.returncode}"


def _is_transformer_engine(dist: importlib.metadata.Distribution) -> bool:
    return (dist.metadata["Name"] or "").lower().replace("_", "-").startswith("transformer-engine")
