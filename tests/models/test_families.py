"""Every family against transformers: names, shapes, log-probs; and through every layout, bit for bit."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from megatron_jackpot.config import Optimizer, Parallel, Precision
from megatron_jackpot.config.model_folder import read_hf_config
from megatron_jackpot.models.checkpoint import Snapshot
from megatron_jackpot.models.convert import checksums, hf_to_megatron, megatron_to_hf
from megatron_jackpot.models.engine import MegatronModel, packed_seq_params
from megatron_jackpot.models.families import family_of
from megatron_jackpot.models.hf_folder import HFFolder, write_hf_folder
from megatron_jackpot.models.mesh import destroy_mesh, init_mesh
from megatron_jackpot.sync.stream import export
from tests.loading import load_model
from tests.models.hf_models import tiny_config, write_hf
from tests.parallel import spawn
from tests.parallel.spawn import run_ranks

spawn.PRELOADED += [
    *("hypothesis", "hypothesis.strategies", "tests.models.hf_models"),
    *(f"transformers.models.{name}.modeling_{name}" for name in ("llama", "qwen2", "qwen3")),
]

LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=5e5,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=8192,
)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("qwen2", dict(tie_word_embeddings=False)),
    "qwen2 tied": ("qwen2", dict(tie_word_embeddings=True)),
    "qwen3": ("qwen3", dict(tie_word_embeddings=False)),
    "qwen3 tied": ("qwen3", dict(tie_word_embeddings=True)),
    "llama": (
        "llama",
        dict(tie_word_embeddings=False, rope_parameters=dict(rope_type="default", rope_theta=1e5)),
    ),
    "llama tied": ("llama", dict(tie_word_embeddings=True)),
}
ROPES = {
    "llama3 rope": ("llama", dict(rope_parameters=LLAMA3, max_position_embeddings=16384)),
    "linear rope": ("qwen3", dict(rope_parameters=dict(rope_type="linear", factor=4.0, rope_theta=1e4))),
}
OWN_WEIGHTS = (".safetensors", ".safetensors.index.json")
OTHER_WEIGHTS = (
    "tf_model.h5", "flax_model.msgpack", "model.gguf", "rust_model.ot", "pytorch_model.bin", "optimizer.pt",
    "pytorch_model.bin.index.json", "onnx/model.onnx", "onnx/model.onnx_data", "original/consolidated.00.pth",
)  # fmt: skip
LAYOUTS = (
    Parallel(),
    Parallel(tp=2),
    Parallel(pp=2),
    Parallel(tp=2, pp=2),
    Parallel(pp=2, vpp=2),
)


def load(folder: Path, mesh, parallel: Parallel) -> MegatronModel:
    precision = Precision(dtype="float32", fused_linear=False)
    return load_model(folder, name=folder.name, mesh=mesh, parallel=parallel, precision=precision)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    source = HFFolder(folder)
    return {name: source.read(name) for name in source.names}


def assert_same(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    assert got.keys() == want.keys()
    for name in want:
        assert got[name].dtype == want[name].dtype and torch.equal(got[name], want[name]), name


def logits(model: MegatronModel, tokens: torch.Tensor) -> torch.Tensor:
    """[T, V] of one sequence on one rank."""
    length = tokens.shape[0]
    with torch.no_grad():
        return model.chunks[0](
            input_ids=tokens[None],
            position_ids=torch.arange(length)[None],
            attention_mask=None,
            packed_seq_params=packed_seq_params(torch.tensor([0, length], dtype=torch.int32), length),
        )[0, :, : model.family.vocab_size]


# One rank: transformers is the judge.


def _gaps(rank: int, world: int, folder: str) -> dict[str, float]:
    from transformers import AutoModelForCausalLM

    mesh, gaps = init_mesh(Parallel(), 0), {}
    for name in [*CASES, *ROPES]:
        theirs = AutoModelForCausalLM.from_pretrained(Path(folder) / name, dtype=torch.float32).eval()
        ours = load(Path(folder) / name, mesh, Parallel())
        for length in (7, 500):
            tokens = torch.randint(0, 61, (length,), generator=torch.Generator().manual_seed(length))
            with torch.no_grad():
                want = theirs(tokens[None]).logits[0]
            assert want.std() > 0.5
            gaps[f"{name}, {length}"] = float((logits(ours, tokens) - want).abs().max())
    return gaps


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("families")
    for name, (model_type, changes) in (CASES | ROPES).items():
        write_hf(folder / name, model_type, **changes)
    return folder


def test_logits_equal_transformers_for_short_and_long_inputs(folder: Path) -> None:
    gaps = run_ranks(_gaps, 1, 200, str(folder))[0]
    assert len(gaps) == 2 * len(CASES | ROPES)
    assert {key: gap for key, gap in gaps.items() if not gap <= 1e-4} == {}


@st.composite
def configs(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    groups, per_group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    return draw(st.sampled_from(["qwen2", "qwen3", "llama"])), dict(
        num_key_value_heads=groups,
        num_attention_heads=groups * per_group,
        head_dim=2 * draw(st.integers(1, 6)),
        hidden_size=groups * per_group * draw(st.integers(1, 5)),
        intermediate_size=draw(st.integers(1, 40)),
        num_hidden_layers=draw(st.integers(1, 3)),
        vocab_size=draw(st.integers(3, 70)),
        tie_word_embeddings=draw(st.booleans()),
    )


def _fifty(rank: int, world: int, folder: str) -> int:
    from transformers import AutoModelForCausalLM

    mesh, done = init_mesh(Parallel(), 0), 0

    @settings(max_examples=50, deadline=None, derandomize=True, database=None)
    @given(configs())
    def check(drawn: tuple[str, dict[str, Any]]) -> None:
        nonlocal done
        done += 1
        model_type, changes = drawn
        here = Path(folder) / str(done)
        write_hf(here / "hf", model_type, **changes)
        # The names and shapes are transformers' own: a module of the same config, not what was saved.
        with torch.device("meta"):
            theirs = AutoModelForCausalLM.from_config(tiny_config(model_type, **changes))
        shapes = {name: tuple(parameter.shape) for name, parameter in theirs.named_parameters()}
        original = tensors_of(here / "hf")
        assert family_of(read_hf_config(here / "hf")).hf_shapes() == shapes
        hf_to_megatron(here / "hf", here / "megatron")
        megatron_to_hf(here / "megatron", here / "back")
        assert_same(tensors_of(here / "back"), original)
        for source in ("hf", "megatron"):
            assert_same(export(load(here / source, mesh, Parallel())), original)

    check()
    return done


def test_fifty_random_configs_map_to_transformers_names_and_come_back_bit_for_bit(tmp_path: Path) -> None:
    assert run_ranks(_fifty, 1, 200, str(tmp_path))[0] >= 50


# Four ranks: the layouts.


def _layouts(rank: int, world: int, folder: str, names: list[str]) -> int:
    checked = 0
    for parallel in LAYOUTS:
        mesh = init_mesh(parallel, 0)
        for name in names:
            for source in (Path(folder) / name, Path(folder) / f"{name} megatron"):
                model = load(source, mesh, parallel)
                exported = export(model)
                if rank == 0:
                    assert_same(exported, tensors_of(Path(folder) / name))
                    checked += 1
            # `model` came from Megatron's format; a run's checkpoint of it must be a model folder again.
            model.add_optimizer(Optimizer(lr=1.0, weight_decay=1.0), 1)
            saved = Path(folder) / f"{name} {parallel.tp} {parallel.pp} {parallel.vpp}"
            if rank == 0:
                saved.mkdir()
            mesh.barrier()
            Snapshot(model).write(saved, dist.group.WORLD)
            mesh.barrier()
            if rank == 0:
                megatron_to_hf(saved, saved.with_name(f"{saved.name} hf"), shard_bytes=40_000)
                assert_same(tensors_of(saved.with_name(f"{saved.name} hf")), tensors_of(Path(folder) / name))
        destroy_mesh()
    return checked


@pytest.mark.parametrize(
    "names",
    [
        ["qwen2", "qwen3 tied"],
        pytest.param(["qwen2 tied", "qwen3", "llama", "llama tied"], marks=pytest.mark.full),
    ],
)
def test_every_layout_loads_both_formats_and_gives_every_tensor_back_bit_for_bit(
    folder: Path, names: list[str]
) -> None:
    for name in names:
        report = hf_to_megatron(folder / name, folder / f"{name} megatron")
        assert report.num_bytes == sum(t.nbytes for t in tensors_of(folder / name).values())
    checked = run_ranks(_layouts, 4, 280, str(folder), names)[0]
    assert checked == 2 * len(names) * len(LAYOUTS)


def _tied_beside_untied(rank: int, world: int, folder: str) -> None:
    """One process, both orders: nothing that one model knows may leak into the other."""
    mesh = init_mesh(Parallel(), 0)
    for pair in (("qwen3 tied", "qwen2"), ("llama", "llama tied")):
        models = [load(Path(folder) / name, mesh, Parallel()) for name in pair]
        for name, model in zip(pair, models, strict=True):
            exported = export(model)
            assert ("lm_head.weight" in exported) == ("tied" not in name)
            assert_same(exported, tensors_of(Path(folder) / name))


def test_a_tied_actor_beside_an_untied_policy_in_one_process(folder: Path) -> None:
    run_ranks(_tied_beside_untied, 1, 120, str(folder))


def test_bfloat16_goes_through_unchanged_and_the_export_names_its_dtype(tmp_path: Path) -> None:
    write_hf(tmp_path / "hf", "llama", dtype=torch.bfloat16)
    hf_to_megatron(tmp_path / "hf", tmp_path / "megatron")
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    assert_same(tensors_of(tmp_path / "back"), tensors_of(tmp_path / "hf"))
    assert checksums(tmp_path / "megatron").differences(checksums(tmp_path / "hf")) == []
    wide = {name: tensor.float() for name, tensor in tensors_of(tmp_path / "hf").items()}
    write_hf_folder(tmp_path / "wide", wide.items(), tmp_path / "hf", bucket_bytes=10**9)
    assert json.loads((tmp_path / "wide" / "config.json").read_text())["dtype"] == "float32"


@pytest.mark.parametrize("first", [["torch_dtype", "dtype"], ["torch_dtype"], ["dtype"]])
def test_an_export_names_its_dtype_and_takes_along_what_is_not_weights(tmp_path: Path, first: list) -> None:
    source = write_hf(tmp_path / "hf", "qwen3")
    tree = json.loads((source / "config.json").read_text())
    tree = {key: value for key, value in tree.items() if key not in ("torch_dtype", "dtype")}
    (source / "config.json").write_text(json.dumps(tree | dict.fromkeys(first, "bfloat16")))
    before = {path.relative_to(source) for path in source.rglob("*") if not path.name.endswith(OWN_WEIGHTS)}
    for name in OTHER_WEIGHTS:
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_bytes(b"old weights")
    for name in ("additional_chat_templates/tool_use.jinja", ".cache/lock"):
        (source / name).parent.mkdir()
        (source / name).write_text("x")
    tensors = {name: tensor.float() for name, tensor in tensors_of(source).items()}
    write_hf_folder(tmp_path / "out", tensors.items(), source, bucket_bytes=10**6)
    out = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {key: out.get(key) for key in ("torch_dtype", "dtype") if key in out} == dict.fromkeys(
        first, "float32"
    )
    kept = {path.relative_to(tmp_path / "out") for path in (tmp_path / "out").rglob("*") if path.is_file()}
    kept = {path for path in kept if not path.name.endswith(OWN_WEIGHTS)}
    assert kept == before | {Path("additional_chat_templates/tool_use.jinja")}


def _read_as_transformers(rank: int, world: int, folder: str) -> dict[str, float]:
    """Gaps of folders whose config.json or files are such as transformers reads in a way of its own."""
    from transformers import AutoModelForCausalLM

    mesh, gaps = init_mesh(Parallel(), 0), {}
    for name in ("head_dim", "rms_norm_eps", "max_position_embeddings", "swish", "stale index", "strays"):
        here = Path(folder) / name
        write_hf(
            here, "llama" if name == "swish" else "qwen3", **({"head_dim": 128} if name == "head_dim" else {})
        )
        config = json.loads((here / "config.json").read_text())
        if name == "swish":
            config["hidden_act"] = "swish"
        (here / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != name}))
        if name == "stale index":
            save_file(tensors_of(here), here / "model.safetensors", metadata={"format": "pt"})
            gone = {"weight_map": {"x": "model-00001-of-00009.safetensors"}}
            (here / "model.safetensors.index.json").write_text(json.dumps(gone))
        if name == "strays":
            save_file({"lora_A.weight": torch.zeros(2, 2)}, here / "adapter_model.safetensors")
        theirs, read = AutoModelForCausalLM.from_pretrained(
            here, dtype=torch.float32, output_loading_info=True
        )
        assert not read["missing_keys"]
        tokens = torch.randint(0, 61, (40,), generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            want = theirs.eval()(tokens[None]).logits[0]
        gaps[name] = float((logits(load(here, mesh, Parallel()), tokens) - want).abs().max())
    return gaps


def test_a_folder_is_read_as_transformers_reads_it(tmp_path: Path) -> None:
    gaps = run_ranks(_read_as_transformers, 1, 200, str(tmp_path))[0]
    assert len(gaps) == 6 and {name: gap for name, gap in gaps.items() if not gap <= 1e-4} == {}


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "llama"])
def test_a_missing_field_counts_as_what_transformers_takes(architecture: str) -> None:
    whole = tiny_config(architecture, num_attention_heads=32, hidden_size=64).to_dict()
    missing = (
        "rms_norm_eps",
        "max_position_embeddings",
        "num_key_value_heads",
        "head_dim",
        "tie_word_embeddings",
    )
    tree = {key: value for key, value in whole.items() if key not in missing}
    theirs, ours = type(tiny_config(architecture))(**tree), family_of(tree)
    assert ours.norm_eps == theirs.rms_norm_eps and ours.context_length == theirs.max_position_embeddings
    assert ours.num_groups == theirs.num_key_value_heads and ours.tied == theirs.tie_word_embeddings
    assert ours.head_dim == getattr(theirs, "head_dim", theirs.hidden_size // theirs.num_attention_heads)


@pytest.mark.parametrize(
    ("model_type", "changes", "message"),
    [
        ("llama", dict(attention_bias=True), "attention_bias = True is not supported for Llama"),
        ("llama", dict(mlp_bias=True), "mlp_bias = True"),
        ("llama", dict(pretraining_tp=2), "pretraining_tp = 2"),
        ("llama", dict(hidden_act="gelu"), "hidden_act = 'gelu'"),
        ("qwen2", dict(use_sliding_window=True), "use_sliding_window = True is not supported for Qwen2"),
        ("qwen2", dict(layer_types=["sliding_attention"] * 4), r"layer_types holds \['sliding_attention'\]"),
        ("qwen2", dict(attention_dropout=0.1), "attention_dropout = 0.1 must be 0"),
        (
            "qwen3",
            dict(num_key_value_heads=4),
            "num_key_value_heads = 4 does not divide num_attention_heads = 6",
        ),
        ("qwen3", dict(quantization_config={"bits": 4}), "quantization_config"),
        ("llama", dict(rope_parameters={**LLAMA3, "low_freq_factor": 2.0}), "rope scaling 'llama3'"),
        (
            "llama",
            dict(rope_scaling={"type": "dynamic", "factor": 2.0}),
            "rope_parameters and rope_scaling differ",
        ),
        ("llama", dict(partial_rotary_factor=0.5), "partial_rotary_factor = 0.5"),
        ("llama", dict(rope_parameters={"rope_theta": 1.0}, rope_theta=2.0), "rope_theta is given twice"),
    ],
)
def test_a_field_that_changes_the_mathematics_is_refused(
    model_type: str, changes: dict, message: str
) -> None:
    tree = {**tiny_config(model_type).to_dict(), **changes}
    with pytest.raises(ValueError, match=message):
        family_of(tree)


def test_the_family_follows_from_either_key_and_the_two_must_agree() -> None:
    tree = {**tiny_config("qwen3").to_dict(), "architectures": None}
    assert family_of(tree).qk_norm and not family_of({**tree, "model_type": "llama"}).qk_norm
    with pytest.raises(ValueError, match="of model_type mamba is not supported. Known, the nearest first: "):
        family_of({"model_type": "mamba"})
    with pytest.raises(ValueError, match="model_type = 'llama' is not that of architecture Qwen3ForCausalLM"):
        family_of({"architectures": ["Qwen3ForCausalLM"], "model_type": "llama"})
