"""Claim: data crosses the wall of a container unchanged, and no bytes that a program may send do harm to the reader."""

# ruff: noqa: E501 - programs in one line

import contextlib
import math
import pickle
import random
import signal
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from collections.abc import Iterator
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from fractions import Fraction
from importlib import import_module
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mull.evaluation.isolation.values import LIBRARY_TYPES, MAX_DEPTH, NotPlainError, decode, encode

HASHABLE = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary()
    | st.complex_numbers(allow_nan=False),
    lambda inner: st.tuples(inner, inner) | st.frozensets(inner, max_size=3),
    max_leaves=5,
)
VALUES = st.recursive(
    HASHABLE | st.lists(st.integers()) | st.lists(st.floats(allow_nan=False)),
    lambda inner: st.lists(inner) | st.dictionaries(HASHABLE, inner, max_size=4) | st.sets(HASHABLE, max_size=4),
    max_leaves=10,
)


def same(one: Any, other: Any) -> bool:
    """Equal, and of the same types all the way down."""
    if type(one) is not type(other) or one != other:
        return False
    if isinstance(one, list | tuple):
        return all(map(same, one, other))
    return not isinstance(one, dict) or all(same(value, other[key]) for key, value in one.items())


@given(VALUES)
@settings(max_examples=60)
def test_values_arrive_as_they_were_sent(value: Any) -> None:
    assert same(decode(encode(value)), value)


@pytest.mark.parametrize(
    "value",
    [
        Decimal("1.10"), Fraction(2, 6), date(2024, 2, 29), datetime(2024, 1, 1, 1, 2, 3, 4),
        time(1, 2, 3), timedelta(-1, 5, 6), Counter("abca"), OrderedDict(b=1, a=2), deque([1, 2], 5), range(3, 9, 2), bytearray(b"x"),
        2**4000, -(2**64), "\udc80", [True] * 20, [1.5, -0.0, math.inf] * 9, (1, 2) * 9, [1, 2.5, -3] * 9, [2**63 - 1, -(2**63)] * 9, [2**63, 0.5] * 9, int, len, ValueError, {1: {2: {3}}},
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_types_of_the_standard_library_arrive(value: Any) -> None:
    assert same(decode(encode(value)), value)


def test_what_is_not_equal_to_itself_arrives() -> None:
    assert math.isnan(decode(encode(math.nan)))
    assert math.copysign(1, decode(encode(-0.0))) == -1


def test_subclasses_arrive_as_their_base_and_iterators_as_iterators() -> None:
    class Always(int):
        def __eq__(self, other: object) -> bool:
            return True

        __hash__ = int.__hash__

    assert type(decode(encode(Always(3)))) is int
    pair: Any = namedtuple("pair", "x y")
    named = decode(encode(pair(1, 2)))
    assert (named, named.x, named.y, pickle.loads(pickle.dumps(named)).y) == ((1, 2), 1, 2, 2)
    assert type(named) is type(decode(encode(pair(3, 4))))
    assert decode(encode(defaultdict(list, a=[1]))) == {"a": [1]}
    iterator = decode(encode(x * x for x in range(3)))
    assert isinstance(iterator, Iterator)
    assert [*iterator] == [0, 1, 4]
    assert decode(encode({1: 2}.keys())) == {1}
    assert decode(encode([np.int64(3), np.float64(0.5), np.arange(3)])) == [3, 0.5, [0, 1, 2]]


def test_objects_are_refused_by_name_and_depth_is_bounded() -> None:
    class Own:
        pass

    with pytest.raises(NotPlainError, match="Own is no plain data"):
        encode([Own()])
    deep: Any = []
    for _ in range(MAX_DEPTH + 5):
        deep = [deep]
    with pytest.raises(ValueError, match="levels deep"):
        encode(deep)
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(ValueError, match="levels deep"):
        encode(loop)


HOSTILE = [
    b"", b"x", b"l", b"l5:", b"l99999999999999:", b"s5:ab", b"i3:zzz", b"d1:l0:N", b"e1:l0:", b"o7:os.walkt0:", b"o9:os.systemt1:s2:ls",
    b"B4:exec", b"B4:eval", b"B5:super", b"B10:__import__", b"B4:open", b"h1:", b"H1:", b"r" * 5000 + b"l0:", b"t1:" * 5000, b"NN", b"f3:xyz", b"c1:1",
    b"s1:\xff", b"o15:decimal.Decimalt1:s3:abc", b"l-1:", b"l1_0:", b"Rlq0:1:a0:", b"Rlq0:0:1:a", b"Rlq2:\0\x010:0:", b"Rlq9:" + b"\2" * 9 + b"0:0:", b"Rlx0:1:-0:", b"Rdq0:0:0:", b"o14:builtins.ranget1:N", b"Ix3:0x1",
    b"nt3:s1:Pt1:s6:__eq__t1:N", b"nt3:s1:Pt1:s1:xt0:", b"nt3:s1:Pl1:s1:xl1:N", b"nt3:Nt1:s1:xt1:N", b"nt3:s1:Pt1:t0:t1:N", b"nN",
]  # fmt: skip


@pytest.mark.parametrize("data", HOSTILE)
def test_hostile_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - any message, but no other error
        decode(data)


@pytest.mark.parametrize("name", sorted(LIBRARY_TYPES))
def test_a_type_that_may_be_named_cannot_be_changed(name: str) -> None:
    """The tests of one program could change it for the next."""
    module, _, kind = name.rpartition(".")
    with pytest.raises(TypeError, match="immutable type"):
        getattr(import_module(module), kind).size = 3


def test_random_damage_gives_a_value_or_a_value_error() -> None:
    rng = random.Random(0)
    good = encode(
        {
            "a": [1, 2.5, (None, True)],
            "b": {1, 2},
            "c": [*range(20)],
            "f": [1, 0.5] * 9,
            "d": Decimal("1.5"),
            "e": iter([1]),
        }
    )
    signal.alarm(60)
    for _ in range(20_000):
        data = bytearray(good)
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        with contextlib.suppress(ValueError):
            decode(bytes(data))
    signal.alarm(0)


def test_named_tuples_of_a_program_take_little_memory() -> None:
    """The reader keeps their classes."""
    from collections import namedtuple

    wide = namedtuple("Wide", [f"a{number}" for number in range(101)])(*range(101))  # type: ignore[misc]
    long = namedtuple("Long", ["a" * 101])(1)  # type: ignore[misc]
    for honest in (wide, long, type("no name", (tuple,), {"_fields": ("a",)})((1,))):
        assert type(decode(encode(honest))) is tuple
    for name, fields in (("K" * 101, ("a",)), ("K x", ("a",)), ("K", ("a" * 101,)), ("K", tuple(f"a{n}" for n in range(101)))):  # fmt: skip
        with pytest.raises(ValueError, match="may not be used"):
            decode(b"n" + encode((name, fields, (1,) * len(fields))))
