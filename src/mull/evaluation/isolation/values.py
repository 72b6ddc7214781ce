"""Values that cross the wall of a container, as bytes.

This module runs in the grader and in the candidate's container, so it imports nothing of mull. The reader trusts nothing that it
reads: it builds data of known types only, never calls what the bytes name, and is bounded in depth. It is no pickle.

A value is a tag of one byte and its content. ``marshal`` would be faster, but its reader is unsafe on hostile bytes; JSON has no
tuples, sets, bytes or exact numbers.
"""

import sys
from _operator import itemgetter  # `operator` takes longer to import
from array import array
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

MAX_DEPTH = 150
"""Most levels of lists in lists. Python's own recursion limit would allow about twice as many here."""

MAX_ITEMS_OF_ITERATOR = 1_000_000
"""Most items that are taken from an iterator; one without an end has to fail some time."""


class NotPlainError(TypeError):
    """A value that is no data, such as an object of a class of one's own."""


Keep: TypeAlias = Callable[[Any], int | None]
"""Gives the number of an object that stays on this side of the wall, or None where it may not."""

Find: TypeAlias = Callable[[int, bool], Any]
"""Gives what a number stands for; True for an object of the reader's own side, False for one of the other side."""

Seen: TypeAlias = Callable[[], None]
"""Called where what is read has objects with methods: of Python's classes or their names."""

SHORT = {None: b"N", True: b"T", False: b"F"}
EXACT: dict[type, bytes] = {list: b"l", tuple: b"t", set: b"e", frozenset: b"z"}

_FACTORIES = (list, dict, set, tuple, int, float, str, bool)

_FIELDS: dict[str, Callable[[Any], Any]] = {
    "decimal.Decimal": lambda v: (str(v),),
    "fractions.Fraction": lambda v: (v.numerator, v.denominator),
    "datetime.datetime": lambda v: (v.year, v.month, v.day, v.hour, v.minute, v.second, v.microsecond),
    "datetime.date": lambda v: (v.year, v.month, v.day),
    "datetime.time": lambda v: (v.hour, v.minute, v.second, v.microsecond),
    "datetime.timedelta": lambda v: (v.days, v.seconds, v.microseconds),
    "collections.Counter": lambda v: (dict(v),),
    "collections.OrderedDict": lambda v: (list(v.items()),),
    "collections.deque": lambda v: (list(v), v.maxlen),
    "builtins.range": lambda v: (v.start, v.stop, v.step),
    "builtins.slice": lambda v: (v.start, v.stop, v.step),
    "builtins.bytearray": lambda v: (bytes(v),),
    "collections.defaultdict": lambda v: (v.default_factory if v.default_factory in _FACTORIES else None, dict(v)),
    "builtins.dict_keys": lambda v: (list(v),),
    "builtins.dict_values": lambda v: (list(v),),
    "builtins.dict_items": lambda v: (list(v),),
}
"""Types of the standard library, by name, and what they are written as. Time zones are dropped."""

LIBRARY_TYPES = {name for name in _FIELDS if not name.startswith("builtins.")} - {
    "collections.Counter",
    "fractions.Fraction",
}
"""Those that may be named across the wall besides `SAFE_BUILTINS`. The others could be changed by tests, for later programs."""

KEPT: set[type] = set()
"""Classes of the program whose objects stay where they are, although they could be written as data."""

OPERATORS = [
    *("eq", "ne", "lt", "le", "gt", "ge", "add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul"),
    *("and_", "or_", "xor", "lshift", "rshift"),
]
"""Operators of two objects of the program, by their names in ``operator``."""

UNARY_OPERATORS = ["neg", "pos", "abs", "invert"]

_SPECIAL: dict[str, Callable[..., Any]] = {
    "collections.defaultdict": lambda factory, items: _defaults(factory, items),
    "builtins.dict_keys": lambda keys: dict.fromkeys(keys).keys(),
    "builtins.dict_values": lambda values: dict(enumerate(values)).values(),
    "builtins.dict_items": lambda items: dict(items).items(),
}
"""How those are read that their own class does not build from these fields."""


ENDLESS = ("itertools.count", "itertools.cycle")
"""Iterators that are known to have no end. Others are read, and refused where it is too far."""

_GENERATOR_NAMES = {name for name in dir(type(_ for _ in ())) if not name.startswith("_")} | {"from_iterable"}


def _defaults(factory: Any, items: Any) -> Any:
    if factory is not None and factory not in _FACTORIES:
        raise ValueError("no factory of a dictionary that may be named")
    return __import__("collections").defaultdict(factory, items)


def is_iterator(value: Any) -> bool:
    """Whether an object is an iterator and no more: files have further methods."""
    kind = type(value)
    return hasattr(kind, "__next__") and all(name.startswith("_") or name in _GENERATOR_NAMES for name in dir(kind))


def encode(value: Any, keep: Keep | None = None) -> bytes:
    """The bytes of a value.

    An iterator is read to its end and arrives as an iterator over the same items. An object of a subclass arrives as one of
    the base type, and a named tuple as a tuple with these names. Numbers and arrays of numpy arrive as those of Python.

    Raises:
        NotPlainError: a part is no data, and `keep` does not take it.
        ValueError: it is nested too deeply, or an iterator gives too many items.
    """
    out: list[bytes] = []
    _write(value, out, keep, 0)
    return b"".join(out)


def _sized(tag: bytes, content: bytes) -> bytes:
    return b"%b%d:%b" % (tag, len(content), content)


def _write(value: Any, out: list[bytes], keep: Keep | None, depth: int) -> None:
    if depth > MAX_DEPTH:
        raise ValueError(f"it is nested more than {MAX_DEPTH} levels deep")
    kind = type(value)
    if value is None or kind is bool:
        out.append(SHORT[value])
    elif kind is int:
        out.append(_sized(b"i", hex(value).encode()))
    elif kind is str:
        out.append(_sized(b"s", value.encode("utf-8", "surrogatepass")))
    elif kind is float:
        out.append(_sized(b"f", float.hex(value).encode()))
    elif kind in EXACT:
        _write_items(EXACT[kind], value, out, keep, depth)
    elif kind is dict:
        out.append(b"d%d:" % len(value))
        for key, item in value.items():
            _write(key, out, keep, depth + 1)
            _write(item, out, keep, depth + 1)
    elif kind is bytes:
        out.append(_sized(b"b", value))
    elif kind is complex:
        out.append(_sized(b"c", f"{float.hex(value.real)} {float.hex(value.imag)}".encode()))
    else:
        _write_other(value, out, keep, depth)


def _write_items(tag: bytes, items: Any, out: list[bytes], keep: Keep | None, depth: int) -> None:
    """Items one by one; long rows of numbers of one type at the speed of C."""
    if len(items) > 8 and tag in b"lt" and (row := _row(tag, items)) is not None:
        out.extend(row)
        return
    out.append(b"%b%d:" % (tag, len(items)))
    for item in items:
        _write(item, out, keep, depth + 1)


def _row(tag: bytes, items: Any) -> list[bytes] | None:
    """A row of integers and floats as the processor has them: which each is, then those, then these; else None."""
    kinds = set(map(type, items))
    if not kinds <= {int, float}:
        return None
    integers = items if kinds == {int} else [item for item in items if type(item) is int]
    floats = items if kinds == {float} else [item for item in items if type(item) is float]
    mask = b"" if len(kinds) == 1 else bytes(map({int: 0, float: 1}.__getitem__, map(type, items)))
    try:
        words = (b"q", array("q", integers).tobytes())
    except OverflowError:
        words = (b"x", " ".join(map(hex, integers)).encode())
    return [
        b"R" + tag + words[0],
        *(b"%d:%b" % (len(part), part) for part in (mask, words[1], array("d", floats).tobytes())),
    ]


def _write_other(value: Any, out: list[bytes], keep: Keep | None, depth: int) -> None:
    kind = type(value)
    name = f"{kind.__module__}.{kind.__qualname__}"
    if name in _FIELDS:
        out.append(_sized(b"o", name.encode()))
        _write(_FIELDS[name](value), out, keep, depth + 1)
    elif kind.__module__.partition(".")[0] == "numpy" and hasattr(kind, "tolist"):
        _write(value.tolist(), out, keep, depth + 1)
    elif value is NotImplemented or value is Ellipsis:
        out.append(_sized(b"B", b"NotImplemented" if value is NotImplemented else b"Ellipsis"))
    elif getattr(value, "__module__", "") == "builtins" and _may_cross(value):
        out.append(_sized(b"B", value.__name__.encode()))
    elif isinstance(value, type) and (full := f"{value.__module__}.{value.__qualname__}") in LIBRARY_TYPES:
        out.append(_sized(b"B", full.encode()))
    else:
        if kind in KEPT and keep is not None and (number := keep(value)) is not None:
            out.append(b"%b%d:" % (b"h" if number >= 0 else b"H", abs(number)))
            return
        if isinstance(value, tuple) and _may_name(kind.__name__, fields := getattr(kind, "_fields", None)):
            out.append(b"n")
            _write((kind.__name__, fields, _plain(tuple, value)), out, keep, depth + 1)
            return
        for base in (int, str, float, *EXACT, dict, bytes, complex):
            if isinstance(value, base) and kind is not bool:
                _write(_plain(base, value), out, keep, depth)
                return
        number = None if keep is None else keep(value)
        if number is not None:
            out.append(b"%b%d:" % (b"h" if number >= 0 else b"H", abs(number)))
        elif is_iterator(value) and name not in ENDLESS:
            out.append(b"r")
            _write(_taken(value), out, keep, depth + 1)
        else:
            raise NotPlainError(f"an object of {name} is no plain data")


def content(value: Any) -> Any:
    """What an object of one of the classes in `KEPT` holds, as data; None for others."""
    if type(value) not in KEPT:
        return None
    return next(_plain(base, value) for base in (list, tuple, set, frozenset, dict) if isinstance(value, base))


def _plain(base: Any, value: Any) -> Any:
    """What a subclass's object holds, without asking the subclass."""
    if base in (int, float, complex):
        return base.__add__(value, base(0)) if base is not int else int.__add__(value, 0)
    if base in (str, bytes):
        return base.__getitem__(value, slice(None)) if base is bytes else str.__str__(value)
    return dict(dict.items(value)) if base is dict else base(base.__iter__(value))


def _taken(iterator: Iterator[Any]) -> list[Any]:
    taken = []
    for item in iterator:
        taken.append(item)
        if len(taken) > MAX_ITEMS_OF_ITERATOR:
            raise ValueError(f"an iterator gives more than {MAX_ITEMS_OF_ITERATOR:,} items")
    return taken


def decode(data: bytes, find: Find | None = None, seen: Seen | None = None) -> Any:
    """The value of these bytes.

    Raises:
        ValueError: they are no value, whatever they are.
    """
    try:
        value, end = _Reader(data, find, seen).value(0, 0)
    except (ArithmeticError, LookupError, TypeError, AttributeError, UnicodeError, RecursionError) as error:
        raise ValueError(f"these bytes are no value: {type(error).__name__}") from None
    if end != len(data):
        raise ValueError("something follows the value")
    return value


class _Reader:
    def __init__(self, data: bytes, find: Find | None, seen: Seen | None) -> None:
        self.data, self.find, self.seen = data, find, seen

    def size(self, at: int) -> tuple[int, int]:
        colon = self.data.index(b":", at, at + 20)
        digits = self.data[at:colon]
        if not digits.isdigit():
            raise ValueError("a length is no number")
        return int(digits), colon + 1

    def content(self, at: int) -> tuple[bytes, int]:
        size, start = self.size(at)
        if start + size > len(self.data):
            raise ValueError("the bytes end too early")
        return self.data[start : start + size], start + size

    def value(self, at: int, depth: int) -> tuple[Any, int]:
        if depth > MAX_DEPTH + 2:
            raise ValueError("it is nested too deeply")
        tag = self.data[at : at + 1]
        at += 1
        if self.seen is not None and tag in (b"B", b"o", b"n"):
            self.seen()
        if tag in SIMPLE:
            return SIMPLE[tag], at
        if tag in SCALARS:
            content, at = self.content(at)
            return SCALARS[tag](content), at
        if tag in BUILT:
            items, at = self.items(at, depth)
            return BUILT[tag](items), at
        return self.other(tag, at, depth)

    def items(self, at: int, depth: int, per_item: int = 1) -> tuple[list[Any], int]:
        n_items, at = self.size(at)
        if n_items > len(self.data):
            raise ValueError("there are fewer items than announced")
        items = []
        for _ in range(n_items * per_item):
            item, at = self.value(at, depth + 1)
            items.append(item)
        return items, at

    def other(self, tag: bytes, at: int, depth: int) -> tuple[Any, int]:
        if tag == b"d":
            flat, at = self.items(at, depth, 2)
            return dict(zip(flat[::2], flat[1::2], strict=True)), at
        if tag == b"R":
            return self.row(at)
        if tag == b"o":
            name, at = self.content(at)
            fields, at = self.value(at, depth + 1)
            return _standard(name.decode("ascii"), fields), at
        if tag == b"n":
            parts, at = self.value(at, depth + 1)
            return _named(*parts), at
        if tag == b"r":
            items, at = self.value(at, depth + 1)
            return iter(items), at
        if tag in (b"h", b"H") and self.find is not None:
            number, at = self.size(at)
            return self.find(number, tag == b"H"), at
        raise ValueError("an unknown tag")

    def row(self, at: int) -> tuple[Any, int]:
        kind, form = BUILT[self.data[at : at + 1]], self.data[at + 1 : at + 2]
        mask, at = self.content(at + 2)
        words, at = self.content(at)
        reals, at = self.content(at)
        integers = (
            memoryview(words).cast("q").tolist()
            if form == b"q"
            else [int(word, 16) for word in words.decode("ascii").split()]
        )
        floats = memoryview(reals).cast("d").tolist()
        if not mask:
            return kind(integers + floats), at
        if mask.count(0) != len(integers) or mask.count(1) != len(floats) or len(integers) + len(floats) != len(mask):
            raise ValueError("a row has other numbers than announced")
        sources = (iter(integers), iter(floats))
        return kind([next(sources[one]) for one in mask]), at


def _standard(name: str, fields: Any) -> Any:
    if name not in _FIELDS:
        raise ValueError("a type that is not among the known ones")
    if name in _SPECIAL:
        return _SPECIAL[name](*fields)
    return _library_type(name)(*fields)


def _library_type(name: str) -> Any:
    """One of those in `_FIELDS`."""
    module, _, kind = name.rpartition(".")
    return getattr(__import__(module), kind)


_named_kinds: dict[tuple[str, tuple[str, ...]], type] = {}


MAX_NAMES = 100
"""Most fields of a tuple with names, and most characters of each: the reader keeps up to so many classes of such tuples."""


def _may_name(name: Any, fields: Any) -> bool:
    """Whether these are names of a tuple and of its items; a tuple with others is one without."""
    return (
        type(fields) is tuple
        and 0 < len(fields) <= MAX_NAMES
        and all(type(one) is str and len(one) <= MAX_NAMES and one.isidentifier() for one in (name, *fields))
        and not any(field.startswith("_") for field in fields)
    )


def _named(name: str, fields: tuple[str, ...], items: tuple[Any, ...]) -> Any:
    """A tuple whose items have names, as of ``namedtuple``, which would run code made of these."""
    if type(fields) is not tuple or type(items) is not tuple or len(fields) != len(items):
        raise ValueError("names and items of a tuple do not match")
    kind = _named_kinds.get((name, fields))
    if kind is None:
        if not _may_name(name, fields):
            raise ValueError("a name of an item may not be used")
        members: dict[str, Any] = {field: property(itemgetter(at)) for at, field in enumerate(fields)}
        members["_fields"] = members["__match_args__"] = fields
        members["_asdict"] = lambda self: dict(zip(fields, self, strict=True))
        members["_replace"] = lambda self, **new: type(self)(map(new.pop, fields, self))
        members["__repr__"] = lambda self: f"{name}({', '.join(map('{}={!r}'.format, fields, self))})"
        members["__reduce__"] = lambda self: (_named, (name, fields, tuple(self)))
        if len(_named_kinds) > MAX_NAMES:  # a program may send many
            _named_kinds.clear()
        kind = _named_kinds[name, fields] = type(name, (tuple,), members)
    return kind(items)


def _complex(content: bytes) -> complex:
    real, imaginary = content.decode("ascii").split()
    return complex(float.fromhex(real), float.fromhex(imaginary))


SAFE_BUILTINS = [
    "abs",
    "all",
    "any",
    "bin",
    "bool",
    "bytearray",
    "bytes",
    "callable",
    "chr",
    "complex",
    "dict",
    "divmod",
    "enumerate",
    "filter",
    "float",
    "format",
    "frozenset",
    "hash",
    "hex",
    "int",
    "isinstance",
    "issubclass",
    "iter",
    "len",
    "list",
    "map",
    "max",
    "min",
    "next",
    "object",
    "oct",
    "ord",
    "pow",
    "print",
    "range",
    "repr",
    "reversed",
    "round",
    "set",
    "slice",
    "sorted",
    "str",
    "sum",
    "tuple",
    "type",
    "zip",
    "NotImplemented",
    "Ellipsis",
]
"""Functions and types that may be named across the wall. Those that read, write or run code are not among them."""


def _may_cross(value: Any) -> bool:
    """Whether a function or type of Python may be named."""
    if isinstance(value, type) and issubclass(value, BaseException):
        return True
    return isinstance(value, type | type(len)) and value.__name__ in SAFE_BUILTINS


def _builtin(content: bytes) -> Any:
    name = content.decode("ascii")
    if name in LIBRARY_TYPES:
        return _library_type(name)
    builtins: Any = sys.modules["builtins"]
    found = getattr(builtins, name, None)
    if name not in SAFE_BUILTINS and not _may_cross(found):
        raise ValueError(f"{name} may not be named")
    return found


SIMPLE = {tag: value for value, tag in SHORT.items()}
SCALARS: dict[bytes, Callable[[bytes], Any]] = {
    b"i": lambda content: int(content, 16),
    b"f": lambda content: float.fromhex(content.decode("ascii")),
    b"s": lambda content: content.decode("utf-8", "surrogatepass"),
    b"b": lambda content: content,
    b"c": _complex,
    b"B": _builtin,
}
BUILT: dict[bytes, Callable[[list[Any]], Any]] = {b"l": list, b"t": tuple, b"e": set, b"z": frozenset}
