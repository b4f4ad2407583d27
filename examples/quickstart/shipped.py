"""Prints the folder of the quickstart's two warmed models, policy/ and actor/, after a look at their hashes.

    models=$(python examples/quickstart/shipped.py)

prepare.py made them; models/models.json says from what.
"""

import hashlib
import json
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent / "models"
RECORD = "models.json"


def damaged(folder: Path) -> list[str]:
    """The files below `folder` that are missing or are not the ones RECORD names."""
    models = json.loads((folder / RECORD).read_text(encoding="utf-8"))["models"]
    return [
        f"{model}/{name}"
        for model, made in models.items()
        for name, digest in made["sha256"].items()
        if not (folder / model / name).is_file()
        or hashlib.sha256((folder / model / name).read_bytes()).hexdigest() != digest
    ]


def main() -> None:
    wrong = damaged(FOLDER)
    if wrong:
        sys.exit(
            f"{FOLDER}: {', '.join(wrong)}: missing, or not what {RECORD} names. "
            "Get the folder back with `git checkout -- examples/quickstart/models`."
        )
    print(FOLDER)


if __name__ == "__main__":
    main()
