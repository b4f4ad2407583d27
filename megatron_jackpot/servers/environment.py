"""What child processes need of their environment whatever this machine's own says: UTF-8, no proxy between
servers and trainer, caches where they can be written."""

import os
import platform
import pwd
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from urllib.parse import urlsplit

NO_PROXY = ("no_proxy", "NO_PROXY")
LOOPBACK = ("localhost", "127.0.0.1", "::1")
CACHES = {
    "XDG_CACHE_HOME": "",
    "SGLANG_CACHE_DIR": "sglang",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "TORCH_EXTENSIONS_DIR": "torch_extensions",
    "TORCH_HOME": "torch",
    "TRITON_HOME": "",
    "TRITON_CACHE_DIR": "triton",
    "TILELANG_CACHE_DIR": "tilelang",
    "CUDA_CACHE_PATH": "nv",
    "FLASHINFER_WORKSPACE_BASE": "",
    "NUMBA_CACHE_DIR": "numba",
    "HF_MODULES_CACHE": "hf_modules",
    "MPLCONFIGDIR": "matplotlib",
    "WANDB_CACHE_DIR": "wandb",
    "WANDB_CONFIG_DIR": "wandb",
    "WANDB_DATA_DIR": "wandb",
}
"""Variable -> folder below that of all caches. What libraries otherwise write below the home folder."""


def child_environment(environ: Mapping[str, str], folder: Path, urls: Iterable[str] = ()) -> dict[str, str]:
    """`environ` for a child whose run lies in `folder` and whose servers are at `urls`."""
    own = {**environ, "PYTHONUTF8": "1"} | _user_name(environ)
    return own | without_proxy(environ, urls) | writable_caches(environ, folder)


def without_proxy(environ: Mapping[str, str], urls: Iterable[str] = ()) -> dict[str, str]:
    """NO_PROXY, in both spellings, with loopback, this machine and the hosts of `urls` besides what it
    holds."""
    hosts = [host for url in urls if (host := urlsplit(url).hostname)]
    held = [part.strip() for name in NO_PROXY for part in environ.get(name, "").split(",")]
    if "*" in held:
        return dict.fromkeys(NO_PROXY, "*")
    wanted = dict.fromkeys([*filter(None, held), *LOOPBACK, platform.node(), *hosts])
    return dict.fromkeys(NO_PROXY, ",".join(filter(None, wanted)))


def writable_caches(environ: Mapping[str, str], folder: Path) -> dict[str, str]:
    """Caches below folder/cache where the home folder takes none; what `environ` sets already stays."""
    if _takes_files(environ):
        return {}
    # By machine: the run's folder may be shared, and compiled kernels fit one kind of machine.
    base = (folder / "cache" / (platform.node() or "here")).absolute()
    missing = {name: str(base / below) for name, below in CACHES.items() if name not in environ}
    for path in missing.values():
        Path(path).mkdir(parents=True, exist_ok=True)
    return missing


def _takes_files(environ: Mapping[str, str]) -> bool:
    """Whether there is a home folder, of this user, writable, with quota left."""
    try:
        folder = Path(environ.get("HOME") or "~").expanduser() / ".cache"
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            file.write(bytes(65536))
            os.fsync(file.fileno())
            return True
    except (OSError, RuntimeError):
        return False


def _user_name(environ: Mapping[str, str]) -> dict[str, str]:
    """USER where the user id has no name, as in a container with one of its own: torch asks for it."""
    if any(environ.get(name) for name in ("LOGNAME", "USER", "LNAME", "USERNAME")):
        return {}
    try:
        pwd.getpwuid(os.getuid())
    except KeyError:
        return {"USER": str(os.getuid())}
    return {}


def own_environment() -> dict[str, str]:
    """This process's environment without what torchrun set for a rank."""
    torchrun = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    prefixes = ("TORCHELASTIC_", "GROUP_", "ROLE_")
    return {k: v for k, v in os.environ.items() if k not in torchrun and not k.startswith(prefixes)}
