"""A model folder without its weights: config.json and the files that go where the weights go. No torch."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

HFConfig = Mapping[str, Any]
"""A config.json as it was read."""
INDEX = "model.safetensors.index.json"
WEIGHTS = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".distcp", ".metadata", ".index.json", ".gguf", ".h5",
    ".msgpack", ".onnx", ".onnx_data", ".ot", ".tflite",
)  # fmt: skip
"""Endings of files that hold weights or say where they are: HF's formats, Megatron's, and those of others,
which would still hold the old numbers."""
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
    """config.json, tokenizer and whatever else lies beside the weights, subfolders included (chat templates
    have one), without the weights and without what is hidden (.git, .cache)."""
    source, to = Path(source), Path(to)
    for file in sorted(source.rglob("*")):
        place = file.relative_to(source)
        hidden = any(part.startswith(".") for part in place.parts[:-1])
        if hidden or to in file.parents or not file.is_file():
            continue
        if file.name not in NOT_COPIED and not file.name.endswith(WEIGHTS):
            (to / place).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, to / place)
