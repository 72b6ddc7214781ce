"""Arithmetic with exact answers: generated questions for training with a reward, and demonstrations to warm up on.

A question is written in characters, ``12*34=``, and answered by the number and the end of the text. Answers are checked without
executing anything. That makes this the smallest task on which reinforcement learning from a verifiable reward can be seen to
work.

Questions are *held out* by their operands: an unordered pair of numbers is either trained on or held out, whatever the operation
and the order, so that no answer to a held-out question is known from its mirror image.

Shapes: B questions, P tokens of a prompt, L tokens of a completion, A tokens of the longest answer with its end.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from mull.data.packing import PackedDataset, TokenizedExample, pack_tokenized_examples

CHARACTERS = "0123456789+-*="
OPERATIONS = "+-*"
HELD_OUT_EVERY = 8
"""On average, one pair of operands in this many is held out."""

MAX_DIGITS = 6
"""Longer numbers would make products that are too hard to compute in characters."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ArithmeticTask:
    """The kind of questions to ask. Token ``i < 10`` is the digit ``i``.

    Raises:
        ValueError: no or too many digits, unknown or repeated operations, or a negative seed.
    """

    digits: int = 2
    """Digits of the largest operand, 1 to 6. Operands are uniform over ``0 .. 10^digits - 1`` and have no leading zeros."""

    operations: str = OPERATIONS
    """Some of ``+``, ``-`` and ``*``, each drawn equally often. A difference may be negative."""

    seed: int = 0
    """Not negative. Which operands are held out does not depend on it."""

    def __post_init__(self) -> None:
        if not 1 <= self.digits <= MAX_DIGITS or self.seed < 0:
            raise ValueError(
                f"digits={self.digits} must lie in [1, {MAX_DIGITS}], and seed={self.seed} must not be negative."
            )
        operations = set(self.operations)
        if not operations or len(operations) < len(self.operations) or operations - {*OPERATIONS}:
            raise ValueError(f"operations={self.operations!r} must be one or more of {OPERATIONS!r}, each once.")

    @property
    def pad_id(self) -> int:
        """Token that pads prompts on the left and answers on the right."""
        return len(CHARACTERS)

    @property
    def eos_id(self) -> int:
        """Token that ends an answer."""
        return len(CHARACTERS) + 1

    @property
    def vocab_size(self) -> int:
        """The characters, padding and the end."""
        return len(CHARACTERS) + 2

    @property
    def prompt_length(self) -> int:
        """Tokens of the longest question, P."""
        return 2 * self.digits + 2

    @property
    def answer_length(self) -> int:
        """Tokens of the longest answer and its end, A: a product has twice the digits, a difference a sign."""
        return (2 * self.digits if "*" in self.operations else self.digits + 1) + 1

    def encode(self, text: str) -> list[int]:
        """Token ids of characters.

        Raises:
            ValueError: a character is not one of ``0123456789+-*=``.
        """
        if unknown := set(text) - set(CHARACTERS):
            raise ValueError(f"{text!r} contains {sorted(unknown)}: only the characters {CHARACTERS!r} can be encoded.")
        return [CHARACTERS.index(character) for character in text]

    def decode(self, ids: Sequence[int]) -> str:
        """Characters of token ids; ``_`` for padding and ``.`` for the end."""
        return "".join((CHARACTERS + "_.")[token] for token in ids)

    def prompts(self, number: int, rows: int, train: bool = True) -> dict[str, Tensor]:
        """Questions without their answers, a pure function of the task, the number and `train`.

        Args:
            number: Number of the batch, from 0.
            rows: Questions, B.
            train: Use the operands that are trained on, not the held-out ones.

        Returns:
            ``input_ids [B, P]``, questions padded on the left; ``attention_mask [B, P]`` int64, 0 at padding; ``answers [B,
            A]``, the right answers for `reward`: digits, the end, padding on the right.

        Raises:
            ValueError: `number` is negative or `rows` not positive.
        """
        if number < 0 or rows < 1:
            raise ValueError(f"number={number} must not be negative, and rows={rows} must be positive.")
        texts = self._draw((self.seed, number), rows, train)
        questions = [self.encode(question) for question, _ in texts]
        answers = [[*self.encode(answer), self.eos_id] for _, answer in texts]
        input_ids = torch.tensor([[self.pad_id] * (self.prompt_length - len(ids)) + ids for ids in questions])
        return {
            "input_ids": input_ids,
            "attention_mask": (input_ids != self.pad_id).long(),
            "answers": torch.tensor([ids + [self.pad_id] * (self.answer_length - len(ids)) for ids in answers]),
        }

    def reward(self, completions: Int[Tensor, "B L"], batch: Mapping[str, Tensor]) -> Float[Tensor, "B"]:
        """Grade completions: 1 for the exact answer followed by the end of the text, else 0.

        Args:
            completions: Generated tokens without the prompt. Tokens after the end of the text do not count.
            batch: Batch of `prompts`. Only its ``answers`` are read, one row per completion.

        Returns:
            float32, on the device of the completions. A leading zero, a missing end and ``-0`` are wrong.
        """
        answers = batch["answers"]
        n_missing = max(0, answers.shape[1] - completions.shape[1])
        given = torch.nn.functional.pad(completions, (0, n_missing), value=self.pad_id)[:, : answers.shape[1]]
        return ((given == answers) | (answers == self.pad_id)).all(1).float()

    def demonstrations(self, n_questions: int, length: int) -> PackedDataset:
        """Training questions, drawn with replacement, and their right answers, for a model that does not yet earn any reward.

        Examples are packed whole into rows of `length` tokens, and labels are -100 in the questions.

        Raises:
            ValueError: `n_questions` is not positive, or no question fits into a row.
        """
        if n_questions < 1:
            raise ValueError(f"n_questions={n_questions} must be positive.")
        # The seed has three numbers, those of `prompts` have two: no batch repeats these questions.
        texts = self._draw((self.seed, 0, 1), n_questions, train=True)
        examples = [TokenizedExample(self.encode(text), [*self.encode(answer), self.eos_id]) for text, answer in texts]
        return pack_tokenized_examples(examples, length=length, pad_id=self.pad_id, vocab_size=self.vocab_size)

    def _draw(self, seed: tuple[int, ...], rows: int, train: bool) -> list[tuple[str, str]]:
        """Questions and answers as text."""
        rng = np.random.default_rng(seed)
        operands = np.empty((0, 2), dtype=np.int64)
        while len(operands) < rows:
            drawn = rng.integers(10**self.digits, size=(2 * rows, 2))
            operands = np.concatenate([operands, drawn[_held_out(drawn) != train]])
        operations = rng.integers(len(self.operations), size=rows)
        return [
            _question(int(left), int(right), self.operations[operation])
            for (left, right), operation in zip(operands[:rows], operations, strict=True)
        ]


def _question(left: int, right: int, operation: str) -> tuple[str, str]:
    value = {"+": left + right, "-": left - right, "*": left * right}[operation]
    return f"{left}{operation}{right}=", str(value)


def _held_out(operands: np.ndarray) -> np.ndarray:
    """[B]: whether the pairs [B, 2] are held out, by a hash of the smaller and the larger number."""
    pair = operands.min(1).astype(np.uint64) * np.uint64(10**MAX_DIGITS) + operands.max(1).astype(np.uint64)
    # The finalizer of SplitMix64 (Steele et al. 2014), so that neighbouring numbers get independent hashes.
    pair = pair + np.uint64(0x9E3779B97F4A7C15)
    pair = (pair ^ (pair >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    pair = (pair ^ (pair >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    pair = pair ^ (pair >> np.uint64(31))
    return pair % np.uint64(HELD_OUT_EVERY) == 0


def character_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with the vocabulary of `ArithmeticTask`."""
    names = [*CHARACTERS, "<pad>", "<eos>"]
    characters = Tokenizer(models.WordLevel({name: index for index, name in enumerate(names)}))
    characters.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    characters.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=characters, pad_token="<pad>", eos_token="<eos>")
