"""Which layers are built, which fp8 is refused, what reaches Megatron, and recomputation of activations."""

from pathlib import Path
from unittest import mock

import pytest
import torch
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.models.gpt.gpt_layer_specs import HAVE_TE

from megatron_jackpot.config import Optimizer, Parallel, Precision
from megatron_jackpot.data.packing import Packer
from megatron_jackpot.models import build, local_layers
from megatron_jackpot.models.families import family_of
from megatron_jackpot.models.precision import Device, check_precision, layers_for, this_device
from megatron_jackpot.parallel.vocab import vocab_parallel_logp
from megatron_jackpot.sync.stream import export
from tests.loading import load_model
from tests.parallel.spawn import run_ranks
from tests.tiny import groups, hf_config, write_model

HOPPER = Device(capability=(9, 0), cuda=(13, 0), te=(2, 20, 2))
FP8 = Precision(dtype="bfloat16", fp8="hybrid")
EVERY_RECIPE = ("delayed", "tensorwise", "blockwise")


@pytest.fixture
def fused_rope(monkeypatch) -> None:
    """Megatron takes its configuration only where Transformer Engine's rotary embedding imports."""
    monkeypatch.setattr(rope_utils, "fused_apply_rotary_pos_emb_thd", lambda *_args, **_kwargs: None)


def changed(knobs, **changes):
    return knobs.model_copy(update=changes)


def on_hopper(**changes) -> Device:
    return Device(**{**vars(HOPPER), **changes})


@pytest.mark.parametrize("te", [None, (2, 20, 2)])
@pytest.mark.parametrize("capability", [None, (8, 0), (9, 0)])
def test_transformer_engine_is_used_only_where_it_imports_and_cuda_is_there(te, capability) -> None:
    wanted = "transformer_engine" if te and capability else "local"
    assert layers_for(Device(capability=capability, te=te)) == wanted


def test_this_device_is_read_from_torch_and_megatron() -> None:
    device = this_device()
    assert (device.te is not None) == HAVE_TE
    assert (device.capability is not None) == torch.cuda.is_available() == (device.cuda is not None)


@pytest.mark.parametrize(
    ("precision", "device", "message"),
    [
        (FP8, on_hopper(capability=None), "needs a GPU with fp8"),
        (FP8, on_hopper(capability=(8, 0)), r"8\.9 or newer, got \(8, 0\)"),
        (FP8, on_hopper(te=None), "needs Transformer Engine, which does not import"),
        (FP8, on_hopper(te=(2, 1)), r"'tensorwise' needs Transformer Engine 2\.2 or newer, got 2\.1"),
        (changed(FP8, fp8_recipe="blockwise"), on_hopper(te=(2, 2, 9)), r"2\.3 or newer, got 2\.2\.9"),
        (
            changed(FP8, fp8_recipe="blockwise"),
            on_hopper(capability=(8, 9)),
            r"capability 9\.0 and CUDA 12\.9",
        ),
        (changed(FP8, fp8_recipe="blockwise"), on_hopper(cuda=(12, 8)), r"got \(9, 0\) and 12\.8. Set it to"),
        (changed(FP8, dtype="float32"), HOPPER, "needs precision.dtype='bfloat16'"),
        (Precision(fp8_param=True), HOPPER, "fp8_param = true needs precision.fp8"),
        (Precision(first_last_layers_bf16=True), HOPPER, "first_last_layers_bf16 = true needs precision.fp8"),
    ],
)
def test_fp8_that_cannot_work_is_refused(precision, device, message) -> None:
    with pytest.raises(ValueError, match=message):
        check_precision(precision, device, family_of(hf_config()), 1)


@pytest.mark.parametrize(
    ("shape", "tp", "message"),
    [
        (dict(intermediate_size=96), 4, r"intermediate_size / tp = 24 at parallel.tp = 4"),
        (dict(hidden_size=72), 1, "hidden_size = 72"),
        (dict(head_dim=8, num_attention_heads=2, num_key_value_heads=2), 2, r"head_dim / tp = 8"),
    ],
)
def test_matrices_that_fp8_cannot_multiply_are_named(shape, tp, message) -> None:
    with pytest.raises(ValueError, match=message):
        check_precision(FP8, HOPPER, family_of(hf_config(**shape)), tp)
    check_precision(Precision(), HOPPER, family_of(hf_config(**shape)), tp)


@pytest.mark.parametrize("fp8", ["hybrid", "e4m3"])
@pytest.mark.parametrize("recipe", EVERY_RECIPE)
@pytest.mark.parametrize("fp8_param", [False, True])
def test_every_recipe_on_hopper_reaches_megatrons_configuration(fused_rope, recipe, fp8, fp8_param) -> None:
    precision = changed(
        FP8, fp8=fp8, fp8_recipe=recipe, fp8_param=fp8_param, first_last_layers_bf16=recipe != "delayed"
    )
    family = family_of(hf_config())
    check_precision(precision, HOPPER, family, 1)
    config = build.transformer_config(family, Parallel(), precision, te=True)
    assert (config.fp8, config.fp8_recipe, config.fp8_param) == (fp8, recipe, fp8_param)
    assert config.first_last_layers_bf16 == (recipe != "delayed")
    assert config.params_dtype == torch.bfloat16 and config.bf16
    assert config.apply_rope_fusion
    assert not build.transformer_config(family, Parallel(), Precision(), te=False).apply_rope_fusion
    plain = build.transformer_config(family, Parallel(), Precision(), te=True)
    assert plain.fp8 is None and not plain.fp8_param and plain.recompute_granularity is None


def test_the_spec_follows_the_choice_of_layers(fused_rope) -> None:
    family = family_of(hf_config())
    config = build.transformer_config(family, Parallel(), Precision(), te=True)
    with (
        mock.patch.object(build, "get_gpt_layer_with_transformer_engine_spec", return_value="te") as te_spec,
        # Of a pipeline stage, which only a mesh knows.
        mock.patch.object(build, "get_num_layers_to_build", return_value=4),
    ):
        assert build.layer_spec(config, te=True, vp_stage=None) == "te"
        te_spec.assert_called_once_with(qk_layernorm=True, use_te_activation_func=True)
        local = build.layer_spec(config, te=False, vp_stage=None)
        assert te_spec.call_count == 1
    norms = [layer.submodules.input_layernorm for layer in local.layer_specs]
    assert norms == [local_layers.RMSNorm] * 4


def _update(rank: int, world: int, folder: str, tp: int, recompute: bool) -> dict:
    parallel = Parallel(tp=tp, sequence_parallel=tp > 1, recompute=recompute)
    model = load_model(Path(folder), parallel=parallel)
    saved = []
    for layer in model.chunks[0].module.decoder.layers:
        layer.register_forward_hook(lambda *_: saved.append(torch.is_grad_enabled()))
    model.add_optimizer(Optimizer(lr=1e-2), 10)
    batch = Packer(model.mesh, tokens=128, enabled=True, num_minibatches=1, vpp=None).pack(
        groups(range(2)), 8
    )

    def loss(logits_TV, m):
        logp_T = vocab_parallel_logp(logits_TV, batch.labels_MT[m], model.vocab())
        value = -torch.where(batch.mask_MT[m], logp_T, 0.0).sum()
        return value, {"loss": value.detach()}

    report = model.update(batch, loss)
    return dict(weights=export(model), norm=report.grad_norm, loss=report.sums["loss"], forwards=len(saved))


@pytest.mark.parametrize("tp", [1, pytest.param(2, marks=pytest.mark.full)])
def test_recomputed_activations_give_the_same_step_bit_for_bit(tmp_path: Path, tp: int) -> None:
    folder = str(write_model(tmp_path / "model", 0))
    kept, again = (run_ranks(_update, tp, 120, folder, tp, recompute)[0] for recompute in (False, True))
    assert again["forwards"] == 2 * kept["forwards"] > 0
    assert kept["norm"] == again["norm"] > 0 and torch.equal(kept["loss"], again["loss"])
    assert all(torch.equal(tensor, again["weights"][name]) for name, tensor in kept["weights"].items())
