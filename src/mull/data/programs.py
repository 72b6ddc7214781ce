"""Tasks whose answers are programs, graded by tests: read in MBPP's form, or generated from rules.

Nothing is executed here. The generated task is small enough for a tiny model, and needs no download: ``times 3 plus 7`` asks for
``def f(x): return x * 3 + 7``. Which rules are *held out* is decided by a hash of the rule.

Shapes: B prompts, P tokens of the longest prompt of a batch.

Source:
    MBPP: Austin et al. 2021 (arXiv:2108.07732).
"""

import ast
import builtins
import hashlib
import itertools
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from mull.data.sources import DATASET, Record, read_records, string_field
from mull.data.tasks import MBPP_PROMPT, MBPP_SPLITS, Example
from mull.runtime.progress import tracked

COLUMNS = ("task_id", "text", "prompt", "test_list", "test_setup_code", "test_imports", "entry_point", "code")
"""What is read of a record."""


@dataclass(frozen=True, slots=True)
class ProgramTask:
    """One task."""

    name: str
    text: str
    """What the program shall do, in words."""

    tests: tuple[str, ...]
    """Asserts, each a test of its own."""

    entry_point: str
    """Function that the tests call."""

    setup: str = ""
    """Python that runs before the tests."""

    @property
    def prompt(self) -> str:
        """The prompt of MBPP's paper, which shows the tests."""
        return MBPP_PROMPT.format(task=self.text, tests="\n".join(self.tests))


def load_program_tasks(source: str | Path, *, split: str | None = None, config: str | None = None) -> list[ProgramTask]:
    """Read tasks in MBPP's form.

    A record has ``text`` (or ``prompt``), ``test_list``, optionally ``task_id``, ``test_setup_code``, ``test_imports`` and
    ``entry_point``. Without an entry point, it is the function that the tests call and that neither Python nor the setup defines.

    Args:
        source: As in `mull.data.sources.read_records`.
        split: One of MBPP's own by ``task_id`` (prompt, test, validation, train), or that of a dataset ``hf:…``.
        config: As in `mull.data.sources.load_documents`.

    Raises:
        ValueError: a record lacks a key or has another type there; its tests are no Python, have no assert or call no function;
            or there are no tasks.
        FileNotFoundError, ConnectionError, RuntimeError: as in `mull.data.sources.load_documents`.
    """
    numbers = None if str(source).startswith(DATASET) or split is None else MBPP_SPLITS.get(split)
    of_source = split if numbers is None else None
    records = read_records(source, split=of_source, config=config, columns=COLUMNS)
    kept = (r for r in records if numbers is None or r.fields.get("task_id") in numbers)
    tasks = [_task(record) for record in tracked(kept, "record", "reading")]
    if not tasks:
        raise ValueError(f"There are no tasks in {source}" + (f" with split={split}." if split else "."))
    return tasks


def _task(record: Record) -> ProgramTask:
    tests = record.fields.get("test_list")
    if not isinstance(tests, list) or not tests or not all(isinstance(test, str) for test in tests):
        raise ValueError(f"{record.place} lacks test_list, a list of strings, each an assert.")
    setup, shown = setup_code(record).strip(), tuple(map(_unix, tests))
    require_tests(record, "test_list", shown, setup)
    given, known = record.fields.get("entry_point"), record.fields.get("code")
    entry = given if isinstance(given, str) else called_function(shown, setup, known if isinstance(known, str) else "")
    if not entry:
        raise ValueError(f"{record.place} has tests that call no function of the program: give entry_point.")
    number = record.fields.get("task_id", record.place)
    return ProgramTask(
        f"{number}", _unix(string_field(record, "text" if "text" in record.fields else "prompt")), shown, entry, setup
    )


def setup_code(record: Record) -> str:
    """What runs before the tests of a record in MBPP's form: ``test_setup_code``, and ``test_imports``.

    Raises:
        ValueError: it is no Python; names the record's place.
    """
    imports, setup = record.fields.get("test_imports") or [], record.fields.get("test_setup_code") or ""
    if not isinstance(imports, list) or not all(isinstance(line, str) for line in imports):
        raise ValueError(f"{record.place} has test_imports that are no list of strings.")
    require_python(record, "test_imports", "\n".join(imports))
    require_python(record, "test_setup_code", str(setup))
    return _unix("\n".join([*imports, str(setup)]))


def require_tests(record: Record, key: str, texts: Sequence[str], setup: str = "") -> list[ast.Module]:
    """Parse tests, and refuse those that are no Python, and those that no program can fail.

    Raises:
        ValueError: names the record's place.
    """
    trees = [require_python(record, key, text) for text in texts]
    if not any(isinstance(node, ast.Assert) for tree in (_parsed(setup), *trees) for node in statements(tree)):
        raise ValueError(f"{record.place} has no assert in {key}: whatever a program does, it would pass.")
    return trees


def statements(tree: ast.Module) -> Iterator[ast.stmt]:
    """All statements of a program, also those within others."""
    waiting: list[ast.AST] = [tree]
    for node in waiting:  # grows
        blocks = [getattr(node, name, []) for name in ("body", "orelse", "finalbody", "handlers", "cases")]
        inner = [child for block in blocks if isinstance(block, list) for child in block]
        yield from (child for child in inner if isinstance(child, ast.stmt))
        waiting += inner


def require_python(record: Record, key: str, text: str) -> ast.Module:
    """Parse Python, and refuse what is none.

    Raises:
        ValueError: names the record's place.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return ast.parse(_unix(text))
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            where = f"line {error.lineno}: {error.msg}" if isinstance(error, SyntaxError) else str(error)
            raise ValueError(f"{record.place} has {key} that is no Python ({where}).") from None


def _unix(text: str) -> str:
    return text.replace("\r\n", "\n")


def called_function(tests: Sequence[str], setup: str = "", code: str = "") -> str:
    """The function of a program that its tests call; empty if they call none.

    Args:
        tests: Asserts.
        setup: What runs before them.
        code: A solution, if known: its last function that they call is the one. Without it, it is the first one that neither
            Python nor the setup defines.
    """
    trees = [_parsed(text) for text in tests]
    called = [
        node.func.id
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    ]
    defined = set(_names_of(setup)) | set(itertools.chain.from_iterable(_names_of(text) for text in tests))
    solved = [node.name for node in _parsed(code).body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    own = [name for name in reversed(solved) if name in called]
    foreign = [name for name in called if name not in defined and not hasattr(builtins, name)]
    # A program of MBPP calls its function sum: the last resort is a name that Python has.
    return next(iter([*own, *foreign, *called]), "")


def _parsed(text: str) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about invalid escape sequences
        try:
            return ast.parse(_unix(text))
        except (SyntaxError, ValueError):
            return ast.Module([], [])


def _names_of(text: str) -> list[str]:
    """Names that Python code defines or imports."""
    found = []
    for node in ast.walk(_parsed(text)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.append(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found += [(alias.asname or alias.name).split(".")[0] for alias in node.names]
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.append(node.id)
    return found


class PromptBatches:
    """Prompts as a function from the number of a batch to the batch, in an order that is new in every epoch.

    Args:
        prompts: Tokens of each.
        batch_size: Prompts per batch, B.
        pad_id: Token that pads prompts on the left.
        seed: Of the order; None keeps it.
        first: Number of the first prompt, where a reward knows more prompts than these.
    """

    def __init__(
        self, prompts: Sequence[Sequence[int]], batch_size: int, pad_id: int, seed: int | None = None, first: int = 0
    ) -> None:
        self.prompts = prompts
        self.batch_size = batch_size
        self.seed = seed
        self.pad_id, self._first = pad_id, first

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return max(map(len, self.prompts))

    def __len__(self) -> int:
        """How many prompts there are."""
        return len(self.prompts)

    def __call__(self, number: int) -> dict[str, Tensor]:
        """``input_ids [B, P]``, padded on the left; ``attention_mask [B, P]``; ``tasks [B]``, the number of each prompt."""
        begin = number * self.batch_size
        return self.rows([self._place(begin + row) for row in range(self.batch_size)])

    def _place(self, index: int) -> int:
        epoch, place = divmod(index, len(self.prompts))
        if self.seed is None:
            return place
        return int(np.random.default_rng((self.seed, epoch)).permutation(len(self.prompts))[place])

    def rows(self, places: Sequence[int]) -> dict[str, Tensor]:
        """A batch of the prompts at these places."""
        chosen = [self.prompts[place] for place in places]
        width = max(map(len, chosen))
        return {
            "input_ids": torch.tensor([[self.pad_id] * (width - len(ids)) + [*ids] for ids in chosen]),
            "attention_mask": torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in chosen]),
            "tasks": torch.tensor([self._first + place for place in places]),
        }


def tasks_digest(tasks: Sequence[ProgramTask]) -> str:
    """SHA-256, in hexadecimal, of tasks in their order."""
    return hashlib.sha256(repr([astuple(task) for task in tasks]).encode("utf-8", "surrogatepass")).hexdigest()


RULES = (
    ("times {a} plus {b}", "x * {a} + {b}", lambda x, a, b: x * a + b),
    ("times {a} minus {b}", "x * {a} - {b}", lambda x, a, b: x * a - b),
    ("plus {a} times {b}", "(x + {a}) * {b}", lambda x, a, b: (x + a) * b),
    ("minus {a} times {b}", "(x - {a}) * {b}", lambda x, a, b: (x - a) * b),
    ("divided by {a} plus {b}", "x // {a} + {b}", lambda x, a, b: x // a + b),
    ("modulo {a} plus {b}", "x % {a} + {b}", lambda x, a, b: x % a + b),
    ("at least {a} plus {b}", "max(x, {a}) + {b}", lambda x, a, b: max(x, a) + b),
    ("at most {a} minus {b}", "min(x, {a}) - {b}", lambda x, a, b: min(x, a) - b),
)
"""Words, program and function of each kind of rule; read from left to right. The numbers a and b are 2 to 9."""

NUMBERS = range(2, 10)
HELD_OUT_EVERY = 4
"""On average, one rule in this many is held out."""

N_TESTS = 4
INPUTS = range(-9, 31)
PIECES = r"def f\(x\): return| ?[a-z]+| ?//| ?[^\sa-z]|\s"
"""What `rule_tokenizer` reads as one token."""


@dataclass(frozen=True, slots=True)
class Rule:
    """What a generated program computes."""

    kind: int
    a: int
    b: int

    @property
    def words(self) -> str:
        """The task, a line."""
        return RULES[self.kind][0].format(a=self.a, b=self.b) + "\n"

    @property
    def program(self) -> str:
        """A right answer, a line without its end."""
        return "def f(x): return " + RULES[self.kind][1].format(a=self.a, b=self.b)

    @property
    def mistaken(self) -> "Rule":
        """The same kind with a second number that is one too high; 2 after 9."""
        return Rule(self.kind, self.a, NUMBERS.start + (self.b - NUMBERS.start + 1) % len(NUMBERS))

    @property
    def held_out(self) -> bool:
        """Whether nothing is trained on it."""
        return self._number % HELD_OUT_EVERY == 0

    @property
    def _number(self) -> int:
        return int.from_bytes(hashlib.sha256(repr((self.kind, self.a, self.b)).encode()).digest()[:4], "big")

    def task(self) -> ProgramTask:
        """The task with its tests: `N_TESTS` different inputs, always the same ones for a rule."""
        inputs = np.random.default_rng(self._number).choice(INPUTS, N_TESTS, replace=False).tolist()
        function: Any = RULES[self.kind][2]
        tests = tuple(f"assert f({x}) == {function(x, self.a, self.b)}" for x in inputs)
        return ProgramTask(self.words.strip(), self.words, tests, "f")


def rules(*, held_out: bool) -> list[Rule]:
    """All rules that are held out, or all others; in an order that mixes their kinds."""
    everything = [Rule(kind, a, b) for kind, a, b in itertools.product(range(len(RULES)), NUMBERS, NUMBERS)]
    return sorted((rule for rule in everything if rule.held_out == held_out), key=lambda rule: rule._number)


def demonstrations(n_examples: int, *, wrong: float, seed: int) -> list[Example]:
    """Rules that are not held out, drawn with replacement, with their programs.

    Args:
        n_examples: How many.
        wrong: Share of programs of the `Rule.mistaken`.
        seed: Of the draws.
    """
    rng, pool = np.random.default_rng(seed), rules(held_out=False)
    chosen, mistakes = rng.integers(len(pool), size=n_examples), rng.random(n_examples) < wrong
    return [
        Example(rule.words, rule.words, (rule.mistaken if mistake else rule).program)
        for rule, mistake in zip((pool[index] for index in chosen.tolist()), mistakes.tolist(), strict=True)
    ]


def rule_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer for generated tasks and their programs: words, numbers and signs are tokens, with the space before them."""
    everything = [*rules(held_out=True), *rules(held_out=False)]
    found = {piece for rule in everything for piece in re.findall(PIECES, rule.words + rule.program)}
    names = ["<pad>", "<eos>", "<unk>", *sorted(found)]
    pieces = Tokenizer(models.WordLevel({name: index for index, name in enumerate(names)}, unk_token="<unk>"))
    pieces.pre_tokenizer = pre_tokenizers.Split(Regex(PIECES), "isolated")
    pieces.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=pieces, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
