"""Messages across the wall of a container: a length, then the bytes of a value. Runs on both sides."""

import builtins
import os
import resource
import sys
from typing import Any

from mull.evaluation.isolation.values import Find, Keep, NotPlainError, decode, encode

MAX_MESSAGE_BYTES = 64 << 20
"""A longer message is refused unread. The largest result of a reference solution (HumanEval/130) takes 9 MB."""

MAX_ANSWER_BYTES = 1 << 30
"""The same for what the grader tells the host: a verdict, or all results of a reference solution."""


MAX_TEXT = 300
MAX_ARGUMENTS_BYTES = 4096


class Ended(BaseException):
    """The other side is gone. No ``Exception``: tests that expect errors must not catch this."""


def plain_arguments(error: BaseException, known: type) -> tuple[Any, ...] | None:
    """Arguments of an error if they are data, are few, and give its text in the built-in class, too; else None."""
    try:
        args = error.args
        is_small = type(args) is tuple and len(encode(args, _refuse)) <= MAX_ARGUMENTS_BYTES
    except Exception:  # noqa: BLE001 - `args` and what is in it are the program's
        return None
    has_own_text = type(error).__str__ is not known.__str__  # type: ignore[comparison-overlap]
    return args if is_small and not has_own_text else None


def _refuse(value: Any) -> int:
    raise NotPlainError(f"{type(value).__name__} is no plain data")


def error_message(kind: str, error: BaseException) -> tuple[str, str, str, str, tuple[Any, ...] | None]:
    """``(kind, name, nearest built-in class, text, arguments)``."""
    known = next(base for base in type(error).__mro__ if base.__module__ == "builtins")
    try:
        text = str(error)[:MAX_TEXT]
    except Exception:  # noqa: BLE001 - __str__ is the candidate's
        text = ""
    return (kind, type(error).__name__, known.__name__, text, plain_arguments(error, known))


def built_error(known: str, text: str, args: Any) -> Exception | None:
    """An error of a built-in class; None where there is no such ``Exception``."""
    kind = getattr(builtins, known, None)
    if not isinstance(kind, type) or not issubclass(kind, Exception):
        return None
    for given in (args, (text,)):
        try:
            return kind(*given)
        except (TypeError, ValueError, OverflowError):  # UnicodeDecodeError and others want their own arguments
            continue
    return None


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

    def receive(self, find: Find | None = None) -> Any:
        """Read one message.

        Raises:
            ValueError: it is none, or too long.
            Ended: the other side is gone.
        """
        size = int.from_bytes(self._read(4), "big")
        if size > self._limit:
            raise ValueError("a message is too long")
        return decode(self._read(size), find)

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
