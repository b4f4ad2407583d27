"""What OBRS does to two distributions, without a model: the Jackpot paper's Figure 2 and five tables.

python tools/simulate_obrs.py --out FOLDER [--seed 0]      writes FOLDER/figure2.png and FOLDER/tables.md

Shapes: N draws or rows, V vocabulary, K candidate ids per row, S sampled tokens per row. Everything is fp64
and depends on the seed alone. docs/simulation.md explains and reads the tables.
"""

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Generator, Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_jackpot.algorithm.obrs import (  # noqa: E402
    accept_prob,
    draw_keep,
    exact_overlap_mass,
    jackpot_weight,
    kappa,
    log_ratio,
    overlap_mass,
    tail_correction,
)

Row = dict[str, str | float]

LAM = 1.0
PAPER_EPS = (0.043, 0.100, 0.175)
CURVE_EPS = (0.02, 0.03, 0.043, 0.06, 0.08, 0.1, 0.125, 0.15, 0.175, 0.2, 0.225, 0.25)
TOP_K = (5, 10, 20, 50, 100)
PAPER_K = 20
EXPONENTS = {"peaked": (1.6, 2.6), "flat": (0.8, 1.2)}
"""Zipf exponents of the rows, uniform in the range: p(rank) ~ rank^-s."""
GAPS = {"near": (0.1, 0.5), "far": (0.5, 3.5), "extreme": (1.0, 6.0)}
"""Standard deviation of the Gaussian noise between the logits of target and server, uniform over the rows."""
TIS_CAP, JACKPOT_CAP = 2.0, 3.0


class Batch(NamedTuple):
    """Candidates and sampled tokens of N rows; the rest of the vocabulary is forgotten."""

    z_N: Tensor
    z_k_N: Tensor
    target_logp_NK: Tensor
    server_logp_NK: Tensor
    accept_NS: Tensor
    keep_NS: Tensor
    is_candidate_NS: Tensor


# Distributions


def dirichlet(alpha: float, num: int, vocab: int, *, generator: Generator) -> Tensor:
    """Draws of Dirichlet(alpha, ..., alpha), [N, V]: normalised Gamma(alpha) variables."""
    alpha_NV = torch.full((num, vocab), alpha, dtype=torch.float64)
    gamma_NV = torch._standard_gamma(alpha_NV, generator=generator)
    return gamma_NV / gamma_NV.sum(-1, keepdim=True)


def normal(*shape: int, generator: Generator) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def uniform(low: float, high: float, *shape: int, generator: Generator) -> Tensor:
    return low + (high - low) * torch.rand(shape, dtype=torch.float64, generator=generator)


def zipf_pair(rows: str, gap: str, num: int, vocab: int, *, generator: Generator) -> tuple[Tensor, Tensor]:
    """(log p, log q) [N, V]: p ~ rank^-s exp(N(0, 0.5^2)), q ~ p exp(N(0, gap^2)); s and gap differ by
    row."""
    exponent_N1 = uniform(*EXPONENTS[rows], num, 1, generator=generator)
    gap_N1 = uniform(*GAPS[gap], num, 1, generator=generator)
    log_rank_V = torch.arange(1, vocab + 1, dtype=torch.float64).log()
    target_NV = -exponent_N1 * log_rank_V + 0.5 * normal(num, vocab, generator=generator)
    server_NV = target_NV + gap_N1 * normal(num, vocab, generator=generator)
    return target_NV.log_softmax(-1), server_NV.log_softmax(-1)


def kl(first_logp_NV: Tensor, second_logp_NV: Tensor) -> Tensor:
    """KL(first || second), [N]."""
    return (first_logp_NV.exp() * (first_logp_NV - second_logp_NV)).sum(-1)


def after_rejection(target_logp_NV: Tensor, server_logp_NV: Tensor, lam: float) -> Tensor:
    """log q' = log(q a / Z), the law of an accepted token, [N, V] (P 4.1)."""
    z_N = exact_overlap_mass(target_logp_NV, server_logp_NV, lam)
    accept_NV = accept_prob(target_logp_NV, server_logp_NV, lam)
    return server_logp_NV + accept_NV.log() - z_N.log()[:, None]


# Figure 2


class Figure2:
    """Pairs (p, q) of the paper's Figure 2, and the same p under Gaussian logit noise of equal KL(p || q)."""

    def __init__(self, seed: int, num: int = 60, vocab: int = 1000):
        generator = Generator().manual_seed(seed)
        self.target_NV = dirichlet(2.0, num, vocab, generator=generator)
        self.other_NV = dirichlet(1.0, num, vocab, generator=generator)
        self.noise_NV = normal(num, vocab, generator=generator)
        self.target_logp_NV = self.target_NV.log()

    def dirichlet_server(self, eps: float) -> Tensor:
        """log q, q = (1 - eps) p + eps r."""
        return ((1 - eps) * self.target_NV + eps * self.other_NV).log()

    def gaussian_server(self, eps: float) -> tuple[Tensor, float]:
        """(log q, sigma), q ~ p exp(sigma N(0, 1)): sigma by bisection to the mean KL of the mixture."""
        wanted = kl(self.target_logp_NV, self.dirichlet_server(eps)).mean()
        low, high = 0.0, 4.0
        for _ in range(40):
            sigma = (low + high) / 2
            server_NV = (self.target_logp_NV + sigma * self.noise_NV).log_softmax(-1)
            below = kl(self.target_logp_NV, server_NV).mean() < wanted
            low, high = (sigma, high) if below else (low, sigma)
        return server_NV, sigma

    def effect(self, server_logp_NV: Tensor, lam: float = LAM) -> dict[str, float]:
        """Means over the draws."""
        post_NV = after_rejection(self.target_logp_NV, server_logp_NV, lam)
        before = kl(self.target_logp_NV, server_logp_NV).mean().item()
        after = kl(self.target_logp_NV, post_NV).mean().item()
        acceptance = exact_overlap_mass(self.target_logp_NV, server_logp_NV, lam).mean().item()
        return {"acceptance": acceptance, "KL before": before, "KL after": after, "falls by": before / after}


def figure2_table(figure2: Figure2) -> list[Row]:
    return [{"eps": eps} | figure2.effect(figure2.dirichlet_server(eps)) for eps in PAPER_EPS]


def gaussian_table(figure2: Figure2) -> list[Row]:
    rows = []
    for eps in PAPER_EPS:
        server_NV, sigma = figure2.gaussian_server(eps)
        rows.append({"eps matched": eps, "sigma": sigma} | figure2.effect(server_NV))
    return rows


# Top-k candidates


def candidates(target_logp_NV: Tensor, server_logp_NV: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """(ids, log p, log q) [N, 2k]: server top-k union target top-k; a duplicate is -inf in both."""
    server_ids_Nk = server_logp_NV.topk(k).indices
    target_ids_Nk = target_logp_NV.topk(k).indices
    again_Nk = (target_ids_Nk[:, :, None] == server_ids_Nk[:, None, :]).any(-1)
    ids_NK = torch.cat([server_ids_Nk, target_ids_Nk], -1)
    again_NK = torch.cat([torch.zeros_like(again_Nk), again_Nk], -1)
    target_NK, server_NK = (
        logp.gather(-1, ids_NK).masked_fill(again_NK, -math.inf) for logp in (target_logp_NV, server_logp_NV)
    )
    return ids_NK, target_NK, server_NK


def draw_batch(
    target_logp_NV: Tensor, server_logp_NV: Tensor, *, num_samples: int, generator: Generator
) -> Batch:
    """Candidates at k = PAPER_K and S tokens of q per row, with their acceptance."""
    ids_NK, target_NK, server_NK = candidates(target_logp_NV, server_logp_NV, PAPER_K)
    ids_NS = torch.multinomial(server_logp_NV.exp(), num_samples, replacement=True, generator=generator)
    accept_NS = accept_prob(target_logp_NV.gather(-1, ids_NS), server_logp_NV.gather(-1, ids_NS), LAM)
    row_N1, sample_S = torch.arange(len(ids_NS))[:, None], torch.arange(num_samples)
    rollout_NS3 = torch.stack([torch.zeros_like(ids_NS), row_N1 + 0 * ids_NS, sample_S + 0 * ids_NS], -1)
    seed = int(torch.randint(2**31, (), generator=generator))
    return Batch(
        z_N=exact_overlap_mass(target_logp_NV, server_logp_NV, LAM),
        z_k_N=overlap_mass(target_NK, server_NK, LAM),
        target_logp_NK=target_NK,
        server_logp_NK=server_NK,
        accept_NS=accept_NS,
        keep_NS=draw_keep(accept_NS, seed, 0, rollout_NS3, torch.zeros_like(ids_NS)),
        is_candidate_NS=(ids_NS[:, :, None] == ids_NK[:, None, :]).any(-1),
    )


def corrected_z(batch: Batch) -> dict[str, Tensor]:
    """Z [N] under each correction; the N x S tokens are one mini-batch."""
    mask_NS = torch.ones_like(batch.keep_NS)
    z_k_NS = batch.z_k_N[:, None].expand_as(batch.accept_NS)
    tail_NS, _ = tail_correction(
        batch.accept_NS,
        batch.is_candidate_NS,
        batch.target_logp_NK[:, None],
        batch.server_logp_NK[:, None],
        z_k_NS,
        LAM,
        mask_NS,
        torch.clone,
    )
    factor = kappa(batch.keep_NS, z_k_NS, mask_NS, torch.clone)
    return {"none": batch.z_k_N, "kappa": (factor * batch.z_k_N).clamp(max=1.0), "tail": tail_NS[:, 0]}


def topk_tables(seed: int, *, num: int = 96, vocab: int = 32000) -> tuple[list[Row], list[Row]]:
    """(mean Z_k / Z against k, errors of Z at k = 20 under the corrections)."""
    generator = Generator().manual_seed(seed)
    bias_rows, error_rows = [], []
    for gap in GAPS:
        batches = {}
        for rows in EXPONENTS:
            target_NV, server_NV = zipf_pair(rows, gap, num, vocab, generator=generator)
            z_N = exact_overlap_mass(target_NV, server_NV, LAM)
            share = {
                f"k={k}": (overlap_mass(*candidates(target_NV, server_NV, k)[1:], LAM) / z_N).mean().item()
                for k in TOP_K
            }
            bias_rows.append({"rows": rows, "gap": gap, "Z": z_N.mean().item()} | share)
            batches[rows] = draw_batch(target_NV, server_NV, num_samples=64, generator=generator)
        error_rows += _errors_of_z(batches, gap)
    return bias_rows, error_rows


def _errors_of_z(batches: dict[str, Batch], gap: str) -> list[Row]:
    """RMSE of Z, absolute and relative to Z: each kind of row as a mini-batch of its own, then both in
    one."""
    mixed = Batch(*map(torch.cat, zip(*batches.values(), strict=True)))
    parts = {name: z_N.chunk(len(batches)) for name, z_N in corrected_z(mixed).items()}
    cases = [(rows, batch.z_N, corrected_z(batch)) for rows, batch in batches.items()]
    for i, (rows, batch) in enumerate(batches.items()):
        cases.append((f"{rows}, of mixed", batch.z_N, {name: part[i] for name, part in parts.items()}))
    found = []
    for rows, true_N, estimates in cases:
        errors = {name: z_N - true_N for name, z_N in estimates.items()}
        absolute = {name: rms(error_N) for name, error_N in errors.items()}
        relative = {f"{name}, relative": rms(error_N / true_N) for name, error_N in errors.items()}
        found.append({"rows": rows, "gap": gap} | absolute | relative)
    return found


def rms(error_N: Tensor) -> float:
    return error_N.square().mean().sqrt().item()


# Estimators of E_p[f]


def estimators(
    target_logp_NV: Tensor, server_logp_NV: Tensor, tis_cap: float, jackpot_cap: float
) -> dict[str, tuple[Tensor, Tensor]]:
    """Name -> (chance that token x counts, its factor on f(x)), both [N, V]; Z is exact.

    Those with a mask (or its expectation) are divided by Z = E_q[a]: the share of accepted tokens, which is
    what `denominator: accepted` divides by in a large batch.
    """
    z_N1 = exact_overlap_mass(target_logp_NV, server_logp_NV, LAM)[:, None]
    accept_NV = accept_prob(target_logp_NV, server_logp_NV, LAM)
    weight_NV = jackpot_weight(target_logp_NV, server_logp_NV, z_N1, LAM, jackpot_cap)
    one_NV = torch.ones_like(accept_NV)
    return {
        "no correction": (one_NV, one_NV),
        "TIS": (one_NV, log_ratio(target_logp_NV, server_logp_NV).exp().clamp(max=tis_cap)),
        "Jackpot, Bernoulli": (accept_NV, weight_NV / z_N1),
        "Jackpot, expected": (one_NV, accept_NV * weight_NV / z_N1),
        "mask without weight": (accept_NV, one_NV / z_N1),
        "weight without mask": (one_NV, weight_NV),
    }


def estimator_table(seed: int, *, num: int = 400, vocab: int = 50) -> list[Row]:
    """Bias and std per sample over E_p[f], enumerated over x (no sampling), f ~ Uniform(0, 1) fixed per pair.

    Bias is the RMS over the N pairs (p, q), std the mean.
    """
    generator = Generator().manual_seed(seed)
    target_NV = normal(num, vocab, generator=generator).log_softmax(-1)
    noise_NV = normal(num, vocab, generator=generator)
    f_NV = uniform(0.0, 1.0, num, vocab, generator=generator)
    truth_N = (target_NV.exp() * f_NV).sum(-1)
    rows: list[Row] = []
    for gap_name, gap in (("near", 0.3), ("far", 1.0)):
        server_NV = (target_NV + gap * noise_NV).log_softmax(-1)
        found: dict[str, Row] = {}
        for suffix, caps in (("", (math.inf, math.inf)), (", caps", (TIS_CAP, JACKPOT_CAP))):
            for name, (chance_NV, factor_NV) in estimators(target_NV, server_NV, *caps).items():
                counted_NV = server_NV.exp() * chance_NV
                mean_N = (counted_NV * factor_NV * f_NV).sum(-1)
                variance_N = (counted_NV * (factor_NV * f_NV).square()).sum(-1) - mean_N.square()
                row = found.setdefault(name, {"estimator": name, "gap": gap_name})
                row[f"bias{suffix}"] = rms(mean_N / truth_N - 1)
                row[f"std{suffix}"] = (variance_N.clamp(min=0).sqrt() / truth_N).mean().item()
        rows += found.values()
    return rows


# Output


def all_tables(seed: int, figure2: Figure2) -> dict[str, list[Row]]:
    bias_rows, error_rows = topk_tables(seed)
    return {
        "Figure 2: q = (1 - eps) p + eps r, means of 60 draws": figure2_table(figure2),
        "Gaussian logit noise with the same KL(p||q)": gaussian_table(figure2),
        "Z_k / Z against k, Zipf rows, V = 32000": bias_rows,
        f"RMSE of Z at k = {PAPER_K}": error_rows,
        "Estimators of the mean of f under p: bias and std per sample over that mean": estimator_table(seed),
    }


def cell(value: str | float) -> str:
    """Three digits; what is rounding of an exact zero is shown as 0."""
    if isinstance(value, str):
        return value
    return "0" if abs(value) < 1e-12 else f"{value:.3g}"


def markdown(title: str, rows: list[Row]) -> str:
    lines = [list(rows[0]), ["---"] * len(rows[0]), *([*map(cell, row.values())] for row in rows)]
    return "\n".join([f"### {title}", "", *("| " + " | ".join(line) + " |" for line in lines), ""])


def print_tables(tables: dict[str, list[Row]]) -> None:
    from rich.console import Console
    from rich.table import Table

    for title, rows in tables.items():
        table = Table(*rows[0], title=title, title_justify="left")
        for row in rows:
            table.add_row(*map(cell, row.values()))
        Console().print(table)


def draw(figure2: Figure2, out: Path) -> None:
    """figure2.png: (a) one pair before and after, (b) KL and (c) acceptance against eps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.2), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    pair, divergence, acceptance = figure.subplots(1, 3, width_ratios=(1.25, 1, 1))
    _draw_pair(pair, figure2, eps=PAPER_EPS[-1])
    models: dict[str, tuple[str, Callable[[float], Tensor]]] = {
        "mixture": ("-", figure2.dirichlet_server),
        "Gaussian logits": ("--", lambda eps: figure2.gaussian_server(eps)[0]),
    }
    for name, (style, server) in models.items():
        effects = [figure2.effect(server(eps)) for eps in CURVE_EPS]
        line = dict(linestyle=style)
        if style == "-":
            at_paper = [i for i, eps in enumerate(CURVE_EPS) if eps in PAPER_EPS]
            line |= dict(marker="o", markersize=5, markevery=at_paper)
            before = [e["KL before"] for e in effects]
            divergence.plot(CURVE_EPS, before, color="tab:orange", label="KL(p||q), both", **line)
        after, rate = ([e[key] for e in effects] for key in ("KL after", "acceptance"))
        divergence.plot(CURVE_EPS, after, color="tab:blue", label=f"KL(p||q'), {name}", **line)
        acceptance.plot(CURVE_EPS, rate, color="tab:green", label=name, **line)
    divergence.set(yscale="log", xlabel="eps (dots: the paper's)", title="(b) KL before and after rejection")
    acceptance.set(xlabel="eps (dots: the paper's)", title="(c) Acceptance Z")
    for axes in (pair, divergence, acceptance):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=9, framealpha=0.8, edgecolor="none")
    figure.savefig(out)


def _draw_pair(axes, figure2: Figure2, eps: float) -> None:
    """p, q and q' of the first draw on every 20th token of the vocabulary sorted by p."""
    server_NV = figure2.dirichlet_server(eps)
    post_NV = after_rejection(figure2.target_logp_NV, server_NV, LAM)
    shown = figure2.target_NV[0].argsort(descending=True)[::20]
    target, server, post = (
        1000 * logp[0, shown].exp() for logp in (figure2.target_logp_NV, server_NV, post_NV)
    )
    place = range(len(shown))
    axes.vlines(place, target, server, color="tab:orange", alpha=0.35, linewidth=1)
    axes.plot(place, target, color="black", linewidth=1.4, label="target p")
    axes.plot(place, server, "o", color="tab:orange", markersize=4, label="server q")
    axes.plot(place, post, "o", color="tab:blue", markersize=4, label="q' after rejection")
    before, after = (kl(figure2.target_logp_NV, logp)[0].item() for logp in (server_NV, post_NV))
    axes.set(xlabel="every 20th token, sorted by p", ylabel="1000 x probability")
    axes.set_title(f"(a) One pair, eps = {eps}: KL {before:.4f} -> {after:.4f}")


def main() -> None:
    parser = argparse.ArgumentParser(description="The Jackpot paper's Figure 2 and tables on OBRS.")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    figure2 = Figure2(given.seed)
    tables = all_tables(given.seed, figure2)
    print_tables(tables)
    given.out.mkdir(parents=True, exist_ok=True)
    draw(figure2, given.out / "figure2.png")
    (given.out / "tables.md").write_text("\n".join(markdown(*table) for table in tables.items()))


if __name__ == "__main__":
    main()
