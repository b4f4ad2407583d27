"""Which of SGLang's 250 model files a server leaves out: to import all takes seconds of a core at a start."""

from importlib.util import find_spec
from pathlib import Path

from megatron_jackpot.config.model_folder import read_json

VARIABLE = "SGLANG_DISABLED_MODEL_ARCHS"
"""SGLang's own: files of its package of models that its registry is not to import, separated by commas."""
KEPT = ("transformers",)
"""What SGLang falls back on for an architecture that none of its files has."""


def other_models(model: Path) -> str:
    """All but those that define an architecture of the folder `model`; "" where there is none that does."""
    spec = find_spec("sglang")
    if spec is None or not spec.submodule_search_locations:
        return ""
    files = sorted(Path(spec.submodule_search_locations[0], "srt", "models").glob("*.py"))
    wanted = [f"\nclass {name}(" for name in read_json(model / "config.json", {}).get("architectures") or ()]
    own = {path.stem for path in files if any(line in path.read_text(encoding="utf-8") for line in wanted)}
    return ",".join(path.stem for path in files if path.stem not in {*own, *KEPT}) if own else ""
