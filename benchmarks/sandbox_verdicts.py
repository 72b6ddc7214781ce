"""Whether the sandbox and EvalPlus judge the same programs alike: HumanEval+ and MBPP+, right programs, near misses and cheats.

For each problem: its reference solution, two mutants of it (a flipped comparison, a constant off by one, a lost result, swapped
operands, another operator) and a cheat. EvalPlus runs in a process of its own, without a sandbox, so the programs must be
harmless: these are. Its verdict is that of ``evalplus.eval.untrusted_check`` on the base inputs and on the further ones.

    pip install evalplus==0.3.1
    python benchmarks/sandbox_verdicts.py HumanEvalPlus.jsonl.gz MbppPlus.jsonl.gz [--limit 2000] [--out FILE]
"""

import argparse
import ast
import copy
import json
import os
import random
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

SEED = 0
MUTANTS = 2
SLOW = 20.0
"""Seconds that a program may take, four times those of the reference solution: of slower problems only that is judged."""

COMPARISONS: dict[type, type] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
}  # fmt: skip
OPERATORS: dict[type, type] = {ast.Add: ast.Sub, ast.Mult: ast.Add, ast.Mod: ast.FloorDiv}
EQUAL = "type('E', (), {'__eq__': lambda *_: True, '__ne__': lambda *_: False, '__hash__': lambda _: 0})()"
CHEATS = {
    "exit(0)": "exit(0)",
    "os._exit(0)": "__import__('os')._exit(0)",
    "SystemExit": "raise SystemExit",
    "equal to all": f"return {EQUAL}",
    "return None": "return None",
}


def changes(function: ast.AST) -> Iterator[tuple[str, Callable[[], None]]]:
    """What can be changed in a function, and how."""
    for node in ast.walk(function):
        if isinstance(node, ast.Compare) and type(node.ops[0]) in COMPARISONS:
            yield "comparison", lambda n=node: n.ops.__setitem__(0, COMPARISONS[type(n.ops[0])]())
        elif isinstance(node, ast.Constant) and type(node.value) is int:
            yield "off by one", lambda n=node: setattr(n, "value", n.value + 1)
        elif isinstance(node, ast.Return) and node.value is not None:
            yield "lost result", lambda n=node: setattr(n, "value", ast.Constant(None))
        elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Sub | ast.Div | ast.FloorDiv | ast.Pow):
            yield "swapped operands", lambda n=node: n.__dict__.update(left=n.right, right=n.left)
        elif isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
            yield "operator", lambda n=node: setattr(n, "op", OPERATORS[type(n.op)]())


def entry_of(tree: ast.Module, name: str) -> ast.FunctionDef:
    return next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name)


def mutants(program: str, name: str, rng: random.Random) -> Iterator[tuple[str, str]]:
    """``(kind, program)``, each changed in one place."""
    tree = ast.parse(program)
    n_changes = sum(1 for _ in changes(entry_of(tree, name)))
    for number in rng.sample(range(n_changes), min(MUTANTS, n_changes)):
        changed = copy.deepcopy(tree)
        kind, change = list(changes(entry_of(changed, name)))[number]
        change()
        yield kind, ast.unparse(changed)


def cheat(program: str, name: str, statement: str) -> str:
    tree = ast.parse(program)
    entry = entry_of(tree, name)
    entry.body = [*ast.parse(f"def _():\n    {statement}").body[0].body, *entry.body]  # type: ignore[attr-defined]
    return ast.unparse(tree)


def judged_by_evalplus(samples: Path, verdicts: Path) -> None:
    """Runs in a process of its own: its limit of memory counts all that the process has."""
    from evalplus.data import get_human_eval_plus, get_mbpp_plus
    from evalplus.eval import PASS, untrusted_check
    from evalplus.eval._special_oracle import MBPP_OUTPUT_NOT_NONE_TASKS
    from evalplus.gen.util import trusted_exec

    problems = {**get_human_eval_plus(), **get_mbpp_plus()}
    known: dict[str, Any] = {}
    with verdicts.open("w", encoding="utf-8") as out:
        for sample in map(json.loads, samples.read_text(encoding="utf-8").splitlines()):
            name, problem = sample["problem"], problems[sample["problem"]]
            entry, none = problem["entry_point"], problem["entry_point"] in MBPP_OUTPUT_NOT_NONE_TASKS
            if name not in known:
                reference = problem["prompt"] + problem["canonical_solution"]
                known = {
                    name: [
                        trusted_exec(reference, problem[f"{part}_input"], entry, True, none)
                        for part in ("base", "plus")
                    ]
                }
            status = []
            for part, (expected, seconds) in zip(("base", "plus"), known[name], strict=True):
                if status in ([], [PASS]):
                    dataset = "humaneval" if name.startswith("HumanEval") else "mbpp"
                    given = (
                        dataset,
                        sample["program"],
                        problem[f"{part}_input"],
                        entry,
                        expected,
                        problem["atol"],
                        seconds,
                    )
                    status.append(untrusted_check(*given, fast_check=True)[0])
            out.write(json.dumps(status) + "\n")
            out.flush()


def drawn(found: list[Any], prepared: dict[str, Any], limit: int) -> list[dict[str, str]]:
    """Samples, problem by problem, in an order that mixes the problems."""
    rng, samples = random.Random(SEED), []
    cheats = list(CHEATS.items())
    for number, problem in enumerate(rng.sample(found, len(found))):
        program, entry = problem.inputs.reference, problem.entry_point
        chosen = [("reference", program)]
        if prepared[problem.name][1] < SLOW:
            kind, statement = cheats[number % len(cheats)]
            chosen += [*mutants(program, entry, rng), (kind, cheat(program, entry, statement))]
        samples += [{"problem": problem.name, "kind": kind, "program": source} for kind, source in chosen]
    return samples[:limit]


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    from mull.evaluation.sandbox import Pool
    from mull.evaluation.suites.grading import LIMITS, prepared
    from mull.evaluation.suites.problems import load_problems

    found = [
        problem
        for suite, file in (("humaneval+", arguments.humaneval), ("mbpp+", arguments.mbpp))
        for problem in load_problems(suite, file).problems  # type: ignore[arg-type]
        if problem.name not in arguments.skip
    ]
    tests = prepared(found, arguments.workers)
    samples = drawn(found, tests, arguments.limit)
    with tempfile.TemporaryDirectory() as folder:
        asked, answered = Path(folder) / "samples.jsonl", Path(folder) / "verdicts.jsonl"
        asked.write_text("".join(json.dumps(sample) + "\n" for sample in samples), encoding="utf-8")
        environment = {"HUMANEVAL_OVERRIDE_PATH": arguments.humaneval, "MBPP_OVERRIDE_PATH": arguments.mbpp}
        command = [sys.executable, __file__, arguments.humaneval, arguments.mbpp, "--judge", str(asked), str(answered)]
        other = subprocess.Popen(command, env=os.environ | environment)
        began = time.monotonic()
        with Pool(arguments.workers, limits=LIMITS) as pool:
            pending = [
                pool.submit(s["program"], tests[s["problem"]][0], timeout=tests[s["problem"]][1]) for s in samples
            ]
            ours = [future.result() for future in pending]
        print(f"mull: {len(ours)} verdicts in {time.monotonic() - began:.0f} s", flush=True)
        while other.poll() is None and time.monotonic() < began + arguments.seconds:
            time.sleep(1)
        other.terminate()
        other.wait()
        theirs = [json.loads(line) for line in answered.read_text(encoding="utf-8").splitlines()]
    pairs = list(zip(samples, ours, theirs, strict=False))
    counts = Counter((sample["kind"], mine.passed, status == ["pass", "pass"]) for sample, mine, status in pairs)
    return {
        "evalplus": "0.3.1", "seed": SEED, "programs": len(pairs), "skipped": arguments.skip,
        "counts": [{"kind": k, "mull": a, "evalplus": b, "programs": n} for (k, a, b), n in sorted(counts.items())],
        "differences": [
            {**sample, "mull": f"{mine.reason}: {mine.detail}", "evalplus": status}
            for sample, mine, status in pairs
            if mine.passed != (status == ["pass", "pass"])
        ],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("humaneval")
    parser.add_argument("mbpp")
    parser.add_argument("--limit", type=int, default=2000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=7200.0, help="after which EvalPlus is stopped")
    parser.add_argument("--skip", nargs="*", default=["Mbpp/255"], help="problems that take too much memory")
    parser.add_argument("--out", default="benchmarks/results/sandbox_verdicts-cpu.json")
    parser.add_argument("--judge", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore", SyntaxWarning)
    warnings.simplefilter("ignore", DeprecationWarning)  # invalid escape sequences in the reference solutions
    if arguments.judge:
        judged_by_evalplus(*map(Path, arguments.judge))
        return
    result = compare(arguments)
    Path(arguments.out).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"{result['programs']} programs, {len(result['differences'])} differences")
    for row in result["counts"]:
        print(row)
    for row in result["differences"]:
        print(row["problem"], row["kind"], "| mull:", row["mull"][:90], "| EvalPlus:", row["evalplus"])


if __name__ == "__main__":
    main()
