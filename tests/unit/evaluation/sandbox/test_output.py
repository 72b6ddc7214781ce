"""Claim: a program may print what is expected of it, whatever its size, and only so much more."""

from collections.abc import Iterator

import pytest

from mull.evaluation.sandbox import Limits, Pool, Stdio

LIMIT = 1000


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    with Pool(1, timeout=20, limits=Limits(output=LIMIT)) as pool:
        yield pool


def reason(pool: Pool, program: str, expected: str) -> str:
    return pool.submit(program, Stdio(("",), (expected,))).result().reason


def test_a_long_output_passes_where_it_is_expected(pool: Pool) -> None:
    assert reason(pool, "print('7\\n' * 1_000_000)", "7\n" * 1_000_000) == "passed"
    assert (
        reason(pool, "print('\N{GREEK SMALL LETTER ALPHA} ' * 5000)", "\N{GREEK SMALL LETTER ALPHA} " * 5000)
        == "passed"
    )
    assert reason(pool, "print('7' * 999)", "7" * 999) == "passed"


def test_the_limit_is_for_what_is_printed_beyond_that(pool: Pool) -> None:
    assert reason(pool, f"print('7 ' * 600 + ' ' * ({LIMIT} - 1))", "7 " * 600) == "passed"
    assert reason(pool, f"print('7 ' * 600 + ' ' * {LIMIT})", "7 " * 600) == "output"
    assert reason(pool, f"print('7' * {LIMIT})", "") == "output"


def test_the_usual_limit_is_1_mib() -> None:
    with Pool(1, timeout=20) as pool:
        assert reason(pool, "print('7\\n' * (1 << 20))", "7\n" * (1 << 20)) == "passed"
        assert reason(pool, "print('7\\n' * (1 << 20))", "7\n") == "output"
