"""The arithmetic of `plan` against models that were built, steps that were run, and published sizes."""

import json
from pathlib import Path

import pytest
import torch

from megatron_jackpot.cli import main
from megatron_jackpot.config import Config, Parallel, parse_config
from megatron_jackpot.config.model_folder import read_hf_config
from megatron_jackpot.config.model_shape import model_shapes, padded_vocab_size
from megatron_jackpot.models.engine import MegatronModel, packed_seq_params
from megatron_jackpot.models.families import family_of
from megatron_jackpot.models.mesh import destroy_mesh, init_mesh
from megatron_jackpot.parallel.context import Mesh
from megatron_jackpot.plan.formulas import GIB, activation_elements, forward_flops, make_plan, num_params
from megatron_jackpot.plan.seconds import Assumptions, shared_seconds
from megatron_jackpot.plan.tables import memory_troubles, turns_advice
from megatron_jackpot.sync.stream import export
from tests.loading import load_models
from tests.parallel.spawn import run_ranks
from tests.tiny import ACTOR, POLICY, hf_config

WIDE = dict(
    hidden_size=128,
    intermediate_size=320,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    vocab_size=501,
)
QWEN3 = dict(
    head_dim=128,
    num_key_value_heads=8,
    vocab_size=151936,
    num_hidden_layers=36,
    max_position_embeddings=40960,
)
QWEN3_8B = dict(QWEN3, hidden_size=4096, intermediate_size=12288, num_attention_heads=32)
QWEN3_4B = dict(
    QWEN3, hidden_size=2560, intermediate_size=9728, num_attention_heads=32, tie_word_embeddings=True
)
QWEN3_17B = dict(
    QWEN3,
    hidden_size=2048,
    intermediate_size=6144,
    num_attention_heads=16,
    num_hidden_layers=28,
    tie_word_embeddings=True,
)


@pytest.fixture
def mesh():
    yield init_mesh(Parallel(), 0)
    destroy_mesh()


def config_for(folder: Path, policy: dict, actor: dict, **sections: dict) -> Config:
    """A configuration over folders that hold nothing but a config.json."""
    for name, changes in (("policy", policy), ("actor", actor)):
        (folder / name).mkdir(parents=True, exist_ok=True)
        if not (folder / name / "config.json").exists():
            (folder / name / "config.json").write_text(json.dumps(hf_config(**changes)))
    tree = dict(
        run=dict(folder=str(folder / "run")),
        policy=dict(hf=str(folder / "policy")),
        actor=dict(hf=str(folder / "actor")),
        data=dict(tasks=dict(chain_sum={}), max_prompt_tokens=24),
        rollout=dict(max_new_tokens=100),
        packing=dict(tokens=1024),
        precision=dict(dtype="float32", fused_linear=False),
    )
    for name, section in sections.items():
        tree[name] = {**tree.get(name, {}), **section}
    return parse_config(tree)


def build(config: Config, name: str, mesh: Mesh) -> MegatronModel:
    families = {n: family_of(read_hf_config(getattr(config, n).hf)) for n in ("policy", "actor")}
    return load_models(config, mesh, {name: None}, families)[name]


def held_bytes(model: MegatronModel) -> dict[str, int]:
    """What one rank really holds, in bytes; optimizer: AdamW's moments, and masters that are not the
    weights."""
    weights = [p for chunk in model.chunks for p in chunk.module.parameters()]
    buffers = {p.main_grad.untyped_storage().data_ptr(): p.main_grad for p in weights}
    own = {p.untyped_storage().data_ptr() for p in weights}
    model.optimizer.step()  # makes AdamW's state; gradients are zero
    optimizer = 0
    for part in getattr(model.optimizer, "chained_optimizers", [model.optimizer]):
        for parameter, state in part.optimizer.state.items():
            optimizer += sum(v.nbytes for k, v in state.items() if k in ("exp_avg", "exp_avg_sq"))
            optimizer += parameter.nbytes if parameter.untyped_storage().data_ptr() not in own else 0
    return dict(
        params=sum(p.numel() for p in weights),
        weights=sum(p.nbytes for p in weights),
        gradients=sum(b.untyped_storage().nbytes() for b in buffers.values()),
        optimizer=optimizer,
    )


@pytest.mark.parametrize(
    ("changes", "published"),
    [(QWEN3_8B, 8_190_735_360), (QWEN3_4B, 4_022_468_096), (QWEN3_17B, 1_720_574_976)],
)
def test_parameters_of_published_models(tmp_path, changes, published) -> None:
    shapes = model_shapes(config_for(tmp_path, changes, changes))
    assert num_params(shapes["policy"]) == published


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_resident_bytes_of_built_models(tmp_path, mesh, dtype) -> None:
    config = config_for(tmp_path, POLICY, ACTOR, precision=dict(dtype=dtype))
    plan = make_plan(config, 1)
    for name, planned in (("policy", plan.policy), ("actor", plan.actor)):
        held = held_bytes(build(config, name, mesh))
        assert held["params"] == planned.params_per_gpu
        assert held["weights"] == planned.weights
        assert held["optimizer"] == planned.optimizer
        # Megatron starts every parameter at a multiple of 64 elements.
        assert planned.gradients <= held["gradients"] <= planned.gradients * 1.1


LAYOUTS = (dict(tp=2), dict(pp=2), dict(), dict(distributed_optimizer=False))


def _held_on_ranks(rank: int, world: int, folder: str) -> list[dict[str, dict[str, int]]]:
    held = []
    for parallel in LAYOUTS:
        config = config_for(Path(folder), POLICY, ACTOR, parallel=parallel)
        mesh = init_mesh(config.parallel, 0)
        held.append({name: held_bytes(build(config, name, mesh)) for name in ("policy", "actor")})
        destroy_mesh()
    return held


def test_bytes_on_the_fullest_of_two_ranks(tmp_path) -> None:
    config_for(tmp_path, POLICY, ACTOR)
    held = run_ranks(_held_on_ranks, 2, 200.0, str(tmp_path))
    for index, parallel in enumerate(LAYOUTS):
        plan = make_plan(config_for(tmp_path, POLICY, ACTOR, parallel=parallel), 2)
        for name, planned in (("policy", plan.policy), ("actor", plan.actor)):
            most = {key: max(rank[index][name][key] for rank in held) for key in held[0][index][name]}
            assert most["params"] == planned.params_per_gpu
            assert most["weights"] == planned.weights
            # A distributed optimizer cuts the padded buffer, not the parameters.
            assert most["optimizer"] == pytest.approx(planned.optimizer, rel=0.1), (parallel, name)


def test_activations_of_a_forward_pass_are_the_formula(tmp_path, mesh) -> None:
    """Of a CPU's layers, which keep other tensors than Transformer Engine's, but as many numbers."""
    config, tokens = config_for(tmp_path, WIDE, WIDE), 1024
    model = build(config, "policy", mesh)
    weights = {p.untyped_storage().data_ptr() for chunk in model.chunks for p in chunk.module.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.chunks[0](
            input_ids=torch.zeros(1, tokens, dtype=torch.long),
            position_ids=(torch.arange(tokens) % 128)[None],
            attention_mask=None,
            packed_seq_params=packed_seq_params(torch.arange(0, tokens + 1, 128, dtype=torch.int32), 128),
        )
    shape = model_shapes(config)["policy"]
    final_norm = 2 * shape.hidden_size
    each = activation_elements(shape, config.parallel) + shape.num_heads  # softmax's normalisers
    want = tokens * 4 * (shape.num_layers * each + final_norm)
    assert sum(s.nbytes() for s in kept.values()) == pytest.approx(want, rel=0.01)


def test_bytes_of_a_weight_update_are_those_of_the_export(tmp_path, mesh) -> None:
    config = config_for(tmp_path, POLICY, ACTOR)
    model = build(config, "actor", mesh)
    assert sum(t.nbytes for t in export(model).values()) == make_plan(config, 1).synced


def test_taking_turns_is_advised_against_where_gpus_would_wait(tmp_path) -> None:
    def advised(**sections: dict) -> bool:
        return turns_advice(config_for(tmp_path, POLICY, ACTOR, **sections)) is not None

    assert advised() and not advised(rollout=dict(ahead=1))
    assert not advised(cluster=dict(gpus_per_node=0)) and not advised(servers=dict(release_memory=True))


def test_q_from_scores_takes_a_pass_for_each_step_ahead_and_memory_for_each_push(tmp_path) -> None:
    asked, older = dict(ahead=2, max_staleness=2), dict(ahead=2, max_staleness=2, top_k_logp=0)
    plain, own = (make_plan(config_for(tmp_path, POLICY, ACTOR, rollout=each), 1) for each in (asked, older))
    assert plain.ring_bytes == 0 and own.ring_bytes == 3 * own.actor.weights
    # Scoring, forward and backward of an update are 4 passes' worth.
    assert own.actor.flops / plain.actor.flops == (4 + 2) / 4 and own.policy.flops == plain.policy.flops


def test_logits_are_a_block_or_all_of_a_micro_batch_with_their_gradient(tmp_path) -> None:
    whole, sizes = 65536 * padded_vocab_size([hf_config()["vocab_size"]], 1), {}
    big = dict(data=dict(max_prompt_tokens=24), packing=dict(tokens=65536))
    for fused in (False, True):
        config = config_for(tmp_path, POLICY, POLICY, precision=dict(fused_linear=fused), **big)
        sizes[fused] = {model.name: model.logits for model in make_plan(config, 1).models}
    assert sizes[False]["policy"] == 2 * whole * 4
    assert sizes[True]["policy"] == min(whole, 2**28) * 4
    assert make_plan(config_for(tmp_path / "wide", WIDE, WIDE, precision=dict(fused_linear=True), **big), 1)


def test_flops_of_the_matrices_are_those_torch_counts(tmp_path, mesh) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    config, tokens = config_for(tmp_path, WIDE, WIDE), 512
    model = build(config, "policy", mesh)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.chunks[0](
            input_ids=torch.zeros(1, tokens, dtype=torch.long),
            position_ids=torch.arange(tokens)[None],
            attention_mask=None,
            packed_seq_params=packed_seq_params(torch.tensor([0, tokens], dtype=torch.int32), tokens),
        )
    shape = model_shapes(config)["policy"]
    # Megatron multiplies the padded vocabulary; torch does not count the CPU's attention.
    padding = 2 * shape.hidden_size * (padded_vocab_size([shape.vocab_size], 1) - shape.vocab_size)
    want = tokens * (forward_flops(shape, 0) + padding)
    assert counter.get_total_flops() == pytest.approx(want, rel=1e-6)


def test_any_cluster_up_to_4096_gpus_and_what_tp_costs_the_smaller_model(tmp_path) -> None:
    sections = dict(
        precision=dict(dtype="bfloat16"), parallel=dict(tp=4), rollout=dict(prompts_per_step=1024)
    )
    config = config_for(tmp_path, QWEN3_8B, QWEN3_17B, **sections)
    plans = [make_plan(config, gpus) for gpus in (4, 8, 64, 512, 4096)]
    assert [plan.dp for plan in plans] == [1, 2, 16, 128, 1024]
    assert all(a.trainer_bytes > b.trainer_bytes for a, b in zip(plans, plans[1:], strict=False))
    plan, assumed = plans[-1], Assumptions()
    ratio = {m.name: shared_seconds(plan, m, assumed) / (m.flops / 4096 / 4e14) for m in plan.models}
    assert ratio["actor"] > ratio["policy"] > 1


def test_a_model_that_does_not_fit_is_said_with_the_arithmetic(tmp_path) -> None:
    cluster = dict(gpus_per_node=8, gpu_memory_gib=80, trainer_procs=1)
    config = config_for(tmp_path, QWEN3_8B, QWEN3_17B, precision=dict(dtype="bfloat16"), cluster=cluster)
    plan = make_plan(config, 1)
    (trouble,) = memory_troubles(plan)
    assert f"needs {plan.trainer_bytes / GIB:.1f} GiB" in trouble and "80 - 4 reserve = 76" in trouble
    assert memory_troubles(make_plan(config, 16)) == []
    # Two versions' hidden states of all tokens, and the policy's, for Z over the whole vocabulary.
    ahead = dict(ahead=1, max_new_tokens=8000, top_k_logp=0)
    exact = dict(correction=dict(name="jackpot", z="exact"))
    sections = dict(precision=dict(dtype="bfloat16"), cluster=cluster, rollout=ahead, algorithm=exact)
    plan = make_plan(config_for(tmp_path, QWEN3_8B, QWEN3_17B, packing=dict(tokens=9216), **sections), 1)
    rows = plan.microbatches * 9216 + 151936
    assert plan.kept_bytes == rows * (2 * 2048 + 4096) * 2
    (trouble,) = memory_troubles(plan)
    assert f"{plan.kept_bytes / GIB:.1f} hidden states kept for scores + " in trouble


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("parallel.tp=3", "parallel.tp = 3 does not divide"),
        ("parallel.pp=8", "does not divide num_hidden_layers = 4"),
        ("cluster.nodes=1", "1 training nodes x 7 processes = 7. 7 training processes are no multiple of"),
        ("rollout.prompts_per_step=1", "is less than dp = 14 / 2 = 7"),
    ],
)
def test_the_command_prints_tables_and_refuses(tmp_path, capsys, override, message) -> None:
    config_for(tmp_path, POLICY, ACTOR)
    run = tmp_path / "run.yaml"
    run.write_text(
        "data: {tasks: {chain_sum: {}}, max_prompt_tokens: 8}\nrollout: {max_new_tokens: 8}\nparallel: {tp: "
        "2}\n"
        f"run: {{folder: {tmp_path}/run}}\npolicy: {{hf: {tmp_path}/policy}}\nactor: "
        f"{{hf: {tmp_path}/actor}}\n"
        "cluster: {nodes: 2, trainer_procs: 7, gpus_per_node: 8}\n"
    )
    assert main(["plan", str(run), "--gpus", "8"]) == 0
    assert "one of 8 training GPUs: tp 2 x pp 1 x dp 4" in capsys.readouterr().out
    gpus = ["--gpus", "48"] if "parallel" in override else []
    assert main(["plan", str(run), override, *gpus]) == 2
    assert message in capsys.readouterr().err
