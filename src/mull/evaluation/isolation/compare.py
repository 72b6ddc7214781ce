"""Whether a result is right: the rules of the suites, without numpy. Runs in the grader, on plain values only."""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

RELATIVE = 1e-7
"""Relative tolerance of EvalPlus wherever it compares numbers with a tolerance."""

FLOAT_TOLERANCE = 1e-6
"""Absolute tolerance of EvalPlus for expected floats where the problem states none."""

TOKEN_TOLERANCE = 1e-5
"""Between two numbers of a printed output, as in CodeContests' checker, where one of them is no integer."""

EXACT_FLOATS = 2**53
"""Floats have every integer below it, and not every integer beyond."""

LONGEST_EXPONENT = 18
"""Digits of an exponent that are read: with more, no number has its digits written out."""

INTEGER = re.compile("[+-]?[0-9]+")
NUMBER = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)(e[+-]?[0-9]+)?", re.IGNORECASE)
"""How programs print numbers. ``float`` reads more: ``1_0``, ``nan``, and the digits of every script."""


def are_floats(value: Any) -> bool:
    """A float, or a list or tuple of floats."""
    if isinstance(value, list | tuple):
        return bool(value) and all(isinstance(item, float) for item in value)
    return isinstance(value, float)


def are_close(result: Any, expected: Any, atol: float) -> bool:
    """Numbers, or lists of lists of numbers, within ``atol + 1e-7 |expected|`` of each other; anything else is not."""
    if isinstance(expected, list | tuple):
        return (
            isinstance(result, list | tuple)
            and len(result) == len(expected)
            and all(are_close(one, other, atol) for one, other in zip(result, expected, strict=True))
        )
    if not isinstance(result, int | float | complex) or not isinstance(expected, int | float | complex):
        return False
    try:
        return bool(result == expected or abs(result - expected) <= atol + RELATIVE * abs(expected))
    except OverflowError:
        return False


def equal(_: Sequence[Any], result: Any, expected: Any, atol: float) -> bool:
    """EvalPlus' common rule: equal; or of one type and close, where floats are expected or the problem has a tolerance."""
    if result == expected:
        return True
    if atol == 0 and are_floats(expected):
        atol = FLOAT_TOLERANCE
    return atol != 0 and type(result) is type(expected) and are_close(result, expected, atol)


def equal_sets(_: Sequence[Any], result: Any, expected: Any, _atol: float) -> bool:
    """The same elements, in any order and number."""
    return set(result) == set(expected)


def equally_none(_: Sequence[Any], result: Any, expected: Any, _atol: float) -> bool:
    """Something where something is expected, nothing where nothing is; True and False stand for these."""
    found, wanted = (value if isinstance(value, bool) else value is not None for value in (result, expected))
    return found == wanted


def root_of_polynomial(arguments: Sequence[Any], result: Any, _expected: Any, atol: float) -> bool:
    """A zero of the polynomial with the coefficients that were given: HumanEval/32 has several."""
    (coefficients,) = arguments
    # The rule of EvalPlus 0.3.1, whose loop forgets to count these inputs, so that there every program fails; here it passes.
    value = sum(coefficient * math.pow(result, power) for power, coefficient in enumerate(coefficients))
    return abs(value) <= (atol or 1e-4)


def digit_distance(arguments: Sequence[Any], result: Any, expected: Any, atol: float) -> bool:
    """Mbpp/558: the expected value, or the one with the shorter number filled with zeros."""
    one, other = map(str, arguments)
    width = max(len(one), len(other))
    filled = sum(abs(int(a) - int(b)) for a, b in zip(one.zfill(width), other.zfill(width), strict=True))
    return equal(arguments, result, expected, atol) or result == filled


def pyramid_surface(arguments: Sequence[Any], result: Any, expected: Any, atol: float) -> bool:
    """Mbpp/581: the expected value, or the one where the height is that of the apex over the base."""
    base, height = arguments
    slant = math.sqrt((base / 2) ** 2 + height**2)
    return equal(arguments, result, expected, atol) or result == round(base**2 + 4 * (base * slant) / 2)


Oracle = Callable[[Sequence[Any], Any, Any, float], bool]

ORACLES: dict[str, Oracle] = {
    "equal": equal,
    "equal_sets": equal_sets,
    "equally_none": equally_none,
    "root_of_polynomial": root_of_polynomial,
    "digit_distance": digit_distance,
    "pyramid_surface": pyramid_surface,
}
"""Rules of comparison by name: ``rule(arguments, result, expected, atol)``."""

EVALPLUS_ORACLES = {
    "HumanEval/32": "root_of_polynomial",
    **dict.fromkeys(
        ("Mbpp/2", "Mbpp/7", "Mbpp/111", "Mbpp/140", "Mbpp/232", "Mbpp/249", "Mbpp/579", "Mbpp/769"), "equal_sets"
    ),
    **dict.fromkeys(("Mbpp/737", "Mbpp/787", "Mbpp/794"), "equally_none"),
    "Mbpp/558": "digit_distance",
    "Mbpp/581": "pyramid_surface",
}
"""Problems of EvalPlus 0.3.1 that plain comparison would judge wrongly, and their rules."""


def is_right(rule: str, arguments: Sequence[Any], result: Any, expected: Any, atol: float) -> bool:
    """Apply a rule; a result that it cannot even be applied to is wrong."""
    try:
        return ORACLES[rule](arguments, result, expected, atol)
    except (TypeError, ValueError, ArithmeticError, RecursionError):
        return False


def same_tokens(output: str, expected: str) -> bool:
    """The same words in the same order, whatever the spaces; case is ignored.

    Integers are compared exactly; two numbers of which one has a point or an exponent may differ by 1e-5, except where an integer
    of 2**53 or more is expected: floats, which skip integers there, would be equal to their neighbors.
    """
    found, wanted = output.split(), expected.split()
    return len(found) == len(wanted) and all(map(_same_token, found, wanted))


def _same_token(found: str, wanted: str) -> bool:
    if found.lower() == wanted.lower():
        return True
    if not NUMBER.fullmatch(found) or not NUMBER.fullmatch(wanted):
        return False
    value = float(wanted)
    if INTEGER.fullmatch(wanted) and (INTEGER.fullmatch(found) or abs(value) >= EXACT_FLOATS):
        return _exact(found) == _exact(wanted)
    return abs(float(found) - value) <= TOKEN_TOLERANCE


def _exact(number: str) -> tuple[bool, str, int]:
    """Sign, digits and exponent of a number, the same for all ways to write it.

    It is not computed: a number of a million digits takes Python seconds, and one with such an exponent takes all memory.
    """
    mantissa, _, exponent = number.lower().partition("e")
    whole, _, part = mantissa.lstrip("+-").partition(".")
    digits = (whole + part).lstrip("0")
    shown = digits.rstrip("0")
    if not shown:
        return False, "", 0
    raised = int(exponent.lstrip("+-").lstrip("0")[:LONGEST_EXPONENT] or 0)
    if exponent.startswith("-"):
        raised = -raised
    return number[0] == "-", shown, raised - len(part) + len(digits) - len(shown)
