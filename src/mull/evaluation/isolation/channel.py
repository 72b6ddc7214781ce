"""Messages across the wall of a container: a length, then the bytes of a value. Runs on both sides."""

import os
import resource
import sys
from itertools import islice
from typing import Any

from mull.evaluation.isolation.values import Find, Keep, Seen, decode, encode

MAX_MESSAGE_BYTES = 64 << 20
"""A longer message is refused unread. The largest result of a reference solution (HumanEval/130) takes 9 MB."""

MAX_ANSWER_BYTES = 1 << 30
"""The same for what the grader tells the host: a verdict, or all results of a reference solution."""


MAX_TEXT = 300
MAX_ARGUMENTS_BYTES = 4096


class Ended(BaseException):
    """The other side is gone. No ``Exception``: tests that expect errors must not catch this."""


class Room:
    """Frames for what stands between a call and its answer: no `RecursionError` may come between a request and its reply."""

    def __enter__(self) -> None:
        sys.setrecursionlimit(sys.getrecursionlimit() + FRAMES)

    def __exit__(self, *_: object) -> None:
        sys.setrecursionlimit(max(FRAMES, sys.getrecursionlimit() - FRAMES))


FRAMES = 500
"""Data may be nested 150 levels deep, of which each takes two."""

MAX_NESTED = 450
"""Most callbacks within callbacks, about as many as Python's limit of 1,000 frames allows in one process."""


class Errors:
    """Errors on their way across the wall. One that comes back is the same object, as in one process."""

    def __init__(self) -> None:
        self._own: list[BaseException] = []

    def message(self, kind: str, error: BaseException, *, comes_back: bool = False) -> tuple[Any, ...]:
        """``(kind, name, text, classes, arguments, attributes, number)``.

        Args:
            kind: Of the message.
            error: What was raised.
            comes_back: Whether to keep it, because the other side may raise it here again.
        """
        try:
            text = str(error)[:MAX_TEXT]
        except Exception:  # noqa: BLE001 - __str__ is the candidate's
            text = ""
        attributes = _attributes(error)
        number = -attributes.pop(NUMBER, 0)
        if not number and comes_back and len(self._own) < MAX_ERRORS:
            self._own.append(error.with_traceback(None))  # whose frames would stay alive
            number = len(self._own)
        classes = [base for base in type(error).__mro__ if issubclass(base, Exception)]
        args = _plain_arguments(error, next(filter(_is_of_library, classes), BaseException))
        return (kind, type(error).__name__, text, tuple(map(full_name, classes)), args, attributes, number)

    def read(self, message: tuple[Any, ...], other: type[Exception]) -> Exception:
        """The error that a message is about: one that was sent from here, or one of the nearest class that this side has.

        Args:
            message: As `message` gives.
            other: Class of those that are of no class of the library.
        """
        _, name, text, names, args, attributes, number = message
        if -len(self._own) <= number < 0 and isinstance(own := self._own[-number - 1], Exception):
            return own
        kinds = [kind for one in names if isinstance(one, str) and (kind := _library_class(one)) is not None]
        error = next((error for kind in kinds if (error := _built(kind, text, args)) is not None), None)
        error = error or other(f"{name}: {text}")
        vars(error).update({name: value for name, value in attributes.items() if _is_attribute(name)})
        vars(error).update({NUMBER: max(0, number), CLASSES: names})
        return error


NUMBER = "mull_number"
"""Attribute of an error of the other side: its number there."""

CLASSES = "mull_classes"
"""Attribute of an error of the other side: names of its classes there."""

FROM_CANDIDATE = "from_candidate"
"""Attribute of an error in the grader that the program has raised: what it was there."""

MAX_ATTRIBUTES = 20
"""Most attributes of an error that are looked at."""

MAX_ERRORS = 10_000
"""Most errors that a side keeps because they may come back."""

OUT_OF_MEMORY = "builtins.MemoryError"
"""Name of a class of errors, as in a message."""


def full_name(kind: Any) -> str:
    """With its module."""
    return f"{kind.__module__}.{kind.__qualname__}"


def _is_of_library(kind: type) -> bool:
    """A class of errors of Python's own. Those of ``unittest`` are the tests' own: a program may not have one skipped."""
    package = str(kind.__module__).partition(".")[0]
    return package in sys.stdlib_module_names and package != "unittest" and issubclass(kind, Exception)


def _library_class(name: str) -> type[Exception] | None:
    """One by its name if its module is loaded here: nothing is imported because a program says so."""
    module, _, attribute = name.rpartition(".")
    kind = getattr(sys.modules.get(module), attribute, None)
    is_it = isinstance(kind, type) and kind.__module__ == module and _is_of_library(kind)
    return kind if is_it else None


def _built(kind: type[Exception], text: str, args: Any) -> Exception | None:
    for given in (args, (text,)):
        try:
            return kind(*given)
        except Exception:  # noqa: BLE001 - UnicodeDecodeError and others want their own arguments, and these are the program's
            continue
    # JSONDecodeError makes its text of arguments that it does not keep.
    return kind.__new__(kind, text) if kind.__str__ is BaseException.__str__ else None


def _is_attribute(name: Any) -> bool:
    return isinstance(name, str) and name.isidentifier() and not name.startswith("_") and name != FROM_CANDIDATE


def _plain_arguments(error: BaseException, known: type) -> tuple[Any, ...] | None:
    """Arguments of an error if they are data, are few, and give its text in the class of the library, too; else None."""
    try:
        args = error.args
        if isinstance(error, OSError) and error.filename is not None and type(error.filename) is str:
            args = (error.errno, error.strerror, error.filename)
    except Exception:  # noqa: BLE001 - `args` may be the program's
        return None
    has_own_text = type(error).__str__ is not known.__str__  # type: ignore[comparison-overlap]
    return args if type(args) is tuple and _is_small(args) and not has_own_text else None


def _attributes(error: BaseException) -> dict[str, Any]:
    """Those of an error that are data and small, the first few."""
    try:
        found = islice(vars(error).items(), MAX_ATTRIBUTES)
        return {name: value for name, value in found if _is_attribute(name) and _is_small(value)}
    except Exception:  # noqa: BLE001 - `__dict__` may be the program's, too
        return {}


def _is_small(value: Any) -> bool:
    """Whether it is data of built-in types, and little: no more is looked at than that."""
    left, parts = MAX_ARGUMENTS_BYTES, [value]
    while parts:
        part = parts.pop()
        kind = type(part)
        if kind in (str, bytes, list, tuple, set, frozenset, dict):
            left -= len(part)
        elif kind is int:
            left -= part.bit_length() // 4
        elif part is not None and kind not in (bool, float, complex):
            return False
        left -= 1
        if left < 0:
            return False
        if kind in (list, tuple, set, frozenset, dict):
            parts += [*part, *part.values()] if kind is dict else part
    return True


class Channel:
    """One end of a stream socket between two containers."""

    def __init__(self, descriptor: int, limit: int = MAX_MESSAGE_BYTES) -> None:
        self._descriptor, self._limit = descriptor, limit

    def send(self, value: Any, keep: Keep | None = None) -> None:
        """Write one message.

        Raises:
            NotPlainError: see `encode`.
            ValueError: it is longer than the limit.
            Ended: nobody reads any more.
        """
        content = encode(value, keep)
        if len(content) > self._limit:
            raise ValueError(f"it takes {len(content):,} bytes, more than the {self._limit:,} that a message may have")
        rest = memoryview(len(content).to_bytes(4, "big") + content)
        try:
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]
        except OSError:
            raise Ended from None

    def receive(self, find: Find | None = None, seen: Seen | None = None) -> Any:
        """Read one message.

        Raises:
            ValueError: it is none, or too long.
            Ended: the other side is gone.
        """
        size = int.from_bytes(self._read(4), "big")
        if size > self._limit:
            raise ValueError("a message is too long")
        return decode(self._read(size), find, seen)

    def _read(self, size: int) -> bytes:
        parts = []
        while size:
            try:
                part = os.read(self._descriptor, min(size, 1 << 16))
            except OSError:
                raise Ended from None
            if not part:
                raise Ended
            parts.append(part)
            size -= len(part)
        return b"".join(parts)


def restrict(setup: dict[str, Any], line: int) -> None:
    """Close what is open besides the line, take the limits on, then the uid: what follows is no longer ours."""
    if setup["closes"]:
        os.closerange(3, line)
        os.closerange(line + 1, 1 << 16)
    for number, value in setup["limits"]:
        resource.setrlimit(number, (value, value))
    if setup["uid"] is not None:
        os.setresgid(setup["uid"], setup["uid"], setup["uid"])
        os.setresuid(setup["uid"], setup["uid"], setup["uid"])
    if setup["packages"]:
        sys.path.append(setup["packages"])
    sys.set_int_max_str_digits(0)
