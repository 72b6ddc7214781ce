"""Packing loses no token, keeps documents apart and supervises exactly the tokens that have a past in their own document."""

import logging
import math
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mull.data.packing import TokenizedExample, pack_examples, pack_texts, pack_tokenized_examples, pack_tokens
from mull.data.sampler import ShuffledBatches
from mull.data.tasks import Example
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


class Row(NamedTuple):
    """One row as a list of its examples, written token by token."""

    examples: list[TokenizedExample]
    n_used: int


def brute_force_rows(examples: list[TokenizedExample], length: int) -> list[Row]:
    """Best fit by looking at every row."""
    rows: list[Row] = []
    for example in examples:
        size = len(example.prompt) + len(example.completion)
        if size > length or not example.completion or size < 2:
            continue
        fitting = [i for i, row in enumerate(rows) if row.n_used + size <= length]
        best = max(fitting, key=lambda i: (rows[i].n_used, -i), default=None)
        if best is None:
            rows.append(Row([example], size))
        else:
            rows[best] = Row([*rows[best].examples, example], rows[best].n_used + size)
    return rows


def written(row: Row, length: int) -> list[tuple[int, int, int, float]]:
    """(input id, label, position, reward) of each token."""
    tokens = []
    for prompt, completion, outcome, _ in row.examples:
        for position, token in enumerate([*prompt, *completion]):
            trained = position > 0 and position >= len(prompt)
            tokens.append((token, token if trained else -100, position, outcome))
    return tokens + [(PAD, -100, position, 0.0) for position in range(length - len(tokens))]


TOKENS = st.lists(st.integers(0, 50), max_size=7)
EXAMPLES = st.lists(st.builds(TokenizedExample, TOKENS, TOKENS, st.sampled_from([0.0, 0.25, 1.0])), max_size=9)


@settings(deadline=None)
@given(EXAMPLES, st.integers(2, 12))
def test_examples_are_whole_masked_and_rewarded(examples: list[TokenizedExample], length: int) -> None:
    expected = [written(row, length) for row in brute_force_rows(examples, length)]
    if not expected:
        with pytest.raises(ValueError, match="No example fits into a row"):
            pack_tokenized_examples(examples, length=length, pad_id=PAD)
        return
    packed = pack_tokenized_examples(examples, length=length, pad_id=PAD)
    assert packed.rewards is not None
    columns = [packed.input_ids.double(), packed.labels.double(), packed.position_ids.double(), packed.rewards.double()]
    assert [[tuple(token) for token in row] for row in torch.stack(columns, dim=-1).tolist()] == expected
    assert packed.rewards.dtype == torch.float32
    assert {tensor.dtype for tensor in (packed.input_ids, packed.labels, packed.position_ids)} == {torch.int64}


def test_a_hand_written_row_of_examples() -> None:
    examples = [
        TokenizedExample([1, 2], [3, 4], 1.0),
        TokenizedExample([5, 6, 7], [8, 9], 0.0),  # does not fit after the first
        TokenizedExample([], [10, 11], 0.5),  # fits after both, and fills the second row more
    ]
    packed = pack_tokenized_examples(examples, length=7, pad_id=0)
    assert packed.input_ids.tolist() == [[1, 2, 3, 4, 0, 0, 0], [5, 6, 7, 8, 9, 10, 11]]
    assert packed.labels.tolist() == [[-100, -100, 3, 4, -100, -100, -100], [-100, -100, -100, 8, 9, -100, 11]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 2], [0, 1, 2, 3, 4, 0, 1]]
    assert packed.rewards is not None
    assert packed.rewards.tolist() == [[1, 1, 1, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0.5, 0.5]]


def test_rewards_reach_the_batches() -> None:
    examples = [TokenizedExample([i], [i], i / 10) for i in range(10)]
    packed = pack_tokenized_examples(examples, length=2, pad_id=PAD)
    batches = [*packed.in_order(4), ShuffledBatches(packed, 5)(3)]
    for batch in batches:
        assert torch.equal(batch["rewards"], batch["input_ids"] / 10)
    without = pack_tokenized_examples([TokenizedExample([1], [2])], length=2, pad_id=PAD)
    assert without.rewards is None
    assert "rewards" not in without.rows(torch.tensor([0]))


def test_a_tokenized_example_is_its_prompt_and_its_completion_apart() -> None:
    tokenizer = train_tokenizer(["abab" * 50], 300)
    example = Example("a", "aba", "bab", 1.0)
    packed = pack_examples([example], tokenizer, length=64, vocab_size=len(tokenizer))
    prompt, completion = (tokenizer(text)["input_ids"] for text in (example.prompt, example.completion))
    n_tokens = len(prompt) + len(completion) + 1
    assert packed.input_ids[0, :n_tokens].tolist() == [*prompt, *completion, tokenizer.eos_token_id]
    assert prompt + completion != tokenizer(example.prompt + example.completion)["input_ids"], "the texts should tell"
    assert packed.labels[0, len(prompt) : n_tokens].tolist() == [*completion, tokenizer.eos_token_id]
    assert (packed.labels != -100).sum() == len(completion) + 1
    assert packed.bytes_per_token == pytest.approx(3 / (len(completion) + 1))


def test_long_examples_are_left_out_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = train_tokenizer(["a"], 257)
    examples = [Example("long", "a" * 6, "é" * 2), Example("fits", "a" * 6, "b")]
    with caplog.at_level(logging.WARNING):
        packed = pack_examples(examples, tokenizer, length=8)
    assert "1 of 2 examples are longer than length=8 and dropped" in caplog.text
    assert tokenizer.decode(packed.input_ids[0]) == "a" * 6 + "b" + tokenizer.eos_token
    assert packed.bytes_per_token == 1 / 2, "dropped examples do not count"
    with pytest.raises(ValueError, match="No example fits into a row: the shortest of 1 has 11 tokens, length=8"):
        pack_examples(examples[:1], tokenizer, length=8)


def test_mistakes_in_examples_are_named() -> None:
    tokenizer = train_tokenizer(["a"], 257)
    with pytest.raises(ValueError, match="1 of 2 examples have an outcome"):
        pack_examples([Example("a", "b", "c", 0.0), Example("a", "b", "c")], tokenizer, length=8)
    with pytest.raises(ValueError, match="there are none with a target"):
        pack_examples([], tokenizer, length=8)
    with pytest.raises(ValueError, match="length=1 must be at least 2"):
        pack_examples([Example("a", "b", "c")], tokenizer, length=1)
    with pytest.raises(ValueError, match="Token 7 is outside the model's vocabulary of 7 tokens"):
        pack_tokenized_examples([TokenizedExample([1], [7])], length=4, pad_id=0, vocab_size=7)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no eos_token"):
        pack_examples([Example("a", "b", "c")], tokenizer, length=8)
