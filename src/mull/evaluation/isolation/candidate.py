"""What runs beside the candidate's program in its container: it loads the program and answers calls. Nothing here is trusted.

The program shares this process and may do what it likes with it. That gains nothing: the tests, the expected results and the
verdict are on the other side. The module is sent into the container as compiled code; files of mull are not there.
"""

import _operator  # `operator` takes longer to import
import _thread  # and `threading`
import builtins
import os
import resource
import sys
from collections.abc import Iterator
from itertools import islice
from types import MethodType, ModuleType
from typing import Any, NoReturn

from mull.evaluation.isolation.channel import MAX_NESTED, MAX_TEXT, Channel, Errors, Room, full_name, restrict
from mull.evaluation.isolation.values import KEPT, OPERATORS, UNARY_OPERATORS, content, encode, is_iterator

MAX_CHUNK = 1024

OF_DATA = {
    *("__new__", "__init__", "__repr__", "__str__", "__getnewargs__", "_make", "_replace", "_asdict"),
    *("__class_getitem__", "__init_subclass__"),
}
"""Methods that a class may have and be no more than data; a named tuple has some."""


class Callback:
    """A function of the tests, which runs on their side."""

    def __init__(self, program: "Program", number: int) -> None:
        self._program, self._number = program, number

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Have it called there."""
        return self._program.ask("callback", self._number, args, kwargs)

    def _about(self) -> tuple[str, list[tuple[str, int, bool]]]:
        name, parameters = self._program.ask("about", self._number)
        return name, parameters

    @property
    def __name__(self) -> str:
        return self._about()[0]

    @property
    def __signature__(self) -> Any:
        """What ``inspect.signature`` gives; defaults are None."""
        inspect = __import__("inspect")  # few ask, and it takes longer than Python's start
        kind = inspect.Parameter
        kinds = [
            kind.POSITIONAL_ONLY,
            kind.POSITIONAL_OR_KEYWORD,
            kind.VAR_POSITIONAL,
            kind.KEYWORD_ONLY,
            kind.VAR_KEYWORD,
        ]
        return inspect.Signature(
            [kind(name, kinds[at], default=None if has else kind.empty) for name, at, has in self._about()[1]]
        )


class Chunks:
    """An iterator that the tests read as they need it: it may have no end.

    They get its first items one by one, because the next one may take long, or change what the tests look at meanwhile; later
    twice as many each time.
    """

    N_ALONE = 64

    def __init__(self, iterator: Iterator[Any]) -> None:
        self._iterator, self._size, self._n_taken = iterator, 1, 0
        self._error: Exception | None = None

    def take(self) -> list[Any]:
        """The next items; none at the end."""
        if self._error is not None:
            raise self._error
        taken: list[Any] = []
        try:
            for item in islice(self._iterator, self._size):
                taken.append(item)  # noqa: PERF402 - `extend` would lose them
        except Exception as error:  # what came before it comes first
            if not taken:
                raise
            self._error = error
        self._n_taken += len(taken)
        if self._n_taken >= self.N_ALONE:
            self._size = min(2 * self._size, MAX_CHUNK)
        return taken


def is_of_library(value: Any) -> bool:
    """An iterator of Python's; those of the program's own classes stay what they are."""
    return type(value).__module__ in sys.stdlib_module_names and is_iterator(value)


def has_methods_of_its_own(value: Any) -> bool:
    """An object of a class of the program that adds methods to lists, dictionaries, sets or tuples."""
    own = [kind for kind in type(value).__mro__ if kind.__module__ not in sys.stdlib_module_names]
    return isinstance(value, list | dict | set | frozenset | tuple) and any(
        callable(attribute) or isinstance(attribute, property | classmethod | staticmethod)
        for kind in own
        for name, attribute in vars(kind).items()
        if name not in OF_DATA
    )


class Program:
    """The candidate's module, and its objects that the tests hold."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._objects: dict[int, Any] = {}
        self._numbers: dict[int, int] = {}
        self._callbacks: dict[int, Callback] = {}
        self._errors = Errors()
        self._n_asking = 0
        self._line = _thread.RLock()
        self.module = ModuleType("candidate")

    def keep(self, value: Any) -> int | None:
        """Number of an object that is no data; None for an iterator inside of data, which is sent item by item."""
        if type(value) is Callback:
            return -value._number
        if is_of_library(value):
            return None
        number = self._numbers.setdefault(id(value), len(self._numbers) + 1)
        self._objects[number] = value
        return number

    def find(self, number: int, own: bool) -> Any:
        """The object that the other side means."""
        return self._objects[number] if own else self._callbacks.setdefault(number, Callback(self, number))

    def send(self, message: Any) -> None:
        """Write to the grader."""
        self._channel.send(message, self.keep)

    def receive(self) -> Any:
        """Read from the grader."""
        return self._channel.receive(self.find)

    def ask(self, *request: Any) -> Any:
        """Have the tests' side do something. It may ask for something here before it has an answer."""
        if self._n_asking >= MAX_NESTED:
            raise RecursionError("maximum recursion depth exceeded")
        with self._line, Room():
            self._n_asking += 1
            try:
                self.send(request)
                while (answer := self.receive())[0] not in ("return", "raise"):
                    self.respond(answer)
            finally:
                self._n_asking -= 1
        if answer[0] == "raise":
            raise self._errors.read(answer, RuntimeError)
        return answer[1]

    def respond(self, request: Any) -> None:
        """Do what the tests ask, and say what came of it."""
        try:
            self.send(self.answer(request))
        except BaseException as error:  # noqa: BLE001 - also SystemExit: whatever a call does, the next one comes
            self.send(self._errors.message("raise", error, comes_back=self._n_asking > 0))

    def load(self, source: str, name: str) -> None:
        """Run the module's code."""
        self.module = ModuleType(name)
        sys.modules[name] = self.module
        exec(compile(source, "<program>", "exec", dont_inherit=True), self.module.__dict__)

    def describe(self, name: str) -> tuple[Any, ...]:
        """What a name of the program stands for: a module of Python, another object, or nothing."""
        if name not in self.module.__dict__:
            return ("missing",)
        value = self.module.__dict__[name]
        return ("module", value.__name__) if isinstance(value, ModuleType) else ("value", value)

    def answer(self, request: Any) -> tuple[Any, ...]:
        """Do what the tests ask: call, read an attribute, index.

        Returns:
            ``("return", result, changed, place)``: which arguments have other content now, by their place, and the place of the
            one that is the result itself. ``"iterator"`` instead, with `Chunks` as result, where it is one.
        """
        operation, target, args, kwargs, is_shared = request
        held = [*args, *kwargs.values()] if is_shared else []
        before = [encode(arg, id) for arg in held]  # with `id`, it reads no iterator
        result = OPERATIONS[operation](target, *args, **kwargs)
        made_by = target.__self__ if isinstance(target, MethodType) else target
        if operation == "call" and type(result) is made_by and has_methods_of_its_own(result):
            KEPT.add(made_by)  # the tests make objects of it to call their methods
        changed = {place: arg for place, arg in enumerate(held) if encode(arg, id) != before[place]}
        # An iterator of the tests was read to its end when it was sent: what is left of it is here.
        place = next((at for at, arg in enumerate(held) if arg is result and not hasattr(type(arg), "__next__")), None)
        if place is None and (operation == "iter" or is_of_library(result)):
            return ("iterator", Chunks(result), changed, None)
        return ("return", result if place is None else None, changed, place)

    def serve(self) -> NoReturn:
        """Answer until the container is removed."""
        while True:
            self.respond(self.receive())


OPERATIONS: dict[str, Any] = {
    "call": lambda target, *args, **kwargs: target(*args, **kwargs),
    "attribute": getattr,
    "set": setattr,
    "item": lambda target, key: target[key],
    "set item": lambda target, key, value: target.__setitem__(key, value),
    "delete item": lambda target, key: target.__delitem__(key),
    "length": len,
    "iter": iter,
    "next": next,
    "chunk": Chunks.take,
    "truth": bool,
    "contains": lambda target, item: item in target,
    "hash": hash,
    "text": str,
    "repr": repr,
    "instance": lambda target, item: isinstance(item, target),
    "enter": lambda target: target.__enter__(),
    "exit": lambda target, kind: bool(target.__exit__(kind, kind and kind(), None)),
    "data": content,
    "full name": full_name,
    "copy": lambda target: __import__("copy").copy(target),
    "deep copy": lambda target: __import__("copy").deepcopy(target),
    **{name: getattr(_operator, name) for name in [*OPERATORS, *UNARY_OPERATORS]},
}


def run_script(program: Program, source: str, text: str) -> None:
    """Run a program that reads its input and prints."""
    descriptor = os.open("input", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    os.unlink("input")  # noqa: PTH108 - pathlib takes as long to import as Python to start
    rest = memoryview(text.encode("utf-8", "surrogatepass"))
    while rest:
        rest = rest[os.write(descriptor, rest) :]
    os.lseek(descriptor, 0, os.SEEK_SET)
    os.dup2(descriptor, 0)
    os.close(descriptor)
    sys.stdin = open(0, encoding="utf-8", errors="surrogateescape", closefd=False)  # noqa: SIM115 - the program's
    status: Any = None
    try:
        program.load(source, "__main__")
    except SystemExit as stop:
        status = stop.code
    if "threading" in sys.modules:
        sys.modules["threading"]._shutdown()  # as Python does at its end: wait for threads
    if "atexit" in sys.modules:
        sys.modules["atexit"]._run_exitfuncs()
    for stream in (sys.stdout, sys.__stdout__):
        if stream is not None and not getattr(stream, "closed", False):
            stream.flush()
    # As Python does: a number is the status, of which the system keeps a byte, and any other object is an error's text.
    told = int(status or 0) & 0xFF if isinstance(status, int | None) else str(status)[:MAX_TEXT]
    program.send(("finished", told))


def run_inside(program: Program, source: str, nonce: bytes) -> None:
    """Run the tests in this process; the weaker proof. The nonce came after the program was loaded."""
    exec(compile(source, "<tests>", "exec", dont_inherit=True), program.module.__dict__)
    program.send(("nonce", nonce))


def leave(_: Any = None) -> NoReturn:
    """What ``exit`` is with ``site``, which we start without."""
    raise SystemExit(_)


def main(line: int) -> None:
    """Serve one program."""
    channel = Channel(line)
    restrict(channel.receive(), line)
    channel.send("ready")
    vars(builtins).update(exit=leave, quit=leave)
    program = Program(channel)
    kind, source, cpu_seconds, details = channel.receive()
    if cpu_seconds:
        resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds))
    try:
        if kind == "script":
            run_script(program, source, details)
            os._exit(0)
        os.dup2(2, 1)  # prints of functions go nowhere
        program.load(source, "candidate")
        program.send(("loaded", {name: program.describe(name) for name in details}))
        if kind == "inside":
            tests, nonce = channel.receive()
            run_inside(program, tests, nonce)
    except BaseException as error:  # noqa: BLE001 - the program may raise anything
        channel.send(Errors().message("failed", error))
        os._exit(1)
    program.serve()
