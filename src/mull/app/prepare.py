"""What a recipe needs before anything is trained: its data, packed; its tokenizer; its model, with or without weights."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from mull.app.build import backbone_config
from mull.app.recipe import Recipe
from mull.data.arithmetic import CHARACTERS, ArithmeticTask, character_tokenizer
from mull.data.corpus import load_stdlib, subsample
from mull.data.packing import PackedDataset, pack_examples, pack_texts
from mull.data.sampler import ShuffledBatches
from mull.data.sources import Document, load_documents
from mull.data.tasks import Example, load_examples, pairs
from mull.data.tokenizer import train_tokenizer
from mull.runtime.distributed import rank
from mull.training.loop import Batches
from mull.training.objectives.base import Batch

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prepared:
    """The data of a run, and its tokenizer."""

    tokenizer: PreTrainedTokenizerBase
    batches: Batches
    """What is trained on."""

    train: PackedDataset | None
    """The rows of `batches`; None where these are generated."""

    held_out: PackedDataset | None
    """What the model is evaluated on, where there is any."""

    outcomes: PackedDataset | None
    """Right and wrong answers, for a value head."""

    aligned: PackedDataset | None
    """What gradients are compared with."""


def prepare(recipe: Recipe) -> Prepared:
    """Read and pack the data of a recipe, and load its tokenizer or train one.

    Raises:
        ValueError: data and tokenizer do not fit the model's vocabulary or positions, or there is nothing to train on.
        FileNotFoundError: a path of the data does not exist.
        OSError: no checkpoint where one is named.
        RuntimeError: a package is missing.
    """
    data = recipe.data
    if data.arithmetic is not None:
        return _prepare_arithmetic(recipe)
    items = _read(recipe, data.paths, data.split)
    held_out = _read_held_out(recipe)
    if data.max_bytes is not None:
        items = subsample([item for item in items if isinstance(item, Document)], data.max_bytes)
    if recipe.model.checkpoint is not None:
        tokenizer = _load_tokenizer(recipe.model.checkpoint)
    else:
        tokenizer = train_tokenizer((_text(item) for item in items), data.vocab_size)
    config = backbone_config(recipe.model, tokenizer).get_text_config()

    def pack(chosen: Sequence[Document | Example]) -> PackedDataset:
        return _pack(chosen, tokenizer, data.length, config)

    outcomes, aligned = None, None
    if recipe.critic is not None:
        stage = recipe.critic.pretrain
        found = pairs(
            [item for item in items if isinstance(item, Example)],
            per_problem=stage.per_problem,
            corrupt=stage.corrupt,
            seed=recipe.train.seed,
        )
        outcomes = pack([answer for pair in found for answer in pair])
    if recipe.gradient is not None and recipe.gradient.paths is not None:
        aligned = pack(_right(_read(recipe, recipe.gradient.paths, data.split)))
    packed = pack(_right(items))
    batches = ShuffledBatches(packed, data.batch_size, recipe.train.seed)
    return Prepared(tokenizer, batches, packed, pack(_right(held_out)) if held_out else None, outcomes, aligned)


def _prepare_arithmetic(recipe: Recipe) -> Prepared:
    """Questions in characters; a checkpoint must read them as the task writes them."""
    task = arithmetic_task(recipe)
    tokenizer: PreTrainedTokenizerBase = character_tokenizer()
    if recipe.model.checkpoint is not None:
        tokenizer = _load_tokenizer(recipe.model.checkpoint)
        expected = (task.encode(CHARACTERS), task.eos_id, task.pad_id)
        if (tokenizer(CHARACTERS)["input_ids"], tokenizer.eos_token_id, tokenizer.pad_token_id) != expected:
            raise ValueError(
                f"The tokenizer of {recipe.model.checkpoint} does not read arithmetic character by character: start from a model "
                "that was trained with data.format=arithmetic."
            )
    if recipe.grpo is not None:

        def batches(number: int) -> Batch:
            return task.prompts(number, recipe.data.batch_size)

        return Prepared(tokenizer, batches, None, None, None, None)
    assert recipe.data.arithmetic is not None
    packed = task.demonstrations(recipe.data.arithmetic.questions, recipe.data.length)
    shuffled = ShuffledBatches(packed, recipe.data.batch_size, recipe.train.seed)
    return Prepared(tokenizer, shuffled, packed, None, None, None)


def arithmetic_task(recipe: Recipe) -> ArithmeticTask:
    """The task of a recipe whose data are arithmetic."""
    section = recipe.data.arithmetic
    assert section is not None
    return ArithmeticTask(digits=section.digits, operations=section.operations, seed=recipe.train.seed)


def _load_tokenizer(checkpoint: str) -> PreTrainedTokenizerBase:
    AutoConfig.from_pretrained(checkpoint)  # says more clearly what is wrong with a place that is no checkpoint
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(checkpoint)
    if not tokenizer(CHARACTERS)["input_ids"]:  # transformers makes an empty one where there are no files
        raise ValueError(
            f"{checkpoint} has no tokenizer: save the model's own beside it, with tokenizer.save_pretrained."
        )
    return tokenizer


def _read(recipe: Recipe, paths: Sequence[str] | None, split: str | None) -> list[Document] | list[Example]:
    data = recipe.data
    if paths is None:
        return load_stdlib().train
    if data.format == "text":
        return load_documents(paths, key=data.key, split=split, config=data.config)
    assert data.format != "arithmetic"
    return [example for path in paths for example in load_examples(path, data.format, split=split, config=data.config)]


def _read_held_out(recipe: Recipe) -> list[Document] | list[Example]:
    data = recipe.data
    if data.held_out_paths is not None or data.held_out_split is not None:
        return _read(recipe, data.held_out_paths or data.paths, data.held_out_split)
    return load_stdlib().held_out if data.paths is None else []


def _text(item: Document | Example) -> str:
    return item.prompt + item.completion if isinstance(item, Example) else item.text


def _right(items: Sequence[Document | Example]) -> list[Document] | list[Example]:
    """Texts, or the answers that are right as far as is known; nobody should learn to write the others.

    Raises:
        ValueError: all answers are wrong.
    """
    documents = [item for item in items if isinstance(item, Document)]
    answers = [
        replace(item, outcome=None) for item in items if isinstance(item, Example) and item.outcome in (None, 1.0)
    ]
    if items and not documents and not answers:
        raise ValueError(f"None of the {len(items)} answers is right (outcome 1): there is nothing to learn to write.")
    if answers and len(answers) < len(items) and rank() == 0:
        logger.warning("%d of %d answers are wrong and not trained on.", len(items) - len(answers), len(items))
    return documents or answers


def _pack(
    items: Sequence[Document | Example], tokenizer: PreTrainedTokenizerBase, length: int, config: PreTrainedConfig
) -> PackedDataset:
    check_length("data.length", length, config)
    examples = [item for item in items if isinstance(item, Example)]
    if examples:
        return pack_examples(examples, tokenizer, length=length, vocab_size=config.vocab_size)
    return pack_texts((_text(item) for item in items), tokenizer, length=length, vocab_size=config.vocab_size)


def check_length(key: str, length: int, config: PreTrainedConfig) -> None:
    """Refuse rows that are longer than the model's positions.

    Raises:
        ValueError: they are.
    """
    if length > config.max_position_embeddings:
        raise ValueError(
            f"{key}={length} exceeds the {config.max_position_embeddings} positions of the model: shorten the rows."
        )
