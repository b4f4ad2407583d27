"""Servers that return no top-k: candidates come from the trainer's own scores of the model they hold."""

import math
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from megatron_jackpot.models.mesh import destroy_mesh
from megatron_jackpot.records import Scores
from tests.parallel.layouts import NUM_PROMPTS, TOP_K, Layout, load_trainer, make_config
from tests.parallel.spawn import run_ranks
from tests.tiny import groups

LAM = 1.3


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
    served = trainer.state.served
    logp_MTV = served.score(without, lambda logits, m: {"all": logits[:].log_softmax(-1)})["all"]
    size = served.family.vocab_size
    destroy_mesh()
    return dict(own=own, told=told, other=other, logp_MTV=logp_MTV[..., :size].log_softmax(-1))


def _all(rank: int, world: int, folder: str) -> dict[bool, dict]:
    return {one_model: _scored(folder, one_model) for one_model in (False, True)}


@pytest.fixture(scope="module")
def scored(folder: Path) -> dict[bool, dict]:
    return run_ranks(_all, 1, 120, str(folder))[0]


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
