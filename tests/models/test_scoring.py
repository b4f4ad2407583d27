"""The candidates of scores aimed at another policy."""

import math
from types import SimpleNamespace

import torch

from megatron_jackpot.parallel.vocab_spec import VocabSpec
from megatron_jackpot.train.scoring import Scorer
from tests.unit.flat import batch_of
from tests.unit.test_objectives import make_tokens

T, V, K = 12, 40, 5


class Fixed:
    """A model that has the same logits [T, V] whatever it reads."""

    def __init__(self, seed: int) -> None:
        self.logits_TV = torch.randn(T, V, generator=torch.Generator().manual_seed(seed)) * 2

    def score(self, batch, reader):
        return {name: tensor[None] for name, tensor in reader(self.logits_TV, 0).items()}

    def vocab(self, temperature):
        return VocabSpec(V, None, temperature)


def rollouts():
    """A batch whose server is one more model."""
    tokens = make_tokens()[1]
    kept = {name: value[:T] for name, value in vars(tokens).items()}
    batch = batch_of(SimpleNamespace(**kept))
    top = Fixed(3).logits_TV.log_softmax(-1).topk(K)
    changes = dict(topk_ids_MTK=top.indices[None], topk_logp_MTK=top.values[None])
    return SimpleNamespace(**{**vars(batch), **changes}), top


def test_a_target_that_moved_brings_its_own_top_k():
    """P Alg. 1: the candidates are the ids of server and current policy; q at the latter's own
    is known where the scored policy listed them."""
    batch, server = rollouts()
    old, new, actor = Fixed(0), Fixed(1), Fixed(2)
    new.logits_TV = old.logits_TV + 0.7 * new.logits_TV
    scorer = Scorer(old, actor, temperature=1.0, top_k=K)
    scored = scorer(batch, step=0, served_version=0)
    scorer.policy = new
    aimed = scorer.retarget(scored, batch)
    policy = new.logits_TV.log_softmax(-1)
    found = 0
    for t in range(T):
        ids = aimed.candidate_ids_MTK[0, t]
        present = ids >= 0
        wanted = {*server.indices[t].tolist(), *policy[t].topk(K).indices.tolist()}
        assert sorted(ids[present].tolist()) == sorted(wanted)
        target = aimed.candidate_target_logp_MTK[0, t]
        torch.testing.assert_close(target[present], policy[t, ids[present]])
        assert (target[~present] == -math.inf).all()
        before = dict(
            zip(scored.candidate_ids_MTK[0, t].tolist(), scored.candidate_server_logp_MTK[0, t], strict=True)
        )
        for id_, logp in zip(ids.tolist(), aimed.candidate_server_logp_MTK[0, t], strict=True):
            assert logp == (before.get(id_, -math.inf) if id_ >= 0 else -math.inf)
            found += id_ >= 0 and id_ not in before
    assert found > T  # The policy moved so far that it lists ids of its own.
