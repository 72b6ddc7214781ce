"""However often a run is killed, wherever a line was torn, and on however many ranks, the samples are those of one whole run."""

import contextlib
import copy
import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny
from transformers import PreTrainedTokenizerBase

from mull import ETDConfig, MTPConfig, wrap_transformer_with_etd
from mull.data.tokenizer import train_tokenizer
from mull.evaluation.suites import samples as module
from mull.evaluation.suites.problems import Problem, Problems
from mull.evaluation.suites.samples import JOINED, SampleFolder, SamplePlan, draw_samples, read_lines, repair
from mull.evaluation.suites.writers import AnswerReader, MullWriter, PlainWriter
from mull.ops.sampling import Sampling

SPLIT = ETDConfig(n_encoder_layers=1, n_think_layers=2, n_decoder_layers=1)
TEXT = "def add(a, b):\n    return a + b\n\nclass A:\n    pass\n# comment\nprint(add(1, 2))\n" * 9
QUESTIONS = [
    "def add(a, b):\n",
    "def twice(x):\n    '''2 x'''\n",
    "import re\ndef f():\n",
    "def g(x, y):\n    '''a'''\n",
    "def h():\n",
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return train_tokenizer([TEXT], 300)


def plan(**changes: Any) -> SamplePlan:
    problems = Problems("humaneval", tuple(Problem(f"P/{i}", text) for i, text in enumerate(QUESTIONS)))
    settings = {"temperatures": (0.5, 1.0), "n_samples": 3, "batch_size": 4, "max_new_tokens": 12, **changes}
    return SamplePlan(problems, tuple(QUESTIONS), **settings)


class FakeWriter:
    """Tokens that depend on the prompt and the seed only, or, with `together`, on the whole batch as well."""

    positions = 64

    def __init__(self, together: bool = False, fail_after: int | None = None) -> None:
        self.together, self.fail_after, self.rows = together, fail_after, 0

    def write(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], sampling: Sampling, max_new_tokens: int, stop: Any
    ) -> list[list[int]]:
        if self.fail_after is not None and self.rows >= self.fail_after:
            raise KeyboardInterrupt
        self.rows += len(prompts)
        found = []
        for prompt, seed in zip(prompts, seeds, strict=True):
            draw = random.Random(f"{prompt} {seed} {sampling.temperature} {seeds if self.together else ''}")
            found.append([draw.randrange(256) for _ in range(draw.randint(1, max_new_tokens))])
        return found


def run(folder: Path, tokenizer: PreTrainedTokenizerBase, writer: Any, **changes: Any) -> bytes:
    place, drawn = SampleFolder(folder), plan(**changes)
    draw_samples(drawn, writer, AnswerReader(tokenizer, chat=False), place)
    place.join(drawn.keys())
    return (folder / JOINED).read_bytes()


def test_killed_and_torn_20_times_equals_uninterrupted(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """The fake's tokens depend on the whole batch, as rounding does: a chunk must be written again with the rows it had."""
    whole = run(tmp_path / "whole", tokenizer, FakeWriter(together=True))
    chance, folder = random.Random(0), tmp_path / "killed"
    place, reader = SampleFolder(folder), AnswerReader(tokenizer, chat=False)
    for _ in range(20):
        with contextlib.suppress(KeyboardInterrupt):
            draw_samples(plan(), FakeWriter(together=True, fail_after=chance.choice([0, 4, 8])), reader, place)
        file = folder / "samples-rank0.jsonl"
        content = file.read_bytes()
        file.write_bytes(content[: chance.randint(max(0, len(content) - 400), len(content))])
    assert run(folder, tokenizer, FakeWriter(together=True)) == whole
    assert whole.count(b"\n") == 30
    assert run(folder, tokenizer, FakeWriter(fail_after=0)) == whole, "a finished run draws nothing"
    assert [*folder.glob("samples-rank*")] == []


@pytest.mark.parametrize("ranks", [2, 3, 7])
def test_any_number_of_ranks_writes_the_same(
    ranks: int, tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(tmp_path / "whole", tokenizer, FakeWriter(together=True))
    folder, reader = tmp_path / "ranks", AnswerReader(tokenizer, chat=False)
    place = SampleFolder(folder)
    # The first rank is killed, and the run continues with one rank.
    monkeypatch.setattr(module, "world_size", lambda: ranks)
    for rank in range(1, ranks):
        monkeypatch.setattr(module, "rank", lambda rank=rank: rank)
        before = {file.name: file.read_bytes() for file in folder.glob("*.jsonl")}
        alone = tmp_path / f"alone{rank}"  # each rank starts from the same files
        other = SampleFolder(alone)
        draw_samples(plan(), FakeWriter(together=True), reader, other)
        assert before == {file.name: file.read_bytes() for file in folder.glob("*.jsonl")}
        (folder / f"samples-rank{rank}.jsonl").write_bytes((alone / f"samples-rank{rank}.jsonl").read_bytes())
    monkeypatch.undo()
    assert run(folder, tokenizer, FakeWriter(together=True)) == whole
    assert place.read().keys() == set(plan().keys())


def test_another_batch_size_draws_the_same(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    files = {size: run(tmp_path / str(size), tokenizer, FakeWriter(), batch_size=size) for size in (1, 4, 7, 100)}
    assert len(set(files.values())) == 1


def small(heads: bool, tokenizer: PreTrainedTokenizerBase, kind: str = "llama") -> Any:
    base = tiny(kind, dtype=torch.float64, vocab_size=len(tokenizer), num_hidden_layers=4)
    mtp = MTPConfig(num_predict_tokens=2, mtp_head_type="sequential") if heads else None
    return wrap_transformer_with_etd(base, SPLIT, mtp).eval()


def test_real_samples_depend_on_neither_batch_nor_engine(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """mull.generate at three batch sizes, and transformers' generate, in fp64: the same records."""
    model = small(False, tokenizer)
    ends = [tokenizer.eos_token_id]
    options = {"max_new_tokens": 16, "top_p": 0.9, "repetition_penalty": 1.3, "n_samples": 2}
    files = {
        (kind.__name__, size): run(
            tmp_path / f"{kind.__name__}{size}", tokenizer, kind(model, ends), batch_size=size, **options
        )
        for kind in (MullWriter, PlainWriter)
        for size in (1, 3, 8)
    }
    assert len(set(files.values())) == 1
    records = [*read_lines(tmp_path / "MullWriter3" / JOINED)]
    assert len({record["text"] for record in records}) > 15
    assert {record["finish"] for record in records} <= {"length", "end", "stop"}


def test_greedy_samples_are_the_same_with_drafts(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    model, ends = small(True, tokenizer), [tokenizer.eos_token_id]
    options = {"temperatures": (0.0,), "n_samples": 1, "max_new_tokens": 20}
    files = {
        n: run(tmp_path / str(n), tokenizer, MullWriter(model, ends, draft_length=n), **options) for n in (0, 1, 2)
    }
    assert len(set(files.values())) == 1


def test_sampled_drafts_are_the_same_in_any_order_of_chunks(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    model, ends = small(True, tokenizer), [tokenizer.eos_token_id]
    whole = run(tmp_path / "whole", tokenizer, MullWriter(model, ends, draft_length=2))
    folder = tmp_path / "part"
    folder.mkdir()
    lines = whole.split(b"\n")
    # What a kill left: chunks 0 and 2 without one line, and the beginning of another.
    kept = [*lines[1:4], *lines[8:11], lines[20][:15]]
    (folder / "samples-rank0.jsonl").write_bytes(b"\n".join(kept))
    assert run(folder, tokenizer, MullWriter(model, ends, draft_length=2)) == whole


def test_an_answer_ends_at_its_stop(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    [record] = _records(tmp_path, tokenizer, "    return a + b\n\nclass A:\n    pass\n")
    assert (record["text"], record["finish"]) == ("    return a + b\n", "stop")


def test_a_chat_about_gsm8k_ends_before_a_question_of_its_own(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    """As in lm-eval: else the number would be that of the last question, which the model made up."""
    spoken = copy.deepcopy(tokenizer)
    spoken.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    text = "2 + 2 = 4\n#### 4\n\nQuestion: How many are 3 + 3?\n#### 6"
    [record] = _records(tmp_path, spoken, text, suite="gsm8k", chat=True)
    assert (record["text"], record["finish"]) == ("2 + 2 = 4\n#### 4\n\n", "stop")


def _records(
    folder: Path, tokenizer: PreTrainedTokenizerBase, text: str, *, suite: Any = "humaneval", chat: bool = False
) -> list[dict[str, Any]]:
    class Says(FakeWriter):
        def write(self, prompts: Any, seeds: Any, sampling: Any, max_new_tokens: int, stop: Any) -> list[list[int]]:
            tokens = tokenizer.encode(text)
            end = next(place for place in range(1, 1 + len(tokens)) if stop(tokens[:place]))
            assert end < len(tokens), "asked after each token, the stop is seen as soon as it is written"
            return [tokens[: end + 2]] * len(prompts)

    settings = {"temperatures": (0.0,), "n_samples": 1, "batch_size": 1, "max_new_tokens": 60}
    problems = Problems(suite, (Problem("P/0", QUESTIONS[0]),))
    drawn = SamplePlan(problems, (QUESTIONS[0],), **settings)
    place = SampleFolder(folder)
    writer = Says()
    writer.positions = 1000
    draw_samples(drawn, writer, AnswerReader(tokenizer, chat=chat), place)
    return place.join(drawn.keys())


def test_a_prompt_without_room_is_a_wrong_answer(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    writer = FakeWriter()
    writer.positions = 20
    run(tmp_path, tokenizer, writer)
    finishes = {record["problem"]: record["finish"] for record in read_lines(tmp_path / JOINED)}
    assert set(finishes.values()) == {"no room", "length", "end"} or "no room" in finishes.values()
    assert all(record["text"] == "" for record in read_lines(tmp_path / JOINED) if record["finish"] == "no room")


def test_answers_to_other_prompts_are_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    run(tmp_path, tokenizer, FakeWriter())
    changed = plan()
    changed = dataclasses.replace(changed, prompts=(*changed.prompts[:-1], "another"))
    place = SampleFolder(tmp_path)
    with pytest.raises(ValueError, match="has answers to another prompt of P/4: the problems have changed since"):
        draw_samples(changed, FakeWriter(), AnswerReader(tokenizer, chat=False), place)


def test_a_damaged_line_inside_is_told(tmp_path: Path) -> None:
    file = tmp_path / JOINED
    good = {"temperature": 0.0, "problem": "a", "sample": 0}
    file.write_text(f"{json.dumps(good)}\n{{torn\n{json.dumps(good)}\n")
    with pytest.raises(ValueError, match="line 2, is damaged"):
        list(read_lines(file))
    file.write_text(f"{json.dumps(good)}\n{json.dumps(good)}")  # whole, but its line end is missing
    assert len(list(read_lines(file))) == 1
    repair(file)
    assert file.read_text() == json.dumps(good) + "\n"
    whole = {**good, "text": "x", "prompt": "y", "finish": "end"}
    for damaged in ({**whole, "text": None}, {**whole, "prompt": 5}, {**good, "text": "x", "prompt": "y"}):
        file.write_text(f"{json.dumps(whole)}\n{json.dumps(damaged)}\n")
        with pytest.raises(ValueError, match=r"samples.jsonl, line 2, is damaged .*: remove the line, and run again"):
            SampleFolder(tmp_path).read()


def test_several_greedy_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="samples=3 with temperature=0 would write one answer 3 times"):
        plan(temperatures=(0.0, 1.0))


def test_seeds_differ_between_problems_and_samples_and_not_between_temperatures() -> None:
    drawn = plan()
    seeds = {key: drawn.seed_of(key) for key in list(drawn.keys())}
    assert len(set(seeds.values())) == 15
    assert all(0 <= seed < 2**63 for seed in seeds.values())


PROGRAM = """
import importlib.util, sys
from pathlib import Path
spec = importlib.util.spec_from_file_location("test_samples", sys.argv[2])
t = importlib.util.module_from_spec(spec)
spec.loader.exec_module(t)
tokenizer = t.train_tokenizer([t.TEXT], 300)
model = t.small(True, tokenizer)
writer = t.MullWriter(model, [tokenizer.eos_token_id], draft_length=2)
t.run(Path(sys.argv[1]), tokenizer, writer, n_samples=40, max_new_tokens=40)
"""


@pytest.mark.slow
def test_a_process_that_is_killed_20_times_writes_the_same_bytes(tmp_path: Path) -> None:
    here = Path(__file__).parent
    command = [sys.executable, "-c", PROGRAM]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{os.environ.get('PYTHONPATH', '')}:{here.parents[2]}"}

    def start(folder: Path) -> subprocess.Popen[bytes]:
        return subprocess.Popen([*command, str(folder), __file__], env=env, stderr=subprocess.DEVNULL)

    assert start(tmp_path / "whole").wait() == 0
    folder, chance, n_killed = tmp_path / "killed", random.Random(5), 0
    file = folder / "samples-rank0.jsonl"
    for _ in range(20):
        size = file.stat().st_size if file.exists() else 0
        process = start(folder)
        while process.poll() is None and (file.stat().st_size if file.exists() else 0) <= size:
            time.sleep(0.01)  # until it has written something new
        time.sleep(chance.random() * 0.2)
        process.send_signal(signal.SIGKILL)
        n_killed += process.wait() == -signal.SIGKILL
    assert start(folder).wait() == 0
    assert (folder / JOINED).read_bytes() == (tmp_path / "whole" / JOINED).read_bytes()
    assert n_killed >= 10
