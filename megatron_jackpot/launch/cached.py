"""Results that depend on content alone, kept in $JACKPOT_HOME between launches."""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from megatron_jackpot.home import home

PACKAGE = Path(__file__).resolve().parents[1]


def content(*parts: object, files: Iterable[Path] = (), sources: Iterable[str] = ()) -> str:
    """sha256 of what a result depends on: values, files (absent ones too), this package's `sources`."""
    digest = hashlib.sha256(repr(parts).encode("utf-8", "surrogatepass"))
    ours = [path for name in sources for path in sorted(PACKAGE.glob(name))]
    for path in [*files, *ours]:
        digest.update(f"\n{path.name}\n".encode())
        with contextlib.suppress(FileNotFoundError, IsADirectoryError), path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def cached(kind: str, key: str, compute: Callable[[], Any]) -> Any:
    """What `compute` gave for this key, in JSON; a folder that cannot be written keeps nothing."""
    path = home() / "checked" / f"{kind}-{key[:32]}.json"
    with contextlib.suppress(OSError, ValueError):
        return json.loads(path.read_text(encoding="utf-8"))
    result = compute()
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        partial.write_text(json.dumps(result), encoding="utf-8")
        partial.replace(path)
    return result
