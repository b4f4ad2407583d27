"""RUN/report.html: one file with everything in it, which no network is asked for."""

import base64
import hashlib
import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from megatron_jackpot.monitor.report.content import Tree, content

REPORT = "report.html"
SCRIPTS = ("uPlot.iife.min.js", "elements.js", "curves.js", "tokens.js", "page.js")
STYLES = ("uPlot.min.css", "page.css")


def write_report(folders: Sequence[Path], out: Path | None = None) -> Path:
    """Write the page of one run, or of several beside each other, and return its path.

    Raises ValueError for a folder without metrics, a bad record, or several runs without `out`: the page is
    no single run's.
    """
    if out is None and len(folders) > 1:
        raise ValueError("The page of several runs belongs to none of them. Name it with --out FILE.")
    out = out or Path(folders[0]) / REPORT
    if out.is_dir():
        raise ValueError(f"--out {out} is a folder. Name a file: --out {out / REPORT}")
    page = render(content(folders))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out {out} cannot be made: {error}. Name another place.") from error
    partial = out.with_name(f".{out.name}.partial")
    partial.write_text(page, encoding="utf-8")
    partial.replace(out)
    return out


def render(tree: Tree, *, live_s: float | None = None) -> str:
    """The page; with `live_s` it asks its own server every so many seconds for a newer tree.

    Only the scripts and styles of assets/ run: their hashes stand in the page's policy, so that text of a
    model could not run even if it became markup.
    """
    scripts, styles = [asset(name) for name in SCRIPTS], [asset(name) for name in STYLES]
    connect = "'none'" if live_s is None else "'self'"
    policy = (
        f"default-src 'none'; script-src {_hashes(scripts)}; style-src {_hashes(styles)}; "
        f"connect-src {connect}; base-uri 'none'; form-action 'none'"
    )
    holes = {
        "@POLICY@": policy,
        "@STYLES@": "".join(f"<style>{style}</style>\n" for style in styles),
        "@DATA@": embedded(tree | {"live_s": live_s}),
        "@SCRIPTS@": "".join(f"<script>{script}</script>\n" for script in scripts),
    }
    # What fills a hole is not searched for others.
    parts = [asset("page.html")]
    for hole, filling in holes.items():
        before, after = parts.pop().split(hole)
        parts += [before, filling, after]
    return "".join(parts)


def embedded(tree: Tree) -> str:
    """JSON for a script element: no "<", with which a text could end it, and nothing that is not finite."""
    text = json.dumps(tree, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c")


def asset(name: str) -> str:
    return (files("megatron_jackpot.monitor.report") / "assets" / name).read_text(encoding="utf-8")


def _hashes(texts: Sequence[str]) -> str:
    hashed = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in texts)
    return " ".join(f"'sha256-{one}'" for one in hashed)
