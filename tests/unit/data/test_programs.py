"""Claim: tasks of MBPP's form are read as they are, and tests of generated ones tell right programs from wrong ones."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from mull.data.programs import (
    HELD_OUT_EVERY,
    NUMBERS,
    RULES,
    PromptBatches,
    Rule,
    called_function,
    demonstrations,
    load_program_tasks,
    rule_tokenizer,
    rules,
)
from mull.evaluation.suites.problems import load_problems

EVERYTHING = [*rules(held_out=False), *rules(held_out=True)]


def passed(program: str, rule: Rule) -> list[bool]:
    """Which tests of a rule a program of these tests passes."""
    names: dict[str, Any] = {}
    exec(program, names)
    found = []
    for test in rule.task().tests:
        try:
            exec(test, names)
        except AssertionError:
            found.append(False)
        else:
            found.append(True)
    return found


def test_the_program_of_every_rule_passes_its_tests_and_the_mistaken_one_does_not() -> None:
    assert len(set(EVERYTHING)) == len(EVERYTHING) == len(RULES) * len(NUMBERS) ** 2
    for rule in EVERYTHING:
        assert passed(rule.program, rule) == [True] * 4, rule
        assert not all(passed(rule.mistaken.program, rule)), rule
        assert rule.mistaken != rule
        assert rule.task() == rule.task()


def test_programs_may_be_partly_right() -> None:
    rule = next(rule for rule in EVERYTHING if RULES[rule.kind][0].startswith("at least"))
    shares = [sum(passed(f"def f(x): return max(x, {a}) + {rule.b}", rule)) for a in range(-9, 31)]
    assert {1, 2, 3} & set(shares)


def test_what_is_held_out_is_no_demonstration_and_a_share_of_them_is_wrong() -> None:
    held_out = {rule.words for rule in rules(held_out=True)}
    assert len(held_out) == pytest.approx(len(EVERYTHING) / HELD_OUT_EVERY, rel=0.2)
    assert {kind for rule in rules(held_out=True) for kind in [rule.kind]} == set(range(len(RULES)))
    shown = demonstrations(2000, wrong=0.6, seed=1)
    by_words = {rule.words: rule for rule in EVERYTHING}
    assert not held_out & {example.prompt for example in shown}
    right = [example.completion == by_words[example.prompt].program for example in shown]
    mistaken = [example.completion == by_words[example.prompt].mistaken.program for example in shown]
    assert [a + b for a, b in zip(right, mistaken, strict=True)] == [1] * 2000
    assert sum(mistaken) / 2000 == pytest.approx(0.6, abs=0.05)
    assert demonstrations(2000, wrong=0.6, seed=1) == shown
    assert demonstrations(2000, wrong=0.6, seed=2) != shown


def test_the_tokenizer_reads_numbers_as_tokens_and_gives_texts_back() -> None:
    tokenizer = rule_tokenizer()
    for rule in EVERYTHING:
        text = rule.words + rule.program
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    pieces = tokenizer.convert_ids_to_tokens(tokenizer("times 3 plus 7\n")["input_ids"])
    assert pieces == ["times", " 3", " plus", " 7", "\n"]


def test_batches_of_prompts_are_a_pure_function_and_an_epoch_asks_each_once() -> None:
    prompts = [[n + 1] * (n + 1) for n in range(10)]
    batches = PromptBatches(prompts, 4, pad_id=0, seed=3, first=100)
    asked = [number for batch in map(batches, range(5)) for number in batch["tasks"].tolist()]
    assert sorted(asked[:10]) == sorted(asked[10:]) == list(range(100, 110))
    assert asked[:10] != asked[10:]
    batch = batches(1)
    assert all(torch.equal(batch[name], batches(1)[name]) for name in batch)
    for ids, mask, number in zip(batch["input_ids"], batch["attention_mask"], batch["tasks"], strict=True):
        assert ids[mask == 1].tolist() == prompts[number - 100]
        assert (ids[mask == 0] == 0).all()
        assert (mask.diff() >= 0).all(), "padding is on the left"
    assert batch["input_ids"].shape[1] == max(mask.sum() for mask in batch["attention_mask"])
    assert PromptBatches(prompts, 4, pad_id=0)(0)["tasks"].tolist() == [0, 1, 2, 3]


RECORD: dict[str, Any] = {
    "task_id": 601,
    "text": "Add two numbers.\r\n",
    "test_list": ["assert set(add(1, 2)) == {3}", "assert one + add(1, 1) == 3"],
    "test_setup_code": "one = 1",
}


def written(tmp_path: Path, *records: dict[str, Any]) -> Path:
    file = tmp_path / "tasks.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


def test_tasks_are_read_with_setup_imports_and_entry_point(tmp_path: Path) -> None:
    prompt_instead = {"prompt" if key == "text" else key: value for key, value in RECORD.items()}
    other = prompt_instead | {"task_id": 11, "entry_point": "plus", "test_imports": ["import math"]}
    first, second = load_program_tasks(written(tmp_path, RECORD, other))
    assert (first.name, first.entry_point, first.setup) == ("601", "add", "one = 1")
    assert (second.entry_point, second.setup) == ("plus", "import math\none = 1")
    assert "\r" not in first.prompt
    assert first.prompt.startswith("You are an expert Python programmer, and here is your task: Add two numbers.")
    assert all(test in first.prompt for test in RECORD["test_list"])
    assert [task.name for task in load_program_tasks(tmp_path / "tasks.jsonl", split="train")] == ["601"]
    assert [task.name for task in load_program_tasks(tmp_path / "tasks.jsonl", split="test")] == ["11"]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"test_list": "assert f(1)"}, r"tasks\.jsonl:1 lacks test_list, a list of strings"),
        ({"test_list": []}, r"tasks\.jsonl:1 lacks test_list"),
        ({"test_list": ["assert 1 == 1"]}, r"tasks\.jsonl:1 has tests that call no function"),
        ({"text": 5}, r"tasks\.jsonl:1"),
        ({"test_imports": [5]}, r"tasks\.jsonl:1 has test_imports that are no list of strings"),
        ({"test_imports": "import math"}, r"tasks\.jsonl:1 has test_imports that are no list of strings"),
        (
            {"test_list": ["add(1, 2)"]},
            r"tasks\.jsonl:1 has no assert in test_list: whatever a program does, it would pass",
        ),
        (
            {"test_list": ["assert add(1", "assert add(1) == 1"]},
            r"tasks\.jsonl:1 has test_list that is no Python \(line 1",
        ),
    ],
)
def test_what_cannot_be_read_is_refused_in_one_sentence(tmp_path: Path, change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        load_program_tasks(written(tmp_path, RECORD | change))
    with pytest.raises(ValueError, match=r"There are no tasks in .* with split=validation"):
        load_program_tasks(written(tmp_path, RECORD), split="validation")


def test_the_called_function_is_the_programs_own() -> None:
    assert called_function(["assert math.isclose(area(2), helper(4))"], "def helper(x): return x") == "area"
    assert called_function(["assert sum(1, 2) == 3"]) == "sum"
    assert called_function(["assert sum(take(1)) == 3"]) == "take"
    assert called_function(["assert inner(f(1)) == 3"], code="def inner(x): ...\ndef f(x): ...") == "f"
    assert called_function(["assert 1"]) == ""


def test_entry_points_of_mbpp_are_found_without_its_solutions() -> None:
    folder = Path(os.environ.get("MULL_DATA", Path(__file__).parents[4] / "shared" / "data"))
    if not (folder / "mbpp.jsonl").is_file():
        pytest.skip("MULL_DATA names no folder with mbpp.jsonl.")
    known = {problem.name: problem for problem in load_problems("mbpp", folder / "mbpp.jsonl").problems}
    tasks = load_program_tasks(folder / "mbpp.jsonl", split="test")
    assert len(tasks) == 500
    for task in tasks:
        problem = known[f"mbpp/{task.name}"]
        assert task.entry_point == problem.entry_point
        assert called_function(task.tests, task.setup) == problem.entry_point
        assert task.tests == problem.tests
