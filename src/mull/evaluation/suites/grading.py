"""Decide which samples are right: programs by their tests in the sandbox, GSM8K's answers by their final number.

HumanEval+ and MBPP+ follow EvalPlus 0.3.1: results are compared with those of the reference solution, floats within 1e-6 or the
problem's own tolerance, and some problems have rules of their own. We compare all inputs of a problem with one tolerance; EvalPlus
compares exactly up to the first input whose result is a float.
"""

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mull.evaluation.sandbox import Asserts, Calls, Pool, Stdio, expected_values
from mull.evaluation.suites.extract import final_number
from mull.evaluation.suites.problems import Problem, Problems
from mull.evaluation.suites.prompts import PROTOCOLS
from mull.evaluation.suites.samples import Key, key_of, line, read_lines, repair
from mull.runtime.progress import Progress, tracked

VERDICTS = "verdicts.jsonl"
FLOAT_TOLERANCE = 1e-6

SET_EQUAL = frozenset(
    {
        "similar_elements",
        "find_char_long",
        "common_in_nested_lists",
        "extract_singly",
        "larg_nnum",
        "intersection_array",
        "find_dissimilar",
        "Diff",
    }
)
"""Functions of MBPP+ whose results are compared as sets."""

NOT_NONE = frozenset({"check_str", "text_match_three", "text_starta_endb"})
"""Functions of MBPP+ that may return a match or a truth value."""

Tests = Asserts | Calls | Stdio


def grade(
    records: Sequence[Mapping[str, Any]], problems: Problems, folder: Path, *, chat: bool, workers: int
) -> list[dict[str, Any]]:
    """Grade samples, and keep the verdicts in the folder as they come, so that a killed run goes on from there.

    Args:
        records: Samples.
        problems: Of their suite.
        folder: Where ``verdicts.jsonl`` is written.
        chat: Whether they are answers of a chat.
        workers: Programs at a time.

    Returns:
        A verdict for each sample: ``passed`` and ``reason``, beside what says which sample it is.
    """
    by_name = {problem.name: problem for problem in problems.problems}
    protocol = PROTOCOLS[problems.suite]
    programs = [protocol.program(by_name[record["problem"]], record["text"], chat) for record in records]
    if problems.suite == "gsm8k":
        return [
            _number_verdict(record, by_name[record["problem"]], text)
            for record, text in zip(records, programs, strict=True)
        ]
    file = folder / VERDICTS
    repair(file)
    known: dict[tuple[Key, str], dict[str, Any]] = {
        (key_of(verdict), verdict["program"]): verdict for verdict in read_lines(file)
    }
    marks = [hashlib.sha256(program.encode("utf-8", "surrogatepass")).hexdigest()[:16] for program in programs]
    keys = [key_of(record) for record in records]
    missing = [index for index in range(len(records)) if (keys[index], marks[index]) not in known]
    # Greedy samples, and short programs, are often equal: each program is run once.
    first: dict[tuple[str, str], list[int]] = {}
    for index in missing:
        first.setdefault((keys[index].problem, marks[index]), []).append(index)
    tests = tests_of([by_name[name] for name in dict.fromkeys(name for name, _ in first)], workers)
    jobs = [(programs[indices[0]], tests[name]) for (name, _), indices in first.items()]
    with file.open("a", encoding="utf-8") as stream, Pool(workers) as pool:
        with Progress(len(missing), "program", label=f"{problems.suite}: grading") as progress:
            for indices, verdict in zip(first.values(), pool.map(jobs), strict=True):
                new = [
                    {
                        **keys[index]._asdict(),
                        "program": marks[index],
                        "passed": verdict.passed,
                        "reason": verdict.reason,
                        "detail": verdict.detail,
                    }
                    for index in indices
                ]
                stream.write("".join(map(line, new)))
                stream.flush()
                known |= {(key_of(each), each["program"]): each for each in new}
                progress.advance(len(new))
    return [known[key, mark] for key, mark in zip(keys, marks, strict=True)]


def tests_of(problems: Sequence[Problem], workers: int) -> dict[str, Tests]:
    """The tests of each problem, as the sandbox takes them. Reference solutions run in it, too."""
    with ThreadPoolExecutor(max_workers=workers) as threads:  # each waits for a process of its own
        made = threads.map(_tests, problems)
        return dict(
            zip(
                (problem.name for problem in problems),
                tracked(made, "problem", "preparing tests", len(problems)),
                strict=True,
            )
        )


def _tests(problem: Problem) -> Tests:
    if problem.stdin:
        return Stdio(problem.stdin, problem.stdout)
    if problem.inputs is None:
        return Asserts(problem.asserts, (problem.entry_point,))
    entry, inputs, reference = problem.entry_point, problem.inputs.inputs, problem.inputs.reference
    oracle = _oracle(problem)
    if oracle is not None:
        expected = oracle.expected(reference, entry, inputs)
        lines = [HEAD, *(oracle.line(entry, given, want) for given, want in zip(inputs, expected, strict=True))]
        return Asserts("\n".join(lines) + "\n", (entry,))
    expected = tuple(expected_values(reference, entry, inputs))
    atol = problem.inputs.atol or (FLOAT_TOLERANCE if any(map(is_floats, expected)) else 0.0)
    return Calls(entry, inputs, expected, atol)


def is_floats(value: Any) -> bool:
    """Whether a result is a float, or a list or tuple of floats only; EvalPlus compares such results within 1e-6."""
    if isinstance(value, list | tuple):
        return bool(value) and all(isinstance(item, float) for item in value)
    return isinstance(value, float)


HEAD = """import math
inf, nan = float("inf"), float("nan")
def _value(coefficients, x):
    return sum(c * math.pow(x, i) for i, c in enumerate(coefficients))
def _area(edge, height):
    slant = math.sqrt((edge / 2) ** 2 + height**2)
    return round(edge**2 + 4 * (edge * slant) / 2)
def _distance(one, other):
    one, other = str(one), str(other)
    width = max(len(one), len(other))
    return sum(abs(int(a) - int(b)) for a, b in zip(one.zfill(width), other.zfill(width)))
def _found(out, wanted):
    return out == wanted if isinstance(out, bool) else wanted == (out is not None)
def _close(out, *wanted):
    return any(out == x or abs(out - x) <= 1e-6 + 1e-7 * abs(x) for x in wanted)
"""
"""Names that the lines of special oracles use. The polynomial is HumanEval/32's; the other two are readings of the tasks Mbpp/581
and Mbpp/558 that EvalPlus accepts beside those of the reference solutions."""


@dataclass(frozen=True)
class _Oracle:
    """A problem whose results are not simply compared: a line of Python for each input."""

    check: Callable[[str, str, str], str]
    """Given the call, the expected value and the arguments as Python, what must be true."""

    wrapped: str = ""
    """Python that replaces the entry point of the reference solution by a function of plain results."""

    needs_reference: bool = True

    def expected(self, reference: str, entry: str, inputs: Sequence[tuple[Any, ...]]) -> Sequence[Any]:
        if not self.needs_reference:
            return [None] * len(inputs)
        if self.wrapped:
            return tuple(expected_values(f"{reference}\n{self.wrapped.format(entry)}", "_wrapped", inputs))
        return tuple(expected_values(reference, entry, inputs))

    def line(self, entry: str, given: tuple[Any, ...], wanted: Any) -> str:
        arguments = ", ".join(map(repr, given))
        return f"assert {self.check(f'{entry}({arguments})', repr(wanted), arguments)}"


def _oracle(problem: Problem) -> _Oracle | None:
    assert problem.inputs is not None
    entry, atol = problem.entry_point, problem.inputs.atol
    if problem.name == "HumanEval/32":
        # The reference's own root is one of several.
        return _Oracle(lambda call, _, given: f"abs(_value({given}, {call})) <= {atol}", needs_reference=False)
    if not problem.name.startswith("Mbpp/"):
        return None
    if entry in SET_EQUAL:
        return _Oracle(lambda call, want, _: f"set({call}) == set({want})")
    if entry in NOT_NONE:
        wrapped = "def _wrapped(*given):\n    return {}(*given) is not None\n"
        return _Oracle(lambda call, want, _: f"_found({call}, {want})", wrapped)
    return SINGLE.get(entry)


SINGLE = {
    # Every answer counts, because the task does not say which is right; but the call must not fail.
    "are_equivalent": _Oracle(lambda call, *_: f"({call}, True)[1]", needs_reference=False),
    "sum_div": _Oracle(lambda call, want, _: f"{call} in ({want}, 0)"),
    "surface_Area": _Oracle(lambda call, want, given: f"_close({call}, {want}, _area({given}))"),
    "digit_distance_nums": _Oracle(lambda call, want, given: f"{call} in ({want}, _distance({given}))"),
}
"""Functions of MBPP+ with a rule of their own."""


STRICT = re.compile(r"#### (\-?[0-9\.\,]+)")
FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")


def lm_eval_matches(text: str, answer: str) -> dict[str, bool]:
    """``strict-match`` and ``flexible-extract`` of lm-eval's task gsm8k (version 3), which compare text with text."""
    strict, flexible = STRICT.findall(text), FLEXIBLE.findall(text)
    last = next((part for part in flexible[-1] if part), "[invalid]") if flexible else "[invalid]"
    wanted = _ignored(answer)
    return {
        "strict_match": _ignored((strict or ["[invalid]"])[0].strip()) == wanted,
        "flexible_extract": _ignored(last.strip()) == wanted,
    }


def _ignored(text: str) -> str:
    for pattern in (",", r"\$", "(?s).*#### ", r"\.$"):
        text = re.sub(pattern, "", text)
    return text.lower()


def _number_verdict(record: Mapping[str, Any], problem: Problem, text: str) -> dict[str, Any]:
    found, wanted = final_number(text), final_number(problem.answer)
    passed = found is not None and found == wanted
    reason = "passed" if passed else "no number" if found is None else "wrong number"
    return {**key_of(record)._asdict(), "passed": passed, "reason": reason, **lm_eval_matches(text, problem.answer)}
