"""Claim: a sampled program is worth the share of its tests that it passes in the sandbox, the same for the same program."""

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from conftest import tiny
from torch import Tensor

from mull.data.programs import ProgramTask, PromptBatches, Rule, rule_tokenizer
from mull.data.tokenizer import TextEncoder, train_tokenizer
from mull.evaluation import program_reward, sandbox
from mull.evaluation.program_reward import ProgramReward, pass_rates
from mull.evaluation.sandbox import Asserts, Pool, SandboxError, Verdict
from mull.retrofit.wrap import wrap_transformer_with_etd

ADD = ProgramTask(
    "add", "Add.", ("assert add(1, 2) == 3", "assert add(2, 2) == 4", f"assert add(0, 5) == {5}"), "add", "one = 1"
)
TOKENIZER = train_tokenizer(["def add(a, b):\n    return a + b\n"] * 3, 300)
END = int(TOKENIZER.eos_token_id)


def graded(reward: ProgramReward, answers: Sequence[str], prompt: str = "Add.\n", numbers: Sequence[int] = ()) -> Any:
    """Grade answers that are given as text."""
    encoder = TextEncoder(TOKENIZER)
    ids = torch.tensor(encoder.prompts([prompt]) * len(answers))
    rows = [completion for _, completion in encoder.examples([(prompt, answer) for answer in answers])]
    width = max(map(len, rows)) + 1
    # Behind the end there may be anything.
    completions = torch.tensor([row + TOKENIZER("x")["input_ids"][:1] * (width - len(row)) for row in rows])
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "tasks": torch.tensor(numbers or [0] * len(rows)),
    }
    return reward(completions, batch)


class Scripted:
    """A pool whose verdicts are written in the programs: ``# reason passed/tests``, after ``inside`` with the weaker proof."""

    def __init__(self, workers: int, *, timeout: float, allow_weak: Any) -> None:
        self.workers, self.timeout, self.allow_weak = workers, timeout, allow_weak
        self.ran: list[tuple[str, Asserts]] = []
        self.closed = 0
        pools.append(self)

    def map(self, jobs: Any) -> Iterator[Verdict]:
        for program, tests in jobs:
            self.ran.append((program, tests))
            reason, _, share = program.strip().removeprefix("# ").rpartition(" ")
            n_passed, n_tests = map(int, share.split("/"))
            reason, inside, _ = reason.partition(" inside")
            counts = (n_passed, n_tests, n_passed / n_tests)
            yield Verdict(reason == "passed", reason, "", 0.0, *counts, "inside" if inside else "outside")

    def close(self) -> None:
        self.closed += 1


pools: list[Scripted] = []


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> list[Scripted]:
    monkeypatch.setattr(program_reward, "Pool", Scripted)
    pools.clear()
    return pools


@pytest.fixture(scope="module")
def real() -> Iterator[ProgramReward]:
    try:
        Pool(1).close()
    except SandboxError as error:
        pytest.skip(str(error))
    with ProgramReward([ADD], TOKENIZER, [END], workers=2, timeout=1.0) as reward:
        yield reward


def test_a_program_earns_the_share_of_tests_that_it_passes(real: ProgramReward) -> None:
    right, two, none = "def add(a, b): return a + b", "def add(a, b): return a + 2", "def add(a, b): return 'x'"
    found = graded(real, [right, two, none, right])
    assert found.rewards.tolist() == pytest.approx([1.0, 2 / 3, 0.0, 1.0])
    assert found.flags["solved"].tolist() == [True, False, False, True]
    assert not found.flags["timeouts"].any()
    assert not found.flags["errors"].any()
    again = graded(real, [none, two, right])
    assert again.rewards.tolist() == pytest.approx([0.0, 2 / 3, 1.0])


def test_a_program_that_takes_too_long_earns_nothing_and_is_counted(real: ProgramReward) -> None:
    late = "def add(a, b):\n    while a == 0: pass\n    return a + b"
    broken, raises, ends = (
        "def add(a, b: return",
        "def add(a, b): return 3 if a == 1 else 1 // 0",
        "raise SystemExit(0)",
    )
    before = real.reasons["time-out"]
    found = graded(real, [late, broken, raises, ends, ""])
    assert found.rewards.tolist() == pytest.approx([0.0, 0.0, 1 / 3, 0.0, 0.0])
    assert found.flags["timeouts"].tolist() == [True, False, False, False, False]
    assert found.flags["errors"].tolist() == [False, True, True, True, True]
    assert real.reasons["time-out"] == before + 1


def test_the_program_is_found_in_what_was_written(real: ProgramReward) -> None:
    program = "def add(a, b):\n    return a + b"
    assert graded(real, [f"{program}\n[DONE]\nand more"]).rewards.tolist() == [1.0]
    assert graded(real, [f"```python\n{program}\n```\n"]).rewards.tolist() == [1.0]
    prose = f"Here it is:\n```python\n{program}\n```\nIt adds."
    assert graded(real, [prose]).rewards.tolist() == [0.0], "a completion is code"
    real._reader.chat = True
    try:
        assert graded(real, [prose]).rewards.tolist() == [1.0]
    finally:
        real._reader.chat = False


def test_equal_programs_run_once_except_those_that_time_out(scripted: list[Scripted]) -> None:
    with ProgramReward([ADD, ADD], TOKENIZER, [END], workers=3, timeout=2.0, allow_weak=("seccomp",)) as reward:
        (pool,) = scripted
        assert (pool.workers, pool.timeout, pool.allow_weak) == (3, 2.0, ("seccomp",))
        answers = ["# passed 3/3", "# time-out 2/3", "# passed 3/3", "# memory 1/3", "# passed 3/3"]
        found = graded(reward, answers, numbers=[0, 0, 0, 0, 1])
        assert found.rewards.tolist() == pytest.approx([1.0, 0.0, 1.0, 1 / 3, 1.0])
        assert found.flags["timeouts"].tolist() == [False, True, False, False, False]
        assert found.flags["errors"].tolist() == [False, False, False, True, False]
        assert len(pool.ran) == 4, "the same program for another task is another one"
        assert pool.ran[0][1] == Asserts("\n".join(["one = 1", *ADD.tests]) + "\n", ("add",))
        graded(reward, answers, numbers=[0, 0, 0, 0, 1])
        assert [program.strip() for program, _ in pool.ran[4:]] == ["# time-out 2/3"]
        assert reward.reasons == {"passed": 2, "time-out": 2, "memory": 1}


def test_the_weaker_proof_is_counted(scripted: list[Scripted]) -> None:
    answers = ["# passed 3/3", "# wrong answer 2/3", "# passed inside 3/3"]
    with ProgramReward([ADD], TOKENIZER, [END]) as reward:
        assert graded(reward, answers).flags["weak_proof"].tolist() == [False, False, True]
        assert graded(reward, answers[2:]).flags["weak_proof"].tolist() == [True], "also of kept verdicts"


def test_tests_that_pass_an_object_have_the_weaker_proof(real: ProgramReward) -> None:
    task = ProgramTask("first", "First.", ("assert first(Thing()) == 1",), "first", "class Thing:\n    one = 1")
    with ProgramReward([ADD, task], TOKENIZER, [END], workers=1, timeout=5.0) as reward:
        found = graded(reward, ["def add(a, b): return a + b", "def first(x): return x.one"], numbers=[0, 1])
    assert found.flags["solved"].tolist() == [True, True]
    assert found.flags["weak_proof"].tolist() == [False, True]


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt])
def test_the_pool_is_closed_also_after_an_error(scripted: list[Scripted], error: type[BaseException]) -> None:
    reward = ProgramReward([ADD], TOKENIZER, [END])
    assert not scripted, "opened by with"
    with pytest.raises(error), reward:
        raise error
    assert [pool.closed for pool in scripted] == [1]
    with pytest.raises(RuntimeError, match="The sandbox is closed"):
        graded(reward, ["# passed 3/3"])


def test_a_machine_without_the_sandbox_is_refused_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "missing_layers", lambda: {"seccomp": "the kernel has none"})
    reward = ProgramReward([ADD], TOKENIZER, [END])
    with pytest.raises(SandboxError, match=r"lacks seccomp on this machine \(the kernel has none\)"), reward:
        pass
    with ProgramReward([ADD], TOKENIZER, [END], allow_weak=("seccomp",)):
        pass


def test_prompts_of_another_task_are_refused(scripted: list[Scripted]) -> None:
    with ProgramReward([ADD], TOKENIZER, [END]) as reward, pytest.raises(ValueError, match=r"data\.format=programs"):
        reward(torch.zeros(1, 1, dtype=torch.long), {"input_ids": torch.zeros(1, 1), "answers": torch.zeros(1, 1)})


def test_pass_at_1_is_that_of_the_models_samples(scripted: list[Scripted], monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = rule_tokenizer()
    asked = [Rule(0, a, b) for a in (2, 3, 4) for b in (5, 6)]
    prompts = PromptBatches(TextEncoder(tokenizer).prompts([rule.words for rule in asked]), 4, 0, first=1)
    model = wrap_transformer_with_etd(tiny("qwen3", vocab_size=len(tokenizer), dtype=torch.float64), None).eval()
    end = int(tokenizer.eos_token_id)
    reward = ProgramReward([ADD, *(rule.task() for rule in asked)], tokenizer, [end])
    seen: list[Tensor] = []

    def verdicts(jobs: Sequence[tuple[int, str]]) -> list[Verdict]:
        seen.append(torch.tensor([number for number, _ in jobs]))
        # Whatever was written, two of the tasks count as solved and one times out.
        return [
            Verdict(
                n in (1, 4),
                {2: "time-out"}.get(n, "passed" if n in (1, 4) else "wrong answer"),
                "",
                0.0,
                3 * (n in (1, 4)),
                4,
                3 / 4 * (n in (1, 4)),
            )
            for n, _ in jobs
        ]

    monkeypatch.setattr(reward, "_verdicts", verdicts)
    options = {"end_ids": [end], "pad_id": 0, "max_new_tokens": 3}
    rates = pass_rates(model, prompts, reward, rows=5, samples=2, seed=7, **options)
    assert torch.cat(seen).tolist() == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert rates == pytest.approx((2 / 5, 3 / 4 * 2 / 5, 1 / 5))
