"""Objectives by name: the per-token surrogate that is maximised, with the live policy in it; formulas in
docs/objectives.md.

policy loss = -sum keep * weight * surrogate / N.
"""

from megatron_jackpot.algorithm.objectives_base import Objective
from megatron_jackpot.algorithm.objectives_covariance import ClipCov, KLCov
from megatron_jackpot.algorithm.objectives_masked import BAPO, DPPOKL, DPPOTV, M2PO
from megatron_jackpot.algorithm.objectives_regression import DMPO, AStarPO
from megatron_jackpot.algorithm.objectives_sequence import GMPO, GSPO, TOPR, MinPRO
from megatron_jackpot.algorithm.objectives_token import CISPO, OPSM, PPO, SAPO, DecoupledPPO, Reinforce
from megatron_jackpot.algorithm.registry import Registry

OBJECTIVES = Registry(
    Objective,
    {
        "ppo": PPO,
        "decoupled_ppo": DecoupledPPO,
        "opsm": OPSM,
        "sapo": SAPO,
        "cispo": CISPO,
        "reinforce": Reinforce,
        "clip_cov": ClipCov,
        "kl_cov": KLCov,
        "gspo": GSPO,
        "gmpo": GMPO,
        "topr": TOPR,
        "minpro": MinPRO,
        "dppo_tv": DPPOTV,
        "dppo_kl": DPPOKL,
        "bapo": BAPO,
        "m2po": M2PO,
        "dmpo": DMPO,
        "a_star_po": AStarPO,
    },
)
