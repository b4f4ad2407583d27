r"""How an answer is written, brought to one form: plain characters, plain LaTeX, no wrapping.

Only the writing changes, never the value: a half sign behind 3 becomes
3\frac{1}{2}, a root sign before 12 \sqrt{12}, a thin space a space.
"""

import re
import unicodedata

DOLLAR = "\ue000"
"""Stands for a dollar sign that means money (\\$), so that it is not taken for one around a formula."""

SIGNS = {
    **dict.fromkeys("\u2212\u2010\u2011\u2012\u2013\u2014\u2015\ufe63\uff0d", "-"),
    **dict.fromkeys("\u00d7\u2715\u2a2f", r"\times "),
    **dict.fromkeys("\u00b7\u22c5\u2219\u2217", r"\cdot "),
    **dict.fromkeys("\u00b0\u00ba\u02da", r"^{\circ}"),
    **dict.fromkeys("\u2018\u2019\u2032", "'"),
    **dict.fromkeys("\u201c\u201d\u2033", '"'),
    **dict.fromkeys("\u2215\u2044", "/"),
    "\u00f7": r"\div ",
    "\u2264": r"\le ",
    "\u2265": r"\ge ",
    "\u2260": r"\ne ",
    "\u2248": r"\approx ",
    "\u00b1": r"\pm ",
    "\u2213": r"\mp ",
    "\u221e": r"\infty ",
    "\u222a": r"\cup ",
    "\u2229": r"\cap ",
    "\u2205": r"\emptyset ",
    "\u2208": r"\in ",
    "\u2220": r"\angle ",
    "\u2261": r"\equiv ",
    "\u2236": ":",
    "\u27e8": r"\langle ",
    "\u27e9": r"\rangle ",
    "\u230a": r"\lfloor ",
    "\u230b": r"\rfloor ",
    "\u2308": r"\lceil ",
    "\u2309": r"\rceil ",
    "\u211d": r"\mathbb{R}",
    "\u2124": r"\mathbb{Z}",
    "\u211a": r"\mathbb{Q}",
    "\u2115": r"\mathbb{N}",
    "\u2102": r"\mathbb{C}",
    "\u066b": ".",
    "\u066c": ",",
}
GREEK = (
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi rho sigma sigma tau "
    "upsilon phi chi psi omega"
).split()
SIGNS |= {chr(0x3B1 + i): rf"\{name} " for i, name in enumerate(GREEK) if name != "omicron"}
SIGNS |= {chr(0x391 + i): rf"\{GREEK[i].capitalize()} " for i in (2, 3, 7, 10, 13, 15, 18, 21, 22, 23)}
ROOTS = {"\u221a": r"\sqrt", "\u221b": r"\sqrt[3]", "\u221c": r"\sqrt[4]"}

RAISED = re.compile(r"[\u00b9\u00b2\u00b3\u2070-\u207f]+")
LOWERED = re.compile(r"[\u2080-\u208e]+")
ROOT = re.compile(r"([\u221a-\u221c])\s*(?:\(([^()]*)\)|\{([^{}]*)\}|(\d+(?:\.\d+)?|[A-Za-z]|\\[A-Za-z]+)?)")

FONTS = (
    "text|textbf|textit|textrm|textsf|texttt|textnormal|textup|textsc|mathrm|mathbf|mathit|mathsf|mathtt|mbox"
    "|hbox|operatorname|boldsymbol|bm|emph|underline"
)
REWRITES = [
    (re.compile(r"\\\$"), DOLLAR),
    (re.compile(r"\$\$(.+?)\$\$"), r" \1 "),
    (re.compile(r"\$(?=[^\s$])([^$]*?(?<=[^\s$]))\$(?!\d)"), r" \1 "),
    (re.compile(r"(?<!\\)\\[()\[\]]"), " "),
    (re.compile(r"(?<!\\)\\(?:left|right)\s*\."), ""),
    (re.compile(r"(?<!\\)\\(?:left|right|middle|[bB]igg?[lrm]?)\s*(?=[\\()\[\]{}|/<>])"), ""),
    (re.compile(r"(?<!\\)\\!"), ""),
    (re.compile(r"(?<=\d)\s*\{,\}\s*(?=\d)"), ""),
    (
        re.compile(r"(?<!\\)\\(?:[,;:> ]|quad(?![A-Za-z])|qquad(?![A-Za-z])|thinspace(?![A-Za-z]))|(?<!\\)~"),
        " ",
    ),
    (re.compile(r"\\[hv](?:space|phantom)\*?\{[^{}]*\}"), " "),
    (re.compile(r"\\(?:displaystyle|textstyle|limits|nolimits|rm|bf|it)(?![A-Za-z])"), ""),
    (re.compile(r"\\[dtc]frac(?![A-Za-z])"), r"\\frac"),
    (re.compile(rf"\\(?:{FONTS})\s*(?=\{{)"), r"\\text"),
    (re.compile(r"\\text\{\s*(?:,\s*)?(and|or)\s*\}"), r" \1 "),
    (re.compile(r"\\(?:lor|vee)(?![A-Za-z])"), " or "),
    (re.compile(r"\\(?:land|wedge)(?![A-Za-z])"), " and "),
    (re.compile(r"\\lbrace(?![A-Za-z])"), r"\\{"),
    (re.compile(r"\\rbrace(?![A-Za-z])"), r"\\}"),
    (re.compile(r"\\(?:lbrack)(?![A-Za-z])"), "["),
    (re.compile(r"\\(?:rbrack)(?![A-Za-z])"), "]"),
    (re.compile(r"\\(?:lvert|rvert|vert)(?![A-Za-z])"), "|"),
    (re.compile(r"\\colon(?![A-Za-z])"), ":"),
    (re.compile(r"\\varnothing(?![A-Za-z])|\\\{\s*\\\}"), r"\\emptyset"),
    (re.compile(r"\\leqs?lant(?![A-Za-z])|\\leq(?![A-Za-z])|<="), r"\\le "),
    (re.compile(r"\\geqs?lant(?![A-Za-z])|\\geq(?![A-Za-z])|>="), r"\\ge "),
    (re.compile(r"\\neq(?![A-Za-z])|!="), r"\\ne "),
    (re.compile(r"\\lt(?![A-Za-z])"), "<"),
    (re.compile(r"\\gt(?![A-Za-z])"), ">"),
    (
        re.compile(r"\^\s*(?:\{\s*)?\\(?:circ|degree)(?![A-Za-z])\s*\}?|\\degree(?![A-Za-z])|\\textdegree"),
        r"^{\\circ}",
    ),
    (re.compile(r"\\([%#&_])"), r"\1"),
    (re.compile(r"\s+"), " "),
]
APPROXIMATE = re.compile(
    r"^(?:\\approx|\\sim|about|approximately|roughly|approx\.?)(?![A-Za-z])\s*", re.IGNORECASE
)
MAX_WRAPPINGS = 40
"""Fonts, quotes and the like around each other that are taken off: each time all is looked at again."""
WRAPPED = re.compile(r"^(?:\*\*|`|__|\"|')(.+?)(?:\*\*|`|__|\"|')$")


def plain_characters(text: str) -> str:
    """Typographic characters as ASCII or LaTeX; control characters, lone surrogates and marks left out."""
    if text.isascii():
        return re.sub(r"[\x00-\x08\x0b-\x1f\x7f]", "", text)
    text = RAISED.sub(lambda run: "^{" + unicodedata.normalize("NFKC", run.group()) + "}", text)
    text = LOWERED.sub(lambda run: "_{" + unicodedata.normalize("NFKC", run.group()) + "}", text)
    text = ROOT.sub(lambda root: ROOTS[root[1]] + "{" + (root[2] or root[3] or root[4] or "") + "}", text)
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f]", "", "".join(_character(c) for c in text))


def _character(c: str) -> str:
    if c.isascii():
        return c
    if (sign := SIGNS.get(c)) is not None:
        return sign
    category = unicodedata.category(c)
    if category in ("Cc", "Cf", "Cs", "Co", "Cn"):
        return ""
    if category == "Nd":
        return str(unicodedata.decimal(c))
    plain = unicodedata.normalize("NFKC", c)
    if "\u2044" in plain:
        above, _, below = plain.partition("\u2044")
        return rf"\frac{{{above or 1}}}{{{below}}}" if below else c
    return "".join(SIGNS.get(part, part) for part in plain)


def tidy(text: str) -> str:
    """One form of an answer's LaTeX, without what stands around it: delimiters, braces, fonts, full stops."""
    text = plain_characters(text)
    for pattern, replacement in REWRITES:
        text = pattern.sub(replacement, text)
    for _ in range(MAX_WRAPPINGS):
        before = text
        text = strip_braces(text.strip().rstrip(".,;: \\").strip())
        if wrapped := WRAPPED.match(text):
            text = wrapped.group(1)
        if text.startswith(r"\text{") and _brace_pairs(text).get(5) == len(text) - 1:
            text = text[6:-1]
        text = APPROXIMATE.sub("", text)
        if text == before:
            break
    return text


def strip_braces(text: str) -> str:
    """Without the braces that hold all of it."""
    if not text.startswith("{"):
        return text
    pairs, start, stop = _brace_pairs(text), 0, len(text)
    while start < stop and pairs.get(start) == stop - 1:
        start, stop = start + 1, stop - 1
    return text[start:stop]


def _brace_pairs(text: str) -> dict[int, int]:
    pairs: dict[int, int] = {}
    opened: list[int] = []
    for mark in re.finditer(r"\\.|[{}]", text):
        if mark.group() == "{":
            opened.append(mark.start())
        elif mark.group() == "}" and opened:
            pairs[opened.pop()] = mark.start()
    return pairs
