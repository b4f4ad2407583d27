"""A run without an actor as configuration, launcher's checks, plan and tools see it."""

import json
from pathlib import Path

import pytest
from rich.console import Console

from megatron_jackpot.config import Config, load_config, parse_config
from megatron_jackpot.config.model_shape import model_shapes
from megatron_jackpot.launch.preflight import CHECKS, Subject
from megatron_jackpot.plan.formulas import make_plan, num_params
from megatron_jackpot.plan.seconds import Assumptions
from megatron_jackpot.plan.tables import show_plan
from megatron_jackpot.run.provenance import find_model
from megatron_jackpot.servers.served_folder import served_folder
from tests.tiny import ACTOR, POLICY, hf_config

EXAMPLES = Path(__file__).parents[2] / "examples"
BLOCKS = dict(intermediate_size=256, num_attention_heads=8, num_key_value_heads=8, head_dim=16)


def tree(folder: Path, shape: dict = POLICY, **sections: dict | None) -> dict:
    """Both models' folders, with nothing but config.json, and a run of the policy alone."""
    for name, changes in (("policy", shape), ("actor", ACTOR)):
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "config.json").write_text(json.dumps(hf_config(**changes)))
    whole: dict = dict(
        run=dict(folder=str(folder / "run")),
        policy=dict(hf=str(folder / "policy")),
        actor=None,
        data=dict(tasks=dict(chain_sum={}), max_prompt_tokens=24),
        rollout=dict(model="policy", max_new_tokens=100),
        packing=dict(tokens=1024),
    )
    for name, section in sections.items():
        whole[name] = {**(whole.get(name) or {}), **section}
    return whole


def joint(folder: Path) -> Config:
    """The same run with the actor."""
    return parse_config(tree(folder, actor=dict(hf=str(folder / "actor")), rollout=dict(model="actor")))


@pytest.mark.parametrize(
    ("sections", "field", "remedy"),
    [
        (dict(rollout=dict(model="actor")), "rollout.model = 'actor' needs an actor", "rollout.model=policy"),
        (dict(actor=dict(hf="a")), "leaves nothing to do for the actor of actor.hf = a", "Set actor=null"),
        (dict(algorithm=dict(train_actor=False)), "algorithm.train_actor = false", "Set it to true"),
        (
            dict(guard=dict(acceptance_floor=0.5)),
            "guard.acceptance_floor = 0.5",
            "guard.acceptance_floor=null",
        ),
        (dict(guard=dict(kl_ceiling=2.0)), "guard.kl_ceiling = 2.0", "guard.kl_ceiling=null"),
    ],
)
def test_what_needs_an_actor_is_refused_with_the_remedy(tmp_path, sections, field, remedy) -> None:
    with pytest.raises(ValueError) as caught:
        parse_config(tree(tmp_path, **sections))
    (line,) = str(caught.value).splitlines()
    assert field in line and remedy in line


def test_a_wrong_key_of_the_actor_names_the_nearest_one_and_no_section_at_all_is_a_mistake(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"'actor.distil'. Did you mean 'actor.distill'\?"):
        parse_config(tree(tmp_path, actor=dict(hf="a", distil=3)))
    without = tree(tmp_path)
    del without["actor"]
    with pytest.raises(ValueError, match="Config key 'actor' is missing"):
        parse_config(without)


def test_servers_hold_the_policy_and_its_sizes_are_what_they_are_asked_for(tmp_path) -> None:
    config = parse_config(tree(tmp_path))
    assert (config.served, config.served_hf) == ("policy", tmp_path / "policy") and [*config.models] == [
        "policy"
    ]
    assert served_folder(config) == tmp_path / "policy" and [*model_shapes(config)] == ["policy"]
    assert (joint(tmp_path).served, joint(tmp_path).served_hf) == ("actor", tmp_path / "actor")
    longest = dict(data=dict(max_prompt_tokens=411), rollout=dict(top_k_logp=62), evaluation=dict(size=0))
    with pytest.raises(ValueError) as caught:
        model_shapes(parse_config(tree(tmp_path, **longest)))
    assert "policy.hf: max_position_embeddings = 512 - 2, which servers keep free" in str(caught.value)
    assert "rollout.top_k_logp = 62 exceeds the policy's vocabulary of 61" in str(caught.value)
    with pytest.raises(
        ValueError, match="algorithm.num_candidates = 62 exceeds the policy's vocabulary of 61"
    ):
        model_shapes(parse_config(tree(tmp_path, algorithm=dict(num_candidates=62))))


def test_fp8_servers_start_from_the_policys_configuration(tmp_path) -> None:
    config = parse_config(tree(tmp_path, {**POLICY, **BLOCKS}, servers=dict(quantization="fp8")))
    made = json.loads((served_folder(config) / "config.json").read_text())
    wanted = json.loads((tmp_path / "policy" / "config.json").read_text())
    assert made.pop("quantization_config")["quant_method"] == "fp8" and made == wanted


def test_the_plan_is_the_joint_one_without_the_actor_and_with_the_policy_on_the_servers(tmp_path) -> None:
    alone, both = (make_plan(config, 1) for config in (parse_config(tree(tmp_path)), joint(tmp_path)))
    assert alone.models == (both.policy,) and alone.actor is None and both.actor is not None
    assert alone.trainer_bytes == both.policy.resident + both.policy.transient
    assert both.trainer_bytes - alone.trainer_bytes == pytest.approx(both.actor.resident)
    policy = num_params(both.policy.shape)
    assert alone.synced == alone.server_weights == 2 * policy
    assert alone.rollout_flops == pytest.approx(both.policy.flops / 4)  # Scoring 1, update 3.
    for plan, said in ((alone, False), (both, True)):
        console = Console(record=True, width=150)
        show_plan(plan.config, 1, Assumptions(), console)
        assert ("actor" in console.export_text()) is said


KL = dict(algorithm=dict(reference_kl={}))


@pytest.mark.parametrize(
    ("sections", "line"),
    [
        (KL, "needs a model to stay near, but policy.reference is null"),
        (
            dict(policy=dict(reference=dict(hf="actor", refresh_every=2)), **KL),
            "a reference that becomes the policy starts as it. Set policy.reference.hf=null",
        ),
        (
            dict(policy=dict(reference=dict(refresh_every=2)), precision=dict(fp8_param=True), **KL),
            "policy.reference.refresh_every takes weights that are no fp8",
        ),
        (
            dict(
                policy=dict(reference={}),
                algorithm=dict(reference_kl=dict(place="reward", estimator="unbiased")),
            ),
            "'unbiased' is a form of the loss, but place = 'reward'. Set estimator=k1",
        ),
        (dict(algorithm=dict(reward_parts="singly")), "needs several rewards, but data.rewards has 0"),
        (dict(data=dict(rewards={"a/b": dict(reward="exact")})), "data.rewards has 'a/b'"),
    ],
)
def test_sections_that_contradict_each_other_are_refused(tmp_path, sections: dict, line: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_config(tree(tmp_path, **sections))
    assert line in str(caught.value) and len(str(caught.value).splitlines()) == 1


def test_a_reference_costs_its_weights_and_one_forward_pass_and_offloaded_they_come_in_turn(tmp_path) -> None:
    other = dict(hf=str(tmp_path / "actor"))
    alone, kept, visiting = (
        make_plan(parse_config(tree(tmp_path, **sections)), 1)
        for sections in (
            {},
            dict(policy=dict(reference=other), **KL),
            dict(policy=dict(reference={**other, "offload": True}), **KL),
        )
    )
    assert alone.reference is None and kept.models == (kept.policy, kept.reference)
    weights, joint_plan = kept.reference.weights, make_plan(joint(tmp_path), 1)
    assert kept.trainer_bytes - alone.trainer_bytes == pytest.approx(kept.reference.resident)
    # The actor, of the same folder, is scored once and updated: 1 + 3 passes' worth.
    assert weights == kept.reference.resident == joint_plan.actor.weights
    assert kept.reference.flops * 4 == pytest.approx(joint_plan.actor.flops)
    assert visiting.reference.resident == 0 and visiting.trainer_bytes < kept.trainer_bytes
    assert visiting.reference.transient == weights + kept.reference.transient
    assert (alone.reference_host, kept.reference_host, visiting.reference_host) == (0.0, 0.0, weights)
    # What servers hold is kept for the scores of older weights, with a reference as without.
    older = dict(rollout=dict(model="policy", ahead=2, max_staleness=2, top_k_logp=0))
    for more in ({}, dict(policy=dict(reference=other), **KL)):
        plan = make_plan(parse_config(tree(tmp_path, **older, **more)), 1)
        assert plan.ring_bytes == 3 * plan.policy.weights
    # The policy's own shape; offloaded, and once more in what a save holds.
    refreshed = dict(policy=dict(reference=dict(refresh_every=2, offload=True)), run=dict(save_every=5))
    plan = make_plan(parse_config(tree(tmp_path, **refreshed, **KL)), 1)
    assert plan.reference_host == 2 * plan.policy.weights > 0
    console = Console(record=True, width=150)
    show_plan(visiting.config, 1, Assumptions(), console)
    shown = console.export_text()
    assert "reference" in shown and "visiting" in shown


def test_a_reference_that_is_not_there_is_named_by_its_key(tmp_path) -> None:
    config = parse_config(tree(tmp_path, policy=dict(reference=dict(hf=str(tmp_path / "none"))), **KL))
    found = [line for check in CHECKS[:3] for line in check.find(Subject(config, "plan"))]
    (line,) = found
    assert line.startswith(f"policy.reference.hf = {tmp_path / 'none'} holds no config.json. Set it to")


def test_a_checkpoint_of_other_models_is_refused_before_anything_starts(tmp_path) -> None:
    alone = parse_config(tree(tmp_path, run=dict(folder=str(tmp_path / "run"), resume="auto")))
    both = joint(tmp_path).model_copy(update={"run": alone.run})
    step = tmp_path / "run" / "checkpoints" / "step-000004"
    (step / "policy").mkdir(parents=True)
    (step / "manifest.json").touch()

    (check,) = (check for check in CHECKS if "run.resume" in check.name)

    def found(config: Config) -> list[str]:
        return [*check.find(Subject(config, "submit"))]

    assert found(alone) == []
    (line,) = found(both)
    assert "step-000004 holds policy, this run has actor and policy. Set rollout.model and actor" in line
    (step / "actor").mkdir()
    assert found(both) == []
    (line,) = found(alone)
    assert "step-000004 holds actor and policy, this run has policy" in line


def test_the_tools_take_the_one_model_of_a_run(tmp_path) -> None:
    model = tmp_path / "run" / "checkpoints" / "step-000001" / "policy"
    model.mkdir(parents=True)
    (model / "config.json").touch()
    assert find_model(tmp_path / "run", None) == model == find_model(tmp_path / "run", "policy")
    with pytest.raises(ValueError, match="holds policy. Choose one with --model policy"):
        find_model(tmp_path / "run", "actor")


def test_the_papers_table_3_is_of_one_model() -> None:
    for path in sorted((EXAMPLES / "staleness").glob("*.yaml")):
        config = load_config(path)
        assert config.actor is None and config.served_hf == config.policy.hf, path
