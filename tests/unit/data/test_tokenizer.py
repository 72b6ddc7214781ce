"""The tokenizer round-trips any text exactly, depends on the documents alone, and survives saving."""

from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from mull.data.tokenizer import END_OF_TEXT, train_tokenizer

CODE = ["def area(width, height):\n    return width * height\n" * 5, "for i in range(10):\n\tprint(i)\n" * 5]
TOKENIZER = train_tokenizer(CODE, 290)


@given(st.text())
@example("a .  b , c 's n't\r\n\t\0")
@example(f"x{END_OF_TEXT} y")
@example("e\u0301 \u2028 \ufeff \U0001f9d1\u200d\U0001f4bb")
def test_decoding_undoes_encoding(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER(text)["input_ids"]) == text


def test_frequent_strings_become_tokens() -> None:
    text = CODE[0]
    assert len(TOKENIZER) == 290
    assert len(TOKENIZER(text)["input_ids"]) < len(text.encode()) / 2


def test_one_token_separates_documents_and_pads() -> None:
    assert TOKENIZER.eos_token_id == TOKENIZER.pad_token_id == TOKENIZER.convert_tokens_to_ids(END_OF_TEXT) == 0
    assert TOKENIZER("")["input_ids"] == [], "no special token is added to a text"


def test_equal_documents_give_an_equal_vocabulary() -> None:
    again = train_tokenizer(iter(CODE), 290)
    assert again.get_vocab() == TOKENIZER.get_vocab()
    assert train_tokenizer(CODE[:1], 290).get_vocab() != TOKENIZER.get_vocab()


def test_saved_and_loaded_is_the_same_tokenizer(tmp_path: Path) -> None:
    TOKENIZER.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "def  é(x) :\n\treturn 'n' , x\n" + END_OF_TEXT
    assert loaded(text)["input_ids"] == TOKENIZER(text)["input_ids"]
    assert loaded.decode(loaded(text)["input_ids"]) == text
    assert (loaded.eos_token, loaded.pad_token) == (END_OF_TEXT, END_OF_TEXT)


def test_a_vocabulary_without_room_for_the_bytes_is_refused() -> None:
    with pytest.raises(ValueError, match="vocab_size=256 must be at least 257"):
        train_tokenizer(CODE, 256)
