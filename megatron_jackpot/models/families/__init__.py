"""One file per HF family: its config.json as Megatron fields, and one name map used in both directions."""

from megatron_jackpot.models.families.base import Family, read_hf_config
from megatron_jackpot.models.families.qwen3 import Qwen3

FAMILIES: dict[str, type[Family]] = {"Qwen3ForCausalLM": Qwen3}

__all__ = ["FAMILIES", "Family", "family_of", "read_hf_config"]


def family_of(hf_config: dict) -> Family:
    """The family of a parsed config.json. Raises ValueError naming the architectures that are known."""
    names = hf_config.get("architectures") or ["(no architectures key)"]
    if names[0] not in FAMILIES:
        raise ValueError(
            f"config.json: architecture {names[0]} is not supported. Known: {', '.join(FAMILIES)}."
        )
    return FAMILIES[names[0]](hf_config)
