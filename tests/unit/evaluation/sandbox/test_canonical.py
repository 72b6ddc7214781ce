"""Claim: the reference solutions of the suites pass as `mull eval` grades them, but for those named; cut short, none does."""

import ast
import functools
import gzip
import json
import os
import warnings
from pathlib import Path

import pytest

from mull.evaluation.sandbox import Pool, Tests, Verdict
from mull.evaluation.suites.grading import LIMITS, prepared
from mull.evaluation.suites.problems import Suite, load_problems

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:invalid escape sequence")]

FILES: dict[Suite, tuple[str, int]] = {
    "humaneval": ("HumanEval.jsonl.gz", 164),
    "humaneval+": ("HumanEvalPlus.jsonl.gz", 164),
    "mbpp": ("mbpp.jsonl", 500),
    "mbpp+": ("MbppPlus.jsonl.gz", 378),
}
SUITES: tuple[Suite, ...] = tuple(FILES)

SLOW = {"mbpp/123"}
"""Its reference solution alone takes most of the three seconds of HumanEval's harness; it may time out on a busy machine."""

CUTS = {
    "raise": "raise RuntimeError",
    "exit": "exit(0)",
    "end": "__import__('os')._exit(0)",
    "none": "return None",
}


def folder() -> Path:
    found = Path(os.environ.get("MULL_DATA", Path(__file__).parents[5] / "shared" / "data"))
    if not found.is_dir():
        pytest.skip("MULL_DATA names no folder with HumanEval.jsonl.gz and the like.")
    return found


@functools.cache
def problems(suite: Suite) -> dict[str, tuple[str, str, Tests, float]]:
    """By name: entry point, reference solution, tests and their seconds."""
    file, n_problems = FILES[suite]
    found = load_problems(suite, folder() / file).problems
    assert len(found) == n_problems
    solutions = {problem.name: problem.inputs.reference if problem.inputs else problem.answer for problem in found}
    if suite == "humaneval":
        with gzip.open(folder() / file, "rt") as lines:
            solutions = {row["task_id"]: row["prompt"] + row["canonical_solution"] for row in map(json.loads, lines)}
    tests = prepared(found, 2)
    return {problem.name: (problem.entry_point, solutions[problem.name], *tests[problem.name]) for problem in found}


def verdicts(programs: dict[str, str], suite: Suite) -> dict[str, Verdict]:
    known = problems(suite)
    with Pool(2, limits=LIMITS) as pool:
        running = {name: pool.submit(text, known[name][2], timeout=known[name][3]) for name, text in programs.items()}
        return {name: future.result() for name, future in running.items()}


def cut_short(program: str, name: str, statement: str) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tree = ast.parse(program)
    inserted = ast.parse(f"def _():\n    {statement}").body[0]
    assert isinstance(inserted, ast.FunctionDef)
    cut = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == name]
    for node in cut:
        node.body = [*inserted.body, *node.body]
    assert cut
    return ast.unparse(tree)


@pytest.mark.parametrize("suite", SUITES)
def test_every_reference_solution_passes_by_the_stronger_proof(suite: Suite) -> None:
    found = verdicts({name: program for name, (_, program, _, _) in problems(suite).items()}, suite)
    assert {name: verdict for name, verdict in found.items() if not verdict.passed and name not in SLOW} == {}
    assert {found[name].reason for name in SLOW & found.keys()} <= {"passed", "time-out"}
    assert {name for name, verdict in found.items() if verdict.proof != "outside"} == set()


@pytest.mark.parametrize("suite", SUITES)
@pytest.mark.parametrize("cut", CUTS)
def test_no_solution_that_is_cut_short_passes(suite: Suite, cut: str) -> None:
    programs = {name: cut_short(program, entry, CUTS[cut]) for name, (entry, program, _, _) in problems(suite).items()}
    assert {name for name, verdict in verdicts(programs, suite).items() if verdict.passed} == set()


@pytest.mark.parametrize("suite", SUITES)
@pytest.mark.parametrize("end", ["exit(0)", "raise SystemExit", "import os\nos._exit(0)"])
def test_no_solution_that_ends_while_it_is_loaded_passes(suite: Suite, end: str) -> None:
    programs = {name: f"{program}\n{end}\n" for name, (_, program, _, _) in problems(suite).items()}
    assert {name for name, verdict in verdicts(programs, suite).items() if verdict.passed} == set()
