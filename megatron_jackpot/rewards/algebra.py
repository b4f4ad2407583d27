r"""Equality of formulas by math-verify, where it can be trusted.

math-verify takes a difference below 1e-15 for nothing, so what it finds equal must also be equal in relative
terms, at numbers put in for the variables. Time limits count CPU time, so a busy machine does not matter.
They are signals: main thread only.
"""

import functools
import logging
import math
import re
import signal
from collections.abc import Callable
from fractions import Fraction
from types import FrameType
from typing import Any, TypeVar, cast

import sympy
from latex2sympy2_extended import NormalizationConfig
from math_verify import LatexExtractionConfig, parse, verify
from sympy.core.relational import Relational

from megatron_jackpot.rewards.numbers import Number, rounds_to

# It logs whole responses; what went wrong is counted and reported by the pool instead.
logging.getLogger("math_verify").setLevel(logging.CRITICAL)
logging.getLogger("latex2sympy2_extended").setLevel(logging.CRITICAL)

T = TypeVar("T")

LIMIT_S = 5.0
"""CPU time of one reading, of one comparison and of one evaluation."""
MAX_SIZE = 1e5
"""Digits of the largest number that is evaluated; a formula with a larger one is compared as written."""
TOLERANCE = 1e-12
POINTS = ("1.3702", "2.1173", "0.6931")

# Without its list of units, which takes the t of 5t and the word east for one.
READER = LatexExtractionConfig(
    normalization_config=NormalizationConfig(
        basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="last"
    )
)
NUMERAL = re.compile(r"[0-9]+")
VARIABLE = re.compile(r"(?<![\\A-Za-z])[abcghj-z](?![A-Za-z])")
"""A lone letter that LaTeX's grammar gives no meaning of its own: not d, e, f or i."""
ASCII = re.compile(
    r"(?<![\\A-Za-z])(arcsin|arccos|arctan|sinh|cosh|tanh|sin|cos|tan|cot|sec|csc|log|ln|exp|pi|theta|alpha|beta"
    r"|gamma|lambda|max|min|gcd|lcm)(?![A-Za-z])"
)


def same(gold: str, answer: str) -> bool:
    """Whether two formulas in LaTeX are equal. Raises TimeoutError where that took too long."""
    left, right = parse_latex(gold), parse_latex(answer)
    if left is None or right is None:
        return False
    return _equal(left, right)


def same_number(number: Number, formula: str, *, number_is_gold: bool) -> bool:
    """Whether a formula comes to a number, or the number to its decimal with six or more digits."""
    parsed = parse_latex(formula)
    if parsed is None or not isinstance(number.value, Fraction) or not isinstance(parsed, sympy.Expr):
        return False
    if parsed.free_symbols or _size(parsed) > MAX_SIZE:
        return False
    exact = sympy.Rational(number.value.numerator, number.value.denominator)
    if _equal(*((exact, parsed) if number_is_gold else (parsed, exact))):
        return True
    value = _limited(lambda: parsed.doit().evalf(40))
    if not getattr(value, "is_Float", False):
        return False
    return rounds_to(Fraction(str(value)), number)


def warm_up() -> None:
    """The grammar's tables are made at its first use, which takes seconds: not on an item's time."""
    for latex in (r"\frac{-3\sqrt{2}+\pi}{4}", "x^{2}-2x(y+1)=0", r"e^{i}\cdot \sin(2)", "1<x", r"\{1,2\}"):
        parse_latex(latex)


@functools.lru_cache(maxsize=4096)
def parse_latex(latex: str) -> Any:
    """The sympy object of a formula, None where it cannot be read. Raises TimeoutError."""
    boxed = rf"\boxed{{{_for_reader(latex)}}}"
    try:
        found = _limited(
            lambda: parse(
                boxed,
                extraction_config=[READER],
                fallback_mode="no_fallback",
                parsing_timeout=cast(int, None),  # no limit of its own, which its annotation leaves out
                raise_on_error=True,
            )
        )
    except (MemoryError, RecursionError, TimeoutError):
        raise
    except Exception:
        return None
    return found[0] if found else None


def readable(latex: str) -> bool:
    """Whether math-verify reads a formula. Raises TimeoutError.

    It is asked once for each form, which is what makes the check of many labels quick: 17 and 42 are read
    alike in the same place, and so are k and n. 0 and 1 stay, for they may make a formula another one, and
    different letters stay different: x - x is not x - y.
    """
    return _form_is_read(_form(latex)) or parse_latex(latex) is not None


def _form(latex: str) -> str:
    letters = dict.fromkeys(VARIABLE.findall(latex))
    names = dict(zip(letters, "xyzabcghjklmnopqrstuvw", strict=False))
    return NUMERAL.sub(_like, VARIABLE.sub(lambda found: names[found.group()], latex))


@functools.lru_cache(maxsize=65536)
def _form_is_read(form: str) -> bool:
    return parse_latex(form) is not None


def _like(numeral: re.Match[str]) -> str:
    digits = numeral.group()
    if digits in ("1", "0" * len(digits)):
        return digits
    return "2" if len(digits) == 1 else "23"  # \frac12 has two arguments


def _for_reader(latex: str) -> str:
    latex = latex.replace("**", "^")
    latex = ASCII.sub(r"\\\1 ", latex)
    latex = re.sub(r"(?<!\\)sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}", latex)
    latex = re.sub(r"\^\s*(-?\d+)", r"^{\1}", latex)
    # Degrees inside a formula; around it they are its unit.
    return re.sub(r"(\d+(?:\.\d+)?)\s*\^\{\\circ\}", r"(\\frac{\1\\pi}{180})", latex)


def _equal(gold: Any, answer: Any) -> bool:
    if _size(gold) > MAX_SIZE or _size(answer) > MAX_SIZE:
        return bool(gold == answer)
    if isinstance(gold, Relational) != isinstance(answer, Relational) and not isinstance(answer, sympy.Set):
        # 2x = 10 is not 10.
        return False
    if not _limited(lambda: _close(gold, answer)):
        return False
    if (
        isinstance(gold, sympy.Eq)
        and isinstance(answer, sympy.Eq)
        and _limited(lambda: _proportional(gold, answer))
    ):
        return True
    try:
        return _limited(lambda: verify([gold], [answer], timeout_seconds=None, raise_on_error=True))
    except (MemoryError, RecursionError, TimeoutError):
        raise
    except Exception:
        return False


class _OutOfTime(BaseException):
    """Not an Exception: sympy passes over those."""


def _limited(work: Callable[[], T]) -> T:
    """Raises TimeoutError after LIMIT_S of CPU time."""

    def out_of_time(number: int, frame: FrameType | None) -> None:
        raise _OutOfTime

    before = signal.signal(signal.SIGPROF, out_of_time)
    signal.setitimer(signal.ITIMER_PROF, LIMIT_S)
    try:
        return work()
    except _OutOfTime as error:
        raise TimeoutError(f"an answer took sympy and math-verify more than {LIMIT_S:g} s.") from error
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def _close(gold: Any, answer: Any) -> bool:
    """Whether two expressions agree in relative terms wherever both can be evaluated."""
    if isinstance(gold, sympy.MatrixBase) and isinstance(answer, sympy.MatrixBase):
        return gold.shape == answer.shape and all(map(_close, gold.flat(), answer.flat()))
    if not isinstance(gold, sympy.Expr) or not isinstance(answer, sympy.Expr):
        return True
    symbols = sorted(gold.free_symbols | answer.free_symbols, key=str)
    for shift, point in enumerate(POINTS if symbols else POINTS[:1]):
        at = {symbol: sympy.Rational(point) + i + shift for i, symbol in enumerate(symbols)}
        left, right = (_value(side, at) for side in (gold, answer))
        if left is None or right is None:
            continue
        size = max(abs(left), abs(right))
        if left != 0 and right != 0 and abs(left - right) > TOLERANCE * size:
            return False
    return True


def _proportional(gold: sympy.Eq, answer: sympy.Eq) -> bool:
    """Whether left less right of two equations have one ratio at all points: 2y = 4x + 6 is y = 2x + 3."""
    symbols = sorted(gold.free_symbols | answer.free_symbols, key=str)
    ratios = []
    for shift, point in enumerate(POINTS):
        at = {symbol: sympy.Rational(point) * (i + 1) + shift for i, symbol in enumerate(symbols)}
        sides = ((cast(sympy.Expr, side.lhs), cast(sympy.Expr, side.rhs)) for side in (gold, answer))
        left, right = (_value(lhs - rhs, at) for lhs, rhs in sides)
        if left is None or right is None or right == 0 or left == 0:
            return False
        ratios.append(left / right)
    return all(abs(ratio - ratios[0]) <= TOLERANCE * abs(ratios[0]) for ratio in ratios)


def _value(expression: Any, at: dict[Any, Any]) -> Any:
    try:
        value = expression.subs(at).doit().evalf(30)
    except (MemoryError, RecursionError, TimeoutError):
        raise
    except Exception:
        return None
    return (
        value if value.is_number and value.is_finite and value.is_Atom | value.is_Add | value.is_Mul else None
    )


def _size(expression: Any) -> float:
    """An estimate from above of the digits that the numbers of an expression have when evaluated."""
    arguments = [_size(part) for part in getattr(expression, "args", ()) if isinstance(part, sympy.Basic)]
    if isinstance(expression, sympy.Integer):
        return len(str(abs(expression.p))) if abs(expression.p) < 10**4000 else math.inf
    if isinstance(expression, sympy.Pow) and len(arguments) == 2:
        base, exponent = expression.args
        if not exponent.is_number:
            return max(arguments)
        return max(arguments[0], 0.3) * 10 ** min(_log10(exponent), 20.0)
    if isinstance(expression, sympy.factorial):
        return max(1.0, _log10(expression.args[0])) * 10 ** min(_log10(expression.args[0]), 20.0)
    return sum(arguments) if arguments else 1.0


def _log10(expression: Any) -> float:
    """Base-10 logarithm of a constant's size, from above; 0 below 1."""
    if isinstance(expression, sympy.Number):
        return math.log10(max(1.0, abs(float(expression)))) if abs(expression) < 10**300 else 300.0
    return min(_size(expression), 300.0)
