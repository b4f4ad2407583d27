"""Which labels a reward's check has found right before, by content.

One text file a reward and its versions, in JACKPOT_HOME/labels: a hash a line, appended to. Labels that were
refused are not kept: they are checked again.
"""

import hashlib
import importlib.metadata
import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from megatron_jackpot.home import home

log = logging.getLogger(__name__)

PACKAGES = ("math-verify", "latex2sympy2_extended", "sympy", "reasoning-gym")
HASH_LENGTH = 32


class CheckedLabels:
    """`label in checked`; `add` keeps labels for the next run, where the folder can be written to."""

    def __init__(self, reward: str, code: Mapping[str, object]):
        """`code` has the settings that a verdict of the reward `code` depends on."""
        told = json.dumps([reward, dict(code), judges()], sort_keys=True)
        key = hashlib.sha256(told.encode()).hexdigest()[:16]
        self.path = home() / "labels" / f"{key}.txt"
        self._hashes: set[str] = set()
        try:
            # A line cut short by a full disk has another length, and is no one's hash.
            self._hashes = set(self.path.read_text(encoding="ascii", errors="replace").split())
        except OSError:
            pass

    def __contains__(self, label: Any) -> bool:
        written = _hash(label)
        return written is not None and written in self._hashes

    def add(self, labels: Iterable[Any]) -> None:
        hashes = [written for label in labels if (written := _hash(label)) is not None]
        if not hashes:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="ascii") as file:
                # The line break first: what an interrupted writer left does not spoil a hash.
                file.write("\n" + "\n".join(hashes) + "\n")
        except OSError as error:
            log.info(f"checked labels are not remembered: {error}")


def _hash(label: Any) -> str | None:
    try:
        text = json.dumps(label, sort_keys=True)
    except (TypeError, ValueError):
        return None
    return hashlib.sha256(text.encode()).hexdigest()[:HASH_LENGTH]


def judges() -> list[str]:
    """What a verdict on a label depends on: the packages that judge, and the rewards' own source."""
    versions = []
    for package in PACKAGES:
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(package)
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        versions.append(hashlib.sha256(path.read_bytes()).hexdigest())
    return versions
