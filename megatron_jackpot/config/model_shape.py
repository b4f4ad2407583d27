"""The sizes of a dense decoder: read from its config.json, checked, divided by a layout. No torch.

One reading for all: `plan` and the launcher use it as it is, models/families adds the tensors' names.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from typing import Any, Literal, Protocol, Self

from megatron_jackpot.config.agreement import new_tokens
from megatron_jackpot.config.model_folder import HFConfig, read_hf_config
from megatron_jackpot.config.models import Parallel
from megatron_jackpot.config.schema import Config
from megatron_jackpot.config.servers import CONTEXT_MARGIN

EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
"""Fields of a mixture of experts in the config.json of Qwen, Mixtral and DeepSeek."""
LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""What megatron-core fixes in Llama 3's scaling of rotary embeddings; the factor is free."""


@dataclass(frozen=True)
class Architecture:
    """What all models of one HF architecture have in common."""

    model_type: str
    qk_norm: bool = False
    """RMSNorm on queries and keys."""
    qkv_bias: bool = False
    """Biases on the query, key and value projections."""
    required: Mapping[str, object] = field(default_factory=dict)
    """config.json field -> the only supported value, which a missing field counts as."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """config.json field -> what transformers takes where the field is missing."""


ARCHITECTURES = {
    "Qwen2ForCausalLM": Architecture(
        "qwen2",
        qkv_bias=True,
        required={"use_sliding_window": False},
        defaults={"num_key_value_heads": 32, "max_position_embeddings": 32768, "rms_norm_eps": 1e-6},
    ),
    "Qwen3ForCausalLM": Architecture(
        "qwen3",
        qk_norm=True,
        required={"attention_bias": False, "use_sliding_window": False},
        defaults={
            "num_key_value_heads": 32,
            "head_dim": 128,
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-6,
        },
    ),
    "LlamaForCausalLM": Architecture(
        "llama",
        required={"attention_bias": False, "mlp_bias": False, "pretraining_tp": 1},
        defaults={"max_position_embeddings": 2048, "rms_norm_eps": 1e-6},
    ),
}
"""Qwen2 and Qwen2.5; Qwen3; Llama 2 and 3 and what is shaped like them (SmolLM2). Dense models only."""


@dataclass(frozen=True)
class Rope:
    """Rotary position embeddings. Example: Rope(theta=500000.0, scaling="llama3", factor=8.0)."""

    theta: float = 10_000.0
    scaling: Literal["default", "linear", "llama3"] = "default"
    factor: float = 1.0


@dataclass(frozen=True)
class ModelShape:
    """The sizes of one dense decoder: RMSNorm, grouped queries, rotary positions, SwiGLU."""

    hf_config: HFConfig
    num_layers: int
    hidden_size: int
    ffn_size: int
    num_heads: int
    num_groups: int
    """Query groups: heads of keys and values."""
    head_dim: int
    vocab_size: int
    context_length: int
    norm_eps: float
    init_std: float
    tied: bool
    """Embedding and output layer are one table."""
    qk_norm: bool
    qkv_bias: bool
    rope: Rope

    @classmethod
    def of(cls, hf_config: HFConfig) -> Self:
        """Of a parsed config.json.

        Raises ValueError for an unknown architecture, a mixture of experts, a size that is missing, and a
        field that changes the mathematics and is not supported.
        """
        name = architecture_of(hf_config)
        kind = ARCHITECTURES[name]
        check_supported(hf_config, name)
        given = {**kind.defaults, **hf_config}
        num_heads, hidden_size = _size(given, "num_attention_heads"), _size(given, "hidden_size")
        # Where it is null, every query head has its own.
        num_groups = num_heads
        if given.get("num_key_value_heads") is not None:
            num_groups = _size(given, "num_key_value_heads")
        head_dim = hidden_size // num_heads
        if given.get("head_dim") is not None:
            head_dim = _size(given, "head_dim")
        if num_heads % num_groups:
            raise ValueError(
                f"config.json: num_key_value_heads = {num_groups} does not divide "
                f"num_attention_heads = {num_heads}."
            )
        return cls(
            hf_config=hf_config,
            num_layers=_size(given, "num_hidden_layers"),
            hidden_size=hidden_size,
            ffn_size=_size(given, "intermediate_size"),
            num_heads=num_heads,
            num_groups=num_groups,
            head_dim=head_dim,
            vocab_size=_size(given, "vocab_size"),
            context_length=_size(given, "max_position_embeddings"),
            norm_eps=_number(given, "rms_norm_eps"),
            init_std=hf_config.get("initializer_range", 0.02),
            tied=bool(hf_config.get("tie_word_embeddings", False)),
            qk_norm=kind.qk_norm,
            qkv_bias=kind.qkv_bias,
            rope=rope_of(hf_config),
        )

    @property
    def query_size(self) -> int:
        """Width of all query heads together."""
        return self.num_heads * self.head_dim

    @property
    def key_size(self) -> int:
        """Width of all key heads together, and of all value heads."""
        return self.num_groups * self.head_dim

    @property
    def layer_matrices(self) -> int:
        """Entries of a layer's weight matrices: what a token is multiplied with."""
        return self.hidden_size * (2 * self.query_size + 2 * self.key_size + 3 * self.ffn_size)


def model_shapes(config: Config) -> dict[str, ModelShape]:
    """Of every model by name, checked against the layout and the run's lengths and top-k.

    Raises ValueError naming the model's field, a line for each mistake.
    """
    shapes, mistakes = {}, []
    for name, section in config.models.items():
        try:
            shapes[name] = ModelShape.of(read_hf_config(section.hf))
            check_layout(shapes[name], config.parallel)
        except ValueError as error:
            mistakes.append(f"{name}.hf = {section.hf}: {error}")
    if not mistakes:
        mistakes = misfits(config, shapes)
    if mistakes:
        raise ValueError("\n".join(mistakes))
    return shapes


def misfits(config: Config, models: "Mapping[str, HasSizes]") -> list[str]:
    """What a run asks of its models that they cannot do: their context against the longest sequences, the
    served one's as its servers count it; that one's vocabulary against top-k, each one's against the
    candidates."""
    found = []
    for name, model in models.items():
        kept = CONTEXT_MARGIN if name == config.served else 0
        margin = f" - {kept}, which servers keep free," if kept else ""
        for section, limit in new_tokens(config).items():
            longest = config.data.max_prompt_tokens + limit
            if longest > model.context_length - kept:
                found.append(
                    f"{name}.hf: max_position_embeddings = {model.context_length}"
                    f"{margin} is shorter than data.max_prompt_tokens + {section}.max_new_tokens = "
                    f"{config.data.max_prompt_tokens} + {limit} = {longest}. Lower one of them."
                )
    k, size = config.rollout.top_k_logp, models[config.served].vocab_size
    if k > size:
        found.append(
            f"rollout.top_k_logp = {k} exceeds the {config.served}'s vocabulary of {size} ids. Lower it."
        )
    num, smallest = config.num_candidates, min(models, key=lambda name: models[name].vocab_size)
    if k <= size and num > models[smallest].vocab_size:
        found.append(
            f"algorithm.num_candidates = {num} exceeds the {smallest}'s vocabulary of "
            f"{models[smallest].vocab_size} ids. Set it to fewer."
        )
    return found


class HasSizes(Protocol):
    """A model's shape, or its family."""

    @property
    def context_length(self) -> int: ...

    @property
    def vocab_size(self) -> int: ...


def check_layout(shape: ModelShape, parallel: Parallel) -> None:
    """Raises ValueError where tp does not divide a size, or the stages do not divide the layers."""
    sizes = {
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_groups,
        "intermediate_size": shape.ffn_size,
        "hidden_size": shape.hidden_size,
    }
    for name, size in sizes.items():
        if size % parallel.tp:
            raise ValueError(
                f"parallel.tp = {parallel.tp} does not divide config.json's {name} = {size}. "
                "Set one that does."
            )
    stages = parallel.pp * (parallel.vpp or 1)
    if shape.num_layers % stages:
        raise ValueError(
            f"parallel.pp * parallel.vpp = {parallel.pp} * {parallel.vpp or 1} does not divide "
            f"num_hidden_layers = {shape.num_layers}."
        )


def padded_vocab_size(vocab_sizes: Sequence[int], tp: int) -> int:
    """One size for both models, so that their tensor-parallel vocabulary shards line up."""
    multiple = 16 * tp
    return math.ceil(max(vocab_sizes) / multiple) * multiple


def architecture_of(hf_config: HFConfig) -> str:
    """The key in ARCHITECTURES, by `architectures`, else by `model_type`.

    Raises ValueError naming the architectures that are known, and for two keys that contradict each other.
    """
    listed, model_type = hf_config.get("architectures") or [], hf_config.get("model_type")
    by_type = {kind.model_type: name for name, kind in ARCHITECTURES.items()}
    name = listed[0] if listed else by_type.get(str(model_type), f"of model_type {model_type}")
    for key in EXPERTS:
        if hf_config.get(key):
            raise ValueError(
                f"config.json: {key} = {hf_config[key]}, a mixture of experts. Supported are dense models: "
                f"{', '.join(ARCHITECTURES)}."
            )
    if name not in ARCHITECTURES:
        near = sorted(ARCHITECTURES, key=lambda known: -SequenceMatcher(None, known, name).ratio())
        raise ValueError(
            f"config.json: architecture {name} is not supported. Known, the nearest first: {', '.join(near)}."
        )
    if model_type is not None and ARCHITECTURES[name].model_type != model_type:
        raise ValueError(f"config.json: model_type = {model_type!r} is not that of architecture {name}.")
    return name


def check_supported(hf_config: HFConfig, architecture: str) -> None:
    """Raises ValueError for a field that changes the mathematics and is not supported."""
    wanted = {"hidden_act": "silu", "quantization_config": None, **ARCHITECTURES[architecture].required}
    for name, value in wanted.items():
        same = ("silu", "swish") if name == "hidden_act" else (value,)
        if hf_config.get(name, value) not in same:
            raise ValueError(
                f"config.json: {name} = {hf_config[name]!r} is not supported for {architecture}, "
                f"only {value!r}."
            )
    if hf_config.get("attention_dropout", 0.0) != 0.0:
        raise ValueError(
            f"config.json: attention_dropout = {hf_config['attention_dropout']} must be 0: with dropout the "
            "trainer's log-probs differ from the server's."
        )
    kinds = set(hf_config.get("layer_types") or []) - {"full_attention"}
    if kinds:
        raise ValueError(
            f"config.json: layer_types holds {sorted(kinds)}, only 'full_attention' is supported."
        )


def rope_of(hf_config: HFConfig) -> Rope:
    """From the form of transformers 4 (rope_theta, rope_scaling) or 5 (rope_parameters).

    Raises ValueError for forms that contradict each other and for scaling other than 'linear' and Llama 3's.
    """
    forms = [hf_config[key] for key in ("rope_parameters", "rope_scaling") if hf_config.get(key)]
    if len(forms) == 2 and forms[0] != forms[1]:
        raise ValueError(f"config.json: rope_parameters and rope_scaling differ: {forms}.")
    nested = forms[0] if forms else {}
    if not isinstance(nested, dict) or any(isinstance(value, dict) for value in nested.values()):
        raise ValueError(
            f"config.json: rope_parameters = {nested} is not supported, only one for all layers."
        )
    thetas = {_number(x, "rope_theta") for x in (nested, hf_config) if x.get("rope_theta") is not None}
    if len(thetas) > 1:
        raise ValueError(f"config.json: rope_theta is given twice and differently: {sorted(thetas)}.")
    partial = nested.get("partial_rotary_factor", hf_config.get("partial_rotary_factor"))
    if partial not in (None, 1, 1.0):
        raise ValueError(f"config.json: partial_rotary_factor = {partial} is not supported, only 1.")
    theta = thetas.pop() if thetas else Rope.theta
    scaling = nested.get("rope_type", nested.get("type", "default"))
    if scaling == "linear":
        return Rope(theta, "linear", _number(nested, "factor"))
    if scaling == "llama3" and all(nested.get(key) == value for key, value in LLAMA3_ROPE.items()):
        return Rope(theta, "llama3", _number(nested, "factor"))
    if scaling != "default":
        raise ValueError(
            f"config.json: rope scaling '{scaling}' with {nested} is not supported. Known: 'default', "
            f"'linear', and 'llama3' with {LLAMA3_ROPE}."
        )
    return Rope(theta)


def _size(hf_config: HFConfig, key: str) -> int:
    value = _given(hf_config, key)
    if type(value) is not int or value < 1:
        raise ValueError(f"config.json: {key} = {value!r} must be a positive integer.")
    return value


def _number(hf_config: HFConfig, key: str) -> float:
    value = _given(hf_config, key)
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise ValueError(f"config.json: {key} = {value!r} must be a positive number.")
    return float(value)


def _given(hf_config: HFConfig, key: str) -> Any:
    if key not in hf_config:
        raise ValueError(f"config.json: {key} is missing.")
    return hf_config[key]
