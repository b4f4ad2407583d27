"""A checkpoint's manifest: size and sha256 of every file, by which a folder is known for whole."""

import hashlib
import json
from pathlib import Path

MANIFEST = "manifest.json"
"""In a checkpoint: its step, size and sha256 of every file."""
Digests = dict[str, list]
"""File, relative to its folder -> [bytes, sha256]."""


def digest(path: Path) -> list:
    """[bytes, sha256] of a file; [-1, the reason] of one that cannot be read."""
    try:
        with path.open("rb") as file:
            return [path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()]
    except OSError as error:
        return [-1, str(error)]


def check_model_files(model: Path) -> bool:
    """Whether a manifest lies beside a checkpoint's model folder. Raises ValueError where one cannot be read,
    or files of the model are not those that were saved."""
    manifest = model.parent / MANIFEST
    if not manifest.is_file():
        return False
    try:
        saved: Digests = json.loads(manifest.read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{manifest} cannot be read ({error}). Use another checkpoint.") from error
    wanted = {name: held for name, held in saved.items() if name.startswith(f"{model.name}/")}
    differing = [name for name, held in wanted.items() if digest(model.parent / name) != held]
    if differing or not wanted:
        raise ValueError(
            f"{model} is damaged: {', '.join(differing[:3]) or 'none of its files'} as {manifest} has "
            f"{'them' if len(differing) > 1 else 'it'}. Use another checkpoint."
        )
    return True
