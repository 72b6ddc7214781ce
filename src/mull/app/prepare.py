"""Read and pack the data of a recipe, and load or train its tokenizer."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from mull.app.architecture import make_config, try_config
from mull.app.data_section import DataSection, ProgramsSection
from mull.app.recipe import ModelSection, Recipe, Stage
from mull.data.arithmetic import CHARACTERS, ArithmeticTask, character_tokenizer
from mull.data.corpus import load_stdlib, subsample
from mull.data.packing import PackedDataset, pack_examples, pack_texts
from mull.data.programs import (
    ProgramTask,
    PromptBatches,
    demonstrations,
    load_program_tasks,
    rule_tokenizer,
    rules,
)
from mull.data.route_labels import RouteRows, load_route_rows
from mull.data.sampler import ShuffledBatches
from mull.data.sources import Document, load_documents
from mull.data.tasks import Example, load_examples, pairs
from mull.data.tokenizer import TextEncoder, train_tokenizer
from mull.evaluation.suites.prompts import ASK
from mull.evaluation.suites.writers import AnswerReader
from mull.model.families import require_supported
from mull.retrofit.source import find_source, load_config, load_tokenizer
from mull.runtime.distributed import rank
from mull.training.loop import Batches
from mull.training.objectives.critic import ValueSection
from mull.training.objectives.distill import DistillSection
from mull.training.objectives.grpo import GRPOSection
from mull.training.objectives.routing import RoutingSection
from mull.training.objectives.table import find_entry
from mull.training.objectives.weightings import GradientSection

logger = logging.getLogger(__name__)

Items = Sequence[Document] | Sequence[Example]
"""Texts or tasks, not yet packed."""


@dataclass(frozen=True)
class StageData:
    """The data of a stage."""

    batches: Batches
    """What it is trained on."""

    rows: PackedDataset | RouteRows | None = None
    """The rows of `batches`; None if they are generated, or are answers for a value head."""

    held_out: PackedDataset | RouteRows | None = None
    """What the model is evaluated on, if there is any."""

    aligned: Batches | None = None
    """What gradients are compared with."""

    programs: "ProgramStage | None" = None
    """The tasks that `batches` ask."""


@dataclass(frozen=True)
class ProgramStage:
    """Tasks whose answers are run."""

    tasks: Sequence[ProgramTask]
    """Those to train on, then those that are held out. Batches name each by its number here."""

    held_out: PromptBatches | None
    """Prompts of those that are held out, if there are any."""

    chat: bool
    """Whether prompts are messages of a chat."""


@dataclass(frozen=True)
class Prepared:
    """The data of a run, and its tokenizer."""

    tokenizer: PreTrainedTokenizerBase
    stages: list[StageData]
    """In the order of `Recipe.schedule`."""


def prepare(recipe: Recipe) -> Prepared:
    """Read and pack the data of a recipe, and load its tokenizer or train one on the data of the first stage.

    Raises:
        ValueError: data and tokenizer do not fit the model's vocabulary or positions, or there is nothing to train on.
        FileNotFoundError: a path of the data does not exist.
        OSError: no checkpoint where one is named.
        RuntimeError: a package is missing.
    """
    stages = recipe.schedule()
    if recipe.model.architecture is not None:
        try_config(make_config(recipe.model.architecture))  # before the data is read
    if stages[0].data.arithmetic is not None:
        return _prepare_arithmetic(recipe.model, stages)
    # By section, because stages that share one read their files once.
    sources = {stage.data: (_read_train(stage.data), _read_held_out(stage.data)) for stage in stages}
    if recipe.model.checkpoint is not None:
        tokenizer = load_tokenizer(recipe.model.checkpoint)
    elif stages[0].data.format == "programs":
        tokenizer = rule_tokenizer()
    else:
        texts, _ = sources[stages[0].data]
        tokenizer = train_tokenizer(map(_text, texts), stages[0].data.vocab_size)
    config = backbone_config(recipe.model, tokenizer).get_text_config()
    return Prepared(tokenizer, [_stage_data(stage, *sources[stage.data], tokenizer, config) for stage in stages])


def _stage_data(
    stage: Stage, train: Items, held_out: Items, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig
) -> StageData:
    data, settings, seed = stage.data, stage.settings, stage.train.seed
    if isinstance(settings, RoutingSection):
        return _route_data(stage, settings, tokenizer, config)
    if isinstance(settings, GRPOSection):
        return _program_data(stage, settings, tokenizer, config)
    if data.format == "programs":
        train, held_out = _rule_examples(data, seed)

    def pack(items: Items) -> PackedDataset:
        check_length("data.length", data.length, config)
        examples = _examples(items)
        if examples:
            return pack_examples(examples, tokenizer, length=data.length, vocab_size=config.vocab_size)
        return pack_texts(map(_text, items), tokenizer, length=data.length, vocab_size=config.vocab_size)

    def shuffled(packed: PackedDataset) -> Batches:
        return ShuffledBatches(packed, data.batch_size, seed, numbered=_is_recorded(settings))

    if isinstance(settings, ValueSection):
        found = pairs(_examples(train), per_problem=settings.per_problem, corrupt=settings.corrupt, seed=seed)
        return StageData(shuffled(pack([answer for pair in found for answer in pair])))
    aligned = None
    if isinstance(settings, GradientSection) and settings.paths is not None:
        aligned = shuffled(pack(_right(_read(data, settings.paths, data.split))))
    rows = pack(_right(train))
    return StageData(shuffled(rows), rows, pack(_right(held_out)) if held_out else None, aligned)


def _route_data(
    stage: Stage, settings: RoutingSection, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig
) -> StageData:
    data, seed = stage.data, stage.train.seed
    check_length("data.length", data.length, config)

    def load(paths: Sequence[str]) -> RouteRows:
        return load_route_rows(paths, tokenizer, length=data.length, vocab_size=config.vocab_size)

    assert data.paths is not None, "checked with the recipe"
    rows, share = load(data.paths).split(settings.held_out_share, seed)
    held_out = load(data.held_out_paths) if data.held_out_paths else share if len(share) else None
    return StageData(ShuffledBatches(rows, data.batch_size, seed), rows, held_out)


def _program_data(
    stage: Stage, settings: GRPOSection, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig
) -> StageData:
    data, chat = stage.data, False
    if data.paths is None:
        train, held_out = ([rule.task() for rule in rules(held_out=held_out)] for held_out in (False, True))
        texts = [task.text for task in (*train, *held_out)]
    else:
        chat = data.programs is not None and data.programs.prompt == "chat"
        train = _read_tasks(data, data.paths, data.split)
        more = data.held_out_paths is not None or data.held_out_split is not None
        held_out = _read_tasks(data, data.held_out_paths or data.paths, data.held_out_split) if more else []
        texts = [_asked(task) if chat else task.prompt for task in (*train, *held_out)]
    prompts = AnswerReader(tokenizer, chat).prompts(texts)
    length = max(map(len, prompts)) + settings.max_new_tokens
    check_length("The longest prompt + grpo.max_new_tokens", length, config)
    pad = TextEncoder(tokenizer).end if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id)
    n_train, rows = len(train), data.batch_size
    last = PromptBatches(prompts[n_train:], rows, pad, first=n_train) if held_out else None
    batches = PromptBatches(prompts[:n_train], rows, pad, stage.train.seed)
    return StageData(batches, programs=ProgramStage([*train, *held_out], last, chat))


def _read_tasks(data: DataSection, paths: Sequence[str], split: str | None) -> list[ProgramTask]:
    return [task for path in paths for task in load_program_tasks(path, split=split, config=data.config)]


def _asked(task: ProgramTask) -> str:
    """The message of a chat that asks for a program, in the words of EvalPlus."""
    return ASK.format("\n".join([task.text, *task.tests]))


def _rule_examples(data: DataSection, seed: int) -> tuple[list[Example], list[Example]]:
    """Generated tasks with programs: what is shown, and right ones of the tasks that are held out."""
    section = data.programs or ProgramsSection()
    shown = demonstrations(section.demonstrations, wrong=section.wrong, seed=seed)
    return shown, [Example(rule.words, rule.words, rule.program) for rule in rules(held_out=True)]


def _prepare_arithmetic(model: ModelSection, stages: Sequence[Stage]) -> Prepared:
    """Questions in characters; the tokenizer of a checkpoint must read them as the task writes them."""
    tokenizer: PreTrainedTokenizerBase = character_tokenizer()
    task = arithmetic_task(stages[0])
    if model.checkpoint is not None:
        tokenizer = load_tokenizer(model.checkpoint)
        expected = (task.encode(CHARACTERS), task.eos_id, task.pad_id)
        if (tokenizer(CHARACTERS)["input_ids"], tokenizer.eos_token_id, tokenizer.pad_token_id) != expected:
            raise ValueError(
                f"The tokenizer of {model.checkpoint} does not read arithmetic character by character: start from a model that "
                "was trained with data.format=arithmetic."
            )
    config = backbone_config(model, tokenizer).get_text_config()
    if config.vocab_size < task.vocab_size:
        raise ValueError(
            f"Arithmetic has {task.vocab_size} tokens, outside the model's vocabulary of {config.vocab_size} tokens: use a "
            "larger one."
        )
    return Prepared(tokenizer, [_arithmetic_data(stage, config) for stage in stages])


def _arithmetic_data(stage: Stage, config: PreTrainedConfig) -> StageData:
    data, task = stage.data, arithmetic_task(stage)
    if find_entry(stage.train.algo).data == "prompts":
        return StageData(lambda number: task.prompts(number, data.batch_size))
    assert data.arithmetic is not None
    check_length("data.length", data.length, config)
    packed = task.demonstrations(data.arithmetic.questions, data.length)
    batches = ShuffledBatches(packed, data.batch_size, stage.train.seed, numbered=_is_recorded(stage.settings))
    return StageData(batches, packed)


def _is_recorded(settings: Any) -> bool:
    """Whether the teacher's predictions of the rows are on the disk, under the rows' numbers."""
    return isinstance(settings, DistillSection) and settings.cache is not None


def backbone_config(section: ModelSection, tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
    """Configuration of the checkpoint, or of the backbone with random weights.

    Raises:
        ValueError: as in `mull.model.families.require_supported`.
    """
    if section.checkpoint is not None:
        config = load_config(find_source(section.checkpoint), {})
    else:
        assert section.architecture is not None
        special = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
        config = make_config({"vocab_size": len(tokenizer), **special, **section.architecture})
    require_supported(config.get_text_config())
    return config


def arithmetic_task(stage: Stage) -> ArithmeticTask:
    """The task of a stage whose data are arithmetic."""
    section = stage.data.arithmetic
    assert section is not None
    return ArithmeticTask(digits=section.digits, operations=section.operations, seed=stage.train.seed)


def _read(data: DataSection, paths: Sequence[str] | None, split: str | None) -> list[Document] | list[Example]:
    if data.format == "programs":
        return []  # generated, or read with the tokenizer
    if paths is None:
        return load_stdlib().train
    if data.format == "text":
        return load_documents(paths, key=data.key, split=split, config=data.config)
    assert data.format != "arithmetic"
    if data.format == "routes":
        return []  # read with the tokenizer
    return [example for path in paths for example in load_examples(path, data.format, split=split, config=data.config)]


def _read_train(data: DataSection) -> list[Document] | list[Example]:
    items = _read(data, data.paths, data.split)
    return items if data.max_bytes is None else subsample(_documents(items), data.max_bytes)


def _read_held_out(data: DataSection) -> list[Document] | list[Example]:
    if data.held_out_paths is not None or data.held_out_split is not None:
        return _read(data, data.held_out_paths or data.paths, data.held_out_split)
    return load_stdlib().held_out if data.paths is None and not data.generated else []


def _text(item: Document | Example) -> str:
    return item.prompt + item.completion if isinstance(item, Example) else item.text


def _documents(items: Items) -> list[Document]:
    return [item for item in items if isinstance(item, Document)]


def _examples(items: Items) -> list[Example]:
    return [item for item in items if isinstance(item, Example)]


def _right(items: Items) -> list[Document] | list[Example]:
    """Texts, or the answers that are not known to be wrong: the model should not learn to write those.

    Raises:
        ValueError: all answers are wrong.
    """
    documents = _documents(items)
    answers = [replace(item, outcome=None) for item in _examples(items) if item.outcome in (None, 1.0)]
    if items and not documents and not answers:
        raise ValueError(f"None of the {len(items)} answers is right (outcome 1): there is nothing to learn to write.")
    if answers and len(answers) < len(items) and rank() == 0:
        logger.warning("%d of %d answers are wrong and not trained on.", len(items) - len(answers), len(items))
    return documents or answers


def check_length(key: str, length: int, config: PreTrainedConfig) -> None:
    """Refuse rows that are longer than the model's positions.

    Raises:
        ValueError: `length` exceeds them; names `key`.
    """
    if length > config.max_position_embeddings:
        raise ValueError(
            f"{key}={length} exceeds the {config.max_position_embeddings} positions of the model: shorten the rows."
        )
