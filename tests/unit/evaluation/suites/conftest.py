"""Where the data lie, and a stand-in for the sandbox, which has tests of its own."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

try:
    from mull.evaluation.sandbox import Asserts, Calls, Verdict
except ModuleNotFoundError:
    import dataclasses, sys, types

    m = types.ModuleType("mull.evaluation.sandbox")
    F = dataclasses.field
    for name, fields in {
        "Asserts": ["source", "entry_points"],
        "Calls": ["entry_point", "inputs", "expected", ("atol", float, F(default=0.0))],
        "Stdio": ["inputs", "outputs"],
        "Verdict": ["passed", "reason", "detail", "seconds", "n_passed", "n_tests"],
    }.items():
        setattr(m, name, dataclasses.make_dataclass(name, fields, frozen=True))
    m.Pool = m.expected_values = None
    sys.modules["mull.evaluation.sandbox"] = m
    Asserts, Calls, Verdict = m.Asserts, m.Calls, m.Verdict


@pytest.fixture
def data() -> Path:
    """Folder with the published problems, which are not shipped."""
    folder = Path(os.environ.get("MULL_DATA", Path(__file__).parents[5] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("MULL_DATA names no folder with HumanEval.jsonl.gz and the like.")
    return folder


def run_here(program: str, tests: Any) -> Verdict:
    """Run a trusted program in this process; only for programs of these tests."""
    names: dict[str, Any] = {"__name__": "program"}
    try:
        exec(program, names)
        if isinstance(tests, Asserts):
            exec(tests.source, names)
        elif isinstance(tests, Calls):
            for given, wanted in zip(tests.inputs, tests.expected, strict=True):
                out = names[tests.entry_point](*given)
                assert out == wanted or (tests.atol and abs(out - wanted) <= tests.atol), (out, wanted)
    except (Exception, SystemExit) as error:
        return Verdict(False, "failed", repr(error), 0.0, 0, 1)
    return Verdict(True, "passed", "", 0.0, 1, 1)


class HerePool(ThreadPoolExecutor):
    """The pool of the sandbox, without a sandbox."""

    def map(self, pairs: Any) -> Iterator[Verdict]:  # type: ignore[override]
        return iter([run_here(program, tests) for program, tests in pairs])


def expected_here(program: str, entry_point: str, inputs: Any) -> list[Any]:
    """Results of a trusted program, in this process."""
    names: dict[str, Any] = {}
    exec(program, names)
    import copy

    return [names[entry_point](*copy.deepcopy(given)) for given in inputs]


@pytest.fixture
def no_sandbox(monkeypatch: pytest.MonkeyPatch) -> None:
    """Grade in this process."""
    monkeypatch.setattr("mull.evaluation.suites.grading.Pool", HerePool)
    monkeypatch.setattr("mull.evaluation.suites.grading.expected_values", expected_here)
