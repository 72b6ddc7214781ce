"""Packing loses no token, keeps documents apart and supervises exactly the tokens that have a past in their own document."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mull.data.packing import pack_texts, pack_tokens
from mull.data.tokenizer import train_tokenizer

PAD = 99


def brute_force(documents: list[list[int]], length: int) -> list[list[tuple[int, int, int]]]:
    """One token at a time: (input id, label, position)."""
    rows: list[list[tuple[int, int, int]]] = [[]]
    for document in documents:
        if len(document) < 2:
            continue
        position = 0
        for token in document:
            if len(rows[-1]) == length:
                rows.append([])
                position = 0
            rows[-1].append((token, token if position else -100, position))
            position += 1
    rows[-1] += [(PAD, -100, position) for position in range(length - len(rows[-1]))]
    return [row for row in rows if any(label != -100 for _, label, _ in row)]


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(0, 50), max_size=12), max_size=8), st.integers(2, 9))
def test_rows_equal_packing_token_by_token(documents: list[list[int]], length: int) -> None:
    if max(map(len, documents), default=0) < 2:
        with pytest.raises(ValueError, match="no document has at least 2 tokens"):
            pack_tokens(documents, length=length, pad_id=PAD)
        return
    packed = pack_tokens(documents, length=length, pad_id=PAD)
    rows = torch.stack([packed.input_ids, packed.labels, packed.position_ids], dim=-1).tolist()
    assert [[tuple(token) for token in row] for row in rows] == brute_force(documents, length)


def test_a_hand_written_example() -> None:
    packed = pack_tokens([[1, 2, 3], [4], [5, 6, 7, 8]], length=5, pad_id=0)
    assert packed.input_ids.tolist() == [[1, 2, 3, 5, 6], [7, 8, 0, 0, 0]]
    assert packed.labels.tolist() == [[-100, 2, 3, -100, 6], [-100, 8, -100, -100, -100]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 0, 1], [0, 1, 0, 1, 2]]


def test_in_order_gives_every_row_once() -> None:
    packed = pack_tokens([list(range(70))], length=10, pad_id=PAD)
    batches = list(packed.in_order(3))
    assert [len(batch["input_ids"]) for batch in batches] == [3, 3, 1]
    for name in ("input_ids", "labels", "position_ids"):
        assert torch.equal(torch.cat([batch[name] for batch in batches]), getattr(packed, name))
    with pytest.raises(ValueError, match="batch_size=0"):
        packed.in_order(0)


def test_packed_texts_end_in_eos_and_decode_to_the_texts() -> None:
    texts = ["def f():\n    return 1\n", "", "x = 'é'\n" * 9]
    tokenizer = train_tokenizer(texts, 280)
    packed = pack_texts(texts, tokenizer, length=16, vocab_size=len(tokenizer))
    eos = tokenizer.eos_token
    stream = tokenizer.decode(packed.input_ids.flatten().tolist())
    assert stream.rstrip(eos) == f"{texts[0]}{eos}{texts[2]}".rstrip(eos)


def test_bytes_per_token_turns_the_uniform_loss_into_bits_per_byte() -> None:
    # Bytes as tokens, coded uniformly over 256 symbols: 8 bits per byte, and 8 more per document for its end.
    texts = ["abcd" * 10, "é" * 20]
    packed = pack_texts(texts, train_tokenizer(["a"], 257), length=8)
    assert packed.bytes_per_token is not None
    loss = math.log(256)
    assert loss / (math.log(2) * packed.bytes_per_token) == pytest.approx(8 * (80 + 2) / 80)


def test_mistakes_are_named() -> None:
    tokenizer = train_tokenizer(["a"], 257)
    with pytest.raises(ValueError, match="Token 7 is outside the model's vocabulary of 7 tokens"):
        pack_tokens([[1, 7]], length=4, pad_id=0, vocab_size=7)
    with pytest.raises(ValueError, match="length=1 must be at least 2"):
        pack_tokens([[1, 2]], length=1, pad_id=0)
    with pytest.raises(ValueError, match="dataset is empty"):
        pack_texts(["", ""], tokenizer, length=4)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no eos_token"):
        pack_texts(["ab"], tokenizer, length=4)
