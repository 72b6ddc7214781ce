"""How text becomes tokens, in training and in use; and a small byte-level BPE tokenizer that is trained on documents."""

import json
import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from mull.runtime.progress import Progress, tracked

logger = logging.getLogger(__name__)

END_OF_TEXT = "<|endoftext|>"
N_BYTES = 256
PROBE = "0"
"""A text that every tokenizer knows, even one of arithmetic."""

GROUP = 2_000_000
"""Characters that are tokenized at once."""

LONG_TEXT = 20_000_000
"""Characters of a text that takes many seconds, and cannot be cut without changing its tokens."""

INSIDE_A_TEXT = {"add_prefix_space": False, "prepend_scheme": "never", "strip_left": False}
"""Options of the tokenizers library by which the beginning of a text differs from its inside."""


class TextEncoder:
    """Turns texts into tokens. Training and use share it, so a model reads in use what it was trained on.

    * A text begins with what the tokenizer's template puts before it, such as ``<s>``; what the template appends is left out.
    * ``eos_token`` ends a text, in training only; in use the model writes it.
    * A prompt is tokenized alone. Its completion is tokenized as the inside of a text, without the space that some tokenizers
      put before a text, so that prompt and completion decode to the text that they are.
    * A text that spells a special token is text, with a warning: no document can end itself, and no prompt either. Chats, whose
      special tokens are meant, have to be given as tokens.

    Args:
        tokenizer: As a checkpoint has it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        whole, bare = tokenizer(PROBE)["input_ids"], tokenizer(PROBE, add_special_tokens=False)["input_ids"]
        places = (place for place in range(len(whole)) if whole[place : place + len(bare)] == bare)
        self.begin: list[int] = whole[: next(places, 0)]
        special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._special = {*special, *tokenizer.all_special_ids} - {tokenizer.unk_token_id}
        names = map(str, tokenizer.convert_ids_to_tokens(sorted(self._special)))
        self._names = [name for name in names if name[1:]]

    @property
    def end(self) -> int:
        """The token that ends a text.

        Raises:
            ValueError: the tokenizer has none.
        """
        end = self.tokenizer.eos_token_id
        if end is None:
            raise ValueError("The tokenizer has no eos_token, which separates documents: set tokenizer.eos_token.")
        return int(end)

    def ends(self, stated: int | Sequence[int] | None) -> list[int]:
        """The tokens that end a text in use.

        Args:
            stated: ``eos_token_id`` of a generation config. If it lacks the token that ends texts in training, the token is
                added, and what is no special token leaves: texts hold it, so it ends none.
        """
        given = [stated] if isinstance(stated, int) else list(stated or ())
        end = self.tokenizer.eos_token_id
        return given if end is None or end in given else [end, *(token for token in given if token in self._special)]

    def prompts(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokens of texts that a model continues."""
        return [self.begin + ids for ids in self._encoded(texts)]

    def documents(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokens of whole texts, with their ends.

        Raises:
            ValueError: the tokenizer has no ``eos_token``.
        """
        end = self.end
        return [[*ids, end] for ids in self.prompts(texts)]

    def examples(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[list[int], list[int]]]:
        """Tokens of prompts, and of the completions that follow them, with their ends.

        Raises:
            ValueError: the tokenizer has no ``eos_token``, or is not one of the tokenizers library.
        """
        end = self.end
        prompts = self.prompts([prompt for prompt, _ in pairs])
        completions = self._encoded([completion for _, completion in pairs], inside=True)
        for index, (prompt, completion) in enumerate(pairs):
            if not prompt:
                [completions[index]] = self._encoded([completion])
        return [(prompt, [*completion, end]) for prompt, completion in zip(prompts, completions, strict=True)]

    def _encoded(self, texts: Sequence[str], inside: bool = False) -> list[list[int]]:
        if not texts:
            return []
        for text in texts:
            if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
                raise ValueError("A text has bytes that are not UTF-8 (lone surrogates), so it cannot be tokenized.")
        spelled = [found[0] for text in texts if (found := self._spelled.search(text))]
        if spelled:
            message = "%d of %d texts spell a special token, such as %s, and it is read as text."
            logger.warning(message, len(spelled), len(texts), spelled[0])
        tokenizer = self._inside if inside else self.tokenizer
        options = {"add_special_tokens": False, "split_special_tokens": True}
        encoded: list[list[int]] = []
        with Progress(len(texts), "text", label="tokenizing", patient=True) as progress:
            for group in _groups(texts):
                if len(group[0]) > LONG_TEXT:
                    progress.say(f"Tokenizing a text of {len(group[0]) / 1e6:,.0f} million characters.")
                encoded += tokenizer(group, **options)["input_ids"]
                progress.advance(len(group))
        for index, ids in enumerate(encoded):
            if self._special.isdisjoint(ids):
                continue
            # Unigram models, and others that know whole words, find special tokens in their vocabulary.
            first, *others = self._seams.split(texts[index])
            pieces = [*self._encoded([first], inside), *self._encoded(others, inside=True)] if others else []
            if not others and len(parts := self._seams.split(self._normalised(texts[index]))) > 1:
                pieces = self._encoded(parts, inside=True)
            if pieces:
                encoded[index] = [token for piece in pieces for token in piece]
        return encoded

    def _normalised(self, text: str) -> str:
        """The text as the tokenizer sees it: normalizers turn lookalikes, such as wide letters, into special tokens."""
        normalizer = self.tokenizer.backend_tokenizer.normalizer if self.tokenizer.is_fast else None
        return text if normalizer is None else str(normalizer.normalize_str(text))

    @cached_property
    def _spelled(self) -> re.Pattern[str]:
        """Finds special tokens, except those of a single character, which text may well hold."""
        return re.compile("|".join(map(re.escape, self._names)) or "(?!)")

    @cached_property
    def _seams(self) -> re.Pattern[str]:
        """Finds the places between the first and the second character of these."""
        seams = (f"(?<={re.escape(name[0])})(?={re.escape(name[1:])})" for name in self._names)
        return re.compile("|".join(seams) or "(?!)")

    @cached_property
    def _inside(self) -> PreTrainedTokenizerBase:
        """The same tokenizer without what it does at the beginning of a text."""
        if not self.tokenizer.is_fast:
            raise ValueError(
                f"{type(self.tokenizer).__name__} cannot continue a text, because it is not one of the tokenizers library: "
                "load a tokenizer that has a tokenizer.json."
            )
        backend = json.loads(self.tokenizer.backend_tokenizer.to_str())
        backend |= {name: _inside(backend[name]) for name in ("normalizer", "pre_tokenizer")}
        backend |= {"truncation": None, "padding": None}
        return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(backend)))


def _groups(texts: Sequence[str]) -> Iterator[list[str]]:
    """Texts one after the other, as many at once as a tokenizer takes a second or so for."""
    group: list[str] = []
    size = 0
    for text in texts:
        if group and size + len(text) > GROUP:
            yield group
            group, size = [], 0
        group.append(text)
        size += len(text)
    yield group


def _inside(part: Any) -> Any:
    """A part of a tokenizer's JSON, changed to `INSIDE_A_TEXT`."""
    if isinstance(part, list):
        return [_inside(one) for one in part]
    if not isinstance(part, dict):
        return part
    if part.get("type") == "Prepend":
        return {"type": "Sequence", "normalizers": []}
    return {name: INSIDE_A_TEXT.get(name, _inside(value)) for name, value in part.items()}


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Learn a byte-level BPE vocabulary from documents.

    All 256 bytes are tokens, so any text is encoded without unknown tokens and decoded exactly. Equal texts give equal
    vocabularies.

    Args:
        texts: Documents to count pairs in.
        vocab_size: Upper limit of the vocabulary, including the 256 bytes and ``<|endoftext|>``. A small corpus may have too few
            pairs to reach it, so take a model's vocabulary from ``len(tokenizer)``.

    Returns:
        A tokenizer that adds no special tokens unless asked. ``<|endoftext|>`` is token 0, both ``eos_token`` and ``pad_token``.

    Raises:
        ValueError: `vocab_size` is too small for the bytes and ``<|endoftext|>``.

    Source:
        Byte-level BPE of GPT-2, as the tokenizers library implements it.
    """
    if vocab_size < N_BYTES + 1:
        raise ValueError(
            f"vocab_size={vocab_size} must be at least {N_BYTES + 1}, for {N_BYTES} bytes and {END_OF_TEXT}."
        )
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(tracked(texts, "text", "training a tokenizer"), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT)
