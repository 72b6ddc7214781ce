"""Claim: the reference solutions of HumanEval and MBPP pass, and do not when they are cut short."""

import ast
import gzip
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mull.evaluation.sandbox import Asserts, Pool

pytestmark = pytest.mark.slow

CUTS = {
    "raise": "raise RuntimeError",
    "exit": "exit(0)",
    "end": "__import__('os')._exit(0)",
    "none": "return None",
}


def rows(name: str) -> list[dict[str, Any]]:
    if "MULL_TEST_DATA" not in os.environ:
        pytest.skip("MULL_TEST_DATA names no folder with the problems")
    file = Path(os.environ["MULL_TEST_DATA"]) / name
    data = gzip.decompress(file.read_bytes()) if name.endswith(".gz") else file.read_bytes()
    return [json.loads(line) for line in data.decode().splitlines()]


def problems() -> Iterator[tuple[str, str, str, Asserts]]:
    """``(id, entry point, reference solution, tests)``."""
    for row in rows("HumanEval.jsonl.gz"):
        tests = Asserts(f"{row['test']}\ncheck({row['entry_point']})\n", (row["entry_point"],))
        yield row["task_id"], row["entry_point"], row["prompt"] + row["canonical_solution"], tests
    for row in rows("mbpp.jsonl"):
        source = "\n".join([row["test_setup_code"], *row["test_list"]])
        defined = {node.name for node in ast.parse(row["code"]).body if isinstance(node, ast.FunctionDef)}
        called = [node.func.id for node in ast.walk(ast.parse(row["test_list"][0])) if is_named_call(node)]
        name = next(name for name in called if name in defined)
        yield f"Mbpp/{row['task_id']}", name, row["code"], Asserts(source, (name,))


def is_named_call(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name)


def cut_short(program: str, name: str, statement: str) -> str:
    tree = ast.parse(program)
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            inserted = ast.parse(f"def _():\n    {statement}").body[0]
            assert isinstance(inserted, ast.FunctionDef)
            node.body = [*inserted.body, *node.body]
    return ast.unparse(tree)


def test_every_reference_solution_passes_by_the_stronger_proof() -> None:
    found = list(problems())
    assert len(found) == 164 + 967
    with Pool(4, timeout=20) as pool:
        verdicts = list(pool.map((program, tests) for _, _, program, tests in found))
    assert {row[0]: verdict for row, verdict in zip(found, verdicts, strict=True) if not verdict.passed} == {}
    assert {row[0] for row, verdict in zip(found, verdicts, strict=True) if verdict.proof != "outside"} == set()


@pytest.mark.parametrize("cut", CUTS)
def test_no_solution_that_is_cut_short_passes(cut: str) -> None:
    found = list(problems())
    with Pool(4, timeout=20) as pool:
        verdicts = list(pool.map((cut_short(program, name, CUTS[cut]), tests) for _, name, program, tests in found))
    assert {row[0] for row, verdict in zip(found, verdicts, strict=True) if verdict.passed} == set()


@pytest.mark.parametrize("end", ["exit(0)", "raise SystemExit", "import os\nos._exit(0)"])
def test_no_solution_that_ends_while_it_is_loaded_passes(end: str) -> None:
    found = list(problems())
    with Pool(4, timeout=20) as pool:
        verdicts = list(pool.map((f"{program}\n{end}\n", tests) for _, _, program, tests in found))
    assert {row[0] for row, verdict in zip(found, verdicts, strict=True) if verdict.passed} == set()
