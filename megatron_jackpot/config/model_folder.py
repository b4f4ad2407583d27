"""A model folder without its weights: config.json and the files that go where the weights go. No torch."""

import json
import shutil
from collections.abc import Mapping, Sequence
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


def read_json(path: Path, absent: Any = None) -> Any:
    """The JSON object of a file, `absent` where there is none. Raises ValueError naming the file."""
    if not path.is_file():
        return absent
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(held, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(held).__name__}. Restore the file.")
    return held


def read_hf_config(folder: Path) -> HFConfig:
    """config.json of a folder in HF's or Megatron's format.

    Raises ValueError naming the folder when it is missing or malformed.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ValueError(
            f"{path} is missing: a model folder holds config.json, *.safetensors and a tokenizer."
        )
    return read_json(path)


def stop_token_ids(eos: int | None, folders: Sequence[Path]) -> tuple[int, ...]:
    """What ends a response for trainer, evaluation and servers alike: the tokenizer's end-of-text id, and
    those of every folder's config.json and generation_config.json, which servers obey by themselves.

    Raises ValueError when there is none, and for one that is no number.
    """
    ids = set() if eos is None else {eos}
    for folder in folders:
        for name in ("config.json", "generation_config.json"):
            listed = read_json(Path(folder) / name, {}).get("eos_token_id")
            found = listed if isinstance(listed, list) else [] if listed is None else [listed]
            wrong = [id for id in found if not isinstance(id, int) or isinstance(id, bool)]
            if wrong:
                raise ValueError(f"{Path(folder) / name}: eos_token_id holds {wrong[0]!r}, which is no id.")
            ids |= set(found)
    if not ids:
        raise ValueError(
            "Neither the tokenizer nor config.json or generation_config.json names an eos token: responses "
            "would never end."
        )
    return tuple(sorted(ids))


def check_stop_ids(stop_ids: Sequence[int], rows: Mapping[str, int]) -> None:
    """Raises ValueError for an id that a model of `rows` ids, by name, cannot say."""
    for name, size in rows.items():
        outside = [id for id in stop_ids if not 0 <= id < size]
        if outside:
            raise ValueError(
                f"{name}.hf has an embedding of {size} rows, but the end-of-text ids of tokenizer, "
                f"config.json and generation_config.json hold {outside[0]}. Mend eos_token_id there."
            )


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
