"""Examples with a prompt and a completion, from code benchmarks or your own files.

Prompts are not trained on; completions are. An *outcome* says whether the completion solves the task, which a critic learns to
predict. Nothing is executed here: outcomes are those that the data sets state.

Source:
    MBPP: Austin et al. 2021 (arXiv:2108.07732). HumanEval: Chen et al. 2021 (arXiv:2107.03374); its longer tests, and the same
    form for MBPP: EvalPlus (arXiv:2305.01210). CodeContests: Li et al. 2022 (arXiv:2203.07814).
"""

import ast
import io
import itertools
import logging
import tokenize
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from mull.data.sources import ALL, DATASET, Record, read_records, string_field
from mull.runtime.progress import tracked

logger = logging.getLogger(__name__)

Schema = Literal["mbpp", "humaneval", "code_contests", "examples"]
"""Format of a source's records; see `load_examples`."""

MBPP_SPLITS = {"prompt": range(1, 11), "test": range(11, 511), "validation": range(511, 601), "train": range(601, 975)}
"""``task_id`` of MBPP's splits, from the paper. The sanitized subset keeps the numbers."""

MBPP_PROMPT = (
    "You are an expert Python programmer, and here is your task: {task} "
    "Your code should pass these tests:\n\n{tests}\n[BEGIN]\n"
)
"""The paper's prompt. A completion ends with the end of the text instead of ``[DONE]``."""

CODE_CONTESTS_PROMPT = "QUESTION:\n{description}\nUse Standard Input format\nANSWER:\n"
"""The prompt of APPS (arXiv:2105.09938) for programs that read standard input. It does not reveal whether the solution is right,
or a critic would read that instead of the program."""


class Language(IntEnum):
    """Languages of CodeContests' solutions; `load_examples` reads ``PYTHON3``."""

    UNKNOWN = 0
    PYTHON = 1
    """Python 2."""

    CPP = 2
    PYTHON3 = 3
    JAVA = 4


@dataclass(frozen=True, slots=True)
class Example:
    """One task with one answer.

    Raises:
        ValueError: the outcome is not a number from 0 to 1.
    """

    name: str
    """The problem. All answers to it have this name."""

    prompt: str
    """The task, which is not trained on."""

    completion: str
    """The answer, which is trained on."""

    outcome: float | None = None
    """1.0 for a right answer, 0.0 for a wrong one, between them for a partly right one; None if unknown."""

    def __post_init__(self) -> None:
        if self.outcome is not None and not 0 <= self.outcome <= 1:
            raise ValueError(
                f"{self.name} has the outcome {self.outcome}: it must lie in [0, 1], 1 for a right answer."
            )


def load_examples(
    source: str | Path, schema: Schema, *, split: str | None = None, config: str | None = None
) -> list[Example]:
    """Read the examples of a data set.

    * ``mbpp``: ``task_id``, ``text`` (sanitized: ``prompt``), ``code``, ``test_list``; one example per task, outcome 1.
    * ``humaneval``: ``task_id``, ``prompt``, ``canonical_solution``, as also in EvalPlus' HumanEval+ and MBPP+; one example per
      task, outcome 1.
    * ``code_contests``: ``name``, ``description``, and ``solutions`` and ``incorrect_solutions``, each with the lists
      ``language`` and ``solution``; one example per solution in Python 3, outcome 1 or 0.
    * ``examples``: ``prompt``, ``completion``, optionally ``outcome`` and ``name``; one example per record.

    Windows line ends become Unix ones: MBPP's programs have the former. Models are compared on HumanEval and the test split
    of MBPP: train on them only to test a pipeline.

    Args:
        source: As in `mull.data.sources.read_records`. `HumanEval.jsonl.gz` needs no unpacking.
        schema: One of the above.
        split: For ``mbpp`` required, by ``task_id``: prompt, test, validation, train or ``all``. For the others a split of a
            dataset ``hf:…``.
        config: As in `mull.data.sources.load_documents`.

    Raises:
        ValueError: a record lacks a key of its schema or has another type there, or there are no examples.
        FileNotFoundError, ConnectionError, RuntimeError: as in `mull.data.sources.load_documents`.
    """
    if schema not in get_args(Schema):
        raise ValueError(f"schema={schema!r} is not known: give one of {', '.join(get_args(Schema))}.")
    if schema == "mbpp":
        return _load_mbpp(source, split, config)
    read, columns = SCHEMAS[schema]
    records = read_records(source, split=split, config=config, columns=columns)
    return _not_empty(
        [example for record in tracked(records, "record", "reading") for example in read(record)],
        f"{source} as {schema}",
    )


def _load_mbpp(source: str | Path, split: str | None, config: str | None) -> list[Example]:
    known = {**MBPP_SPLITS, ALL: range(1, 975)}
    if split not in known:
        raise ValueError(
            f"split={split!r} of {source}: MBPP has the splits {', '.join(known)}, by task_id; choose one."
        )
    from_dataset = str(source).startswith(DATASET)
    columns = ("task_id", "text", "prompt", "code", "test_list")
    records = read_records(source, split=ALL if from_dataset else None, config=config, columns=columns)
    examples = [_mbpp(record) for record in tracked(records, "record", "reading") if _task_id(record) in known[split]]
    return _not_empty(examples, f"{source} as mbpp with split={split!r}")


def _not_empty(examples: list[Example], what: str) -> list[Example]:
    if not examples:
        raise ValueError(f"There are no examples in {what}: check the source, the schema and the split.")
    return examples


def _task_id(record: Record) -> int:
    number = record.fields.get("task_id")
    if not isinstance(number, int):
        raise ValueError(f"{record.place} has task_id={number!r}: MBPP numbers its tasks from 1 to 974.")
    return number


def _mbpp(record: Record) -> Example:
    tests = record.fields.get("test_list")
    if not isinstance(tests, list) or not all(isinstance(test, str) for test in tests):
        raise ValueError(f"{record.place} lacks test_list, a list of strings.")
    task = string_field(record, "prompt" if "prompt" in record.fields else "text")
    prompt = MBPP_PROMPT.format(task=_unix(task), tests=_unix("\n".join(tests)))
    return Example(f"mbpp/{_task_id(record)}", prompt, _unix(string_field(record, "code")).rstrip() + "\n", 1.0)


def _humaneval(record: Record) -> Iterator[Example]:
    name, prompt, solution = (string_field(record, key) for key in ("task_id", "prompt", "canonical_solution"))
    yield Example(name, _unix(prompt), _unix(solution), 1.0)


def _code_contests(record: Record) -> Iterator[Example]:
    name = string_field(record, "name")
    prompt = CODE_CONTESTS_PROMPT.format(description=_unix(string_field(record, "description")).strip())
    for key, outcome in (("solutions", 1.0), ("incorrect_solutions", 0.0)):
        answers = record.fields.get(key)
        lists = answers if isinstance(answers, dict) else {}
        languages, texts = lists.get("language"), lists.get("solution")
        if not (isinstance(languages, list) and isinstance(texts, list) and len(languages) == len(texts)):
            raise ValueError(f"{record.place} lacks {key} with the lists language and solution of one length.")
        for language, text in zip(languages, texts, strict=True):
            if language == Language.PYTHON3:
                yield Example(name, prompt, _unix(text), outcome)


def _example(record: Record) -> Iterator[Example]:
    outcome, name = record.fields.get("outcome"), record.fields.get("name", record.place)
    if not (outcome is None or isinstance(outcome, int | float)) or not isinstance(name, str):
        raise ValueError(
            f"{record.place} has outcome={outcome!r} and name={name!r}: they must be a number and a string."
        )
    prompt, completion = string_field(record, "prompt"), string_field(record, "completion")
    yield Example(name, prompt, completion, None if outcome is None else float(outcome))


def _unix(text: str) -> str:
    return text.replace("\r\n", "\n")


SCHEMAS: dict[str, tuple[Callable[[Record], Iterable[Example]], tuple[str, ...]]] = {
    "humaneval": (_humaneval, ("task_id", "prompt", "canonical_solution")),
    "code_contests": (_code_contests, ("name", "description", "solutions", "incorrect_solutions")),
    "examples": (_example, ("name", "prompt", "completion", "outcome")),
}
"""Function that turns a record into examples, and the columns that it reads."""


def pairs(
    examples: Iterable[Example], *, per_problem: int | None = None, corrupt: bool = False, seed: int = 0
) -> list[tuple[Example, Example]]:
    """Pair right with wrong answers to the same problem. No answer is in two pairs.

    Args:
        examples: With outcomes 1 and 0. Answers to one problem have one name.
        per_problem: Maximum of pairs per problem; None pairs as many as possible.
        corrupt: Make synthetic wrong answers, with `corrupted`, for problems that have none.
        seed: For drawing, pairing and corrupting answers.

    Returns:
        ``(right, wrong)`` in the order in which the problems first occur. Problems without a pair are dropped, with a warning.

    Raises:
        ValueError: an outcome is neither 0 nor 1, `per_problem` is not positive, or no pair is left.
    """
    if per_problem is not None and per_problem < 1:
        raise ValueError(f"per_problem={per_problem} must be at least 1, or None for all.")
    problems: dict[str, tuple[list[Example], list[Example]]] = {}
    for example in examples:
        if example.outcome not in (0.0, 1.0):
            raise ValueError(
                f"{example.name} has the outcome {example.outcome}: pairs need right (1) and wrong (0) answers."
            )
        problems.setdefault(example.name, ([], []))[example.outcome == 0.0].append(example)
    rng = np.random.default_rng(seed)
    found = [pair for answers in problems.values() for pair in _pairs_of(*answers, per_problem, corrupt, rng)]
    if not found:
        hint = "" if corrupt else "; corrupt=True makes synthetic wrong answers"
        raise ValueError(f"None of {len(problems)} problems has both right and wrong answers{hint}.")
    n_left_out = len(problems) - len({right.name for right, _ in found})
    if n_left_out:
        logger.warning("%d of %d problems are dropped: they lack right or wrong answers.", n_left_out, len(problems))
    return found


def _pairs_of(
    right: list[Example], wrong: list[Example], per_problem: int | None, corrupt: bool, rng: np.random.Generator
) -> list[tuple[Example, Example]]:
    def shuffled(answers: list[Example]) -> list[Example]:
        return [answers[index] for index in rng.permutation(len(answers)).tolist()]

    if wrong or not corrupt:
        return list(zip(shuffled(right), shuffled(wrong), strict=False))[:per_problem]
    attempts = ((example, _corrupt(example, rng)) for example in shuffled(right))
    return list(itertools.islice(((example, bad) for example, bad in attempts if bad is not None), per_problem))


_PAIRS = [("+", "-"), ("+=", "-="), ("<", ">"), ("<=", ">="), ("==", "!="), ("and", "or"), ("True", "False")]
_ONE_WAY = {"*": "+", "/": "*", "//": "/", "%": "//", "*=": "+="}
SWAPS = _ONE_WAY | dict(_PAIRS) | {second: first for first, second in _PAIRS}
"""Replacements of operators and constants."""


def corrupted(example: Example, rng: np.random.Generator) -> Example:
    """Make a synthetic wrong answer: change one operator, constant or variable of a right one.

    The completion, or the prompt followed by it, must be Python. The change keeps the rest of the text as it was, and always
    changes the syntax tree. The result is not executed: 8 % of the programs made from MBPP's (68 of 843) still pass its three
    tests. Prefer wrong answers by people or models.

    Raises:
        ValueError: the completion is not Python, or has nothing that could be changed.
    """
    wrong = _corrupt(example, rng)
    if wrong is None:
        raise ValueError(
            f"{example.name} cannot be corrupted: its completion is not Python with an operator or a variable."
        )
    return wrong


def _corrupt(example: Example, rng: np.random.Generator) -> Example | None:
    for given in ("", example.prompt):  # HumanEval's completions are Python only after their prompts
        if (tree := _parse(given + example.completion)) is not None:
            break
    else:
        return None
    program = given + example.completion
    changes = [change for change in _changes(program, tree) if change[0] >= len(given)]
    for index in rng.permutation(len(changes)).tolist():
        start, end, replacements = changes[index]
        changed = program[:start] + replacements[rng.integers(len(replacements))] + program[end:]
        if _parse(changed) is not None:  # the * of *args, for one, cannot be swapped
            return replace(example, completion=changed[len(given) :], outcome=0.0)
    return None


def _parse(program: str) -> ast.Module | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about invalid escape sequences in strings
        try:
            return ast.parse(program)
        except (SyntaxError, ValueError):  # ValueError: surrogates, which JSON allows
            return None


def _changes(program: str, tree: ast.Module) -> Iterator[tuple[int, int, Sequence[str]]]:
    """Beginning, end and possible replacements of each token that can be changed."""
    lines = list(io.StringIO(program, newline=""))  # split as the parser does, line ends kept
    starts = [0, *itertools.accumulate(map(len, lines))]
    read, variables = _variables(tree, lines)
    try:
        tokens = list(tokenize.generate_tokens(iter(lines).__next__))
    except (tokenize.TokenError, SyntaxError):  # a backslash at the very end, which the parser accepts
        return
    for token in tokens:
        row, column = token.start
        replacements: Sequence[str] = ()
        if token.string in SWAPS:
            replacements = [SWAPS[token.string]]
        elif token.type == tokenize.NUMBER and token.string.isdecimal():
            replacements = [str(int(token.string) + 1)]
        elif (row, column) in read:
            replacements = [name for name in variables if name != token.string]
        if replacements:
            start = starts[row - 1] + column
            yield start, start + len(token.string), replacements


def _variables(tree: ast.Module, lines: Sequence[str]) -> tuple[set[tuple[int, int]], list[str]]:
    """Where the program reads variables that it binds, as (line, column in characters), and the names of these variables."""
    names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    bound = {node.id for node in names if isinstance(node.ctx, ast.Store)}
    bound |= {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
    read = {
        (node.lineno, len(lines[node.lineno - 1].encode()[: node.col_offset].decode()))
        for node in names
        if isinstance(node.ctx, ast.Load) and node.id in bound
    }
    return read, sorted(bound)
