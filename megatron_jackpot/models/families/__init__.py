"""HF architectures as Megatron fields, and one map of tensor names used in both directions."""

from megatron_jackpot.config.model_folder import HFConfig
from megatron_jackpot.config.model_shape import architecture_of
from megatron_jackpot.models.families.base import Family, Kind
from megatron_jackpot.models.families.decoder import Decoder

FAMILIES: dict[str, type[Family]] = {
    "Qwen2ForCausalLM": Decoder,
    "Qwen3ForCausalLM": Decoder,
    "LlamaForCausalLM": Decoder,
}
"""HF architecture -> the names of its tensors and how they are cut."""

__all__ = ["FAMILIES", "Family", "Kind", "family_of"]


def family_of(hf_config: HFConfig) -> Family:
    """The family of a parsed config.json. Raises ValueError for a model that is not supported."""
    return FAMILIES[architecture_of(hf_config)].of(hf_config)
