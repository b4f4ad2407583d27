"""A model folder without its weights: config.json and the files that go where the weights go. No torch."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

HFConfig = Mapping[str, Any]
"""A config.json as it was read."""
INDEX = "model.safetensors.index.json"
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".distcp", ".metadata")
"""Endings of files that hold weights or say where they are, in HF's formats and in Megatron's."""
NOT_COPIED = {INDEX, "metadata.json", "model.safetensors", "conversion.json"}


def read_hf_config(folder: Path) -> HFConfig:
    """config.json of a folder in HF's or Megatron's format.

    Raises ValueError naming the folder when it is missing or malformed.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ValueError(
            f"{path} is missing: a model folder holds config.json, *.safetensors and a tokenizer."
        )
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error


def copy_other_files(source: Path, to: Path) -> None:
    """config.json, tokenizer and whatever else lies beside the weights, without the weights."""
    for file in sorted(Path(source).iterdir()):
        if file.is_file() and file.name not in NOT_COPIED and not file.name.endswith(WEIGHTS):
            shutil.copyfile(file, to / file.name)
