"""Grade sampled programs by their tests in the sandbox: as a reward in training, and as pass@1."""

import os
from collections import Counter
from collections.abc import Collection, Sequence
from functools import partial
from typing import NamedTuple, Self

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mull.data.programs import ProgramTask, PromptBatches
from mull.decoding.rollouts import rollouts
from mull.evaluation.sandbox import Asserts, Pool, Verdict
from mull.evaluation.suites.problems import Problem
from mull.evaluation.suites.prompts import PROTOCOLS
from mull.evaluation.suites.writers import AnswerReader
from mull.model.causal_lm import MullForCausalLM
from mull.runtime.distributed import on_first_rank
from mull.training.objectives.base import Batch, mixed_seed
from mull.training.objectives.resources import Graded

KEPT_VERDICTS = 100_000
"""A model that learns writes the same programs again and again, and each is run once."""


class ProgramReward:
    """Share of its tests that an answer's program passes; 0 if it times out.

    Equal programs for one task get the same reward, because verdicts are kept; not those of time-outs, which may be
    the machine's fault. A program that raises, or that the sandbox ends, has the share that passed before. The flags of an answer
    are

    * ``solved``: all tests passed;
    * ``timeouts``: the time was over;
    * ``errors``: it raised, is no Python, or was ended for its memory or output, or by itself;
    * ``weak_proof``: its task's tests have to run in the program's own process, where a program can learn to cheat them.

    The pool of the sandbox is opened by ``with``.

    Args:
        tasks: A batch names each by its number here (``tasks [N]``).
        tokenizer: Reads answers.
        end_ids: Tokens that end an answer.
        chat: Whether prompts are messages of a chat; programs are then looked for in prose.
        workers: Programs that run at once; None for one per core.
        timeout: Seconds that a program and its tests have.
        allow_weak: Layers of the sandbox that may be missing.

    Attributes:
        reasons: How often each `mull.evaluation.sandbox.Verdict.reason` came, of programs that were run.

    Source:
        Tests as reward: CodeRL (arXiv:2207.01780) and others reward all tests or none; the share of tests passed is that of
        APPS' "test case average" (arXiv:2105.09938).
    """

    def __init__(
        self,
        tasks: Sequence[ProgramTask],
        tokenizer: PreTrainedTokenizerBase,
        end_ids: Collection[int],
        *,
        chat: bool = False,
        workers: int | None = None,
        timeout: float = 3.0,
        allow_weak: Collection[str] = (),
    ) -> None:
        self._tasks, self._end_ids = tasks, frozenset(end_ids)
        self._reader = AnswerReader(tokenizer, chat)
        self._tests = [Asserts("\n".join([task.setup, *task.tests]) + "\n", (task.entry_point,)) for task in tasks]
        self._open = partial(Pool, workers or os.cpu_count() or 1, timeout=timeout, allow_weak=allow_weak)
        self._pool: Pool | None = None
        self._known: dict[tuple[int, str], Verdict] = {}
        self.reasons: Counter[str] = Counter()

    def __enter__(self) -> Self:
        """Open the pool.

        Raises:
            ValueError: an unknown layer, or a time out of range.
            SandboxError: this machine lacks a layer.
        """
        self._pool = self._open()
        return self

    def __exit__(self, *_: object) -> None:
        """End what still runs."""
        if self._pool is not None:
            self._pool.close()
            self._pool = None

    def __call__(self, completions: Tensor, batch: Batch) -> Graded:
        """Grade completions ``[N, L]``."""
        if "tasks" not in batch:
            raise ValueError(
                f"The reward 'programs' looks up the tests of tasks, and the batch has {', '.join(sorted(batch))}: use prompts "
                "of data.format=programs."
            )
        rows = zip(batch["input_ids"], batch["attention_mask"], completions, strict=True)
        texts = [self._text(ids[mask == 1].tolist(), completion.tolist()) for ids, mask, completion in rows]
        numbers = batch["tasks"].tolist()
        jobs = [(number, self._program(number, text)) for number, text in zip(numbers, texts, strict=True)]
        verdicts = self._verdicts(jobs)
        late = torch.tensor([verdict.reason == "time-out" for verdict in verdicts])
        solved = torch.tensor([verdict.passed for verdict in verdicts])
        wrong = torch.tensor([verdict.reason == "wrong answer" for verdict in verdicts])
        shares = torch.tensor([verdict.share for verdict in verdicts])
        weak = torch.tensor([verdict.proof == "inside" for verdict in verdicts])
        flags = {"solved": solved, "timeouts": late, "errors": ~(solved | late | wrong), "weak_proof": weak}
        return Graded(torch.where(late, 0.0, shares), flags)

    def _text(self, prompt: list[int], tokens: list[int]) -> str:
        """What an answer says, up to its end."""
        end = next((place for place, token in enumerate(tokens) if token in self._end_ids), len(tokens))
        return self._reader.text(prompt, tokens[:end])

    def _program(self, number: int, text: str) -> str:
        task = self._tasks[number]
        return PROTOCOLS["mbpp"].program(Problem(task.name, task.text, task.entry_point), text, self._reader.chat)

    def _verdicts(self, jobs: Sequence[tuple[int, str]]) -> list[Verdict]:
        if self._pool is None:
            raise RuntimeError("The sandbox is closed: grade inside `with ProgramReward(...) as reward`.")
        new = [job for job in dict.fromkeys(jobs) if job not in self._known]
        found = self._pool.map([(program, self._tests[number]) for number, program in new])
        verdicts = dict(zip(new, found, strict=True))
        self.reasons.update(verdict.reason for verdict in verdicts.values())
        everything = [verdicts[job] if job in verdicts else self._known[job] for job in jobs]
        if len(self._known) > KEPT_VERDICTS:
            self._known.clear()
        self._known |= {job: verdict for job, verdict in verdicts.items() if verdict.reason != "time-out"}
        return everything


class PassRates(NamedTuple):
    """How good the answers to a set of tasks are."""

    pass_at_1: float
    """Share of answers that pass all tests."""

    tests_passed: float
    """Mean share of tests that an answer passes."""

    timeouts: float
    """Share of answers that time out."""


def pass_rates(
    model: MullForCausalLM,
    prompts: PromptBatches,
    reward: ProgramReward,
    *,
    rows: int,
    end_ids: Sequence[int],
    pad_id: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    iterations: int | None = None,
    samples: int = 1,
    seed: int = 0,
) -> PassRates:
    """Sample answers and grade them. With several ranks, all call this alike, and the first one grades.

    Args:
        model: In evaluation mode.
        prompts: Of the tasks, the first ones of which are asked.
        reward: Knows the tasks.
        rows: Tasks; all if there are fewer.
        end_ids: Tokens that end an answer.
        pad_id: Fills rows after their end.
        max_new_tokens: Longest answer.
        temperature: Divides the logits.
        iterations: Think iterations; None for a model without a think block.
        samples: Answers per task.
        seed: Of the draws.
    """
    graded = []
    places = range(min(rows, len(prompts)))
    for first in range(0, len(places), prompts.batch_size):
        batch = prompts.rows(places[first : first + prompts.batch_size])
        batch = {name: tensor.to(model.device).repeat_interleave(samples, 0) for name, tensor in batch.items()}
        n_rows = len(batch["input_ids"])
        completions = rollouts(
            model,
            batch["input_ids"],
            batch["attention_mask"],
            seeds=[mixed_seed(seed, first * samples + row) >> 1 for row in range(n_rows)],
            end_ids=end_ids,
            pad_id=pad_id,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            iterations=iterations,
        )
        graded.append(on_first_rank(partial(reward, completions, batch)))
    rewards = torch.cat([one.rewards for one in graded])
    solved, late = (torch.cat([one.flags[name] for one in graded]) for name in ("solved", "timeouts"))
    return PassRates(float(solved.double().mean()), float(rewards.double().mean()), float(late.double().mean()))
