"""Claim: an evaluation on two ranks gives the files and the results of one process, and a killed rank is made up for."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny
from distributed_ranks import run_ranks

from mull import ETDConfig, MTPConfig, wrap_transformer_with_etd
from mull.app.evaluate import run_evaluation
from mull.data.tokenizer import train_tokenizer
from mull.evaluation.suites.subject import Request

SPLIT = ETDConfig(n_encoder_layers=1, n_think_layers=2, n_decoder_layers=1)
TEXTS = [f"Question: what is {i} + {i}?\nAnswer: it is {i + i}.\n#### {2 * i}\n" for i in range(40)]
SUITES = ["gsm8k", "token-accuracy", "per-head-analysis", "perplexity"]
pytestmark = pytest.mark.filterwarnings("default")


def evaluate(folder: Path, out: str) -> dict[str, Any]:
    data = {"gsm8k": str(folder / "test.jsonl"), "text": str(folder / "text.txt")}
    request = Request(
        data=data, samples=3, temperatures=(0.7, 1.0), max_new_tokens=8, batch_size=4, length=32, chat=False
    )
    found = run_evaluation(str(folder / "model"), SUITES, folder / out, request)
    return {name: result.model_dump() for name, result in found.items()}


@pytest.mark.slow
def test_two_ranks_give_what_one_process_gives(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(TEXTS, 300)
    base = tiny("llama", vocab_size=len(tokenizer), num_hidden_layers=4, eos_token_id=0, max_position_embeddings=1024)
    heads = MTPConfig(num_predict_tokens=2, mtp_head_type="sequential")
    wrap_transformer_with_etd(base, SPLIT, heads).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    for name, rows in (("train", TEXTS[:8]), ("test", TEXTS[8:13])):
        asked = [dict(zip(("question", "answer"), text.split("Answer: "), strict=True)) for text in rows]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    (tmp_path / "text.txt").write_text("".join(TEXTS))
    alone = evaluate(tmp_path, "alone")
    (tmp_path / "ranks").mkdir()
    both = run_ranks(evaluate, tmp_path, "both", folder=tmp_path / "ranks")
    assert both[0] == both[1]
    samples = (tmp_path / "alone" / "gsm8k" / "samples.jsonl").read_bytes()
    assert (tmp_path / "both" / "gsm8k" / "samples.jsonl").read_bytes() == samples
    assert samples.count(b"\n") == 30
    assert both[0]["gsm8k"] == alone["gsm8k"]
    for name in SUITES[1:]:
        for score, values in alone[name]["scores"].items():
            assert tuple(both[0][name]["scores"][score]) == pytest.approx(tuple(values), rel=1e-9)
