"""q from the trainer's own scores of the model that servers hold: of servers that return no top-k, and over
the whole vocabulary; with the weights that sampled each token."""

import math
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from megatron_jackpot.config import Config
from megatron_jackpot.data.loader import PromptLoader
from megatron_jackpot.models.engine import MegatronModel
from megatron_jackpot.models.head import FrozenHead, record_head
from megatron_jackpot.models.mesh import destroy_mesh
from megatron_jackpot.plan.formulas import make_plan
from megatron_jackpot.records import Scores
from megatron_jackpot.sync.stream import export
from megatron_jackpot.train import scoring
from tests.parallel.layouts import NUM_PROMPTS, TOP_K, Layout, load_trainer, make_config
from tests.parallel.spawn import run_ranks
from tests.rollout.sources import ScriptedSource
from tests.tiny import groups, rollout

LAM = 1.3
AGES = 3
"""Versions of weights in one batch."""
EXACT = (("name", "jackpot"), ("z", "exact"))


def _scored(folder: str, one_model: bool) -> dict[str, object]:
    """Scores of rollouts without top-k; of the same as if a server had said what the actor's scores say; of
    weights that produced none of the tokens; and the served model's log-probs of all ids."""
    trainer = load_trainer(make_config(Layout(one_model=one_model), Path(folder)))
    without = trainer.packer.pack(groups(range(NUM_PROMPTS)), 0)
    asked = dict(step=0, served_version=0, exact_lam=LAM)
    own = trainer.scorer(without, **asked)
    topk = dict(topk_ids_MTK=own.batch.topk_ids_MTK, topk_logp_MTK=own.batch.topk_logp_MTK)
    told = trainer.scorer(replace(without, **topk), **asked)
    other = trainer.scorer(without, **asked | dict(served_version=1))
    logp_MTV = _logp(trainer.state.served, without)
    destroy_mesh()
    return dict(own=own, told=told, other=other, logp_MTV=logp_MTV)


def _with_servers(folder: str, dtype: str | None, one_model: bool) -> Scores:
    """Of rollouts with the servers' top-k, by weights that produced them, where servers have this dtype."""
    config = make_config(Layout(one_model=one_model), Path(folder))
    servers = config.servers.model_copy(update={"dtype": dtype})
    trainer = load_trainer(config.model_copy(update={"servers": servers}))
    batch = trainer.packer.pack(groups(range(NUM_PROMPTS)), TOP_K)
    version = int(batch.weight_version_MT[batch.mask_MT].unique().item())
    scores = trainer.scorer(batch, step=0, served_version=version)
    destroy_mesh()
    return scores


def _logp(model, batch) -> torch.Tensor:
    """[M, T, V] of one rank."""
    logits_MTV = model.score(batch, lambda logits, m: {"all": logits[:]})["all"]
    return logits_MTV[..., : model.family.vocab_size].log_softmax(-1)


def _aged_config(folder: Path, layout: Layout) -> Config:
    config = make_config(layout, folder)
    older = dict(max_staleness=AGES - 1, ahead=AGES - 1)
    # `plan` counts full micro-batches: of these there is one.
    packing = config.packing.model_copy(update={"tokens": 64})
    return config.model_copy(update={"rollout": config.rollout.model_copy(update=older), "packing": packing})


@contextmanager
def _heads_held() -> Iterator[list[int]]:
    """Bytes of all hidden states and output weights that are kept at the end of each pass within."""
    sizes: list[int] = []
    heads: weakref.WeakSet[FrozenHead] = weakref.WeakSet()

    @contextmanager
    def noted(model: MegatronModel) -> Iterator[FrozenHead]:
        with record_head(model) as head:
            heads.add(head)
            yield head
        sizes.append(sum(t.nbytes for one in heads for t in (*one.hidden_TH, one.weight_VH)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring, "record_head", noted)
        yield sizes


def _aged(folder: str, layout: Layout) -> dict[str, object]:
    """Scores of a batch whose tokens are of several versions in turn, and the log-probs of each version's
    weights and of the policy; whether the model is what it was, and what hidden states took."""
    trainer = load_trainer(_aged_config(Path(folder), layout))
    served, mesh = trainer.state.served, trainer.mesh
    mine = groups(range(mesh.dp_rank, NUM_PROMPTS, mesh.dp))
    packed = trainer.packer.pack(mine, layout.top_k)
    turns_MT = torch.where(packed.mask_MT, packed.position_MT % AGES, -1)
    batch = replace(packed, weight_version_MT=turns_MT)
    logp = []
    for version in range(-1, AGES):  # The oldest of all has left the ring when the last is pushed.
        generator = torch.Generator().manual_seed(version + 5)
        for parameter in (p for chunk in served.chunks for p in chunk.parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data += 0.1 * parameter.data.std().nan_to_num() * noise
        trainer.ring.push(version)
        logp.append(_logp(served, batch))
    before = export(served)
    with _heads_held() as held:
        scores = trainer.scorer(batch, step=AGES, served_version=AGES - 1, exact_lam=LAM)
    after = export(served)
    policy_MTV = _logp(trainer.policy, batch)
    same = all(torch.equal(after[name], before[name]) for name in before)
    versions = trainer.ring.versions
    destroy_mesh()
    return dict(scores=scores, logp=logp[1:], policy=policy_MTV, same=same, versions=versions, held=max(held))


def _trained(folder: str) -> list[dict[str, float]]:
    """Steps ahead of which rollouts are sampled, with q from scores alone."""
    trainer = load_trainer(_aged_config(Path(folder), Layout(top_k=0, correction=EXACT)))
    prompts = [rollout(p, 0).prompt for p in range(NUM_PROMPTS * 2)]
    trainer.state.loader = PromptLoader(prompts, NUM_PROMPTS, 0, 1, 5)
    trainer.source = trainer.pipeline.source = ScriptedSource()
    trainer.push()
    rows = [trainer.step().metrics for _ in range(4)]
    trainer.pipeline.interrupt("the end")
    trainer.source.close()
    destroy_mesh()
    return rows


AGED = {
    "no top-k": Layout(top_k=0),
    "servers' top-k": Layout(),
    "one model": Layout(top_k=0, one_model=True),
}
ON_TWO = "two ranks, gathers overlapped"
CASES = AGED | {ON_TWO: Layout(top_k=0, dp=2, overlap=True)}


def _all(rank: int, world: int, folder: str) -> dict[object, object]:
    found = {one_model: _scored(folder, one_model) for one_model in (False, True)}
    aged = {name: _aged(folder, replace(layout, correction=EXACT)) for name, layout in AGED.items()}
    servers = {
        (dtype, one_model): _with_servers(folder, dtype, one_model)
        for dtype in (None, "bfloat16")
        for one_model in (False, True)
    }
    return found | aged | {"trained": _trained(folder), "servers": servers}


def _aged_on_two(rank: int, world: int, folder: str) -> dict[str, object]:
    return _aged(folder, replace(CASES[ON_TWO], correction=EXACT))


@pytest.fixture(scope="module")
def scored(folder: Path) -> dict:
    return run_ranks(_all, 1, 200, str(folder))[0]


@pytest.mark.parametrize("one_model", [False, True], ids=["joint", "one model"])
def test_the_served_models_top_k_takes_the_place_of_the_servers(scored: dict, one_model: bool) -> None:
    """All that is scored is what it would be if a server had returned these top-k, and they are the served
    model's."""
    own, told, logp_MTV = (scored[one_model][name] for name in ("own", "told", "logp_MTV"))
    mask_MT = own.batch.mask_MT
    best = logp_MTV.topk(TOP_K)
    assert torch.equal(own.batch.topk_ids_MTK[mask_MT], best.indices[mask_MT])
    torch.testing.assert_close(own.batch.topk_logp_MTK[mask_MT], best.values[mask_MT])
    assert (own.batch.topk_ids_MTK[~mask_MT] == -1).all()
    for item in fields(Scores):
        one, other = (getattr(scores, item.name) for scores in (own, told))
        if isinstance(one, torch.Tensor):
            torch.testing.assert_close(one, other, msg=item.name)
    known_MTK = mask_MT[..., None] & (own.candidate_ids_MTK >= 0)
    q_MTK = logp_MTV.gather(-1, own.candidate_ids_MTK.clamp(min=0))
    torch.testing.assert_close(own.candidate_server_logp_MTK[known_MTK], q_MTK[known_MTK])
    assert one_model or (known_MTK[..., TOP_K:]).any()  # Ids of the policy alone.


@pytest.mark.parametrize("one_model", [False, True], ids=["joint", "one model"])
def test_of_tokens_of_other_weights_no_candidate_is_known(scored: dict, one_model: bool) -> None:
    other = scored[one_model]["other"]
    assert (other.candidate_server_logp_MTK == -math.inf).all()


@pytest.mark.parametrize("one_model", [False, True], ids=["joint", "one model"])
def test_of_servers_with_other_numbers_no_score_tells_q(scored: dict, one_model: bool) -> None:
    """What they returned stays; of ids that only the policy lists nothing is known."""
    alike, other = (scored["servers"][dtype, one_model] for dtype in (None, "bfloat16"))
    told, listed = (alike.candidate_server_logp_MTK, alike.candidate_ids_MTK[..., TOP_K:] >= 0)
    only_MTK = listed & alike.batch.mask_MT[..., None]
    assert only_MTK.any() and told[..., TOP_K:][only_MTK].isfinite().all()
    assert (other.candidate_server_logp_MTK[..., TOP_K:] == -math.inf).all()
    assert torch.equal(other.candidate_server_logp_MTK[..., :TOP_K], told[..., :TOP_K])
    for item in fields(Scores):
        one, two = (getattr(scores, item.name) for scores in (alike, other))
        if isinstance(one, torch.Tensor) and item.name != "candidate_server_logp_MTK":
            assert torch.equal(one, two), item.name


@pytest.fixture(scope="module")
def on_two(folder: Path) -> dict:
    return run_ranks(_aged_on_two, 2, 120, str(folder))[0]


@pytest.mark.parametrize("case", CASES)
def test_each_token_is_scored_with_the_weights_that_sampled_it(scored: dict, on_two: dict, case: str) -> None:
    """And the model has its own weights again, bit for bit."""
    found = scored[case] if case in AGED else on_two
    scores, mask_MT = found["scores"], found["scores"].batch.mask_MT
    assert found["versions"] == (0, 1, 2) and found["same"]
    turns_MT = scores.batch.weight_version_MT
    q_MTV = torch.stack(found["logp"])[
        turns_MT.clamp(min=0), *torch.meshgrid(*(torch.arange(n) for n in turns_MT.shape), indexing="ij")
    ]
    exact_MT = torch.minimum(q_MTV, found["policy"] - math.log(LAM)).exp().sum(-1)
    torch.testing.assert_close(scores.exact_overlap_MT[mask_MT], exact_MT[mask_MT])
    assert ((found["logp"][0] - found["logp"][2]).abs()[mask_MT].mean()) > 0.1
    first = TOP_K if case == "servers' top-k" else 0  # Theirs are what they said.
    ids_MTK, server_MTK = scores.candidate_ids_MTK[..., first:], scores.candidate_server_logp_MTK[..., first:]
    known_MTK = mask_MT[..., None] & (ids_MTK >= 0)
    wanted_MTK = q_MTV.gather(-1, ids_MTK.clamp(min=0))
    if first:
        wanted_MTK = torch.minimum(wanted_MTK, scores.batch.topk_logp_MTK.amin(-1, keepdim=True))
    torch.testing.assert_close(server_MTK[known_MTK], wanted_MTK[known_MTK])
    if case != "one model":
        now_MT = found["logp"][-1].gather(-1, scores.batch.labels_MT[..., None])[..., 0]
        torch.testing.assert_close(scores.actor_logp_MT[mask_MT], now_MT[mask_MT])


@pytest.mark.parametrize("case", CASES)
def test_plan_counts_the_hidden_states_that_scoring_keeps(
    scored: dict, on_two: dict, folder: Path, case: str
) -> None:
    found = scored[case] if case in AGED else on_two
    layout = replace(CASES[case], correction=EXACT)
    planned = make_plan(_aged_config(folder, layout), layout.dp)
    # The packer's own number of micro-batches: `plan` cannot know how well sequences fill them.
    planned = replace(planned, microbatches=len(found["scores"].batch.mask_MT))
    assert found["held"] == planned.kept_bytes > 0


def test_rollouts_run_ahead_with_q_from_scores_alone(scored: dict) -> None:
    rows = scored["trained"]
    assert [row["staleness/max"] for row in rows] == [0, 1, 2, 2]
    for row in rows:
        assert 0 < row["jackpot/z"] < 1 and row["jackpot/z_zero_fraction"] == 0
        assert row["rollout/stale_groups"] == 0 and math.isfinite(row["loss/policy"])
