"""Generated answers: other forms of a reference, and near misses in value, sign, unit and order."""

import random
from collections.abc import Callable, Iterator
from fractions import Fraction

Case = tuple[str, list[str], list[str]]
"""Reference, answers that say the same, answers that nearly do."""

UNITS = [
    ("cm", "m"),
    ("kg", "g"),
    ("hours", "minutes"),
    ("dollars", "cents"),
    ("apples", "pears"),
    ("km", "miles"),
]
WORDS = [
    "east",
    "west",
    "seat",
    "eats",
    "odd",
    "even",
    "north",
    "thorn",
    "triangle",
    "integral",
    "Paris",
    "pairs",
]
VARIABLES = "xyznk"


def integers(rng: random.Random) -> Case:
    n = rng.randint(2, 10 ** rng.randint(1, 20))
    same = [
        f"{n:,}",
        f"{n}.0",
        rf"{n}\text{{ apples}}",
        rf"x = {n}",
        f"${n}$",
        f"{n:,}".replace(",", r"\,"),
        f"+{n}",
    ]
    return (
        str(n),
        same,
        [str(n + 1), str(n - 1), f"-{n}", f"{n}0", f"{n}.5", f"{n}x", rf"\frac{{1}}{{{n}}}", f"{n}e1"],
    )


def decimals(rng: random.Random) -> Case:
    places = rng.randint(1, 12)
    n = rng.randint(1, 10**places) * 10 + rng.randint(1, 9)
    text = f"{n:0{places + 2}d}"
    written = f"{text[: -places - 1]}.{text[-places - 1 :]}"
    near = f"{n + 1:0{places + 2}d}"
    same = [f"{written}0", rf"\frac{{{n}}}{{{10 ** (places + 1)}}}", rf"{n} \times 10^{{-{places + 1}}}"]
    wrong = [f"{near[: -places - 1]}.{near[-places - 1 :]}", f"-{written}", f"1{written}", f"{n}e-{places}"]
    return written, same, wrong


def fractions(rng: random.Random) -> Case:
    value = Fraction(rng.choice([1, 2, 4, 5, 8, 10]), rng.choice([3, 7, 11, 13, 17]))
    a, b = value.numerator, value.denominator
    same = [f"{a}/{b}", rf"\dfrac{{{2 * a}}}{{{2 * b}}}", rf"\frac{{-{a}}}{{-{b}}}", rf"{a} \div {b}"]
    wrong = [
        rf"\frac{{{b}}}{{{a}}}",
        rf"-\frac{{{a}}}{{{b}}}",
        rf"\frac{{{a + 1}}}{{{b}}}",
        f"{a}/{b + 1}",
        f"{a},{b}",
    ]
    wrong += [f"{a}:{b}", f"({a},{b})", f"{a / b:.2f}", rf"\frac{{{a}}}{{{b}}}x"]
    return rf"\frac{{{a}}}{{{b}}}", same, [answer for answer in wrong if a != b and answer != f"{a}/{b}"]


def mixed(rng: random.Random) -> Case:
    whole, b = rng.randint(1, 20), rng.randint(3, 9)
    a = rng.randint(1, b - 1)
    gold = rng.choice([f"{whole} {a}/{b}", rf"{whole}\frac{{{a}}}{{{b}}}"])
    same = [rf"\frac{{{whole * b + a}}}{{{b}}}", rf"{whole}\tfrac{{{a}}}{{{b}}}", f"{whole} {a}/{b} cups"]
    wrong = [
        rf"\frac{{{whole * a}}}{{{b}}}",
        f"{whole}{a}/{b}",
        f"{a}/{b}",
        f"-{whole} {a}/{b}",
        f"{whole + 1} {a}/{b}",
    ]
    return gold, same, [w for w in wrong if w != rf"\frac{{{whole * b + a}}}{{{b}}}"]


def powers(rng: random.Random) -> Case:
    n, m = rng.randint(1, 9), rng.randint(20, 400)
    wrong = [
        rf"{n} \times 10^{{{m + 1}}}",
        rf"{n} \times 10^{{-{m}}}",
        rf"-{n} \times 10^{{{m}}}",
        "0",
        rf"{n}^{{10}}",
    ]
    return rf"{n} \times 10^{{{m}}}", [f"{n}e{m}", f"{n}.0 * 10^{m}", str(n * 10**m)], wrong


def tiny(rng: random.Random) -> Case:
    m = rng.randint(60, 900)
    wrong = [
        rf"\frac{{1}}{{2^{{{m + 1}}}}}",
        rf"-\frac{{1}}{{2^{{{m}}}}}",
        rf"\frac{{1}}{{3^{{{m}}}}}",
        "0",
        f"2^{{{m}}}",
    ]
    return rf"\frac{{1}}{{2^{{{m}}}}}", [f"2^{{-{m}}}"], wrong


def measured(rng: random.Random) -> Case:
    n, (unit, other) = rng.randint(2, 999), rng.choice(UNITS)
    same = [str(n), rf"{n}\text{{ {unit}}}", rf"{n}\,\mathrm{{{unit}}}", f"{n}.0 {unit}"]
    wrong = [
        f"{n} {other}",
        rf"{n}\text{{ {other}}}",
        f"{n + 1} {unit}",
        f"-{n} {unit}",
        rf"{n}\text{{ {unit}}}^2",
    ]
    return rng.choice([f"{n} {unit}", rf"{n}\text{{ {unit}}}"]), same, wrong


def percents(rng: random.Random) -> Case:
    n = rng.randint(2, 99)
    wrong = [rf"{n + 1}\%", rf"-{n}\%", rf"0.{n:02d}\%", str(n + 1), f"0.{n + 1:03d}", f"{n * 100}"]
    return rf"{n}\%", [f"{n}%", f"{n} percent", str(n), f"0.{n:02d}"], wrong


def tuples(rng: random.Random) -> Case:
    items = rng.sample(range(-20, 20), rng.randint(2, 4))
    swapped = [*items[1:], items[0]]
    changed = [items[0] + 50, *items[1:]]
    text, braces = ", ".join(map(str, items)), ",".join(map(str, items))
    wrong = [f"({', '.join(map(str, swapped))})", f"({', '.join(map(str, changed))})", rf"\{{{text}\}}"]
    wrong += [f"({', '.join(map(str, items[:-1]))})", f"({', '.join(str(-item) for item in items)})"]
    wrong += [f"[{text}]"] * (len(items) == 2) + [f"({text}, 0)"]
    return f"({text})", [rf"\left({braces}\right)", f"({braces})"], wrong


def sets(rng: random.Random) -> Case:
    items = rng.sample(range(-30, 30), rng.randint(2, 4))
    shuffled = ", ".join(map(str, items[::-1]))
    changed = ", ".join(map(str, [items[0] + 70, *items[1:]]))
    text = ", ".join(map(str, items))
    wrong = [
        rf"\{{{changed}\}}",
        changed,
        rf"\{{{', '.join(map(str, items[:-1]))}\}}",
        f"({text})",
        rf"\{{{text}, 99\}}",
    ]
    return rf"\{{{text}\}}", [rf"\{{{shuffled}\}}", shuffled, text.replace(", ", ",")], wrong


def assignments(rng: random.Random) -> Case:
    a, b = rng.sample(range(2, 60), 2)
    wrong = [
        f"x = {b}, y = {a}",
        f"y = {a}, x = {b}",
        f"x = {a}, y = {b + 1}",
        f"{b}, {a}",
        f"x = {a}",
        f"({b}, {a})",
    ]
    return f"x = {a}, y = {b}", [f"y = {b}, x = {a}", f"x={a}; y={b}", f"(x, y) = ({a}, {b})"][:2], wrong


def intervals(rng: random.Random) -> Case:
    a = rng.randint(-20, 20)
    b = a + rng.randint(1, 9)
    wrong = [f"[{a}, {b}]", f"({a}, {b})", f"({a}, {b}]", f"[{a}, {b + 1})", f"[{b}, {a})", f"[{-b}, {-a})"]
    return f"[{a}, {b})", [rf"\left[{a},{b}\right)", rf"x \in [{a}, {b})"], wrong


def words(rng: random.Random) -> Case:
    word = rng.choice(WORDS)
    others = [other for other in WORDS if other != word]
    same = [rf"\text{{{word}}}", word.upper(), f"{word}.", rf"\textbf{{{word}}}", f"**{word}**"]
    return (
        rng.choice([word, rf"\text{{{word}}}"]),
        same,
        [*rng.sample(others, 3), word[::-1], f"not {word}", word[:-1]],
    )


def letters(rng: random.Random) -> Case:
    letter, other = rng.sample("ABCDE", 2)
    same = [rf"\text{{({letter})}}", f"({letter})", rf"\textbf{{{letter}}}", f"{letter}.", f"({letter}) 12"]
    return (
        letter,
        same,
        [other, f"({other})", rf"\text{{{other}}}", f"{other}. {letter}", f"{letter}, {other}"],
    )


def dates(rng: random.Random) -> Case:
    y, m, d = rng.randint(1900, 2030), rng.randint(2, 12), rng.randint(2, 28)
    wrong = [
        f"{y}-{m:02d}-{d - 1:02d}",
        f"{y - 1}-{m:02d}-{d:02d}",
        str(y - m - d),
        f"{y}-{m - 1:02d}-{d:02d}",
        str(y),
    ]
    return f"{y}-{m:02d}-{d:02d}", [f"{y}/{m}/{d}", rf"\text{{{y}-{m:02d}-{d:02d}}}"], wrong


def ratios(rng: random.Random) -> Case:
    a, b = rng.sample(range(2, 59), 2)
    wrong = [
        f"{b}:{a}",
        f"{a}:{b + 1}",
        f"{a + 1}:{b}",
        str(a - b),
        f"{a}-{b}",
        f"-{a}:{b}",
        f"{a}:{b}:1",
        f"{a}.{b}",
    ]
    return f"{a}:{b}", [f"{a} : {b}", rf"{a}\colon {b}"], wrong


def bases(rng: random.Random) -> Case:
    base = rng.randint(3, 9)
    digits = "1" + "".join(str(rng.randrange(base)) for _ in range(3))
    wrong = [
        f"{digits}_{base + 1}",
        f"{digits}1_{base}",
        f"-{digits}_{base}",
        f"{digits}1",
        f"{int(digits, base)}",
    ]
    return f"{digits}_{base}", [rf"{digits}_{{{base}}}", digits, f"{digits}_{{ {base} }}"], wrong


def roots(rng: random.Random) -> Case:
    a, b = rng.randint(2, 9), rng.choice([2, 3, 5, 6, 7])
    wrong = [
        rf"-{a}\sqrt{{{b}}}",
        rf"{a}\sqrt{{{b + 5}}}",
        rf"{a + 1}\sqrt{{{b}}}",
        rf"\sqrt{{{a * b}}}",
        rf"{b}\sqrt{{{a}}}",
    ]
    wrong = [answer for answer in wrong if answer != rf"{a}\sqrt{{{b}}}"]
    value = a * b**0.5
    wrong += [f"{value:.2f}", f"{value + 0.001:.6f}", str(a * a * b)]
    return rf"{a}\sqrt{{{b}}}", [rf"\sqrt{{{a * a * b}}}", rf"\sqrt{b} \cdot {a}", f"{value:.8f}"], wrong


def polynomials(rng: random.Random) -> Case:
    a, b, v = rng.randint(2, 9), rng.randint(1, 9), rng.choice(VARIABLES)
    other = VARIABLES[VARIABLES.index(v) - 1]
    wrong = [
        f"{a}{v}^2-{b}",
        f"{a}{v}^3+{b}",
        f"{a}{other}^2+{b}",
        f"{a + 1}{v}^2+{b}",
        f"-{a}{v}^2-{b}",
        f"{b}",
        f"{a}{v}+{b}",
    ]
    return f"{a}{v}^2+{b}", [f"{b} + {a}{v}^{{2}}", rf"{a} \cdot {v}^2 + {b}", f"y = {a}{v}^2+{b}"], wrong


def angles(rng: random.Random) -> Case:
    n = rng.randint(1, 179)
    return (
        rf"{n}^\circ",
        [str(n), rf"{n}^{{\circ}}", f"{n} degrees"],
        [rf"{n + 1}^\circ", rf"-{n}^\circ", rf"{n}\text{{ radians}}", rf"\frac{{{n}}}{{180}}", f"{n}%"],
    )


def inequalities(rng: random.Random) -> Case:
    n, v = rng.randint(-20, 20), rng.choice("xyz")
    wrong = [
        f"{v} < {n}",
        rf"{v} \ge {n}",
        f"{v} > {n + 1}",
        f"{v} > {-n - 50}",
        f"{n}",
        f"{n} > {v}",
        f"{v} = {n}",
    ]
    return f"{v} > {n}", [f"{n} < {v}"], wrong


def pairs_of_roots(rng: random.Random) -> Case:
    n = rng.randint(2, 40)
    return (
        rf"\pm {n}",
        [f"{n}, -{n}", rf"x = \pm {n}", rf"\{{-{n}, {n}\}}"],
        [str(n), f"-{n}", rf"\pm {n + 1}", f"{n}, {n}", f"({n}, -{n})" + "0"],
    )


FAMILIES: list[Callable[[random.Random], Case]] = [
    integers,
    decimals,
    fractions,
    mixed,
    powers,
    tiny,
    measured,
    percents,
    tuples,
    sets,
    assignments,
    intervals,
    words,
    letters,
    dates,
    ratios,
    bases,
    roots,
    polynomials,
    angles,
    inequalities,
    pairs_of_roots,
]


def cases(per_family: int, seed: int) -> Iterator[tuple[str, Case]]:
    for family in FAMILIES:
        rng = random.Random(f"{seed} {family.__name__}")
        for _ in range(per_family):
            yield family.__name__, family(rng)
