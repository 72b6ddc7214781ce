"""Stand-ins for the program's functions and objects, for the tests: what is done with one is asked of the candidate's container.

Runs in the grader. What comes back is data, or stands for another object; see the concept page *Sandbox*.
"""

import builtins
from collections import deque
from collections.abc import Iterator
from functools import _lru_cache_wrapper, partial
from importlib import import_module
from operator import attrgetter, itemgetter, methodcaller
from types import (
    BuiltinFunctionType,
    ClassMethodDescriptorType,
    FunctionType,
    MethodDescriptorType,
    MethodType,
    MethodWrapperType,
    WrapperDescriptorType,
)
from typing import Any

from mull.evaluation.isolation.channel import CLASSES, FROM_CANDIDATE, Channel, Ended, Errors, Room
from mull.evaluation.isolation.values import OPERATORS, UNARY_OPERATORS, is_iterator

CALLED_BACK = (
    *(FunctionType, MethodType, BuiltinFunctionType, MethodWrapperType),
    *(MethodDescriptorType, WrapperDescriptorType, ClassMethodDescriptorType),
    *(partial, attrgetter, itemgetter, methodcaller, _lru_cache_wrapper),
)
"""Functions of the tests, and what the library makes of them."""


class CandidateError(Exception):
    """The program raised something that is no built-in ``Exception``, such as ``SystemExit``."""


class Remote:
    """An object of the candidate's: what is done with it asks its container, and gives data or another such object.

    Operators ask, too, where both sides are such objects. Between one and data they do not: it is equal to none, and has no order
    and no difference, because what the tests compare with data must not be the program's word. Nor is it a number: its
    ``float`` could be another each time.
    """

    def __init__(self, candidate: "Candidate", number: int) -> None:
        self.__dict__.update(_candidate=candidate, _number=number)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call it; lists and dictionaries of the tests get the content that the call leaves in them."""
        return self._ask("call", args, kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name not in ("__name__", "__qualname__"):
            raise AttributeError(name)
        return self._ask("attribute", (name,))

    def __setattr__(self, name: str, value: Any) -> None:
        self._ask("set", (name, value))

    def __getitem__(self, key: Any) -> Any:
        return self._ask("item", (key,))

    def __setitem__(self, key: Any, value: Any) -> None:
        self._ask("set item", (key, value))

    def __delitem__(self, key: Any) -> None:
        self._ask("delete item", (key,))

    def __len__(self) -> int:
        return int(self._ask("length"))

    def __iter__(self) -> Any:
        return self._ask("iter")

    def __next__(self) -> Any:
        return self._ask("next")

    def __bool__(self) -> bool:
        return bool(self._ask("truth"))

    def __contains__(self, item: Any) -> bool:
        return bool(self._ask("contains", (item,))) if type(item) is Remote else any(item == mine for mine in self)

    def __hash__(self) -> int:
        return int(self._ask("hash"))

    def __str__(self) -> str:
        return str(self._ask("text"))

    def __repr__(self) -> str:
        return str(self._ask("repr"))

    def __instancecheck__(self, item: Any) -> bool:
        if isinstance(item, Exception) and (names := vars(item).get(CLASSES)):
            return self._ask("full name") in names
        return type(item) is Remote and bool(self._ask("instance", (item,)))

    def __enter__(self) -> Any:
        return self._ask("enter")

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # Its answer is not taken: it would have the program pass over what the tests do next.
        self._ask("exit", (kind if kind is None or kind.__module__ == "builtins" else Exception,))

    def __copy__(self) -> Any:
        return self._ask("copy")

    def __deepcopy__(self, _: object) -> Any:
        return self._ask("deep copy")

    def _ask(self, operation: str, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        return self.__dict__["_candidate"].ask(operation, self, args, kwargs or {})


def _equality(name: str) -> Any:
    """Of two objects, the program's word. Of one and data, that of its content, which crosses as the result of a call does."""

    def asked(self: Remote, other: Any) -> Any:
        if type(other) is Remote:
            return self._ask(name, (other,))
        content = self._ask("data")
        return NotImplemented if content is None or type(content) is Remote else (content == other) == (name == "eq")

    return asked


def _operator(name: str) -> Any:
    def asked(self: Remote, other: Any) -> Any:
        return self._ask(name, (other,)) if type(other) is Remote else NotImplemented

    return asked


def _unary_operator(name: str) -> Any:
    return lambda self: self._ask(name)


for _name in OPERATORS:
    setattr(Remote, f"__{_name.strip('_')}__", (_equality if _name in ("eq", "ne") else _operator)(_name))
for _name in UNARY_OPERATORS:
    setattr(Remote, f"__{_name}__", _unary_operator(_name))


def _items(chunks: Remote) -> Iterator[Any]:
    while items := chunks._ask("chunk"):
        yield from items


class Candidate:
    """The other container."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._functions: list[Any] = [None]
        self._numbers: dict[Any, int] = {}
        self._remotes: dict[int, Remote] = {}
        self._errors = Errors()
        self._has_objects = False
        """Whether it has given objects with methods, such as types, of which the tests may have made what is no data."""

        self._has_errors = False
        self.n_asked = 0
        self.is_gone = False
        """Whether it has ended, or fallen out of its part. The tests may have caught that with a bare ``except``."""

    def keep(self, value: Any) -> int | None:
        """Functions of the tests stay here and are called back; objects of the candidate's go home by number.

        Raises:
            TypeError: it is the class of the stand-ins, or of no class of the tests' own after the program has given objects such
                as types. No `NotPlainError`, which would have the program choose the weaker proof.
        """
        if value is Remote or type(value) is Candidate:
            raise TypeError("the class of a program's object has no stand-in")
        if type(value) is Remote:
            return -int(value.__dict__["_number"])
        # One such as `eval`, which `encode` does not name, is not called back: the program would have it run here.
        if isinstance(value, CALLED_BACK) and value is not getattr(builtins, getattr(value, "__name__", ""), None):
            identity = _identity(value)
            if identity not in self._numbers:
                self._numbers[identity] = len(self._functions)
                self._functions.append(value)
            return self._numbers[identity]
        is_error = isinstance(value, BaseException) or (isinstance(value, type) and issubclass(value, BaseException))
        is_of_tests = is_iterator(value) or "__main__" in (getattr(value, "__module__", ""), type(value).__module__)
        if not is_of_tests and (self._has_objects or (self._has_errors and is_error)):
            raise TypeError(f"{type(value).__name__} may have come from what the program gave, and is no plain data")
        return None

    def find(self, number: int, own: bool) -> Any:
        """What a number in a message means; an object of the candidate's is the same stand-in each time."""
        return self._functions[number] if own else self._remotes.setdefault(number, Remote(self, number))

    def _note_objects(self) -> None:
        self._has_objects = True

    def send(self, message: Any) -> None:
        """Write."""
        self._channel.send(message, self.keep)

    def receive(self) -> Any:
        """Read. What is no message counts as the candidate's end: an honest one sends none such."""
        try:
            message = self._channel.receive(self.find, self._note_objects)
        except ValueError:
            raise Ended from None
        if not isinstance(message, tuple) or not message:
            raise Ended
        return message

    def ask(
        self,
        operation: str,
        target: Remote,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        is_shared: bool | None = None,
    ) -> Any:
        """Have something done over there, with calls back in between, and raise what it raises.

        Args:
            operation: One of the candidate's `OPERATIONS`.
            target: What with.
            args: Its arguments, which get the content that the call leaves in them if `is_shared`.
            kwargs: More of them.
            is_shared: None for calls whose arguments can change.
        """
        held = [*args, *kwargs.values()]
        self.n_asked += 1
        if is_shared is None:
            is_shared = operation == "call" and _can_change(held)
        if not is_shared:
            held = []  # so that a message about them is none that an honest candidate sends
        try:
            self.send((operation, target, args, kwargs, is_shared))
            while True:
                match self.receive():
                    case ("return", value, dict() as changed, place):
                        _update(held, changed)
                        return value if place is None else _at(held, place)
                    case ("iterator", Remote() as chunks, dict() as changed, None):
                        _update(held, changed)
                        return _items(chunks)
                    case ("raise", str(), str(), tuple(), tuple() | None, dict(), int()) as message:
                        raise self._error(message, may_stop=operation == "next")
                    case ("callback", int() as number, tuple() as back, dict() as options) if (
                        0 < number < len(self._functions)
                    ):
                        self.send(self._tried(self._functions[number], back, options))
                    case ("about", int() as number) if 0 < number < len(self._functions):
                        self.send(self._tried(_about, (self._functions[number],), {}))
                    case _:
                        raise Ended
        except Ended:
            self.is_gone = True
            raise

    def _tried(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        """What the message back is about: a result, or an error."""
        try:
            with Room():
                return ("return", function(*args, **kwargs))
        except Exception as error:  # noqa: BLE001 - the candidate chose the arguments
            message = self._errors.message("raise", error, comes_back=True)
            if isinstance(error, AssertionError):
                # Its text has what the tests expect.
                kind, name, _, classes, *_, number = message
                message = (kind, name, "", classes, (), {}, number)
            return message

    def _error(self, message: tuple[Any, ...], *, may_stop: bool) -> Exception:
        """The program's error, marked as its own, or one that the tests have raised themselves."""
        _, name, text, *_, number = message
        error = self._errors.read(message, CandidateError)
        if isinstance(error, StopIteration) and not may_stop:
            # It would end a `map` or `all` of the tests before they have seen everything.
            error, number = CandidateError(f"{name}: {text}"), 0
        if number >= 0:
            self._has_errors = True
            vars(error)[FROM_CANDIDATE] = f"{name}: {text}" if text else name
        return error


def _can_change(args: list[Any]) -> bool:
    """Whether a call can change what the tests hold."""
    return any(not isinstance(arg, int | float | str | bytes | complex | None) for arg in args)


def _at(held: list[Any], place: Any) -> Any:
    if not isinstance(place, int) or not 0 <= place < len(held):
        raise Ended  # an honest candidate sends none such
    return held[place]


def _identity(function: Any) -> Any:
    """The same for the same function; a method is another object each time that it is read."""
    if isinstance(function, MethodType):
        return (id(function.__self__), id(function.__func__))
    return (id(function.__self__), function.__name__) if isinstance(function, BuiltinFunctionType) else id(function)


def _about(function: Any) -> tuple[str, list[tuple[str, int, bool]]]:
    """Name and parameters: their names, their kinds in the order of ``inspect``, and whether they have defaults."""
    try:
        inspect = import_module("inspect")  # few ask, and it takes longer than Python's start
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # some in C have none
        parameters = []
    return function.__name__, [(one.name, int(one.kind), one.default is not one.empty) for one in parameters]


def _update(held: list[Any], changed: dict[Any, Any]) -> None:
    """Give the tests' own lists, dictionaries and sets the content that the call left in them."""
    for place, new in changed.items():
        mine = _at(held, place)
        if type(mine) is not type(new):
            continue
        if isinstance(mine, list | bytearray):
            mine[:] = new
        elif isinstance(mine, dict | set):
            mine.clear()
            mine.update(new)
        elif isinstance(mine, deque):
            mine.clear()
            mine.extend(new)


def result_of(function: Any, arguments: tuple[Any, ...]) -> Any:
    """Call with data that no call may change: the next program gets it, too, and the oracle."""
    if type(function) is not Remote:
        return function(*arguments)  # a built-in one, or what cannot be called
    candidate: Candidate = function.__dict__["_candidate"]
    return candidate.ask("call", function, arguments, {}, is_shared=False)
