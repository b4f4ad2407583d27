"""What Z and the weight lose where q at the candidates comes from the trainer (rollout.top_k_logp: 0).

python tools/proposals.py [--vocab 100] [--rows 200] [--k 20] [--gap 0.3] [--lam 1.0] [--seed 0]

Prints a table. Nothing is sampled: every id of every row is enumerated as the sampled one. a is the law of
the scored weights, logits s N(0, 1) with s uniform in 2 .. 8; the server samples from q, a with logits moved
by NOISE N(0, 1), as other kernels move them; the target's logits are a's plus GAP N(0, 1). Acceptance and
ratio use the server's q of the sampled token in every line.
"""

import argparse
import math
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_jackpot.algorithm.obrs import (  # noqa: E402
    exact_overlap_mass,
    jackpot_weight,
    overlap_limit,
    overlap_mass,
)

NOISE = (0.0, 0.007, 0.05)
CAP = 3.0


class Rows(NamedTuple):
    """Log-probs [N, V] of the scored weights, the server and the target."""

    actor: Tensor
    server: Tensor
    target: Tensor


class Errors(NamedTuple):
    """Means over rows and over what is sampled from q."""

    bias: float
    """Of Z."""
    error: float
    """Root mean square error of Z."""
    spread: float
    """Root mean square of Z around its mean over the sampled tokens: 0 for a function of the prefix."""
    weight: float
    """Mean |E[keep x weight] - the same with the true Z|."""


def rows(noise: float, asked: argparse.Namespace) -> Rows:
    generator = torch.Generator().manual_seed(asked.seed)
    drawn = dict(generator=generator, dtype=torch.float64)
    logits, moved, gap = torch.randn(3, asked.rows, asked.vocab, **drawn)
    actor = (2 + 6 * torch.rand(asked.rows, 1, **drawn)) * logits
    return Rows(*((actor + change).log_softmax(-1) for change in (0 * moved, noise * moved, asked.gap * gap)))


def listed(*laws: Tensor, k: int) -> Tensor:
    """bool [N, V]: ids in a top-k of any of the laws."""
    inside = torch.zeros(laws[0].shape, dtype=torch.bool)
    for law in laws:
        inside.scatter_(-1, law.topk(k).indices, True)
    return inside


def overlaps(r: Rows, asked: argparse.Namespace) -> dict[str, Tensor]:
    """Where q comes from -> Z [N, V] for each sampled id, or [N, 1] where it depends on the prefix alone;
    with one kappa for all rows, but for the exact one."""
    k, lam = asked.k, asked.lam
    own, servers = listed(r.actor, r.target, k=k), listed(r.server, k=k)
    both = listed(r.server, r.target, k=k)
    kth = r.server.topk(k).values[:, -1:]
    joined = torch.where(servers, r.server, torch.minimum(r.actor, kth))
    chosen, ids = own.double().topk(2 * k)  # All ids of `own`, and some others to fill the row up.
    target_N1K, actor_N1K = (
        law.gather(-1, ids).masked_fill(chosen == 0, -math.inf)[:, None] for law in (r.target, r.actor)
    )
    scaled = overlap_mass(target_N1K, actor_N1K + (r.server - r.actor)[:, :, None], lam)
    found = {
        "trainer's top-k": _z(own, r.target, r.actor, lam),
        "trainer's top-k, scaled by the sampled token": scaled,
        "server's top-k": _z(both, r.target, joined, lam),
        "server's top-k, 0 at the policy's own": _z(servers, r.target, r.server, lam),
    }
    true = exact_overlap_mass(r.target, r.server, lam)
    accepted = {name: true.mean() / (r.server.exp() * z).sum(-1).mean() for name, z in found.items()}
    with_kappa = {name: (accepted[name] * z).clamp(max=overlap_limit(lam)) for name, z in found.items()}
    return with_kappa | {"trainer's whole vocabulary": exact_overlap_mass(r.target, r.actor, lam)[:, None]}


def _z(inside: Tensor, target: Tensor, server: Tensor, lam: float) -> Tensor:
    return overlap_mass(*(law.masked_fill(~inside, -math.inf) for law in (target, server)), lam)[:, None]


def errors(z: Tensor, r: Rows, lam: float) -> Errors:
    q, true = r.server.exp(), exact_overlap_mass(r.target, r.server, lam)[:, None]
    accept = torch.minimum(torch.ones_like(q), (r.target - r.server).exp() / lam)

    def expected(overlap: Tensor) -> Tensor:
        """E[keep x weight] of each row."""
        return (q * accept * jackpot_weight(r.target, r.server, overlap, lam, CAP)).sum(-1)

    mean = (q * z).sum(-1, keepdim=True)
    return Errors(
        bias=float((mean - true).mean()),
        error=float((q * (z - true).square()).sum(-1).mean().sqrt()),
        spread=float((q * (z - mean).square()).sum(-1).mean().sqrt()),
        weight=float((expected(z) - expected(true)).abs().mean()),
    )


def table(asked: argparse.Namespace) -> list[str]:
    lines = [
        "| noise of the server | q at the candidates from | bias of Z | error of Z "
        "| of it from the sampled token | error of E[keep x weight] |",
        "|---|---|---|---|---|---|",
    ]
    for noise in NOISE:
        r = rows(noise, asked)
        for name, z in overlaps(r, asked).items():
            numbers = (f"{number:.5f}" for number in errors(z, r, asked.lam))
            lines.append(f"| {noise:g} | {name} | {' | '.join(numbers)} |")
    return [line.replace("-0.00000", "0.00000") for line in lines]


def options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--vocab", type=int, default=100)
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--k", type=int, default=20)
    parser.add_argument("--gap", type=float, default=0.3)
    parser.add_argument("--lam", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    print("\n".join(table(options())))
