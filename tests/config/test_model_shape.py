"""The sizes that launcher and plan read from a config.json are those that Megatron builds."""

import json
from pathlib import Path

import pytest

from megatron_jackpot.config import Config, Parallel, Precision, parse_config
from megatron_jackpot.config.model_shape import ARCHITECTURES, ModelShape, Rope, model_shapes
from megatron_jackpot.models.build import transformer_config
from megatron_jackpot.models.families import FAMILIES, family_of
from tests.models.hf_models import TYPES, tiny_config
from tests.tiny import hf_config

VARIANTS = {
    "plain": {},
    "every query head its own key": dict(num_key_value_heads=6),
    "tied": dict(tie_word_embeddings=True),
    "layers": dict(num_hidden_layers=6, intermediate_size=32, max_position_embeddings=77),
}


def config_for(folder: Path, policy: dict, actor: dict, **sections: dict) -> Config:
    for name, tree in (("policy", policy), ("actor", actor)):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(tree))
    models = {name: dict(hf=str(folder / name)) for name in ("policy", "actor")}
    data = dict(tasks=dict(chain_sum={}), max_prompt_tokens=24)
    rest = dict(run=dict(folder="run"), data=data, rollout=dict(max_new_tokens=100))
    return parse_config({**rest, **models, **sections})


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("model_type", TYPES.values())
def test_sizes_are_those_of_megatrons_own_configuration(model_type: str, changes: dict) -> None:
    tree = tiny_config(model_type, **changes).to_dict()
    shape = ModelShape.of(tree)
    megatron = transformer_config(family_of(tree), Parallel(), Precision(), te=False)
    assert (shape.num_layers, shape.hidden_size) == (megatron.num_layers, megatron.hidden_size)
    assert shape.ffn_size == megatron.ffn_hidden_size
    assert (shape.num_heads, shape.num_groups) == (megatron.num_attention_heads, megatron.num_query_groups)
    assert shape.query_size == megatron.num_attention_heads * megatron.kv_channels
    assert shape.key_size == megatron.num_query_groups * megatron.kv_channels
    assert (shape.qk_norm, shape.qkv_bias) == (megatron.qk_layernorm, megatron.add_qkv_bias)
    assert (shape.norm_eps, shape.init_std) == (megatron.layernorm_epsilon, megatron.init_method_std)
    assert megatron.num_moe_experts is None


def test_every_architecture_has_a_family() -> None:
    assert ARCHITECTURES.keys() == FAMILIES.keys()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(num_experts=8), "num_experts = 8, a mixture of experts. Supported are dense models: Qwen2For"),
        (dict(num_hidden_layers=0), "num_hidden_layers = 0 must be a positive integer"),
        (dict(hidden_size="64"), "hidden_size = '64' must be a positive integer"),
        (dict(vocab_size=True), "vocab_size = True must be a positive integer"),
        (dict(head_dim="8"), "head_dim = '8' must be a positive integer"),
        (dict(rms_norm_eps="1e-05"), "rms_norm_eps = '1e-05' must be a positive number"),
        (dict(rope_parameters=dict(full_attention=dict(rope_theta=1e6))), "only one for all layers"),
        (dict(rope_parameters=dict(rope_type="linear", factor=None)), "factor = None must be a positive"),
        (dict(rope_parameters=dict(rope_type="linear")), "factor is missing"),
        (dict(rope_parameters=dict(rope_theta="1e6")), "rope_theta = '1e6' must be a positive number"),
        (dict(model_type="llama"), "model_type = 'llama' is not that of architecture Qwen3ForCausalLM"),
    ],
)
def test_what_is_no_dense_decoder_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelShape.of(hf_config(**changes))


def test_a_size_that_is_missing_is_named() -> None:
    tree = hf_config()
    del tree["intermediate_size"]
    with pytest.raises(ValueError, match="intermediate_size is missing"):
        ModelShape.of(tree)


def test_scaling_of_rotary_positions_is_read() -> None:
    assert ModelShape.of(hf_config(rope_scaling={"type": "linear", "factor": 4})).rope == Rope(
        1e4, "linear", 4.0
    )


@pytest.mark.parametrize(
    ("actor", "parallel", "message"),
    [
        ({}, dict(tp=3), r"policy.hf = .*policy: parallel.tp = 3 does not divide .*num_attention_heads = 4"),
        (dict(num_hidden_layers=5), dict(pp=2), r"actor.hf = .*actor: .* does not divide .*layers = 5"),
        (dict(architectures=["Mamba"]), {}, r"actor.hf = .*actor: .*architecture Mamba is not supported"),
    ],
)
def test_a_model_that_a_layout_does_not_divide_is_named_by_its_field(
    tmp_path: Path, actor: dict, parallel: dict, message: str
) -> None:
    config = config_for(tmp_path, hf_config(), hf_config(**actor), parallel=parallel)
    with pytest.raises(ValueError, match=message):
        model_shapes(config)
