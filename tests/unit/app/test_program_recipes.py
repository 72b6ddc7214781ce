"""Claim: a recipe asks for programs, rewards what they do in the sandbox, and leaves no sandbox open."""

import json
from pathlib import Path
from typing import Any

import pytest
from recipes import ARCHITECTURE, changed
from transformers import AutoTokenizer

from mull.app import run
from mull.app.recipe import parse_recipe
from mull.app.run import estimate_recipe, run_recipe
from mull.data.tokenizer import train_tokenizer
from mull.evaluation import program_reward, sandbox
from mull.evaluation.sandbox import Verdict

TASK = {"task_id": 1, "text": "Add.", "test_list": ["assert add(1, 2) == 3"], "code": "def add(a, b): return a + b"}


class Even:
    """A pool in which a program of even length passes, one whose length is a multiple of 3 is late, and others fail."""

    opened: "list[Even]" = []
    error: BaseException | None = None

    def __init__(self, workers: int, **settings: Any) -> None:
        self.settings = {"workers": workers, **settings}
        self.closed = 0
        self.programs: list[str] = []
        self.opened.append(self)

    def map(self, jobs: Any) -> Any:
        for program, _ in jobs:
            if Even.error is not None:
                raise Even.error
            self.programs.append(program)
            passed = len(program) % 2 == 0
            reason = "time-out" if len(program) % 3 == 0 else "passed" if passed else "wrong answer"
            yield Verdict(reason == "passed", reason, "", 0.0, 4 * passed, 4, float(passed))

    def close(self) -> None:
        self.closed += 1


@pytest.fixture
def pools(monkeypatch: pytest.MonkeyPatch) -> list[Even]:
    monkeypatch.setattr(program_reward, "Pool", Even)
    monkeypatch.setattr(Even, "opened", [])
    return Even.opened


def recipe(tmp_path: Path, **values: Any) -> dict[str, Any]:
    """Demonstrations, then rewards."""
    grpo = {"reward": "programs", "group_size": 4, "max_new_tokens": 6, "workers": 2, "timeout": 1.5}
    whole = {
        "run": {"name": "programs", "out": str(tmp_path)},
        "model": {"architecture": dict(ARCHITECTURE)},
        "data": {"format": "programs", "length": 20, "batch_size": 3},
        "train": {"steps": 2, "precision": "fp32", "log_every": 1},
        "eval": {"rows": 5},
        "stages": [
            {"name": "shown", "data": {"programs": {"demonstrations": 50, "wrong": 0.5}}},
            {"name": "rewarded", "train": {"algo": "grpo-wmtp"}, "grpo": grpo},
        ],
    }
    return changed(whole, **values)


def carry_out(content: dict[str, Any], resume: bool = False) -> Any:
    return run_recipe(parse_recipe(content), resume)


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_recipe_shows_programs_and_then_rewards_them(tmp_path: Path, pools: list[Even]) -> None:
    carry_out(recipe(tmp_path))
    (pool,) = pools
    assert pool.settings == {"workers": 2, "timeout": 1.5, "allow_weak": ()}
    assert pool.closed == 1
    assert pool.programs
    assert "eval_loss" in records(tmp_path / "programs" / "shown")[-1]
    log = records(tmp_path / "programs")
    for record in log:
        assert record["reward"] == pytest.approx(record["solved"])
        assert record["solved"] + record["timeouts"] <= 1
        assert {"errors", "equal_groups", "rollout_seconds", "grading_seconds"} <= record.keys()
    assert 0 <= log[-1]["eval_pass_at_1"] == log[-1]["eval_tests_passed"] <= 1
    assert 0 <= log[-1]["eval_timeouts"] <= 1
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "programs" / "model")
    assert tokenizer.decode(tokenizer("def f(x): return x * 3 + 7")["input_ids"]) == "def f(x): return x * 3 + 7"


def test_a_resumed_run_goes_on_with_the_same_answers(tmp_path: Path, pools: list[Even]) -> None:
    whole = changed(recipe(tmp_path / "whole"), train__steps=4)
    carry_out(whole)
    part = changed(recipe(tmp_path / "part"), train__steps=4, checkpoint={"every": 1})
    train = run.train

    def until_2(model: Any, *args: Any, **options: Any) -> Any:
        return train(model, *args, **options, until=lambda record: record["step"] == 2 and "reward" in record)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "train", until_2)
        assert carry_out(part).stopped == "until"
    carry_out(part, resume=True)
    clock = {"seconds", "tokens_per_second", "rollout_seconds", "grading_seconds"}
    one, two = (
        [
            {name: value for name, value in record.items() if name not in clock}
            for record in records(tmp_path / place / "programs")
        ]
        for place in ("whole", "part")
    )
    assert two == one
    assert [pool.closed for pool in pools] == [1, 1, 1]


@pytest.mark.parametrize("error", [RuntimeError("it broke"), KeyboardInterrupt()])
def test_the_sandbox_is_closed_after_an_error_and_after_ctrl_c(
    tmp_path: Path, pools: list[Even], monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    monkeypatch.setattr(Even, "error", error)
    with pytest.raises(type(error)):
        carry_out(recipe(tmp_path))
    assert [pool.closed for pool in pools] == [1]


def test_a_machine_without_the_sandbox_is_refused_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sandbox, "missing_layers", lambda: {"network": "no namespaces"})
    for begin in (carry_out, lambda content: estimate_recipe(parse_recipe(content))):
        with pytest.raises(RuntimeError, match=r"The sandbox lacks network on this machine \(no namespaces\)"):
            begin(recipe(tmp_path))
    assert not list(tmp_path.rglob("metrics.jsonl"))


def from_files(tmp_path: Path, chat: bool) -> dict[str, Any]:
    """A recipe that asks a trained model for the programs of two files."""
    carry_out(recipe(tmp_path, run__name="base", stages=[{"data": {"programs": {"demonstrations": 50}}}]))
    model = tmp_path / "base" / "model"
    tokenizer = train_tokenizer(["def add(a, b): return a + b"] * 2, 300)
    tokenizer.chat_template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<a>"
    tokenizer.save_pretrained(model)
    for name, number in (("train", 1), ("test", 2)):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(TASK | {"task_id": number, "text": f"Add, {name}."}) + "\n")
    files = {"paths": [str(tmp_path / "train.jsonl")], "held_out_paths": [str(tmp_path / "test.jsonl")]}
    data = {"format": "programs", "batch_size": 2, **files, **({"programs": {"prompt": "chat"}} if chat else {})}
    grpo = {"reward": "programs", "group_size": 2, "max_new_tokens": 4}
    content = recipe(tmp_path, data=data, train__algo="grpo-wmtp", train__steps=1, grpo=grpo)
    del content["stages"]
    return changed(content, model={"checkpoint": str(model)})


@pytest.mark.parametrize("chat", [False, True])
def test_tasks_of_files_are_asked_as_mbpp_or_in_a_chat(
    tmp_path: Path, pools: list[Even], monkeypatch: pytest.MonkeyPatch, chat: bool
) -> None:
    monkeypatch.setitem(ARCHITECTURE, "max_position_embeddings", 512)
    monkeypatch.setitem(ARCHITECTURE, "vocab_size", 320)
    content = from_files(tmp_path, chat)
    prepared = run.prepare(parse_recipe(content))
    (stage,) = prepared.stages
    ids, mask = (stage.batches(0)[name][0] for name in ("input_ids", "attention_mask"))
    text = prepared.tokenizer.decode(ids[mask == 1])
    if chat:
        assert text.startswith("<user>Please provide a self-contained Python script")
        assert text.endswith("<a>")
    else:
        assert text.startswith("You are an expert Python programmer, and here is your task: Add, train.")
        assert text.endswith("[BEGIN]\n")
    assert "assert add(1, 2) == 3" in text
    assert [task.name for task in stage.programs.tasks] == ["1", "2"]
    carry_out(content)
    assert "eval_pass_at_1" in records(tmp_path / "programs")[-1]
    assert pools[-1].closed == 1
    (tmp_path / "train.jsonl").write_text(json.dumps(TASK | {"text": "Subtract."}) + "\n")
    with pytest.raises(ValueError, match=r"content\.data\.tasks"):
        carry_out(content, resume=True)


REFUSED: list[tuple[dict[str, Any], str]] = [
    (
        {"data__paths": ["x"], "stages": [{}]},
        "data.format=programs with paths has tasks to answer, for train.algo=grpo-wmtp",
    ),
    ({"data__split": "train"}, "format=programs is generated and reads no split: leave them out, or give paths"),
    ({"data__programs": {"prompt": "chat"}}, "programs.prompt is not read for generated tasks"),
    ({"data__format": "text", "data__programs": {}, "stages": [{}]}, "the section programs belongs to format=programs"),
    ({"stages": [{}, {"data": {"format": "text"}}]}, "generated programs have their own"),
    ({"stages": [{"train": {"algo": "grpo-wmtp"}, "grpo": {"reward": "program"}}]}, "Did you mean programs?"),
    (
        {"stages": [{"train": {"algo": "grpo-wmtp"}, "grpo": {"reward": "arithmetic"}}]},
        "grpo.reward=arithmetic grades answers to data.format=arithmetic, not programs",
    ),
    (
        {
            "data": {"format": "arithmetic", "arithmetic": {}},
            "stages": [{"train": {"algo": "grpo-wmtp"}, "grpo": {"reward": "arithmetic", "timeout": 1}}],
        },
        "grpo.timeout is for grpo.reward=programs",
    ),
    (
        {"data__paths": ["x"], "stages": [{"train": {"algo": "grpo-wmtp"}, "grpo": {"reward": "programs"}}]},
        "a model with random weights writes no programs: start from model.checkpoint",
    ),
]


@pytest.mark.parametrize(("change", "sentence"), REFUSED)
def test_what_does_not_fit_is_refused_in_one_sentence(tmp_path: Path, change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError) as refused:  # noqa: PT011
        parse_recipe(recipe(tmp_path, **change))
    assert sentence in str(refused.value)


def test_prompts_that_are_too_long_are_refused(tmp_path: Path, pools: list[Even]) -> None:
    content = recipe(tmp_path)
    content["stages"][1]["grpo"]["max_new_tokens"] = 60
    with pytest.raises(ValueError, match=r"The longest prompt \+ grpo.max_new_tokens=66 exceeds the 64 positions"):
        carry_out(content)
