"""What the clamp of kappa Z_k at min(1, 1 / lam) does to Z (z_clamp of the correction jackpot).

python tools/kappa_clamp.py [--vocab 50] [--rows 4000] [--lam 1.0] [--seed 0]      prints a table
                            [--spread 0.3 4.5] [--gap 0.4]

Rows are pairs of random distributions: p's logits are s N(0, 1), q's those plus GAP N(0, 1). s differs from
row to row, uniform between both of SPREAD: some are flat and some peaked, as tokens are.
"""

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_jackpot.algorithm.obrs import exact_overlap_mass, overlap_limit, overlap_mass  # noqa: E402


def rows(asked: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """(log p, log q), [N, V]."""
    generator = torch.Generator().manual_seed(asked.seed)
    drawn = dict(generator=generator, dtype=torch.float64)
    logits_NV, noise_NV = torch.randn(2, asked.rows, asked.vocab, **drawn)
    low, high = asked.spread
    target_NV = (low + (high - low) * torch.rand(asked.rows, 1, **drawn)) * logits_NV
    return target_NV.log_softmax(-1), (target_NV + asked.gap * noise_NV).log_softmax(-1)


def means(k: int, asked: argparse.Namespace) -> tuple[float, float, float, float]:
    """Mean of Z, of Z_k, of kappa Z_k and of that clamped, over all rows."""
    target_NV, server_NV = rows(asked)
    listed_NV = torch.zeros(target_NV.shape, dtype=torch.bool)
    for logp_NV in (target_NV, server_NV):
        listed_NV.scatter_(-1, logp_NV.topk(k).indices, True)
    z_N = exact_overlap_mass(target_NV, server_NV, asked.lam)
    z_k_N = overlap_mass(*(x.masked_fill(~listed_NV, -torch.inf) for x in (target_NV, server_NV)), asked.lam)
    scaled_N = z_k_N * (z_N.mean() / z_k_N.mean())
    clamped_N = scaled_N.clamp(max=overlap_limit(asked.lam))
    return tuple(float(x_N.mean()) for x_N in (z_N, z_k_N, scaled_N, clamped_N))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--vocab", type=int, default=50)
    parser.add_argument("--rows", type=int, default=4000)
    parser.add_argument("--lam", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--spread", type=float, nargs=2, default=[0.3, 4.5])
    parser.add_argument("--gap", type=float, default=0.4)
    asked = parser.parse_args()
    print("| K | mean Z | mean Z_k | mean kappa Z_k | clamped |\n|---|---|---|---|---|")
    for k in (5, 10, 20):
        numbers = means(k, asked)
        print(f"| {k} |", " | ".join(f"{number:.3f}" for number in numbers), "|")


if __name__ == "__main__":
    main()
