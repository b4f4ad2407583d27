"""RUN/report.html: a run on one page, no script in it: numbers, curves, what was accepted, token by token."""

import base64
import html
import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from megatron_jackpot.monitor.console import final_rows
from megatron_jackpot.monitor.curves import plot_runs
from megatron_jackpot.monitor.metrics import read_metrics
from megatron_jackpot.monitor.token_log import TokenRecord, records
from megatron_jackpot.run.provenance import CONFIG_FILE, PROVENANCE_FILE, check_run_folder

REPORT = "report.html"
SHOWN_STEPS = 12
"""Records on the page: the first, the last and others evenly between."""
MOST_REJECTED = 20
"""Tokens in the table of those that are rejected most often."""

Decode = Callable[[int], str]
"""Token id -> its text."""

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em;
  color: #222 }
h1 { font-size: 1.5em } h2 { font-size: 1.2em; margin-top: 2em } img { max-width: 100% }
table { border-collapse: collapse }
td, th { padding: .15em .8em; text-align: right; border-bottom: 1px solid #ddd }
td:first-child, th:first-child { text-align: left }
.rollout { white-space: pre-wrap; overflow-wrap: anywhere; font: 13px/1.9 ui-monospace, monospace;
  border-left: 3px solid #ccc; padding-left: .8em; margin: .6em 0 }
.rollout.right { border-color: #2a2 } .rollout small { font-family: system-ui, sans-serif; color: #777 }
.p { color: #888 } .k, .r, .u { border-radius: 3px; padding: 1px 0 }
.k { background: rgba(40, 160, 60, var(--w)) } .u { background: #ddd }
.r { background: rgba(220, 50, 40, .28); text-decoration: line-through }
"""
LEGEND = (
    '<p class="rollout"><span class="p">prompt</span> <span class="k" style="--w:.45">accepted</span> '
    '<span class="k" style="--w:.12">accepted, small weight</span> <span class="r">rejected</span> '
    '<span class="u">not scored</span><br><small>Point at a token for its probabilities under policy, server '
    "and trainer's actor where there is one, the ratio that decides, and its weight.</small></p>"
)


def write_report(run_folder: Path, out: Path | None = None) -> Path:
    """Write the page and return its path. Raises ValueError for a folder without metrics or a bad record."""
    folder = Path(run_folder)
    check_run_folder(folder)
    rows = read_metrics(folder)
    if not rows:
        raise ValueError(
            f"{folder} has no rows in metrics.jsonl: name the folder of a run that has done a step."
        )
    config = (
        yaml.safe_load((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        if (folder / CONFIG_FILE).is_file()
        else {}
    )
    curves = folder / "curves.png"
    plot_runs([folder], curves)
    kept = records(folder)
    decode = decoder_of(config)
    body = [
        f"<h1>{_text(folder.resolve().name)}</h1>",
        table(("", ""), facts(folder, config)),
        "<h2>Numbers</h2>",
        table(("metric", "first", "last", "best"), final_rows(rows)),
        "<h2>Curves</h2>",
        f'<img alt="curves" src="data:image/png;base64,{base64.b64encode(curves.read_bytes()).decode()}">',
        *token_sections(kept, decode),
    ]
    out = out or folder / REPORT
    title = f"<title>{_text(folder.resolve().name)}</title>"
    head = f'<meta charset="utf-8">{title}<style>{STYLE}</style>'
    page = f'<!doctype html>\n<html lang="en"><head>{head}</head><body>'
    out.write_text("\n".join([page, *body, "</body></html>", ""]), encoding="utf-8")
    return out


def facts(folder: Path, config: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What was run: models, methods, commit, versions, time."""
    for role in ("policy", "actor"):
        if config.get(role):
            yield role, str(config[role]["hf"])
    algorithm = config.get("algorithm", {})
    for part in ("correction", "objective", "advantage"):
        if part in algorithm:
            yield part, json.dumps(algorithm[part])
    path = folder / PROVENANCE_FILE
    if path.is_file():
        made = json.loads(path.read_text(encoding="utf-8"))
        commit = str(made["commit"])[:12] + (" and uncommitted changes" if made["dirty"] else "")
        yield "commit", commit
        yield "started", f"{made['time']} on {made['host']}"
        yield (
            "versions",
            ", ".join(f"{name} {version}" for name, version in made["versions"].items() if version),
        )


def decoder_of(config: dict[str, Any]) -> Decode:
    """The policy's tokenizer; numbers in brackets where it is not there any more."""
    folder = Path(config.get("policy", {}).get("hf", ""))
    if not (folder / "tokenizer_config.json").is_file():
        return lambda token: f"[{token}]"
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    return lambda token: tokenizer.decode([token])


def token_sections(kept: list[TokenRecord], decode: Decode) -> Iterator[str]:
    if not kept:
        yield "<h2>Tokens</h2><p>None were recorded (logging.tokens_every).</p>"
        return
    yield "<h2>Rejected most often</h2>"
    recorded = sum(int(r.trained_N.sum()) for r in kept)
    yield f"<p>Of the {recorded} recorded tokens, by the number of rejections.</p>"
    heads = ("token", "seen", "rejected", "share", "median p(policy) / p(server)")
    yield table(heads, (rejection.cells(decode) for rejection in most_rejected(kept)))
    yield "<h2>Token by token</h2>"
    yield LEGEND
    for record in chosen(kept, SHOWN_STEPS):
        share = record.keep_N.sum() / max(1, record.trained_N.sum())
        shown = " open" if record is kept[-1] else ""
        yield f"<details{shown}><summary>step {record.step}: {share:.3f} accepted</summary>"
        yield from rollouts(record, decode)
        yield "</details>"


def chosen(kept: list[TokenRecord], most: int) -> list[TokenRecord]:
    """At most `most` records, the first and the last among them."""
    places = np.linspace(0, len(kept) - 1, min(most, len(kept))).round().astype(int)
    return [kept[place] for place in places]


@dataclass(frozen=True)
class Rejection:
    token: int
    seen: int
    rejected: int
    median_ratio: float
    """p(policy) / p(server), median of its occurrences."""

    def cells(self, decode: Decode) -> tuple[str, ...]:
        share = f"{self.rejected / self.seen:.2f}"
        return repr(decode(self.token)), str(self.seen), str(self.rejected), share, f"{self.median_ratio:.3g}"


def most_rejected(kept: Iterable[TokenRecord], most: int = MOST_REJECTED) -> list[Rejection]:
    """The tokens with the most rejections, in that order; by id where they are equal."""
    ratios: dict[int, list[float]] = defaultdict(list)
    rejected: dict[int, int] = defaultdict(int)
    for record in kept:
        for place in np.flatnonzero(record.trained_N):
            token = int(record.token_N[place])
            ratios[token].append(
                math.exp(min(50.0, record.target_logp_N[place] - record.server_logp_N[place]))
            )
            rejected[token] += not record.keep_N[place]
    order = sorted((token for token in rejected if rejected[token]), key=lambda t: (-rejected[t], t))
    return [
        Rejection(token, len(ratios[token]), rejected[token], float(np.median(ratios[token])))
        for token in order[:most]
    ]


def rollouts(record: TokenRecord, decode: Decode) -> Iterator[str]:
    stops = np.cumsum(record.length_S)
    for number, (start, stop) in enumerate(zip(stops - record.length_S, stops, strict=True)):
        epoch, prompt, sample = record.rollout_S3[number]
        right = bool(record.correct_S[number])
        head = (
            f"prompt {prompt}, sample {sample}, epoch {epoch}: {'right' if right else 'wrong'}, "
            f"advantage {record.advantage_S[number]:+.2f}"
        )
        spans = "".join(token_span(record, place, decode) for place in range(start, stop))
        yield f'<div class="rollout{" right" if right else ""}"><small>{head}</small>\n{spans}</div>'


def token_span(record: TokenRecord, place: int, decode: Decode) -> str:
    text = _text(decode(int(record.token_N[place])).replace("\n", "⏎\n"))
    if not record.response_N[place]:
        return f'<span class="p">{text}</span>'
    if not record.trained_N[place]:
        return f'<span class="u" title="the server gave no finite log-prob">{text}</span>'
    logp = {"policy": record.target_logp_N, "server": record.server_logp_N, "actor": record.actor_logp_N}
    shown = {name: float(np.exp(values[place])) for name, values in logp.items() if values is not None}
    weight = float(record.weight_N[place])
    shown |= {"ratio": ratio_at(record, place), "weight": weight}
    title = ", ".join(f"{name} {value:.3g}" for name, value in shown.items())
    if not record.keep_N[place]:
        return f'<span class="r" title="{title}">{text}</span>'
    shade = 0.12 + 0.33 * min(1.0, max(0.0, weight))
    return f'<span class="k" style="--w:{shade:.2f}" title="{title}">{text}</span>'


def ratio_at(record: TokenRecord, place: int) -> float:
    """p(policy) / p(server) of a token, at most e^50."""
    return math.exp(min(50.0, float(record.target_logp_N[place]) - float(record.server_logp_N[place])))


def table(heads: tuple[str, ...], rows: Iterable[Iterable[str]]) -> str:
    head = "".join(f"<th>{_text(cell)}</th>" for cell in heads)
    body = "\n".join("<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>\n{body}</table>"


def _text(value: str) -> str:
    return html.escape(str(value))
