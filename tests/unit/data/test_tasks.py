"""Benchmarks are read as their authors split them, and a synthetic wrong answer is a small change of a right one."""

import ast
import gzip
import itertools
import json
import logging
import os
import warnings
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mull.data.tasks import Example, corrupted, load_examples, pairs

MBPP_CODE = "def add(a, b):\r\n  return a + b "
HUMANEVAL = {
    "task_id": "HumanEval/0",
    "prompt": 'def add(a, b):\n    """Sum of a and b."""\n',
    "canonical_solution": "    total = a + b\n    return total\n",
    "entry_point": "add",
    "test": "def check(candidate): ...",
}
PYTHON2, CPP, PYTHON3 = 1, 2, 3
CONTEST = {
    "name": "1_A. Sum",
    "description": "Read two numbers.\r\nPrint their sum.\n",
    "solutions": {"language": [CPP, PYTHON3, PYTHON3], "solution": ["int main(){}", "right\r\none\n", "right two\n"]},
    "incorrect_solutions": {"language": [PYTHON3, PYTHON2], "solution": ["wrong three\n", "print 4\n"]},
    "public_tests": {"input": ["1 2\n"], "output": ["3\n"]},
    "private_tests": {"input": [], "output": []},
    "generated_tests": {"input": [], "output": []},
}


def mbpp(task_id: int, key: str = "text") -> dict[str, Any]:
    tests = [f"assert add({task_id}, {i}) == {task_id + i}" for i in range(3)]
    return {"task_id": task_id, key: "Add.", "code": MBPP_CODE, "test_list": tests, "test_setup_code": ""}


def write_lines(file: Path, records: Iterable[Any]) -> Path:
    content = "".join(json.dumps(record) + "\n" for record in records).encode()
    file.write_bytes(gzip.compress(content) if file.suffix == ".gz" else content)
    return file


def test_mbpp_is_split_by_task_id(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "mbpp.jsonl", map(mbpp, range(1, 975)))
    parts = {split: load_examples(file, "mbpp", split=split) for split in ("prompt", "test", "validation", "train")}
    numbers = {split: [int(example.name.removeprefix("mbpp/")) for example in part] for split, part in parts.items()}
    # Austin et al. 2021, section 2.1: 10 for the prompt, 500 to test, 90 to validate, 374 to fine-tune on.
    assert {split: (part[0], part[-1], len(part)) for split, part in numbers.items()} == {
        "prompt": (1, 10, 10),
        "test": (11, 510, 500),
        "validation": (511, 600, 90),
        "train": (601, 974, 374),
    }
    assert len(load_examples(file, "mbpp", split="all")) == 974
    for split in (None, "dev"):
        with pytest.raises(
            ValueError, match=f"split={split!r} of .*MBPP has the splits prompt, test, validation, train, all"
        ):
            load_examples(file, "mbpp", split=split)


@pytest.mark.parametrize("key", ["text", "prompt"])
def test_an_example_of_mbpp_has_the_prompt_of_the_paper(tmp_path: Path, key: str) -> None:
    file = tmp_path / "sanitized-mbpp.json"
    file.write_text(json.dumps([mbpp(601, key)]))
    assert load_examples(file, "mbpp", split="train") == [
        Example(
            "mbpp/601",
            "You are an expert Python programmer, and here is your task: Add. Your code should pass these tests:\n\n"
            "assert add(601, 0) == 601\nassert add(601, 1) == 602\nassert add(601, 2) == 603\n[BEGIN]\n",
            "def add(a, b):\n  return a + b\n",
            1.0,
        )
    ]


def test_mbpp_of_the_hub_is_split_as_its_file(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    parts = {"train": [mbpp(601), mbpp(974)], "test": [mbpp(11)], "prompt": [mbpp(1)]}
    datasets.DatasetDict({name: datasets.Dataset.from_list(part) for name, part in parts.items()}).save_to_disk(
        str(tmp_path / "hub")
    )
    file = write_lines(tmp_path / "mbpp.jsonl", [record for part in parts.values() for record in part])
    for split in ("train", "test", "prompt"):
        assert load_examples(f"hf:{tmp_path / 'hub'}", "mbpp", split=split) == load_examples(file, "mbpp", split=split)


@pytest.mark.parametrize("name", ["HumanEval.jsonl", "HumanEval.jsonl.gz"])
def test_prompt_and_completion_of_humaneval_are_a_program(tmp_path: Path, name: str) -> None:
    (example,) = load_examples(write_lines(tmp_path / name, [HUMANEVAL]), "humaneval")
    assert example == Example("HumanEval/0", HUMANEVAL["prompt"], HUMANEVAL["canonical_solution"], 1.0)
    namespace: dict[str, Any] = {}
    exec(example.prompt + example.completion, namespace)
    assert namespace["add"](2, 3) == 5


@pytest.mark.parametrize("kind", ["file", "dataset"])
def test_code_contests_gives_right_and_wrong_programs_in_python_3(tmp_path: Path, kind: str) -> None:
    if kind == "file":
        source = str(write_lines(tmp_path / "contests.jsonl", [CONTEST]))
    else:
        datasets = pytest.importorskip("datasets")
        datasets.Dataset.from_list([CONTEST]).save_to_disk(str(tmp_path / "contests"))
        source = f"hf:{tmp_path / 'contests'}"
    prompt = "QUESTION:\nRead two numbers.\nPrint their sum.\nUse Standard Input format\nANSWER:\n"
    assert load_examples(source, "code_contests") == [
        Example("1_A. Sum", prompt, "right\none\n", 1.0),
        Example("1_A. Sum", prompt, "right two\n", 1.0),
        Example("1_A. Sum", prompt, "wrong three\n", 0.0),
    ]


def test_own_examples_may_have_a_name_and_an_outcome(tmp_path: Path) -> None:
    records = [
        {"prompt": "a", "completion": "b"},
        {"prompt": "", "completion": "c\r\n", "outcome": 0.5, "name": "mine"},
        {"prompt": "d", "completion": "e", "outcome": True},
    ]
    file = write_lines(tmp_path / "own.jsonl", records)
    assert load_examples(file, "examples") == [
        Example(f"{file}:1", "a", "b", None),
        Example("mine", "", "c\r\n", 0.5),
        Example(f"{file}:3", "d", "e", 1.0),
    ]


@pytest.mark.parametrize(
    ("schema", "record", "message"),
    [
        ("mbpp", {**mbpp(700), "task_id": "x"}, "task_id='x'"),
        ("mbpp", {**mbpp(700), "test_list": "assert"}, "lacks test_list, a list of strings"),
        ("mbpp", {**mbpp(700), "code": None}, "NoneType under 'code'"),
        ("humaneval", mbpp(700), "has int under 'task_id'"),
        ("code_contests", HUMANEVAL, "under 'name'"),
        ("code_contests", {**CONTEST, "solutions": []}, "lacks solutions with the lists language and solution"),
        ("code_contests", {**CONTEST, "solutions": {"language": [3], "solution": []}}, "lacks solutions"),
        ("examples", {"prompt": "a"}, "has the keys prompt"),
        ("examples", {"prompt": "a", "completion": "b", "outcome": "right"}, "outcome='right'"),
        ("examples", {"prompt": "a", "completion": "b", "outcome": 100}, r"must lie in \[0, 1\]"),
        ("examples", {"prompt": "a", "completion": "b", "outcome": float("nan")}, r"must lie in \[0, 1\]"),
    ],
)
def test_a_record_of_another_schema_is_named(tmp_path: Path, schema: Any, record: Any, message: str) -> None:
    file = write_lines(tmp_path / "data.jsonl", [record])
    with pytest.raises(ValueError, match=rf"data\.jsonl:1.*{message}"):
        load_examples(file, schema, split="all" if schema == "mbpp" else None)


def test_no_examples_is_an_error(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "mbpp.jsonl", [mbpp(11)])
    with pytest.raises(ValueError, match="There are no examples in .*mbpp with split='train'"):
        load_examples(file, "mbpp", split="train")
    empty = write_lines(tmp_path / "empty.jsonl", [])
    with pytest.raises(ValueError, match="There are no examples in .*as humaneval"):
        load_examples(empty, "humaneval")


def answers(name: str, n_right: int, n_wrong: int) -> list[Example]:
    return [
        Example(name, "", f"{kind} = {i} + x\n", outcome)
        for kind, count, outcome in (("right", n_right, 1.0), ("wrong", n_wrong, 0.0))
        for i in range(count)
    ]


def test_pairs_are_balanced_within_each_problem(caplog: pytest.LogCaptureFixture) -> None:
    examples = answers("a", 5, 2) + answers("b", 1, 9) + answers("c", 3, 0)
    with caplog.at_level(logging.WARNING):
        found = pairs(examples, seed=3)
    assert Counter(right.name for right, _ in found) == {"a": 2, "b": 1}
    assert all((right.outcome, wrong.outcome) == (1.0, 0.0) and right.name == wrong.name for right, wrong in found)
    for side in zip(*found, strict=True):
        assert len(set(side)) == len(side), "an answer in two pairs"
    assert "1 of 3 problems are dropped" in caplog.text
    assert Counter(right.name for right, _ in pairs(examples, per_problem=1)) == {"a": 1, "b": 1}


def test_pairs_are_drawn_by_the_seed() -> None:
    examples = answers("a", 9, 3)
    assert pairs(examples, seed=1) == pairs(examples, seed=1)
    drawn = [pairs(examples, seed=seed) for seed in range(20)]
    assert {right for found in drawn for right, _ in found} == set(examples[:9]), "some answers are never drawn"


def test_problems_without_wrong_answers_get_synthetic_ones() -> None:
    examples = [*answers("a", 3, 0), *answers("b", 2, 1), Example("c", "", "pass\n", 1.0)]
    found = pairs(examples, corrupt=True)
    assert Counter(right.name for right, _ in found) == {"a": 3, "b": 1}
    assert all(wrong.completion != right.completion and wrong.outcome == 0.0 for right, wrong in found)
    assert {wrong for right, wrong in found if right.name == "b"} == {examples[5]}, "real ones are preferred"
    assert len(pairs(examples, corrupt=True, per_problem=2)) == 3


def test_mistakes_in_pairing_are_named() -> None:
    with pytest.raises(ValueError, match="None of 1 problems has both .*corrupt=True"):
        pairs(answers("a", 2, 0))
    with pytest.raises(ValueError, match=r"None of 1 problems has both right and wrong answers\."):
        pairs([Example("c", "", "pass\n", 1.0)], corrupt=True)
    with pytest.raises(ValueError, match="a has the outcome None"):
        pairs([Example("a", "", "b")])
    with pytest.raises(ValueError, match="per_problem=0"):
        pairs(answers("a", 1, 1), per_problem=0)


PROGRAM = '''\
import re

def count(words: list[str], n: int = 2, *rest: str) -> dict[str, int]:
    """Words of n + 1 letters, or more."""
    found = {}
    for é, word in enumerate(words):
        if len(word) > n and re.match("\\d+", word) is None:  # not "1 + 1"
            found[word] = found.get(word, 0) + 1
    return found
'''


def test_a_corrupted_program_differs_in_one_token_of_its_syntax_tree() -> None:
    seen = set()
    for seed in range(200):
        wrong = corrupted(Example("a", "Count.", PROGRAM, 1.0), np.random.default_rng(seed))
        assert (wrong.name, wrong.prompt, wrong.outcome) == ("a", "Count.", 0.0)
        with warnings.catch_warnings(action="ignore"):
            assert ast.dump(ast.parse(wrong.completion)) != ast.dump(ast.parse(PROGRAM))
        changed = [
            (before, after)
            for before, after in zip(PROGRAM.splitlines(), wrong.completion.splitlines(), strict=True)
            if before != after
        ]
        (change,) = changed
        assert '"""' not in change[0]
        seen.add(change[1].strip())
    assert {
        'if len(word) < n and re.match("\\d+", word) is None:  # not "1 + 1"',
        'if len(word) > n or re.match("\\d+", word) is None:  # not "1 + 1"',
        'if len(é) > n and re.match("\\d+", word) is None:  # not "1 + 1"',
        "found[word] = found.get(word, 0) - 1",
        "found[word] = found.get(word, 1) + 1",
        "for é, word in enumerate(found):",
        "return words",
    } <= seen


def test_only_the_completion_of_a_program_is_corrupted() -> None:
    prompt = "def add(a, b=3):\n    c = a if 1 < 2 else b\n"  # six places that could be changed
    example = Example("a", prompt, HUMANEVAL["canonical_solution"], 1.0)
    changed = {corrupted(example, np.random.default_rng(seed)).completion for seed in range(99)}
    assert "    total = a - b\n    return total\n" in changed
    assert all(completion.startswith("    total = ") for completion in changed)
    assert example.completion not in changed, "the change is in the prompt"
    assert len(changed) == 1 + 3 + 3 + 3, "the operator; each of three names is replaced by one of the three others"


@pytest.mark.parametrize(
    "completion", ["pass\n", "return x +", "nothing to see, here", "x = '\ud800' + y", "", "\\\r\n"]
)
def test_what_cannot_be_corrupted_is_an_error(completion: str) -> None:
    with pytest.raises(ValueError, match="problem cannot be corrupted"):
        corrupted(Example("problem", "A prompt. ", completion, 1.0), np.random.default_rng(0))


@pytest.fixture
def benchmarks() -> Path:
    if "MULL_TEST_DATA" not in os.environ:
        pytest.skip("MULL_TEST_DATA names no folder with mbpp.jsonl and HumanEval.jsonl.gz")
    return Path(os.environ["MULL_TEST_DATA"])


def test_the_files_of_the_benchmarks_are_read(benchmarks: Path) -> None:
    humaneval = load_examples(benchmarks / "HumanEval.jsonl.gz", "humaneval")
    assert len(humaneval) == 164
    mbpp_parts = [
        load_examples(benchmarks / "mbpp.jsonl", "mbpp", split=split) for split in ("train", "validation", "test")
    ]
    assert [len(part) for part in mbpp_parts] == [374, 90, 500]
    for example in itertools.chain(humaneval, *mbpp_parts):
        assert "\r" not in example.prompt + example.completion
    for example in humaneval:
        ast.parse(example.prompt + example.completion)
    assert len(pairs(mbpp_parts[0], corrupt=True)) == 353
