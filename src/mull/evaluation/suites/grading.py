"""Decide which samples are right: programs by their tests in the sandbox, GSM8K's answers by their final number.

HumanEval+ and MBPP+ compare with what the reference solution returns, by the rules of EvalPlus 0.3.1, see
`mull.evaluation.sandbox.Calls`.
"""

import hashlib
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from mull.evaluation.sandbox import EVALPLUS_ORACLES, Asserts, Calls, Limits, Pool, Stdio, Tests, expected_values
from mull.evaluation.suites.extract import final_number
from mull.evaluation.suites.problems import Problem, Problems
from mull.evaluation.suites.prompts import PROTOCOLS
from mull.evaluation.suites.samples import Key, key_of, line, read_lines, repair
from mull.runtime import storage
from mull.runtime.progress import Progress, tracked

VERDICTS = "verdicts.jsonl"
SECONDS = 3.0
"""For a program and its asserts, as in HumanEval's harness; and for each input of a contest that states no limit."""

LIMITS = Limits(memory=4 << 30)
"""The memory that EvalPlus gives; some of MBPP+'s reference solutions need more than the sandbox's usual one."""

NUMPY = re.compile(r"^\s*(?:import|from)\s+numpy\b", re.MULTILINE)

LEAST, FACTOR, MOST = 4.0, 4.0, 60.0
"""Seconds for all inputs of HumanEval+ and MBPP+: so many times what the reference solution takes, between these limits. EvalPlus
0.3.1 has this factor, at least 1 s for each input, and at most 60 s for all."""

WRAPPED = "\n\ndef _wrapped(*given):\n    return {}(*given) is not None\n"
"""For references that return a match of a regular expression, which is no data; only whether there is one counts."""


class _Job(NamedTuple):
    """A program of one problem, and the samples that it answers."""

    problem: str
    program: str
    mark: str
    """Its hash."""

    keys: list[Key]


def grade(
    records: Sequence[Mapping[str, Any]],
    problems: Problems,
    folder: Path,
    *,
    chat: bool,
    workers: int,
    allow_weak: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Grade samples, and keep the verdicts in the folder as they come, so that a killed run goes on from there.

    Args:
        records: Samples.
        problems: Of their suite.
        folder: Where ``verdicts.jsonl`` is written.
        chat: Whether they are answers of a chat.
        workers: Programs at a time.
        allow_weak: Layers of the sandbox that may be missing.

    Returns:
        A verdict for each sample: ``passed`` and ``reason``, beside what says which sample it is; of programs ``proof``, too.
    """
    by_name = {problem.name: problem for problem in problems.problems}
    protocol = PROTOCOLS[problems.suite]
    programs = [protocol.program(by_name[record["problem"]], record["text"], chat) for record in records]
    if problems.suite == "gsm8k":
        pairs = zip(records, programs, strict=True)
        return [_number_verdict(record, by_name[record["problem"]], text) for record, text in pairs]
    file = folder / VERDICTS
    repair(file)
    known = {(key_of(verdict), str(verdict["program"])): verdict for verdict in _read_verdicts(file)}
    marks = [hashlib.sha256(program.encode("utf-8", "surrogatepass")).hexdigest()[:16] for program in programs]
    keys = [key_of(record) for record in records]
    jobs: dict[tuple[str, str], _Job] = {}
    for key, mark, program in zip(keys, marks, programs, strict=True):
        if (key, mark) not in known:
            # Greedy and short programs are often equal: each is run once.
            jobs.setdefault((key.problem, mark), _Job(key.problem, program, mark, [])).keys.append(key)
    asked = [by_name[name] for name in dict.fromkeys(job.problem for job in jobs.values())]
    tests = prepared(asked, workers, allow_weak) if asked else {}
    # numpy is mull's own requirement, and there for programs that import it, as in EvalPlus.
    has_numpy = any(NUMPY.search(job.program) for job in jobs.values())
    limits = replace(LIMITS, packages=("numpy",)) if has_numpy else LIMITS
    with file.open("ab", buffering=0) as stream, Pool(workers, limits=limits, allow_weak=allow_weak) as pool:
        for new in _verdicts(list(jobs.values()), tests, pool, problems.suite):
            storage.append(stream, "".join(map(line, new)))
            known |= {(key_of(verdict), str(verdict["program"])): verdict for verdict in new}
    return [known[key, mark] for key, mark in zip(keys, marks, strict=True)]


def _read_verdicts(file: Path) -> Iterator[dict[str, Any]]:
    for number, verdict in enumerate(read_lines(file, ("program", "reason", "proof")), start=1):
        if not isinstance(verdict.get("passed"), bool):
            raise ValueError(f"{file}, line {number}, is damaged ('passed'): remove the line, and run again.")
        yield verdict


def _verdicts(
    jobs: Sequence[_Job], tests: Mapping[str, tuple[Tests, float]], pool: Pool, suite: str
) -> Iterator[list[dict[str, Any]]]:
    """The verdict of each job, once for each of its samples."""
    running = [pool.submit(job.program, tests[job.problem][0], timeout=tests[job.problem][1]) for job in jobs]
    with Progress(len(jobs), "program", label=f"{suite}: grading") as progress:
        for job, future in zip(jobs, running, strict=True):
            verdict = future.result()
            found = {name: getattr(verdict, name) for name in ("passed", "reason", "detail", "proof")}
            yield [{**key._asdict(), "program": job.mark, **found} for key in job.keys]
            progress.advance()


def prepared(
    problems: Sequence[Problem], workers: int, allow_weak: Sequence[str] = ()
) -> dict[str, tuple[Tests, float]]:
    """The tests of each problem, and the seconds for them. Reference solutions run in the sandbox, too."""
    with ThreadPoolExecutor(max_workers=workers) as threads:  # each waits for a process of its own
        made = threads.map(lambda problem: _tests(problem, allow_weak), problems)
        shown = tracked(made, "problem", "preparing tests", len(problems))
        return dict(zip((problem.name for problem in problems), shown, strict=True))


def _tests(problem: Problem, allow_weak: Sequence[str]) -> tuple[Tests, float]:
    if problem.stdin:
        return Stdio(problem.stdin, problem.stdout), problem.seconds or SECONDS
    if problem.inputs is None:
        return Asserts(problem.asserts, (problem.entry_point,)), SECONDS
    entry, inputs, reference = problem.entry_point, problem.inputs.inputs, problem.inputs.reference
    oracle = EVALPLUS_ORACLES.get(problem.name, "equal")
    name = entry
    if oracle == "equally_none":
        reference, name = reference + WRAPPED.format(entry), "_wrapped"
    begin = time.perf_counter()
    expected = _expected(reference, name, inputs, allow_weak)
    seconds = min(MOST, max(LEAST, FACTOR * (time.perf_counter() - begin)))
    return Calls(entry, inputs, expected, problem.inputs.atol, oracle), seconds


def _expected(
    reference: str, name: str, inputs: Sequence[tuple[Any, ...]], allow_weak: Sequence[str]
) -> tuple[Any, ...]:
    """Results of a reference solution; half by half where all together are more than the sandbox gives back at once."""
    try:
        return expected_values(reference, name, inputs, limits=LIMITS, allow_weak=allow_weak)
    except ValueError:
        if len(inputs) == 1:
            raise
    half = len(inputs) // 2
    return _expected(reference, name, inputs[:half], allow_weak) + _expected(reference, name, inputs[half:], allow_weak)


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
