"""Claim: rows of a label file are its questions, answers and routes, and what is left out is said."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from mull.data.arithmetic import character_tokenizer
from mull.data.route_labels import RouteLabel, load_route_rows

SPENT: dict[str, Any] = {
    "loss": 1.0,
    "base_loss": 1.0,
    "simulations": 1,
    "evaluated": 1,
    "layers": 1,
    "layers_unshared": 1,
}


def label(index: int, prompt: str, answer: str, route: tuple[int, ...], correct: bool = True) -> dict[str, Any]:
    facts = {"index": index, "prompt": prompt, "answer": answer, "route": route, "visits": sum(route)}
    return RouteLabel.model_validate(facts | SPENT | {"correct": correct, "base_correct": False}).model_dump()


def write(path: Path, labels: list[dict[str, Any]], end: bool = False) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in [{"settings": {"end": end}}, *labels]))
    return path


LABELS = [
    label(0, "12+3=", "15", (1, 0, 1)),
    label(1, "7*8=", "56", (1, 1, 1), correct=False),
    label(2, "40-2=", "38", (1, 2, 1)),
    label(3, "1234567+1234567=", "2469134", (1, 1, 1)),
    label(4, "1+1=", "2", (0, 1, 1)),
]


@pytest.mark.parametrize("end", [False, True])
def test_rows_are_questions_with_answers_and_routes(
    end: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = character_tokenizer()
    with caplog.at_level(logging.WARNING):
        rows = load_route_rows([write(tmp_path / "labels.jsonl", LABELS, end)], tokenizer, length=10)
    assert "2 of 5 labels are left out: 1 have no correct route, 1 are longer than length=10" in caplog.text
    assert rows.route_labels.tolist() == [[1, 0, 1], [1, 2, 1], [0, 1, 1]]
    batch = rows.rows(torch.tensor([2, 0]))
    texts = ["1+1=2", "12+3=15"]
    for row, text in enumerate(texts):
        n_tokens, n_prompt = len(text) + end, text.index("=") + 1
        ids, labels = batch["input_ids"][row], batch["labels"][row]
        assert tokenizer.decode(ids[: len(text)]).replace(" ", "") == text
        assert batch["attention_mask"][row].tolist() == [1] * n_tokens + [0] * (7 + end - n_tokens)
        assert (labels[:n_prompt] == -100).all()
        assert torch.equal(labels[n_prompt:n_tokens], ids[n_prompt:n_tokens])
        assert (labels[n_tokens:] == -100).all()
        assert not end or ids[n_tokens - 1] == tokenizer.eos_token_id
    assert rows.rows(torch.tensor([2]))["input_ids"].shape == (1, 5 + end), "as long as the longest row of the batch"
    assert batch["route_labels"].tolist() == [[0, 1, 1], [1, 0, 1]]


def test_a_split_is_a_partition_by_seed(tmp_path: Path) -> None:
    many = [label(n, f"{n}+{n}=", str(2 * n), (1, n % 3, 1)) for n in range(40)]
    rows = load_route_rows([write(tmp_path / "labels.jsonl", many)], character_tokenizer(), length=20)
    kept, others = rows.split(0.25, seed=1)
    assert (len(kept), len(others)) == (30, 10)
    both = torch.cat([kept.input_ids, others.input_ids]).tolist()
    assert sorted(both) == sorted(rows.input_ids.tolist())
    assert torch.equal(rows.split(0.25, 1)[1].input_ids, others.input_ids)
    assert not torch.equal(rows.split(0.25, 2)[1].input_ids, others.input_ids)
    assert len(rows.split(0.0, 0)[1]) == 0


def test_files_that_fit_nothing_are_refused(tmp_path: Path) -> None:
    tokenizer = character_tokenizer()
    wrong = write(tmp_path / "wrong.jsonl", [LABELS[1]])
    with pytest.raises(ValueError, match="Of 1 labels in .*, 0 have a correct route"):
        load_route_rows([wrong], tokenizer, length=10)
    other = write(tmp_path / "other.jsonl", [label(0, "1+2=", "3", (1, 1, 1, 1))])
    with pytest.raises(ValueError, match=r"through \[3, 4\] layers"):
        load_route_rows([write(tmp_path / "labels.jsonl", LABELS), other], tokenizer, length=10)
    with pytest.raises(ValueError, match="outside the model's vocabulary"):
        load_route_rows([other], tokenizer, length=10, vocab_size=3)
