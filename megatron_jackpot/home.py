"""Where environments, models, checked labels and verdicts are kept between runs."""

import os
import tempfile
from pathlib import Path


def home() -> Path:
    """$JACKPOT_HOME, by default below ~/.cache; a temporary folder of this user who has no home folder, as in
    a container started with a user id of its own."""
    try:
        return Path(os.environ.get("JACKPOT_HOME") or "~/.cache/megatron-jackpot").expanduser()
    except RuntimeError:
        return Path(tempfile.gettempdir()) / f"megatron-jackpot-{os.getuid()}"
