"""Claim: on a real model, perplexity is lm-eval's, and transformers' generate writes what mull.generate writes."""

import os
from pathlib import Path

import pytest
import torch
from lm_eval_tasks import rolling_task

from mull.app.evaluate import run_evaluation
from mull.data.sources import Document
from mull.evaluation.suites.harness import find_task, mull_lm, run_task
from mull.evaluation.suites.perplexity import perplexity_scores, text_losses
from mull.evaluation.suites.subject import Request, load_subject

pytestmark = [pytest.mark.filterwarnings("default"), pytest.mark.real]
CHARACTERS = 20_000


@pytest.fixture
def data() -> Path:
    folder = Path(os.environ.get("MULL_DATA", Path(__file__).parents[3] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("MULL_DATA names no folder with tinyshakespeare.txt and HumanEval.jsonl.gz.")
    return folder


@pytest.mark.parametrize("length", [512, 8192])
def test_perplexity_on_tiny_shakespeare_is_that_of_lm_eval(
    length: int, real_model: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval", reason="needs the extra eval")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    subject = load_subject(real_model, Request(), torch.device("cpu"))
    text = (data / "tinyshakespeare.txt").read_text()[:CHARACTERS]
    length = min(length, subject.positions)
    lm = mull_lm()(subject.model, tokenizer=subject.tokenizer, max_length=length, batch_size=2)
    theirs, _ = run_task(lm, find_task(rolling_task(tmp_path, [text])))
    losses = text_losses(
        lambda ids: subject.model(ids, use_cache=False).logits,
        subject.tokenizer,
        [Document("text", text)],
        length=length,
        batch_size=2,
        device=torch.device("cpu"),
    )
    ours, _ = perplexity_scores(losses)
    for name, score in theirs.items():
        print(name, score.value, ours[name].value)
        assert ours[name].value == pytest.approx(score.value, abs=1e-3, rel=1e-5)


@pytest.mark.parametrize("temperatures", [(0.0,), (0.8,)])
def test_transformers_writes_the_same_answers(
    temperatures: tuple[float, ...], real_model: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "mull.evaluation.suites.table.grade",
        lambda records, *_, **__: [{"passed": False, "reason": "not run"}] * len(records),
    )
    files = []
    for engine in ("mull", "transformers"):
        request = Request(
            data={"humaneval": str(data / "HumanEval.jsonl.gz")},
            limit=4,
            max_new_tokens=24,
            batch_size=4,
            temperatures=temperatures,
            top_p=None if temperatures == (0.0,) else 0.95,
            engine=engine,
            dtype="fp32",
        )
        run_evaluation(real_model, ["humaneval"], tmp_path / engine, request)
        files.append((tmp_path / engine / "humaneval" / "samples.jsonl").read_bytes())
    assert files[0] == files[1]
