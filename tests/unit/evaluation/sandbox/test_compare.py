"""Claim: results are judged by the rules of the suites."""

import math
import time
from decimal import Decimal
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mull.evaluation.isolation.compare import EVALPLUS_ORACLES, ORACLES, are_close, is_right, same_tokens


@given(
    st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=4), st.floats(-1e-5, 1e-5), st.sampled_from([1e-9, 1e-6, 1e-3])
)
def test_closeness_is_numpys(values: list[float], shift: float, atol: float) -> None:
    moved = [value + shift for value in values]
    assert are_close(moved, values, atol) == np.allclose(moved, values, rtol=1e-7, atol=atol)


@pytest.mark.parametrize(
    ("rule", "arguments", "result", "expected", "atol", "right"),
    [
        ("equal", (), [1, 2], [1, 2], 0.0, True),
        ("equal", (), [1, 2], (1, 2), 0.0, False),
        ("equal", (), 1, True, 0.0, True),  # as in Python, and in EvalPlus
        ("equal", (), 0.1 + 0.2, 0.3, 0.0, True),
        ("equal", (), 0.3001, 0.3, 0.0, False),
        ("equal", (), 0.3001, 0.3, 1e-3, True),
        ("equal", (), 3, 3.0000001, 0.0, False),  # another type
        ("equal", (), [0.3, "x"], [0.3, 0.2], 1e-3, False),
        ("equal", (), math.nan, math.nan, 0.0, False),
        ("equal", (), math.inf, math.inf, 0.0, True),
        ("equal", (), 10**400, 1.5, 1e-3, False),
        ("equal_sets", (), [3, 1, 1], (1, 3), 0.0, True),
        ("equal_sets", (), [3], (1, 3), 0.0, False),
        ("equal_sets", (), None, (1, 3), 0.0, False),
        ("equally_none", (), 5, True, 0.0, True),
        ("equally_none", (), None, True, 0.0, False),
        ("equally_none", (), False, None, 0.0, True),
        ("root_of_polynomial", ([1, 2],), -0.5, None, 1e-4, True),
        ("root_of_polynomial", ([1, 2],), -5.0, None, 1e-4, False),  # a negative value is not small
        ("root_of_polynomial", ([1, 2],), None, None, 1e-4, False),
        ("digit_distance", (1, 256), 5, 1, 0.0, False),
        ("digit_distance", (23, 256), 2 + 3 + 3, 1, 0.0, True),
        ("pyramid_surface", (3, 4), 33, 33, 0.0, True),
    ],
)
def test_rules(rule: str, arguments: Any, result: Any, expected: Any, atol: float, right: bool) -> None:
    assert is_right(rule, arguments, result, expected, atol) is right


def test_every_rule_of_a_problem_exists() -> None:
    assert set(EVALPLUS_ORACLES.values()) <= ORACLES.keys()


@pytest.mark.parametrize(
    ("output", "expected", "same"),
    [
        ("1 2\n3", "1\n2 3\n", True),
        ("YES", "yes", True),
        ("0.333333", "0.333334", True),
        ("0.3333", "0.3334", False),
        ("1 2", "1 2 3", False),
        ("", "1", False),
        ("nan", "1", False),
        ("inf", "inf", True),
        ("9007199254740992", "9007199254740993", False),  # equal as floats
        (str(10**18 + 50), str(10**18 + 1), False),
        ("-007 +3 -0", "-7 3 0", True),
        ("7", "-7", False),
        ("70", "7", False),
        ("9" * 100_000 + "0", "9" * 100_000 + "1", False),
        ("0" * 1_000_000 + "x", "0", False),  # and at once
        ("5.000001", "5", True),
        ("5", "5.0", True),
        (".5 5. 1e2 1E+2", "0.5 5 100 100", True),
        ("1_0", "10", False),
        ("\N{ARABIC-INDIC DIGIT ONE}", "1", False),
        ("nan", "nan", True),
        ("Infinity", "inf", False),
        ("1e999", "1e998", False),
        ("0x10", "16", False),
        ("1.8446744073709552e+19", "18446744073709551615", False),  # equal as floats
        ("18446744073709551614.999999", "18446744073709551615", False),
        ("9007199254740992.4", "9007199254740992", False),
        ("9007199254740993.0", "9007199254740992", False),
        ("-1.8446744073709551615E+19", "-18446744073709551615", True),
        ("1.8446744073709551615E+19", "-18446744073709551615", False),
        ("184467440737095516150.e-1", "+18446744073709551615", True),
        ("18446744073709551615.000", "018446744073709551615", True),
        ("1e23", "1" + "0" * 23, True),
        ("1e+0000000000000000000000000000000023", "1" + "0" * 23, True),
        ("1e999999999", "1" + "0" * 23, False),
        ("1e10000000000000000023", "1" + "0" * 23, False),
        ("9" * 400 + "." + "0" * 400, "9" * 400, True),
        ("9" * 400 + ".1", "9" * 400, False),
        ("18446744073709551615", "1.8446744073709552e+19", True),  # as precise as what is expected
        ("4503599627370496.0", "4503599627370496", True),
        ("7.0", "7", True),
    ],
)
def test_outputs_are_compared_by_word(output: str, expected: str, same: bool) -> None:
    assert same_tokens(output, expected) is same


LONG = {
    "exponent": "1e999999999",
    "negative exponent": "1e-999999999",
    "exponent of many digits": f"1e{'9' * 1_000_000}",
    "zero with an exponent": f"0.{'0' * 1_000_000}e{'9' * 20}",
    "point": f"{'9' * 1_000_000}.5",
    "many digits": "9" * 1_000_000 + "e1",
}


@pytest.mark.parametrize("digits", [1, 30, 1_000_000])
@pytest.mark.parametrize("name", LONG)
def test_no_number_takes_long_to_compare(name: str, digits: int) -> None:
    started = time.perf_counter()
    assert not same_tokens(LONG[name], "9" * digits)
    assert not same_tokens(LONG[name], "9" * digits + ".5") or name == "point"
    assert time.perf_counter() - started < 1


@given(st.integers(2**53, 2**64), st.from_regex(r"\A-?[0-9]{1,3}(\.[0-9]{0,3})?\Z"), st.integers(-4, 20))
def test_large_integers_are_those_of_exact_arithmetic(integer: int, mantissa: str, exponent: int) -> None:
    for found in (
        f"{mantissa}e{exponent}",
        f"{integer}e0",
        f"{integer}0.e-1",
        f"{integer}.5",
        f"{float(integer):.0f}.0",
    ):
        assert same_tokens(found, str(integer)) == (Decimal(found) == integer), found
