"""math_verify: what is the answer, what is compared as what, and which references are refused."""

import time

import pytest

from megatron_jackpot.rewards import algebra, math_verify
from megatron_jackpot.rewards.final_answer import final_answer
from tests.rewards.near_misses import FAMILIES, cases

pytestmark = pytest.mark.timeout(280)


@pytest.fixture(autouse=True, scope="module")
def warm():
    algebra.warm_up()


def verdict(gold, answer):
    return math_verify.score(f"Hence it is \\boxed{{{answer}}}.", {"answer": gold})


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"First \boxed{3}, rather \boxed{4}.", "4"),
        (r"First \boxed{3}, rather \boxed{4", ""),
        (r"First \boxed{3}, rather \boxed{}", ""),
        (r"\boxed{\boxed{4}}", "4"),
        (r"\boxed{\boxed{4}", ""),
        (r"\boxed{\{1, \frac{2}{3}\}}", r"\{1, \frac{2}{3}\}"),
        (r"\fbox{4}", "4"),
        (r"it is \boxed 47.", "47"),
        ("\\boxed{4\n\nThe end}", ""),
        (r"<think>\boxed{3}</think> I give up.", "I give up."),
        (r"<think>so \boxed{3}", None),
        (r"so \boxed{3}</think> It is \boxed{4}.", "4"),
        (r"\boxed{4} <think>sure?</think> Yes, I am.", "4"),
        (r"<think>a <think> tag \boxed{3}</think> \boxed{4}", "4"),
        ("\u25c1think\u25b7\\boxed{3}\u25c1/think\u25b7I give up.", "I give up."),
        (r"<|begin_of_thought|>\boxed{3}<|end_of_thought|>\boxed{4}", "4"),
        (r"<seed:think>\boxed{3}", None),
        ("The answer is 4" + 30_000 * " ", "4"),
        (r"[THINK]\boxed{3}[/THINK]\boxed{4}", "4"),
        ("<think>3</think><answer>4</answer>", "4"),
        ("3 + 1 = 4\n#### 4", "4"),
        ("The answer is 3. No: the final answer is **4**.", "4"),
        ("Final Answer: $x^2$ as shown.", r"x^2"),
        ("The sum of 3 and 1 makes 4 in total", "4"),
        ("We sold 1,204 of them yesterday.", "1,204"),
        (r"Thus we get $\frac{1}{2}$ of it all.", r"\frac{1}{2}"),
        ("east", "east"),
    ],
)
def test_the_final_answer_is_the_last_whole_box_or_what_is_said_to_be_it_and_never_a_thought(
    response, answer
):
    found = final_answer(response)
    assert found == answer or (answer and answer in (found or "") and len(found) < len(answer) + 12)


SAME = [
    # Numbers.
    ("0.00001", "10^{-5}"),
    ("1e16", "10000000000000000"),
    ("18.0", "18"),
    ("18.", "18"),
    ("016", "16"),
    ("3 1/4", "3.25"),
    (r"-2\frac{1}{2}", "-2.5"),
    ("2 and 1/2", "2.5"),
    (r"0.\overline{6}", "2/3"),
    ("1.5 million", "1500000"),
    ("3 dozen", "36"),
    ("eleven", "11"),
    ("(1/2)", "0.5"),
    (r"\frac37", "3/7"),
    ("1{,}000{,}000", r"1\,000\,000"),
    ("1,200", r"1,\!200"),
    (r"\frac{1}{7}", "0.142857"),
    # Characters.
    ("5", "\uff15"),
    ("42", "\u0664\u0662"),
    ("-5", "\u22125"),
    ("-5", "\u20135"),
    ("3.5", "3\u00bd"),
    (r"\sqrt{12}", "\u221a12"),
    ("x^2", "x\u00b2"),
    (r"2\pi", "2\u03c0"),
    ("10^{-3}", "10\u207b\u00b3"),
    ("1234567", "1\u2009234\u2009567"),
    ("1234", "1\u202f234"),
    ("90", "90\u00b0"),
    (r"\frac{2}{3}", "\u2154"),
    # Units.
    (r"12\text{ cm}^2", "12 square centimeters"),
    ("60 miles per hour", "60 mph"),
    ("$5", "5 dollars"),
    ("5 dollars", r"\$5.00"),
    ("2 hours 30 minutes", "2 hours and 30 minutes"),
    (r"20^\circ\text{C}", "20\u00b0C"),
    (r"8\pi\text{ m}", r"8\pi"),
    ("5 people", "5"),
    ("$1.5 million", "1500000"),
    ("4 PM", "4 p.m."),
    # Words, letters, codes.
    (r"\text{Yes}", "yes"),
    ("no solution", r"\text{No solution}"),
    ("C", r"\textbf{(C)}"),
    ("D", "(D) 12"),
    ("January 15, 2024", "2024-01-15"),
    ("15 January 2024", r"\text{January 15, 2024}"),
    ("09:30", "9:30"),
    ("555-1234", "555\u20131234"),
    ("1010_2", r"1010_{\text{two}}"),
    (r"\varnothing", r"\emptyset"),
    # Collections and names.
    ("x = 2 or x = 3", "3, 2"),
    (r"x = 1 \text{ or } x = 4", r"\{1, 4\}"),
    (r"1 \pm \sqrt{2}", r"1+\sqrt2, 1-\sqrt2"),
    ("$5 and $7", "7, 5"),
    (r"\langle 1, 2 \rangle", "(1, 2)"),
    ("(1,2), (3,4)", "(3,4), (1,2)"),
    ("72", "48 + 24 = 72"),
    ("5", "x = 10/2 = 5"),
    ("f(x) = 2x", "2x"),
    ("(0, 1)", r"x \in (0, 1)"),
    # Algebra.
    ("y = 2x + 3", "2x - y + 3 = 0"),
    (r"\sin 30^\circ", "0.5"),
    ("2^10", "1024"),
    ("x^2+2x+1", "(x+1)^2"),
    (r"\frac{\pi}{4}", "pi/4"),
    ("sqrt(2)/2", r"\frac{1}{\sqrt{2}}"),
    (r"\sqrt{2}", "1.41421"),
    ("9^{9^{9^9}}",) * 2,
    (r"\begin{pmatrix} 1 & 2 \end{pmatrix}", r"\begin{bmatrix}1&2\end{bmatrix}"),
    (r"\log_2 8", "3"),
]


@pytest.mark.parametrize(("gold", "answer"), SAME)
def test_other_ways_to_write_a_value_are_accepted(gold, answer):
    math_verify.check({"answer": gold})
    assert verdict(gold, answer) == 1.0


DIFFERENT = [
    ("3 1/2", "31/2"),
    (r"3\frac12", r"\frac{3}{2}"),
    ("1e16", "1e15"),
    ("0.0000001", "0.0000002"),
    ("0", "1e-9"),
    ("12345678901234567890", "12345678901234567891"),
    ("1.23456789012345678", "1.23456789012345679"),
    (r"\frac{1}{500!}", r"\frac{1}{501!}"),
    (r"10^{-20}\pi", r"2 \cdot 10^{-20}\pi"),
    ("10^{-20}x", "10^{-21}x"),
    (r"\sqrt{2}", "1.41422"),
    (r"\sqrt{2}", "1.414"),
    ("100!", "101!"),
    ("3", "9^{9^{9^9}}"),
    ("3", "((10!)!)!"),
    ("5t", "5"),
    ("2x", "2"),
    ("x + t", "x"),
    ("5 m", "5 km"),
    ("5 mW", "5 MW"),
    ("$5", "\u20ac5"),
    ("18 apples", "18 pears"),
    (r"12\text{ cm}^3", r"12\text{ cm}^2"),
    ("4 pm", "4 am"),
    ("20\u00b0C", "20\u00b0F"),
    ("east", "seat"),
    ("AB", "BA"),
    ("even", "odd"),
    ("listen", "silent"),
    ("x'", "x"),
    ("no", "on"),
    ("2024-01-15", "2008"),
    ("2008", "2024-01-15"),
    ("3-5", "-2"),
    ("12:00", "1:00"),
    ("1/15/2024", "2/15/2024"),
    ("(0, 1)", "[0, 1]"),
    ("(1, 2)", r"\{1, 2\}"),
    ("x = 1, y = 2", "2, 1"),
    ("1 or 2", "1"),
    ("x = 5", "y = 5"),
    ("f(1) = 4", "f(2) = 4"),
    ("5", "2x = 5"),
    ("x > 3", r"x \ge 3"),
    ("x^2 + y^2 = 1", "x^2 + y^2 = 4"),
    ("2516_8", "2516_9"),
    ("a_1 + b_2", "a_2 + b_1"),
    ("3+4i", "3-4i"),
    (r"\pm 3", "3"),
    ("2 hours 30 minutes", "2"),
    (r"\begin{pmatrix}10^{-8}\\1\end{pmatrix}", r"\begin{pmatrix}10^{-9}\\1\end{pmatrix}"),
    ("|x|", "x"),
]


@pytest.mark.parametrize(("gold", "answer"), DIFFERENT)
def test_what_only_looks_alike_is_refused(gold, answer):
    assert verdict(gold, answer) == 0.0


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)
def test_no_generated_near_miss_of_value_sign_unit_or_order_is_accepted(family):
    tried = 0
    for gold, same, near in (case for name, case in cases(7, seed=11) if name == family.__name__):
        math_verify.check({"answer": gold})
        assert [answer for answer in same if verdict(gold, answer) != 1.0] == [], gold
        assert [answer for answer in near if verdict(gold, answer) != 0.0] == [], gold
        tried += len(near)
    assert tried * len(FAMILIES) >= 500


@pytest.mark.parametrize(
    ("gold", "message"),
    [
        (r"\frac{1}{", "parses to nothing"),
        ("", "parses to nothing"),
        (r"\boxed{}", "parses to nothing"),
        (r"\le", "parses to nothing"),
        ("the sum of both numbers is larger than all of the others", "is prose"),
        (r"x^2 for every y", "mixes words and mathematics"),
        (r"1, \frac{2}{", "parses to nothing|mixes"),
    ],
)
def test_a_reference_that_cannot_mean_what_is_written_is_refused(gold, message):
    with pytest.raises(ValueError, match=message):
        math_verify.check({"answer": gold})


def test_what_takes_math_verify_too_long_is_a_time_out_and_not_a_wrong_answer(monkeypatch):
    monkeypatch.setattr(algebra, "LIMIT_S", 0.2)

    def never(*arguments, **knobs):
        try:
            while True:
                time.time()
        except Exception:
            return False

    monkeypatch.setattr(algebra, "verify", never)
    with pytest.raises(TimeoutError, match="sympy and math-verify more than 0.2 s"):
        verdict("x^2-1", "(x-1)(x+1)")


@pytest.mark.parametrize(
    "answer",
    [
        "1" * 100_000,
        "{" * 5000 + "18" + "}" * 5000,
        r"\frac{1}{" * 300 + "2" + "}" * 300,
        "1+" * 50_000 + "1",
        "a," * 50_000,
        "(" * 20_000,
        "1:" * 20_000 + "1",
        "1-" * 20_000 + "1",
        "a b " * 20_000,
        "1,234," * 20_000,
        "$" * 20_001,
        "x=" * 20_000 + "1",
        "(" * 10_000 + "18" + ")" * 10_000,
        r"\text{" * 5000 + "18" + "}" * 5000,
        "'" * 40_000,
        "." * 40_000 + "x",
        "123 " * 20_000 + "12",
        r"\text{" + " " * 100_000 + "x}",
        "^" + " " * 100_000 + "x",
        "<answer>" * 20_000,
        r"\text{\$}" * 2000 + "5",
        "A) " * 600 + "5",
        "A: " * 600 + "()",
        "A: " * 25 + "()",
    ],
)
def test_long_answers_cost_next_to_nothing(answer):
    started = time.process_time()
    for text in (f"\\boxed{{{answer}}}", answer, f"The answer is {answer}", f"\\boxed{{{answer}"):
        math_verify.score(text, {"answer": "x^2-1"})
    assert time.process_time() - started < 4.0


LETTERS = (
    r"\frac{1}{%s-%s}",
    r"\int %s d%s",
    r"\log_%s %s",
    "%s(%s)",
    r"\frac%s%s",
    r"\binom{%s}{%s}",
    "%s:%s",
    "%s!-%s'",
)


def test_other_numbers_or_letters_in_the_same_places_are_not_asked_again_and_the_verdict_is_the_formulas():
    algebra._form_is_read.cache_clear()
    labels = [rf"{i}\sqrt{{{i + 20}}}+\frac{{\pi}}{{{i + 30}}}" for i in range(11, 61)]
    assert all(map(algebra.readable, labels)) and algebra._form_is_read.cache_info().misses == 1
    labels = [rf"\frac{{2{a}+{i}}}{{{b}}}-{a}" for a in "akn" for b in "mpz" for i in (3, 5)]
    assert all(map(algebra.readable, labels)) and algebra._form_is_read.cache_info().misses == 2
    formulas = [gold for _, (gold, *_) in cases(3, 7)] + [
        r"\frac{5}{1-1}",
        r"\frac12",
        "x^{",
        "3^",
        r"\sqrt",
        "5)(3",
        *(
            form % pair
            for form in LETTERS
            for pair in (("x", "x"), ("n", "k"), ("d", "e"), ("i", "c"), ("f", "g"))
        ),
    ]
    for formula in formulas:
        assert algebra.readable(formula) == (algebra.parse_latex(formula) is not None), formula


@pytest.mark.parametrize(
    ("gold", "answer", "right"),
    [
        ("E", "e", 1.0),
        ("e", "E", 1.0),
        ("E", "D", 0.0),
        ("e", "2", 0.0),
        ("FF_{16}", "FF_{16}", 1.0),
        ("FF_{16}", "FE_{16}", 0.0),
    ],
)
def test_a_letter_may_be_a_choice_and_letters_may_be_digits(gold, answer, right):
    math_verify.check({"answer": gold})
    assert verdict(gold, answer) == right
