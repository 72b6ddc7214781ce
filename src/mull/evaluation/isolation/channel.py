"""Messages across the wall of a container: a length, then the bytes of a value. Runs on both sides."""

import os
import resource
import sys
from typing import Any

from mull.evaluation.isolation.values import Find, Keep, decode, encode

MAX_MESSAGE_BYTES = 64 << 20
"""A longer message is refused unread. The largest result of a reference solution (HumanEval/130) takes 25 MB."""


class Ended(BaseException):
    """The other side is gone. No ``Exception``: tests that expect errors must not catch this."""


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
