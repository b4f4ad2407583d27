"""HF folder -> Megatron chunks -> HF folder: what is refused, that nothing is lost, and HF's own
log-probs."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_jackpot.config import Parallel, Precision
from megatron_jackpot.config.model_folder import read_hf_config
from megatron_jackpot.config.model_shape import padded_vocab_size
from megatron_jackpot.data.packing import Packer
from megatron_jackpot.models.build import rope_fields, transformer_config
from megatron_jackpot.models.families import family_of
from megatron_jackpot.parallel.vocab import vocab_parallel_logp
from megatron_jackpot.sync.stream import export
from tests.loading import load_model
from tests.parallel.spawn import run_ranks
from tests.tiny import groups, hf_config, write_model


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_bias": True}, "attention_bias = True is not supported"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"attention_dropout": 0.1}, "attention_dropout = 0.1 must be 0"),
    ],
)
def test_a_field_that_changes_the_mathematics_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        family_of(hf_config(**changes))


def test_rope_is_read_in_both_forms_of_transformers_and_yarn_is_refused() -> None:
    assert rope_fields(family_of(hf_config(rope_theta=5e5)).rope) == {"rotary_base": 5e5}
    nested = hf_config(rope_parameters={"rope_type": "default", "rope_theta": 1e6})
    del nested["rope_theta"]
    assert rope_fields(family_of(nested).rope) == {"rotary_base": 1e6}
    for field in ("rope_scaling", "rope_parameters"):
        with pytest.raises(ValueError, match="rope scaling 'yarn'"):
            family_of(hf_config(**{field: {"rope_type": "yarn", "factor": 4.0}}))


def test_an_unknown_architecture_names_the_known_ones_the_nearest_first() -> None:
    with pytest.raises(
        ValueError, match="Qwen3NextForCausalLM is not supported. .* first: Qwen3ForCausalLM, Q"
    ):
        family_of(hf_config(architectures=["Qwen3NextForCausalLM"]))


@pytest.mark.parametrize(
    ("parallel", "message"),
    [
        (Parallel(tp=4), "tp = 4 does not divide config.json's num_key_value_heads = 2"),
        (Parallel(tp=3), "tp = 3 does not divide config.json's num_attention_heads = 4"),
        (Parallel(pp=3), "does not divide num_hidden_layers = 4"),
        (Parallel(pp=2, vpp=4), r"2 \* 4 does not divide num_hidden_layers = 4"),
    ],
)
def test_a_layout_that_does_not_divide_the_model_is_refused(parallel: Parallel, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        transformer_config(family_of(hf_config()), parallel, Precision(dtype="float32"), te=False)


def test_both_models_share_one_padded_vocabulary_that_every_tp_divides() -> None:
    for tp in (1, 2, 3, 8):
        size = padded_vocab_size([61, 97], tp)
        assert size >= 97 and size % (16 * tp) == 0


def test_a_config_that_is_missing_or_malformed_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="config.json is missing"):
        read_hf_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        read_hf_config(tmp_path)


def _refusal(rank: int, world: int, folder: str) -> str:
    with pytest.raises(ValueError) as caught:
        load_model(Path(folder))
    return str(caught.value)


def _without(folder: Path, name: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors[name]
    save_file(tensors, folder / "model.safetensors")


def _cut(folder: Path, name: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = tensors[name][:-1].contiguous()
    save_file(tensors, folder / "model.safetensors")


def _truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "model.safetensors").unlink(), "holds no *.safetensors file"),
        (lambda f: _without(f, "model.norm.weight"), "tensor 'model.norm.weight' is in no safetensors file"),
        (lambda f: _cut(f, "model.norm.weight"), "model.norm.weight has shape (63,)"),
        (_truncate, "model.safetensors is truncated"),
    ],
    ids=["no file", "a tensor missing", "a tensor of another shape", "truncated"],
)
def test_a_folder_that_is_incomplete_is_refused_by_name(tmp_path: Path, spoil, message: str) -> None:
    folder = write_model(tmp_path / "model", 0)
    spoil(folder)
    assert message in run_ranks(_refusal, 1, 60, str(folder))[0]


def _round_trip(rank: int, world: int, folder: str, tp: int, pp: int) -> bool | None:
    model = load_model(Path(folder), parallel=Parallel(tp=tp, pp=pp))
    exported = export(model)
    if rank:
        return None
    original = load_file(Path(folder) / "model.safetensors")
    assert exported.keys() == original.keys()
    return all(torch.equal(exported[name], original[name]) for name in original)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 2)])
def test_loading_and_exporting_returns_every_tensor_bit_for_bit(
    tmp_path, tied: bool, tp: int, pp: int
) -> None:
    folder = write_model(tmp_path / "model", 0, tie_word_embeddings=tied)
    assert run_ranks(_round_trip, tp * pp, 120, str(folder), tp, pp)[0] is True


def _gap_to_transformers(rank: int, world: int, folder: str) -> float:
    from transformers import AutoModelForCausalLM

    model = load_model(Path(folder))
    rollouts = groups(range(6))
    batch = Packer(model.mesh, tokens=256, enabled=True, num_minibatches=1, vpp=None).pack(rollouts, 8)

    def read(logits_TV: torch.Tensor, m: int) -> dict[str, torch.Tensor]:
        return {"logp": vocab_parallel_logp(logits_TV, batch.labels_MT[m], model.vocab())}

    mine = model.score(batch, read)["logp"]
    # Every sequence on its own, without padding and without packing.
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    gap, compared = 0.0, 0
    for m in range(batch.num_microbatches):
        edges = batch.cu_seqlens[m].tolist()
        for start, stop in zip(edges, edges[1:], strict=False):
            mask = batch.mask_MT[m, start:stop]
            with torch.no_grad():
                logp = reference(batch.tokens_MT[m, start:stop][None]).logits[0].float().log_softmax(-1)
            theirs = logp.gather(-1, batch.labels_MT[m, start:stop, None]).squeeze(-1)
            gap = max([gap, *(theirs - mine[m, start:stop])[mask].abs().tolist()])
            compared += int(mask.sum())
    assert compared == sum(int(r.valid.sum()) for group in rollouts for r in group)
    return gap


@pytest.mark.parametrize("tied", [False, True])
def test_logp_of_packed_sequences_equals_hf_transformers_one_by_one(tmp_path: Path, tied: bool) -> None:
    folder = write_model(tmp_path / "model", 0, tie_word_embeddings=tied)
    config = json.loads((folder / "config.json").read_text())
    assert config["tie_word_embeddings"] == tied
    assert run_ranks(_gap_to_transformers, 1, 120, str(folder))[0] <= 2e-5
