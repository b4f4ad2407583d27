"""KL(policy || reference) from the log-probs of sampled tokens: what each estimate is, and its gradient.

x is drawn from the policy, d = log p(x) - log p_ref(x). Of each form the mean over x:
    k1  d                 value: the KL; gradient as a loss: 0
    k2  d^2 / 2           value: biased; gradient: the KL's
    k3  e^-d - 1 + d      value: the KL; gradient: that of KL(reference || policy)
    unbiased  s k3        value and gradient: the KL's, also where x is p_old's; s = p / p_old
(k1 to k3: Schulman 2020; unbiased: DeepSeek-V3.2, arXiv 2512.02556.) Shapes: any, the same for all.
"""

from typing import Literal

from torch import Tensor

from megatron_jackpot.algorithm.divergence import k3
from megatron_jackpot.algorithm.obrs import log_ratio

Estimator = Literal["k1", "k2", "k3", "unbiased"]


def reference_kl(estimator: Estimator, logp: Tensor, old_logp: Tensor, reference_logp: Tensor) -> Tensor:
    """The estimate at each token, in `logp` live; log-ratios are clamped to +-20."""
    log_ratio_ = log_ratio(logp, reference_logp)
    if estimator == "k1":
        return log_ratio_
    if estimator == "k2":
        return log_ratio_.square() / 2
    if estimator == "k3":
        return k3(-log_ratio_)
    return log_ratio(logp, old_logp).exp() * k3(-log_ratio_)
