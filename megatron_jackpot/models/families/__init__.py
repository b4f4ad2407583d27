"""One file per HF family: its config.json as Megatron fields, and one name map used in both directions."""

from megatron_jackpot.models.families.base import Family, Kind, read_hf_config
from megatron_jackpot.models.families.llama import Llama
from megatron_jackpot.models.families.qwen2 import Qwen2
from megatron_jackpot.models.families.qwen3 import Qwen3

FAMILIES: dict[str, type[Family]] = {
    "Qwen2ForCausalLM": Qwen2,
    "Qwen3ForCausalLM": Qwen3,
    "LlamaForCausalLM": Llama,
}
ARCHITECTURES = {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM"}
"""model_type -> architecture, for a config.json that names no architectures."""

__all__ = ["FAMILIES", "Family", "Kind", "family_of", "read_hf_config"]


def family_of(hf_config: dict) -> Family:
    """The family of a parsed config.json, by `architectures`, else by `model_type`.

    Raises ValueError naming the architectures that are known, and for two keys that contradict each other.
    """
    listed, model_type = hf_config.get("architectures") or [], hf_config.get("model_type")
    name = listed[0] if listed else ARCHITECTURES.get(model_type, f"of model_type {model_type}")
    if name not in FAMILIES:
        raise ValueError(f"config.json: architecture {name} is not supported. Known: {', '.join(FAMILIES)}.")
    if model_type is not None and ARCHITECTURES.get(model_type) != name:
        raise ValueError(f"config.json: model_type = {model_type!r} is not that of architecture {name}.")
    return FAMILIES[name](hf_config)
