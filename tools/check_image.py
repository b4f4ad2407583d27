"""Is an image (or any environment) what its lock file says? Run at the end of each build in the Dockerfile.

    python tools/check_image.py --lock requirements/gpu.txt --server-python /usr/local/bin/sglang-python
    --need apex

Every pin is the installed version; the package, torch and Megatron import, and what --need names; the
servers' interpreter imports SGLang; both sides' NCCL have one major.minor. Prints a line each, ends with 1 if
one is wrong.
"""

import argparse
import importlib.metadata
import re
import sys
from pathlib import Path

from megatron_jackpot.launch.doctor import attempt, same_nccl

ALWAYS = ("torch", "megatron.core.models.gpt", "megatron_jackpot.cli", "megatron_jackpot.plan.tables")


def pins(lock: Path) -> dict[str, str]:
    """Name -> version of every `name==version` line; hashes, markers and comments are passed over."""
    found = re.findall(r"^([A-Za-z0-9._-]+)(?:\[[^\]]*\])?==([^\s;\\]+)", lock.read_text(), re.MULTILINE)
    if not found:
        raise ValueError(f"{lock} pins nothing: it holds no `name==version` line.")
    return dict(found)


def wrong_pins(wanted: dict[str, str]) -> list[str]:
    """One line for every package that is missing or has another version; +cpu and the like do not count."""
    lines = []
    for name, version in wanted.items():
        try:
            installed = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            installed = "missing"
        if installed.split("+")[0] != version.split("+")[0]:
            lines.append(f"{name}: pinned {version}, {installed}")
    return lines


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lock", type=Path, required=True)
    parser.add_argument("--server-python", type=Path)
    parser.add_argument("--need", action="append", default=[], metavar="MODULE")
    parser.add_argument(
        "--without", action="append", default=[], metavar="PACKAGE", help="a pin left out here"
    )
    args = parser.parse_args(argv)
    wanted = {name: version for name, version in pins(args.lock).items() if name not in args.without}
    troubles = wrong_pins(wanted)
    print(f"{len(wanted) - len(troubles)} of {len(wanted)} pins of {args.lock} are installed")
    for module in (*ALWAYS, *args.need):
        fine, text = attempt(f"import {module}; print('imports')")
        print(f"{module}: {text}")
        troubles += [] if fine else [f"{module} does not import"]
    if args.server_python:
        fine, text = attempt("import sglang; print(sglang.__version__)", interpreter=str(args.server_python))
        print(f"sglang: {text}")
        nccl = same_nccl(args.server_python)
        print(nccl)
        troubles += [] if fine else ["sglang does not import"]
        troubles += [nccl.detail] if nccl.status == "broken" else []
    for trouble in troubles:
        print(f"WRONG: {trouble}", file=sys.stderr)
    return int(bool(troubles))


if __name__ == "__main__":
    sys.exit(main())
