"""Problems of the generative suites, as their authors published them: what to ask, and what decides whether an answer is right.

Source:
    HumanEval: Chen et al. 2021 (arXiv:2107.03374). MBPP: Austin et al. 2021 (arXiv:2108.07732). HumanEval+ and MBPP+: EvalPlus
    (arXiv:2305.01210), comparison rules of its version 0.3.1. CodeContests: Li et al. 2022 (arXiv:2203.07814). GSM8K: Cobbe et
    al. 2021 (arXiv:2110.14168).
"""

import ast
import hashlib
import json
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from mull.data.programs import called_function, require_tests, setup_code, statements
from mull.data.sources import DATASET, Record, read_records, string_field
from mull.data.tasks import MBPP_SPLITS
from mull.evaluation.suites.extract import final_number, unix
from mull.runtime import storage
from mull.runtime.progress import tracked

Suite = Literal["humaneval", "humaneval+", "mbpp", "mbpp+", "codecontests", "gsm8k"]
"""Suites whose answers are written by the model."""

MBPP_SHOTS = (2, 3, 4)
"""``task_id`` of the examples in MBPP's prompt."""

GSM8K_SHOTS = 5
"""lm-eval draws so many training problems anew for each test problem."""

HUB = {
    "humaneval": ("openai/openai_humaneval", None, "test"),
    "humaneval+": ("evalplus/humanevalplus", None, "test"),
    "mbpp": ("google-research-datasets/mbpp", "full", "all"),
    "mbpp+": ("evalplus/mbppplus", None, "test"),
    "codecontests": ("deepmind/code_contests", None, "test"),
    "gsm8k": ("openai/gsm8k", "main", "test"),
}
"""Hub name, configuration and split of each suite, where no source is given."""


@dataclass(frozen=True)
class Inputs:
    """Tests that call the entry point; what is right is what the reference solution returns."""

    reference: str
    """Program of the reference solution."""

    inputs: tuple[tuple[Any, ...], ...]
    atol: float
    """Tolerance of numbers; 0 is that of the sandbox's rule."""


@dataclass(frozen=True)
class Problem:
    """One problem of a suite."""

    name: str
    question: str
    """What is asked: code to complete (HumanEval), a docstring (MBPP+), a task or a statement in prose."""

    entry_point: str = ""
    """Function that the tests call; empty where the program reads standard input, and for numbers."""

    asserts: str = ""
    """Python that fails if the program is wrong."""

    inputs: Inputs | None = None
    stdin: tuple[str, ...] = ()
    """Inputs of a program that reads standard input, and `stdout`, what it must print."""

    stdout: tuple[str, ...] = ()
    seconds: float | None = None
    """Time for each input, where the problem states one."""

    tests: tuple[str, ...] = ()
    """Asserts that the prompt shows."""

    answer: str = ""
    """The reference answer: code of MBPP, text of GSM8K."""


@dataclass(frozen=True)
class Problems:
    """The problems of a suite in their published order, and those that its prompt shows as examples."""

    suite: Suite
    problems: tuple[Problem, ...]
    shots: tuple[Problem, ...] = ()
    source: str = field(default="", compare=False)
    digest: str = field(default="", compare=False)
    """A hash of all records of the source, tests included."""

    examples: str | None = field(default=None, compare=False)
    """The same of the source of `shots`, where that is another one."""


def load_problems(suite: Suite, source: str | Path | None = None, *, shots: str | Path | None = None) -> Problems:
    """Read the problems of a suite.

    Args:
        suite: Which one. For ``mbpp`` these are its 500 test problems; ids 2, 3 and 4 of the same source are in the prompt.
        source: As in `mull.data.sources.read_records`; None reads the suite's dataset from the hub.
        shots: GSM8K's training problems, of which the prompt shows five; default: the same place with ``train`` for ``test``.

    Raises:
        ValueError: a record lacks a key of its suite or has another type there, its tests are no Python or cannot fail, or there
            are no problems.
        FileNotFoundError, ConnectionError, RuntimeError: as in `mull.data.sources.load_documents`.
    """
    place, records = _records(suite, source)
    found = [READERS[suite](record) for record in records]
    examples: list[Problem] = []
    others: list[Record] = []
    if suite == "mbpp":
        by_number = {int(problem.name.rpartition("/")[2]): problem for problem in found}
        if missing := [number for number in MBPP_SHOTS if number not in by_number]:
            raise ValueError(f"{place} lacks task_id {missing[0]}: MBPP's prompt shows the problems 2, 3 and 4.")
        examples = [by_number[number] for number in MBPP_SHOTS]
        found = [problem for number, problem in by_number.items() if number in MBPP_SPLITS["test"]]
    if suite == "gsm8k":
        others = _gsm8k_shots(place if source is not None else None, shots)
        examples = [_gsm8k(record) for record in others]
    if not found:
        raise ValueError(f"There are no problems of {suite} in {place}: check the source.")
    names = [problem.name for problem in found]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"{place} has two problems that are called {twice}: each must have a name of its own.")
    return Problems(suite, tuple(found), tuple(examples), place, _digest(records), _digest(others) if others else None)


def _records(suite: Suite, source: str | Path | None, split: str | None = None) -> tuple[str, list[Record]]:
    name, config, usual = HUB[suite]
    place = DATASET + name if source is None else str(source)
    options: dict[str, Any] = {}
    if place.startswith(DATASET):
        options = {"split": split or usual, "config": config if place == DATASET + name else None}
    try:
        return place, list(tracked(read_records(place, **options), "problem", f"reading {suite}"))
    except ConnectionError as error:
        hint = f"--data {suite}=FILE (in Python data={{'{suite}': …}}) reads the problems from a file"
        raise ConnectionError(f"{error} {hint}." if source is None else str(error)) from None


def _digest(records: Sequence[Record]) -> str:
    digest = hashlib.sha256()
    for record in records:
        digest.update(json.dumps(record.fields, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:16]


def _gsm8k_shots(place: str | None, shots: str | Path | None) -> list[Record]:
    if shots is None and place is not None and not place.startswith(DATASET):
        folder, slash, name = place.rpartition("/")
        shots = folder + slash + name.replace("test", "train")
        if "test" not in name or not storage.exists(str(shots)):
            raise ValueError(
                f"GSM8K's prompt shows five training problems, and there are none beside {place}: give their source as "
                "gsm8k-train."
            )
    found, records = _records("gsm8k", place if shots is None else shots, "train")
    if len(records) < GSM8K_SHOTS:
        raise ValueError(f"{found} has {len(records)} training problems, and GSM8K's prompt shows {GSM8K_SHOTS}.")
    return records


def _humaneval(record: Record) -> Problem:
    name, prompt, entry, test = (
        unix(string_field(record, key)) for key in ("task_id", "prompt", "entry_point", "test")
    )
    require_tests(record, "test", [test])
    return Problem(name, prompt, entry, asserts=f"{_helpers(prompt, entry, test)}{test}\ncheck({entry})\n")


def _helpers(prompt: str, entry: str, test: str) -> str:
    """Functions and imports of the prompt where the tests call these: else they would be what the program makes of them.

    HumanEval/32, 38 and 50 have one each.
    """
    try:
        tree, called = ast.parse(f"{prompt}    pass\n"), ast.parse(test)
    except SyntaxError:  # told when the tests run; a prompt may end within a line
        return ""
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name != entry]
    if not {node.id for node in ast.walk(called) if isinstance(node, ast.Name)} & {node.name for node in functions}:
        return ""
    imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    return "".join(f"{ast.unparse(node)}\n\n" for node in [*imports, *functions])


def _humaneval_plus(record: Record) -> Problem:
    name, prompt, entry, solution = (
        unix(string_field(record, key)) for key in ("task_id", "prompt", "entry_point", "canonical_solution")
    )
    if "base_input" not in record.fields:
        return Problem(name, prompt, entry, inputs=_hub_inputs(record, prompt + solution))
    return Problem(name, prompt, entry, inputs=_inputs(record, prompt + solution, lambda values: values))


def _mbpp(record: Record) -> Problem:
    number, tests = record.fields.get("task_id"), record.fields.get("test_list")
    if (
        not isinstance(number, int)
        or isinstance(number, bool)
        or not isinstance(tests, list)
        or not all(isinstance(test, str) for test in tests)
    ):
        raise ValueError(f"{record.place} lacks task_id, a number, or test_list, a list of strings.")
    question = unix(string_field(record, "text" if "text" in record.fields else "prompt"))
    code = unix(string_field(record, "code"))
    setup, shown = setup_code(record), tuple(unix(test) for test in tests)
    if not shown:
        raise ValueError(f"{record.place} has an empty test_list: whatever a program does, it would pass.")
    require_tests(record, "test_list", shown, setup)
    asserts = "\n".join([setup, *shown]) + "\n"
    return Problem(f"mbpp/{number}", question, tested_function(code, shown), asserts, tests=shown, answer=code)


def _mbpp_plus(record: Record) -> Problem:
    if "base_input" in record.fields:
        name, prompt, entry, solution = (
            unix(string_field(record, key)) for key in ("task_id", "prompt", "entry_point", "canonical_solution")
        )
        digits = re.search(r"\d+$", name)
        if digits is None:
            raise ValueError(f"{record.place} has task_id {name!r}, which ends with no number.")
        number = int(digits[0])
        return Problem(
            name,
            prompt,
            entry,
            inputs=_inputs(record, solution, lambda values: with_tuples(number, _carried(number, values))),
        )
    problem = _mbpp(record)  # the form on the hub
    name = f"Mbpp/{problem.name.rpartition('/')[2]}"
    question = f'"""\n{problem.question}\n{problem.tests[0]}\n"""\n'
    inputs = _hub_inputs(record, problem.answer)
    kept = _carried(int(problem.name.rpartition("/")[2]), [list(given) for given in inputs.inputs])
    return Problem(name, question, problem.entry_point, inputs=replace(inputs, inputs=tuple(map(tuple, kept))))


def _hub_inputs(record: Record, reference: str) -> Inputs:
    """Inputs and tolerance of EvalPlus' tests in the form on the hub, where they are literals of a program.

    That program compares with numpy, which the sandbox lacks, and for some problems with a copy of the reference solution. Here,
    inputs are read from it, and the rest is as for the other form: results of the reference solution, by the same rules.
    """
    test = unix(string_field(record, "test"))
    # Inputs are megabytes, so what lies within an expression is not searched.
    nodes = [*statements(require_tests(record, "test", [test])[0])]
    assigned = [
        node.value for node in nodes if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "inputs"
    ]
    # assertion(f(*inp), exp, atol), and for a root of a polynomial: assert _poly(...) <= atol
    calls = [node.value for node in nodes if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)]
    called = [call.args[-1] for call in calls if ast.unparse(call.func) == "assertion" and call.args]
    compared = [
        node.test.comparators[0]
        for node in nodes
        if isinstance(node, ast.Assert) and isinstance(node.test, ast.Compare) and isinstance(node.test.ops[0], ast.LtE)
    ]
    try:
        given = _Numbers().visit(assigned[0]) if re.search(r"\b(?:inf|nan)\b", test) else assigned[0]
        inputs = ast.literal_eval(given)
        atol = ast.literal_eval((called or compared)[-1])
        return Inputs(reference, tuple(tuple(arguments) for arguments in inputs), float(atol))
    except (LookupError, TypeError, ValueError):
        raise ValueError(
            f"{record.place} has a test that is not of EvalPlus' form on the hub: inputs = [...], and assertion(..., atol)."
        ) from None


class _Numbers(ast.NodeTransformer):
    """Numbers that Python writes, but does not read as literals."""

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return ast.Constant(float(node.id)) if node.id in ("inf", "nan") else node


def _carried(number: int, inputs: list[Any]) -> list[Any]:
    """Without the one input of Mbpp/255 whose result, 1.7 million tuples of 77 colors, takes more memory than there is."""
    return [given for given in inputs if number != 255 or (len(given[0]), given[1]) != (5, 77)]


def _inputs(record: Record, reference: str, converted: Callable[[list[Any]], list[Any]]) -> Inputs:
    base, plus, atol = (record.fields.get(key) for key in ("base_input", "plus_input", "atol"))
    if not isinstance(base, list) or not isinstance(plus, list | dict) or not isinstance(atol, int | float):
        raise ValueError(f"{record.place} lacks base_input, plus_input, lists, or atol, a number.")
    # Two problems of MBPP+ have no further inputs, written as {}.
    for key, part in (("base_input", base), ("plus_input", list(plus))):
        if not all(isinstance(arguments, list) for arguments in part):
            raise ValueError(f"{record.place} has {key} that is no list of lists, the arguments of each call.")
    if not base and not plus:
        raise ValueError(f"{record.place} has no inputs: whatever a program does, it would pass.")
    try:
        values = [tuple(arguments) for arguments in converted([*base, *plus])]
    except (TypeError, ValueError, LookupError, AttributeError) as error:
        name = record.fields["task_id"]
        raise ValueError(f"{record.place} has inputs that are not those of {name} ({error}).") from None
    return Inputs(reference, tuple(values), float(atol))


def _code_contests(record: Record) -> Problem:
    name, statement = string_field(record, "name"), unix(string_field(record, "description")).strip()
    stdin, stdout = [], []
    for key in ("public_tests", "private_tests", "generated_tests"):
        tests = record.fields.get(key)
        given, wanted = (tests.get("input"), tests.get("output")) if isinstance(tests, dict) else (None, None)
        if not isinstance(given, list) or not isinstance(wanted, list) or len(given) != len(wanted):
            raise ValueError(f"{record.place} lacks {key} with the lists input and output of one length.")
        if not all(isinstance(text, str) for text in [*given, *wanted]):
            raise ValueError(f"{record.place} has {key} that are no strings.")
        stdin += given
        stdout += wanted
    if not stdin:
        raise ValueError(f"{record.place} has no tests: whatever a program does, it would pass.")
    limit = record.fields.get("time_limit")
    seconds = None
    if isinstance(limit, dict):
        parts = [limit.get("seconds") or 0, limit.get("nanos") or 0]
        if not all(isinstance(part, int | float) for part in parts):
            raise ValueError(f"{record.place} has time_limit whose seconds or nanos are no numbers.")
        seconds = parts[0] + parts[1] / 1e9
    return Problem(name, statement, stdin=tuple(stdin), stdout=tuple(stdout), seconds=seconds or None)


def _gsm8k(record: Record) -> Problem:
    question, answer = string_field(record, "question"), string_field(record, "answer")
    if final_number(answer) is None:
        raise ValueError(f"{record.place} has no number in answer: no solution would be right.")
    number = re.search(r"\d+$", record.place)  # line of a file from 1, row of a dataset from 0
    first = 0 if record.place.startswith(DATASET) else 1
    return Problem(f"gsm8k/{int(number[0]) - first if number else record.place}", question, answer=answer)


READERS: dict[Suite, Callable[[Record], Problem]] = {
    "humaneval": _humaneval,
    "humaneval+": _humaneval_plus,
    "mbpp": _mbpp,
    "mbpp+": _mbpp_plus,
    "codecontests": _code_contests,
    "gsm8k": _gsm8k,
}


def tested_function(code: str, tests: Sequence[str]) -> str:
    """The function of a program that its tests call: the last one of those that they name; if none, the last one defined.

    If the program is no Python 3, it is the one that the tests name.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about invalid escape sequences
        try:
            trees = [ast.parse(text) for text in (code, *tests)]
        except (SyntaxError, ValueError):
            return called_function(tests)
    defined = [node.name for node in ast.walk(trees[0]) if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    nodes = [node for tree in trees[1:] for node in ast.walk(tree)]
    called = {node.func.id for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    return next((name for name in reversed(defined) if name in called), defined[-1] if defined else "")


TUPLES = frozenset(
    {2, 116, 132, 143, 222, 261, 273, 394, 399, 421, 424, 429, 470, 560, 579, 596, 616, 630, 726, 740, 744, 809}
)
LISTS_OF_TUPLES = frozenset({63, 64, 70, 94, 120, 237, 272, 299, 400, 409, 417, 438, 473, 614, 780})
FIRST_HAS_TUPLES = frozenset({75, 413, 444, 753})
SECOND_IS_TUPLE = frozenset({106, 750})
FIRST_IS_TUPLE = frozenset({250, 307, 405, 446, 617, 720, 763, 808})
TUPLES_OF_TUPLES = frozenset({259, 401, 445})
ALL_TUPLES = frozenset({580, 615, 791})


def with_tuples(number: int, inputs: list[Any]) -> list[Any]:
    """Inputs of MBPP+ with the types that JSON does not have, by ``task_id``, as EvalPlus 0.3.1 reads them."""
    convert: Callable[[Any], Any] | None = {
        115: lambda given: [[set(item) if item else {} for item in given[0]]],
        124: lambda given: [float(given[0]), complex(given[1])],
        252: lambda given: [complex(given[0])],
        278: lambda given: [tuple(tuple(x) if isinstance(x, list) else x for x in part) for part in given],
        722: lambda given: [{key: tuple(value) for key, value in given[0].items()}, *given[1:]],
    }.get(number)
    kinds: tuple[tuple[frozenset[int], Callable[[Any], Any]], ...] = (
        (TUPLES, lambda given: [tuple(part) for part in given]),
        (LISTS_OF_TUPLES, lambda given: [[tuple(item) for item in part] for part in given]),
        (FIRST_HAS_TUPLES, lambda given: [[tuple(item) for item in given[0]], given[1]]),
        (SECOND_IS_TUPLE, lambda given: [given[0], tuple(given[1])]),
        (FIRST_IS_TUPLE, lambda given: [tuple(given[0]), *given[1:]]),
        (TUPLES_OF_TUPLES, lambda given: [tuple(tuple(item) for item in part) for part in given]),
        (ALL_TUPLES, lambda given: list(_tuples(given))),
    )
    convert = convert or next((each for numbers, each in kinds if number in numbers), None)
    return inputs if convert is None else [convert(given) for given in inputs]


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
