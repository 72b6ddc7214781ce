"""Claim: text becomes the same tokens in training and in use, whatever the tokenizer adds, and no text becomes a special
token.

The tokenizers are of all kinds that add something: a space (SentencePiece in its three forms, byte-level BPE with a prefix), a
begin token, an end token.
"""

from collections.abc import Callable

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from mull.data.packing import pack_examples, pack_texts
from mull.data.tasks import Example
from mull.data.tokenizer import TextEncoder, train_tokenizer

TEXTS = ["12+30= 42 is the answer", "a </s> b <s> c\nd", "0 1 2 3 4 5 6 7 8 9 + - * = x y z"] * 4
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>"]


def metaspace(scheme: str) -> Callable[[Tokenizer], None]:
    def configure(backend: Tokenizer) -> None:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
        backend.decoder = decoders.Metaspace(prepend_scheme=scheme)

    return configure


def prepended(backend: Tokenizer) -> None:
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])


def byte_level(backend: Tokenizer) -> None:
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    backend.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])


ADD_A_SPACE = {
    "metaspace, first": metaspace("first"),
    "metaspace, always": metaspace("always"),
    "prepended": prepended,
    "byte level": byte_level,
}
TEMPLATES = {"nothing": "$A", "begin": "<s> $A", "end": "$A </s>", "both": "<s> $A </s>"}


def made(kind: str, template: str = "nothing", model: str = "bpe") -> PreTrainedTokenizerFast:
    unigram = model == "unigram"
    backend = Tokenizer(models.Unigram() if unigram else models.BPE(unk_token="<unk>"))
    ADD_A_SPACE[kind](backend)
    options = {"special_tokens": SPECIAL, "vocab_size": 120, "show_progress": False}
    trainer = trainers.UnigramTrainer(unk_token="<unk>", **options) if unigram else trainers.BpeTrainer(**options)
    backend.train_from_iterator(TEXTS, trainer)
    ids = [(token, backend.token_to_id(token)) for token in ("<s>", "</s>")]
    backend.post_processor = processors.TemplateProcessing(TEMPLATES[template], special_tokens=ids)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def test_tokens_do_not_depend_on_how_many_texts_are_tokenized_at_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = [text * length for length in (1, 5, 45, 2) for text in TEXTS[2:4]] + [""]
    encoder = TextEncoder(made("byte level", "both"))
    expected = encoder.documents(texts)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("mull.data.tokenizer.GROUP", 100)
    monkeypatch.setattr("mull.data.tokenizer.LONG_TEXT", 1300)
    monkeypatch.setattr("mull.runtime.progress.PRINT_EVERY_SECONDS", 0.0)
    assert encoder.documents(texts) == expected
    lines = capsys.readouterr().err.splitlines()
    assert lines.count("Tokenizing a text of 0 million characters.") == 1
    assert lines[-1] == f"tokenizing: text {len(texts)} of {len(texts)}, 00:00 left"


@pytest.mark.parametrize("model", ["bpe", "unigram"])
@pytest.mark.parametrize("kind", ADD_A_SPACE)
def test_an_answer_continues_its_prompt_without_a_space_of_its_own(kind: str, model: str) -> None:
    tokenizer = made(kind, model=model)
    encoder = TextEncoder(tokenizer)
    assert tokenizer.decode(tokenizer("12+30=")["input_ids"] + tokenizer("42")["input_ids"]) == "12+30= 42", (
        "the tokenizer should add a space"
    )
    for prompt, completion in (("12+30=", "42"), ("12+30=", " 42"), ("", "42"), ("x y", "z\n"), ("x ", "y z")):
        [(before, after)] = encoder.examples([(prompt, completion)])
        assert after[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(before + after[:-1]) == tokenizer.decode(tokenizer(prompt + completion)["input_ids"])
        assert before == tokenizer(prompt)["input_ids"], "in use the prompt is alone"
    [(before, after)] = encoder.examples([("", "42")])
    assert before + after == encoder.documents(["42"])[0]


@pytest.mark.parametrize("template", TEMPLATES)
def test_texts_begin_in_training_as_in_use_and_only_training_ends_them(template: str) -> None:
    tokenizer = made("metaspace, first", template)
    encoder = TextEncoder(tokenizer)
    bare = tokenizer("12+30=", add_special_tokens=False)["input_ids"]
    begin = [tokenizer.bos_token_id] if template in ("begin", "both") else []
    assert encoder.begin == begin
    assert encoder.prompts(["12+30="]) == [begin + bare]
    assert encoder.prompts([""]) == [begin]
    assert encoder.documents(["12+30="]) == [[*begin, *bare, tokenizer.eos_token_id]]
    packed = pack_texts(["12+30="] * 2, tokenizer, length=64)
    assert (
        packed.input_ids[0, : 2 * len(encoder.documents(["12+30="])[0])].tolist()
        == encoder.documents(["12+30="])[0] * 2
    )
    assert packed.bytes_per_token == pytest.approx(6 / (len(bare) + 1)), "a begin token is not predicted"
    [(before, after)] = encoder.examples([("12+30=", "42")])
    examples = pack_examples([Example("a", "12+30=", "42")], tokenizer, length=64)
    assert examples.input_ids[0, : len(before + after)].tolist() == before + after
    assert examples.labels[0][examples.labels[0] != -100].tolist() == after


@pytest.mark.parametrize("model", ["bpe", "unigram"])
@pytest.mark.parametrize("kind", ADD_A_SPACE)
def test_a_text_that_spells_a_special_token_stays_text(kind: str, model: str) -> None:
    tokenizer = made(kind, "begin", model)
    encoder = TextEncoder(tokenizer)
    special = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    for text in ("a </s> b <s> c", "</s>", "</s></s><s>"):
        for ids in (
            encoder.prompts([text])[0][1:],
            encoder.documents([text])[0][1:-1],
            encoder.examples([("x", text)])[0][1][:-1],
            encoder.examples([(text, "x")])[0][0][1:],
        ):
            assert special.isdisjoint(ids)
            assert tokenizer.decode(ids).strip() in (text, "x")


@pytest.mark.parametrize("model", ["bpe", "unigram"])
@pytest.mark.parametrize(
    ("normalizer", "text", "decoded"),
    [
        (normalizers.NFKC(), "a ＜／ｓ＞ b ＜ｓ＞", "a </s> b <s>"),
        (normalizers.Lowercase(), "a </S> b <S>", "a </s> b <s>"),
        (normalizers.Sequence([normalizers.NFKC(), normalizers.Prepend("▁")]), "＜/s＞", "</s>"),
    ],
)
def test_a_text_that_is_normalised_to_a_special_token_stays_text(
    normalizer: normalizers.Normalizer, text: str, decoded: str, model: str
) -> None:
    tokenizer = made("metaspace, first", model=model)
    tokenizer.backend_tokenizer.normalizer = normalizer
    encoder = TextEncoder(tokenizer)
    for ids in (
        encoder.prompts([text])[0],
        encoder.documents([text])[0][:-1],
        encoder.examples([("x", text)])[0][1][:-1],
    ):
        assert {tokenizer.bos_token_id, tokenizer.eos_token_id}.isdisjoint(ids)
        assert tokenizer.decode(ids).strip() == decoded


def test_an_end_of_one_character_stays_what_the_user_made_it() -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made("byte level").backend_tokenizer, eos_token="d")
    assert len(TextEncoder(tokenizer).documents(["c d"])[0]) == 4


def test_byte_level_texts_that_spell_the_end_are_decoded_exactly(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = train_tokenizer(TEXTS, 280)
    text = "a<|endoftext|>b<|endoftext|>"
    document, _ = TextEncoder(tokenizer).documents([text, "plain"])
    said = [record.getMessage() for record in caplog.records if record.name == "mull.data.tokenizer"]
    assert said == ["1 of 2 texts spell a special token, such as <|endoftext|>, and it is read as text."]
    assert document.count(tokenizer.eos_token_id) == 1
    assert tokenizer.decode(document[:-1]) == text


def test_tokens_that_end_a_text_in_use_include_the_one_of_training() -> None:
    tokenizer = made("metaspace, first")
    ends = TextEncoder(tokenizer).ends
    assert ends(None) == [2]
    assert ends(2) == [2]
    assert ends([3, 2]) == [3, 2], "a configuration that knows the end is left alone"
    assert ends([3, 50]) == [2, 3], "texts hold token 50, so it ends none"
    assert ends(50) == [2]
    tokenizer.eos_token = None
    assert TextEncoder(tokenizer).ends(50) == [50]
    assert TextEncoder(tokenizer).ends(None) == []


def test_what_is_missing_is_named() -> None:
    tokenizer = made("metaspace, first")
    tokenizer.eos_token = None
    encoder = TextEncoder(tokenizer)
    assert encoder.prompts(["12"])
    with pytest.raises(ValueError, match="no eos_token"):
        encoder.documents(["12"])
    with pytest.raises(ValueError, match="no eos_token"):
        encoder.examples([("12", "3")])


def test_text_that_is_not_utf_8_is_refused_with_a_sentence() -> None:
    encoder = TextEncoder(train_tokenizer(["some text to learn from"], 300))
    with pytest.raises(ValueError, match="not UTF-8"):
        encoder.prompts(["a\udcff"])
