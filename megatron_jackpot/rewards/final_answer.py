r"""The final answer of a response, as text.

Thinking is no answer. Of the rest, in this order: the last box (none where that box is unfinished), the last
<answer>...</answer>, what follows the last ####, what follows the last "answer is" or "answer:", a response
that is nothing but an answer, and at last the last formula or number.
"""

import re
from collections.abc import Iterator

from megatron_jackpot.rewards.written import plain_characters

THINK = re.compile(
    r"<(/?)(?:think|thinking|thought|reasoning|seed:think)>|\[(/?)THINK\]|\u25c1(/?)think\u25b7"
    r"|<\|(?:begin|(end))_of_thought\|>",
    re.IGNORECASE,
)
"""What closes a thought has a group that is not empty."""
BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*")
ANSWER_BEGIN, ANSWER_END = (re.compile(tag, re.IGNORECASE) for tag in ("<answer>", "</answer>"))
SPOKEN = re.compile(
    r"\banswers?\b(?:\W{0,4}[:=]|[^.:\n]{0,60}?\b(?:is|are|be|equals)\b\s*:?)[\s*]*(?=\S)", re.IGNORECASE
)
SENTENCE_END = re.compile(r"[.!?](?=\s+[A-Z]|\s*$)|\*\*(?=\s|[.,]|$)")
NUMBER = r"(?<![\w.])[-+]?\s?(?:\d+(?:,\d{3})+(?:\.\d+)?|\d*\.?\d+)(?:[eE][-+]?\d+)?"
SPAN = re.compile(
    r"\$\$(.+?)\$\$|\\\[(.+?)\\\]|\\\((.+?)\\\)|(?<![\\$])\$(?=[^\s$])([^$\n]*?[^\s$\\]|[^\s$\\])\$(?!\d)"
    r"|(-?\s?\\d?frac\s*\{[^{}]*\}\s*\{[^{}]*\})"
    rf"|((?:{NUMBER})(?:\s?[:/-]\s?\d+(?:\.\d+)?)*(?:\s?\\?%)?)",
    re.DOTALL,
)
MAX_BARE = 200
"""Characters of a response that may be nothing but an answer."""
MAX_SEARCHED = 20_000
"""Characters at the end in which an answer without a mark is looked for."""


def final_answer(response: str) -> str | None:
    """The answer as written, "" for an empty or unfinished box, None where there is none to be found."""
    visible = without_thinking(response)
    if visible is None:
        return None
    marked = marked_answer(visible)
    return marked if marked is not None else _unmarked(visible.rstrip()[-MAX_SEARCHED:])


def marked_answer(text: str) -> str | None:
    """What a box, answer tags or #### hold; None where there are none of them."""
    boxes = list(_boxes(text))
    if boxes:
        return boxes[-1]
    if tagged := list(_tagged(text)):
        return tagged[-1]
    if "####" in text:
        return text.rpartition("####")[2].strip().split("\n")[0]
    return None


def without_thinking(response: str) -> str | None:
    """The response without its thoughts; None where it ends amid one.

    A closing tag without an opening one ends a thought that the prompt's template began.
    """
    visible: list[str] = []
    start, thinking = 0, False
    for tag in THINK.finditer(response):
        if any(tag.groups()):
            if not thinking:
                visible.clear()
            start, thinking = tag.end(), False
        elif not thinking:
            visible.append(response[start : tag.start()])
            thinking = True
    return None if thinking else "\n".join([*visible, response[start:]])


def _boxes(text: str) -> Iterator[str]:
    """Contents of the outermost boxes in order, "" for one that does not end within its paragraph."""
    at = 0
    while opened := BOX.search(text, at):
        start = opened.end()
        if not text.startswith("{", start):
            # \boxed 42: people mean the whole number, TeX takes its first digit.
            word = re.compile(r"[^\s$\\}]+").match(text, start)
            at = word.end() if word else start
            yield word.group().rstrip(".,;:") if word else ""
            continue
        limit = text.find("\n\n", start)
        limit = len(text) if limit < 0 else limit
        end = matching_brace(text, start, limit)
        if end is None:
            yield ""
            at = limit
        else:
            yield _innermost(text[start + 1 : end])
            at = end + 1


def matching_brace(text: str, start: int, limit: int) -> int | None:
    r"""Where the brace opened at `start` is closed before `limit`; \{ and \} do not count."""
    depth = 0
    for mark in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, start, limit):
        depth += {"{": 1, "}": -1}.get(mark.group(), 0)
        if depth == 0:
            return mark.start()
    return None


def _tagged(text: str) -> Iterator[str]:
    """What stands between answer tags, in order."""
    at = 0
    while (begin := ANSWER_BEGIN.search(text, at)) and (end := ANSWER_END.search(text, begin.end())):
        yield text[begin.end() : end.start()]
        at = end.end()


def _innermost(content: str) -> str:
    """A box in a box is the box that counts."""
    while opened := list(BOX.finditer(content)):
        start = opened[-1].end()
        end = matching_brace(content, start, len(content)) if content.startswith("{", start) else None
        if end is None:
            return ""
        content = content[start + 1 : end]
    return content


def _unmarked(text: str) -> str | None:
    text = plain_characters(text)
    if spoken := list(SPOKEN.finditer(text)):
        said = text[spoken[-1].end() :].partition("\n")[0].strip()
        end = SENTENCE_END.search(said)
        said = said[: end.start()] if end else said
        if len(said) <= MAX_BARE and (
            len(said.split()) <= 3 or not re.search(r"[A-Za-z]{2,} [A-Za-z]{2,}", said)
        ):
            return said
        if span := _last_span(said):
            return span
    bare = text.strip()
    words = re.findall(r"(?<![\\A-Za-z])[A-Za-z]{2,}", bare)
    if len(bare) <= MAX_BARE and (not words or (len(words) <= 3 and not re.search(r"\d", bare))):
        return bare
    return _last_span(text)


def _last_span(text: str) -> str | None:
    found = list(SPAN.finditer(text))
    return next(group for group in found[-1].groups() if group) if found else None
