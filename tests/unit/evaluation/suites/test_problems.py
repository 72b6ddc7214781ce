"""Problems are read and asked as their authors published them."""

import copy
import gzip
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mull.evaluation.sandbox import Asserts, run_program
from mull.evaluation.suites import problems as module
from mull.evaluation.suites.grading import grade, lm_eval_matches
from mull.evaluation.suites.problems import Problem, Problems, load_problems, with_tuples
from mull.evaluation.suites.prompts import PROTOCOLS

FILES = {
    "humaneval": ("HumanEval.jsonl.gz", 164),
    "humaneval+": ("HumanEvalPlus.jsonl.gz", 164),
    "mbpp": ("mbpp.jsonl", 500),
    "mbpp+": ("MbppPlus.jsonl.gz", 378),
    "gsm8k": ("gsm8k_test.jsonl", 1319),
}


def write(file: Path, records: Sequence[Any]) -> Path:
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


pytestmark = pytest.mark.filterwarnings("ignore:invalid escape sequence")


@pytest.mark.parametrize("suite", FILES)
def test_the_published_problems_are_all_there(suite: Any, data: Path) -> None:
    name, n = FILES[suite]
    found = load_problems(suite, data / name)
    assert len(found.problems) == n
    assert len(PROTOCOLS[suite].prompts(found)) == len(PROTOCOLS[suite].chats(found)) == n


def test_humaneval_is_asked_by_its_prompt_alone(data: Path) -> None:
    with gzip.open(data / "HumanEval.jsonl.gz", "rt") as lines:
        published = [json.loads(text)["prompt"] for text in lines]
    assert PROTOCOLS["humaneval"].prompts(load_problems("humaneval", data / "HumanEval.jsonl.gz")) == published


# ruff: noqa: E501, W291
MBPP_PROMPT_11 = """You are an expert Python programmer, and here is your task: Write a function to find the similar elements from the given two tuple lists. Your code should pass these tests:

assert similar_elements((3, 4, 5, 6),(5, 7, 4, 10)) == (4, 5)
assert similar_elements((1, 2, 3, 4),(5, 4, 3, 7)) == (3, 4)
assert similar_elements((11, 12, 14, 13),(17, 15, 14, 13)) == (13, 14)
[BEGIN]
def similar_elements(test_tup1, test_tup2):
  res = tuple(set(test_tup1) & set(test_tup2))
  return (res) 
[DONE]

You are an expert Python programmer, and here is your task: Write a python function to identify non-prime numbers. Your code should pass these tests:

assert is_not_prime(2) == False
"""


def test_mbpp_shows_the_problems_2_3_and_4(data: Path) -> None:
    prompts = PROTOCOLS["mbpp"].prompts(load_problems("mbpp", data / "mbpp.jsonl"))
    assert prompts[0].startswith(MBPP_PROMPT_11)
    assert prompts[0].count("[DONE]") == 3
    assert prompts[0].count("[BEGIN]") == 4
    assert prompts[0].endswith('assert remove_Occ("PHP","P") == "H"\n[BEGIN]\n')
    assert "\r" not in "".join(prompts)


def test_mbpp_without_its_examples_is_refused(tmp_path: Path) -> None:
    record = {"task_id": 11, "text": "Add.", "code": "def f(): pass", "test_list": ["assert f() is None"]}
    with pytest.raises(ValueError, match="lacks task_id 2: MBPP's prompt shows the problems 2, 3 and 4"):
        load_problems("mbpp", write(tmp_path / "mbpp.jsonl", [record]))


def test_gsm8k_is_asked_exactly_as_lm_eval_asks(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its task on the same files, with its own sampler: the first 30 contexts, character by character."""
    pytest.importorskip("lm_eval", reason="needs the extra eval")
    from random import Random

    import yaml
    from lm_eval.api.samplers import ContextSampler

    lm_eval = Path(__import__("lm_eval").__file__).parent
    task = yaml.safe_load((lm_eval / "tasks" / "gsm8k" / "gsm8k.yaml").read_text())
    assert (task["doc_to_text"], task["num_fewshot"], task["fewshot_split"]) == (
        "Question: {{question}}\nAnswer:",
        5,
        "train",
    )
    train = [json.loads(text) for text in (data / "gsm8k_train.jsonl").read_text().splitlines()]
    test = [json.loads(text) for text in (data / "gsm8k_test.jsonl").read_text().splitlines()]
    sampler = ContextSampler(train, rnd=1234)
    expected = []
    for doc in test[:30]:
        shots = sampler.sample(5)
        told = "".join(f"Question: {shot['question']}\nAnswer: {shot['answer']}\n\n" for shot in shots)
        expected.append(f"{told}Question: {doc['question']}\nAnswer:")
    assert isinstance(sampler.rnd, Random)
    assert PROTOCOLS["gsm8k"].prompts(load_problems("gsm8k", data / "gsm8k_test.jsonl"))[:30] == expected
    assert PROTOCOLS["gsm8k"].stops == tuple(task["generation_kwargs"]["until"])


def test_gsm8k_needs_training_problems(tmp_path: Path) -> None:
    file = write(tmp_path / "gsm8k_test.jsonl", [{"question": "1 + 1?", "answer": "#### 2"}])
    with pytest.raises(ValueError, match="shows five training problems, and there are none beside"):
        load_problems("gsm8k", file)
    shots = write(tmp_path / "shots.jsonl", [{"question": f"{i}?", "answer": f"#### {i}"} for i in range(6)])
    found = load_problems("gsm8k", file, shots=shots)
    assert len(found.shots) == 6
    assert found.problems[0].name == "gsm8k/0"


def contest(**changes: Any) -> dict[str, Any]:
    tests = {"input": ["1 2\n"], "output": ["3\n"]}
    empty: dict[str, list[str]] = {"input": [], "output": []}
    record = {"name": "1_A", "description": "Add.\r\n", "public_tests": tests, "private_tests": empty}
    return {**record, "generated_tests": {"input": ["5 6\n"], "output": ["11\n"]}, **changes}


def test_code_contests_has_all_its_tests(tmp_path: Path) -> None:
    found = load_problems("codecontests", write(tmp_path / "c.jsonl", [contest()]))
    assert found.problems[0].stdin == ("1 2\n", "5 6\n")
    assert found.problems[0].stdout == ("3\n", "11\n")
    assert PROTOCOLS["codecontests"].prompts(found) == ["QUESTION:\nAdd.\nUse Standard Input format\nANSWER:\n"]
    for bad in ({"public_tests": None}, {"private_tests": {"input": ["1"], "output": []}}):
        with pytest.raises(ValueError, match="with the lists input and output of one length"):
            load_problems("codecontests", write(tmp_path / "c.jsonl", [contest(**bad)]))
    none = {key: {"input": [], "output": []} for key in ("public_tests", "private_tests", "generated_tests")}
    with pytest.raises(ValueError, match="has no tests"):
        load_problems("codecontests", write(tmp_path / "c.jsonl", [contest(**none)]))


def test_two_problems_of_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="two problems that are called 1_A"):
        load_problems("codecontests", write(tmp_path / "c.jsonl", [contest(), contest()]))


def test_missing_keys_are_told(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"h.jsonl:1 has the keys task_id: each record must have a string under 'prompt'"
    ):
        load_problems("humaneval", write(tmp_path / "h.jsonl", [{"task_id": "a"}]))
    with pytest.raises(ValueError, match="There are no problems of humaneval in"):
        load_problems("humaneval", write(tmp_path / "h.jsonl", []))


def test_the_tested_function_is_the_last_one_that_the_tests_name() -> None:
    assert module.tested_function("def a(): pass\ndef b(): pass\n", ["assert a() == 1"]) == "a"
    assert module.tested_function("def a(): pass\ndef b(): pass\n", ["assert set(b(a())) == 1"]) == "b"
    assert module.tested_function("class A: pass\n", ["assert A().x == 1"]) == "A"


def test_inputs_of_mbpp_plus_have_their_types() -> None:
    assert with_tuples(2, [[[1], [2]]]) == [[(1,), (2,)]]
    assert with_tuples(63, [[[[1, 2], [3, 4]]]]) == [[[(1, 2), (3, 4)]]]
    assert with_tuples(75, [[[[1, 2]], 6]]) == [[[(1, 2)], 6]]
    assert with_tuples(106, [[[5], [9, 10]]]) == [[[5], (9, 10)]]
    assert with_tuples(115, [[[[1, 2], []]]]) == [[[{1, 2}, {}]]]
    assert with_tuples(124, [["0.0", "1j"]]) == [[0.0, 1j]]
    assert with_tuples(252, [["1+2j"]]) == [[1 + 2j]]
    assert with_tuples(259, [[[[1, 3]], [[6, 7]]]]) == [[((1, 3),), ((6, 7),)]]
    assert with_tuples(278, [[[1, [2, 3]]]]) == [[(1, (2, 3))]]
    assert with_tuples(307, [[["a", []], 1, 50]]) == [[("a", []), 1, 50]]
    assert with_tuples(722, [[{"a": [6.2, 70]}, 6.0]]) == [[{"a": (6.2, 70)}, 6.0]]
    assert with_tuples(580, [[[4, [7]]]]) == [[(4, (7,))]]
    assert with_tuples(3, [[[1]]]) == [[[1]]]


def test_every_reference_solution_of_the_plus_sets_takes_the_inputs(data: Path) -> None:
    for suite in ("humaneval+", "mbpp+"):
        for problem in load_problems(suite, data / FILES[suite][0]).problems:
            assert problem.inputs is not None
            names: dict[str, Any] = {}
            exec(problem.inputs.reference, names)
            given = problem.inputs.inputs[0]
            names[problem.entry_point](*copy.deepcopy(given))


def test_only_one_input_of_the_plus_sets_is_left_out(data: Path) -> None:
    for suite, file in (("humaneval+", "HumanEvalPlus.jsonl.gz"), ("mbpp+", "MbppPlus.jsonl.gz")):
        with gzip.open(data / file, "rt") as lines:
            published = {row["task_id"]: [*row["base_input"], *row["plus_input"]] for row in map(json.loads, lines)}
        kept = {p.name: len(p.inputs.inputs) for p in load_problems(suite, data / file).problems if p.inputs}  # type: ignore[arg-type]
        assert {name: len(published[name]) - n for name, n in kept.items() if len(published[name]) != n} == (
            {"Mbpp/255": 1} if suite == "mbpp+" else {}
        )


CHEATS = {
    "HumanEval/32": "def poly(xs, x):\n    return 0\n\ndef find_zero(xs):\n    return 7\n",
    "HumanEval/38": "def encode_cyclic(s):\n    return s\n\ndef decode_cyclic(s):\n    return s\n",
    "HumanEval/50": "def encode_shift(s):\n    return s\n\ndef decode_shift(s):\n    return s\n",
}


def test_functions_of_the_prompt_that_tests_call_are_not_the_programs(data: Path) -> None:
    with gzip.open(data / "HumanEval.jsonl.gz", "rt") as lines:
        rows = {row["task_id"]: row for row in map(json.loads, lines)}
    problems = {problem.name: problem for problem in load_problems("humaneval", data / "HumanEval.jsonl.gz").problems}
    for name, cheat in CHEATS.items():
        tests = Asserts(problems[name].asserts, (problems[name].entry_point,))
        assert run_program(cheat, tests).reason == "wrong answer"
        assert run_program(rows[name]["prompt"] + rows[name]["canonical_solution"], tests).passed
    others = [problem for name, problem in problems.items() if name not in CHEATS]
    assert all(problem.asserts == f"{rows[problem.name]['test']}\ncheck({problem.entry_point})\n" for problem in others)


@pytest.mark.parametrize("suite", ["humaneval", "mbpp"])
@pytest.mark.usefixtures("no_sandbox")
def test_published_solutions_pass_and_others_fail(suite: Any, data: Path, tmp_path: Path) -> None:
    found = load_problems(suite, data / FILES[suite][0])
    found = Problems(found.suite, found.problems[:40], found.shots)
    with gzip.open(data / "HumanEval.jsonl.gz", "rt") as lines:
        solutions = {record["task_id"]: record["canonical_solution"] for record in map(json.loads, lines)}

    def records(text: Any) -> list[dict[str, Any]]:
        return [{"temperature": 0.0, "problem": p.name, "sample": 0, "text": text(p)} for p in found.problems]

    def solution(problem: Problem) -> str:
        return solutions[problem.name] if suite == "humaneval" else problem.answer + "\n[DONE]\nmore"

    right = grade(records(solution), found, tmp_path, chat=False, workers=2)
    assert [verdict["problem"] for verdict in right if not verdict["passed"]] == []
    wrong = grade(records(lambda p: "    pass\n"), found, tmp_path, chat=False, workers=2)
    assert not any(verdict["passed"] for verdict in wrong)
    fenced = grade(
        records(
            lambda p: (
                f"Sure:\n```python\n{p.question if suite == 'humaneval' else ''}{solution(p).split('[DONE]')[0]}```\nOk?"
            )
        ),
        found,
        tmp_path,
        chat=True,
        workers=2,
    )
    assert all(verdict["passed"] for verdict in fenced)


def test_numbers_of_gsm8k_are_graded_like_lm_eval_and_by_value() -> None:
    answer = "He has 1,000 + 234.\n#### 1,234"
    assert lm_eval_matches("So #### 1234", answer) == {"strict_match": True, "flexible_extract": True}
    assert lm_eval_matches("It is $1,234.", answer) == {"strict_match": False, "flexible_extract": True}
    assert lm_eval_matches("#### 1234.00", answer) == {"strict_match": False, "flexible_extract": False}
    assert lm_eval_matches("none", answer) == {"strict_match": False, "flexible_extract": False}


HUMANEVAL = {
    "task_id": "HumanEval/0",
    "prompt": "def f(x):\n",
    "entry_point": "f",
    "test": "def check(f):\n    assert f(1)\n",
}
MBPP = {"task_id": 11, "text": "Add.", "code": "def f(): pass", "test_list": ["assert f() is None"]}
PLUS = {"canonical_solution": "    return x\n", "base_input": [[1]], "plus_input": [], "atol": 0}
GSM8K = {"question": "1 + 1?", "answer": "#### 2"}
DAMAGED: list[tuple[str, dict[str, Any], str]] = [
    ("mbpp", {**MBPP, "test_list": []}, "has an empty test_list"),
    ("mbpp", {**MBPP, "test_list": ["f()"]}, "has no assert in test_list"),
    ("mbpp", {**MBPP, "test_list": ["assert f( == 1"]}, "has test_list that is no Python \\(line 1"),
    ("mbpp", {**MBPP, "task_id": True}, "lacks task_id, a number"),
    ("mbpp", {**MBPP, "test_imports": [5]}, "has test_imports that are no list of strings"),
    ("mbpp", {**MBPP, "test_setup_code": "import ("}, "has test_setup_code that is no Python"),
    ("mbpp+", {**MBPP, "test": "assert f("}, "has test that is no Python"),
    ("mbpp+", {**MBPP, "test": "f()"}, "has no assert in test"),
    (
        "mbpp+",
        {**MBPP, "test": "import numpy as np\nassert np.allclose(f(), 1)"},
        "has a test that is not of EvalPlus' form",
    ),
    (
        "mbpp+",
        {**MBPP, "test": "inputs = [f]\nassertion(f(), 1, 0)\nassert 1"},
        "has a test that is not of EvalPlus' form",
    ),
    ("mbpp+", {**HUMANEVAL, **PLUS, "task_id": "abc"}, "has task_id 'abc', which ends with no number"),
    (
        "mbpp+",
        {**HUMANEVAL, **PLUS, "task_id": "Mbpp/75", "base_input": [[1]]},
        "has inputs that are not those of Mbpp/75",
    ),
    ("humaneval", {**HUMANEVAL, "test": "def check(f):\n    pass\n"}, "has no assert in test"),
    ("humaneval", {**HUMANEVAL, "test": "def check(:\n"}, "has test that is no Python \\(line 1"),
    ("humaneval+", {**HUMANEVAL, **PLUS, "base_input": [1]}, "has base_input that is no list of lists"),
    ("humaneval+", {**HUMANEVAL, **PLUS, "plus_input": [[2], {}]}, "has plus_input that is no list of lists"),
    ("humaneval+", {**HUMANEVAL, **PLUS, "base_input": []}, "has no inputs"),
    ("codecontests", contest(public_tests={"input": [1], "output": ["3"]}), "has public_tests that are no strings"),
    ("codecontests", contest(private_tests={"input": ["1"], "output": [3]}), "has private_tests that are no strings"),
    ("codecontests", contest(time_limit={"seconds": "x"}), "has time_limit"),
    ("gsm8k", {**GSM8K, "answer": "two"}, "has no number in answer"),
]


@pytest.mark.parametrize(
    ("suite", "record", "told"), DAMAGED, ids=lambda value: value if isinstance(value, str) else ""
)
def test_a_damaged_problem_is_told_by_its_place(suite: Any, record: dict[str, Any], told: str, tmp_path: Path) -> None:
    shots = write(tmp_path / "shots.jsonl", [GSM8K] * 5)
    examples = [{**MBPP, "task_id": number} for number in (2, 3, 4)] if suite == "mbpp" else []
    file = write(tmp_path / "p.jsonl", [*examples, record])
    with pytest.raises(ValueError, match=rf"p.jsonl:{len(examples) + 1} {told}"):
        load_problems(suite, file, shots=shots)


def test_gsm8k_needs_five_training_problems(tmp_path: Path) -> None:
    file = write(tmp_path / "t.jsonl", [GSM8K] * 4)
    with pytest.raises(ValueError, match="t.jsonl has 4 training problems, and GSM8K's prompt shows 5"):
        load_problems("gsm8k", file, shots=file)


def test_a_solution_in_python_2_does_not_matter(tmp_path: Path) -> None:
    rows = [
        {**MBPP, "task_id": number, "code": "def f():\n  print 1", "test_list": ["assert set(f()) == 1"]}
        for number in (2, 3, 4, 11)
    ]
    assert load_problems("mbpp", write(tmp_path / "m.jsonl", rows)).problems[0].entry_point == "f"


def test_damaged_verdicts_are_told(tmp_path: Path) -> None:
    problems = Problems("mbpp", (Problem("mbpp/11", "Add.", "f", "assert f()\n"),))
    kept = {"temperature": 0.0, "problem": "mbpp/11", "sample": 0, "passed": True, "reason": "passed"}
    kept |= {"program": "a", "proof": "outside"}
    for name, value in (("program", None), ("reason", None), ("program", 5), ("passed", "yes"), ("proof", None)):
        damaged = {**kept, name: value}
        if value is None:
            del damaged[name]
        write(tmp_path / "verdicts.jsonl", [kept, damaged])
        with pytest.raises(ValueError, match=r"verdicts.jsonl, line 2, is damaged .*remove the line, and run again"):
            grade([{**kept, "text": "x"}], problems, tmp_path, chat=False, workers=1)


HUB_HELPERS = """import numpy as np

def is_floats(x) -> bool:
    # check if it is float; List[float]; Tuple[float]
    if isinstance(x, float):
        return True
    if isinstance(x, (list, tuple)):
        return all(isinstance(i, float) for i in x)
    if isinstance(x, np.ndarray):
        return x.dtype == np.float64 or x.dtype == np.float32
    return False


def assertion(out, exp, atol):
    if atol == 0 and is_floats(exp):
        atol = 1e-6
    if out != exp and atol != 0:
        assert np.allclose(out, exp, rtol=1e-07, atol=atol)
    else:
        assert out == exp, f"out: {out}, exp: {exp}"

"""
HUB_POLY = (
    "import math\n\ndef _poly(xs: list, x: float):\n    return sum([c * math.pow(x, i) for i, c in enumerate(xs)])\n\n"
)


def in_hub_form(suite: str, row: dict[str, Any], problem: Problem) -> dict[str, Any]:
    """A published problem as ``to_original_fmt.py`` of EvalPlus writes it for the hub."""
    assert problem.inputs is not None
    given, entry = [list(arguments) for arguments in problem.inputs.inputs], problem.entry_point
    is_mbpp, helpers, head = suite == "mbpp+", HUB_HELPERS, f"inputs = {given}"
    call = f"assertion({entry if is_mbpp else 'candidate'}(*inp), exp, {row['atol']})"
    lines = [head, "results = [None]", "for i, (inp, exp) in enumerate(zip(inputs, results)):", f"    {call}"]
    if entry == "find_zero":
        helpers, lines[3] = HUB_POLY, f"    assert _poly(*inp, candidate(*inp)) <= {row['atol']}"
    elif entry in ("tri", "string_sequence", "starts_one_ends", "make_a_pile", "combinations_colors", "freq_count"):
        helpers += problem.inputs.reference.replace(f" {entry}(", " ref_func(")
        lines = [head, "for i, inp in enumerate(inputs):", f"    {call.replace('exp,', 'ref_func(*inp),')}"]
    if is_mbpp:
        number = int(row["task_id"].rpartition("/")[2])
        kept = {"task_id": number, "prompt": "Do it.", "test_list": [row["assertion"].strip()], "test_imports": []}
        body = "\n".join(lines)
        return {**kept, "code": row["canonical_solution"], "test": f"from math import inf\n{helpers}\n{body}\n"}
    body = "\n    ".join(lines)
    kept = {key: row[key] for key in ("task_id", "prompt", "entry_point", "canonical_solution")}
    return {**kept, "test": f"{helpers}\ndef check(candidate):\n    {body}\n"}


@pytest.mark.parametrize("suite", ["humaneval+", "mbpp+"])
def test_the_form_on_the_hub_has_the_same_tests(suite: Any, data: Path, tmp_path: Path) -> None:
    own = load_problems(suite, data / FILES[suite][0])
    with gzip.open(data / FILES[suite][0], "rt") as lines:
        rows = {row["task_id"]: row for row in map(json.loads, lines)}
    # Every 40th, and those that the hub or its rules treat in a way of their own.
    special = {"find_zero", "string_sequence", "freq_count", "minimum", "zero_count"}
    chosen = [
        problem for place, problem in enumerate(own.problems) if place % 40 == 0 or problem.entry_point in special
    ]
    chosen = [
        replace(problem, inputs=replace(problem.inputs, inputs=problem.inputs.inputs[:20]))
        for problem in chosen
        if problem.inputs
    ]
    hub = [in_hub_form(suite, rows[problem.name], problem) for problem in chosen]
    found = load_problems(suite, write(tmp_path / "hub.jsonl", hub))
    for problem, expected in zip(found.problems, chosen, strict=True):
        assert (problem.name, problem.entry_point) == (expected.name, expected.entry_point)
        assert repr(problem.inputs) == repr(expected.inputs)  # a nan is not equal to itself
    right = [
        {"temperature": 0.0, "problem": p.name, "sample": 0, "text": rows[p.name]["canonical_solution"]}
        for p in chosen[:3]
    ]
    if suite == "mbpp+":
        wrong = [{**record, "sample": 1, "text": "def f(): pass"} for record in right]
    else:
        wrong = [{**record, "sample": 1, "text": "    return None"} for record in right]
    few = Problems(suite, found.problems[:3])
    verdicts = grade([*right, *wrong], few, tmp_path, chat=False, workers=1)
    assert [verdict["passed"] for verdict in verdicts] == [True] * 3 + [False] * 3


def test_programs_may_import_numpy(tmp_path: Path) -> None:
    problems = Problems("mbpp", (Problem("mbpp/11", "Double.", "f", "assert f(1) == 2\n"),))
    text = "import numpy as np\ndef f(x):\n    return int(np.array([x, x]).sum())\n"
    record = {"temperature": 0.0, "problem": "mbpp/11", "sample": 0, "text": text}
    assert grade([record], problems, tmp_path, chat=False, workers=1)[0]["passed"]
