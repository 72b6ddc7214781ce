"""A run as one YAML file: which model, which data, which loss, how long; read strictly, and carried out.

The sections are ``run``, ``model``, ``data``, ``loss`` and ``train``. Unknown keys are refused with the nearest known one, and
``--set section.key=value`` of the command overrides the file.
"""

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from mull.backbone import FAMILIES
from mull.configs import ETDConfig
from mull.data.corpus import Document, load_stdlib, load_text_files, subsample
from mull.data.packing import PackedDataset, pack_texts
from mull.data.sampler import ShuffledBatches
from mull.data.tokenizer import train_tokenizer
from mull.model import MullForCausalLM, from_pretrained, wrap_transformer_with_etd
from mull.objectives.iterations import IterationSampling
from mull.objectives.next_token import NextToken, next_token_targets
from mull.train import TrainConfig, TrainResult, train


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class RunSection(_Section):
    """Where a run lives."""

    name: str
    """Name of the run, and of its folder."""

    out: Path = Path("out")
    """Folder that holds the run's own folder."""


class ModelSection(_Section):
    """Which model is trained: a checkpoint, or one with random weights."""

    checkpoint: str | None = None
    """Directory or hub name to start from, with its tokenizer."""

    architecture: dict[str, Any] | None = None
    """``model_type`` and further fields of a transformers configuration, to start from random weights. The vocabulary is that of
    the tokenizer which is trained on the data."""

    etd: ETDConfig | None = None
    """Which layers think. A checkpoint that mull saved keeps its own without it."""

    @model_validator(mode="after")
    def _one_start(self) -> "ModelSection":
        if (self.checkpoint is None) == (self.architecture is None):
            raise ValueError("give either checkpoint or architecture")
        if self.architecture is not None and self.architecture.get("model_type") not in FAMILIES:
            raise ValueError(
                f"architecture.model_type={self.architecture.get('model_type')!r} is not supported; "
                f"supported are {', '.join(sorted(FAMILIES))}"
            )
        return self


class DataSection(_Section):
    """What it is trained on."""

    paths: tuple[Path, ...] | None = None
    """Text files, ``.jsonl`` files or folders; without them, the sources of the Python standard library."""

    held_out_paths: tuple[Path, ...] | None = None
    """The same for evaluation. The standard library brings its own held-out files."""

    max_bytes: int | None = Field(default=None, ge=1)
    """Train on a random sample of the documents, at most this large."""

    vocab_size: int = Field(default=2048, ge=257)
    """Size of the byte-level BPE that is trained when the model starts from random weights."""

    length: int = Field(default=256, ge=2)
    """Tokens per row; documents are packed."""

    batch_size: int = Field(default=8, ge=1)
    """Rows per micro-batch."""


class LossSection(_Section):
    """What is minimised."""

    objective: Literal["next-token"] = "next-token"
    """Cross-entropy of the next token behind the last iteration."""

    iterations: IterationSampling = IterationSampling(kind="fixed", maximum=1)
    """How many think iterations a micro-batch runs."""


class Recipe(_Section):
    """A whole run."""

    run: RunSection
    model: ModelSection
    data: DataSection = DataSection()
    loss: LossSection = LossSection()
    train: TrainConfig


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe.

    Args:
        path: YAML file.
        overrides: ``section.key=value``, the value in YAML; later ones win.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not YAML, an unknown key (the nearest known one is named), or a value that does not fit.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no recipe at {path}.")
    try:
        content = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold sections such as run, model and train, but holds {type(content).__name__}.")
    for override in overrides:
        _override(content, override)
    return parse_recipe(content)


def _override(content: dict[str, Any], override: str) -> None:
    key, separator, value = override.partition("=")
    if not separator:
        raise ValueError(f"--set {override} lacks a value: write --set section.key=value.")
    *sections, last = key.split(".")
    for section in sections:
        content = content.setdefault(section, {})
        if not isinstance(content, dict):
            raise ValueError(f"--set {key} goes through {section}, which is a value and has no keys.")
    content[last] = yaml.safe_load(value)


def parse_recipe(content: Mapping[str, Any]) -> Recipe:
    """Check the content of a recipe, one sentence per mistake.

    Raises:
        ValueError: unknown, missing or unfitting keys.
    """
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        raise ValueError("; ".join(_sentence(mistake) for mistake in error.errors())) from None


def _sentence(mistake: Any) -> str:
    location = [str(part) for part in mistake["loc"]]
    key = ".".join(location)
    if mistake["type"] == "extra_forbidden":
        known = _keys_of(location[:-1])
        near = difflib.get_close_matches(location[-1], known, n=1)
        hint = f"Did you mean {'.'.join([*location[:-1], near[0]])}?" if near else f"Known are {', '.join(known)}."
        return f"unknown key {key}. {hint}"
    if mistake["type"] == "missing":
        return f"the key {key} is missing"
    message = mistake["msg"].removeprefix("Value error, ")
    return f"{key}={mistake['input']!r}: {message}" if mistake["type"] != "value_error" else f"{key}: {message}"


def _keys_of(location: Sequence[str]) -> list[str]:
    """Keys of the schema at a place in the recipe."""
    model: Any = Recipe
    for part in location:
        annotation = model.model_fields[part].annotation
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        model = next(kind for kind in candidates if isinstance(kind, type) and issubclass(kind, BaseModel))
    return list(model.model_fields)


def held_out_loss(
    model: MullForCausalLM,
    dataset: PackedDataset,
    iterations: int | None,
    *,
    batch_size: int = 16,
    max_rows: int | None = None,
) -> float:
    """Mean next-token loss over held-out rows, in nats per token, in the model's own precision.

    Args:
        model: Left in the mode it is in.
        dataset: Packed documents.
        iterations: Passes through the think block; None for a model without one.
        batch_size: Rows per forward pass.
        max_rows: Evaluate the first rows only.
    """
    total, count, rows = 0.0, 0, 0
    with torch.no_grad():
        for batch in dataset.in_order(batch_size):
            tensors = {name: tensor.to(model.device) for name, tensor in batch.items()}
            (state,) = model.early_decoded(
                tensors["input_ids"], position_ids=tensors["position_ids"], think_iterations=iterations
            )
            targets = next_token_targets(tensors)
            logits = model.lm_head(state[:, :-1]).float()
            total += F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").item()
            count += int((targets != -100).sum())
            rows += len(targets)
            if max_rows is not None and rows >= max_rows:
                break
    return total / count


def run_recipe(recipe: Recipe, resume: bool = False) -> TrainResult:
    """Carry out a recipe: read the data, make the model, train it, save it.

    The run's folder receives ``metrics.jsonl``, checkpoints, and at the end ``model/``, which `mull.from_pretrained` and
    transformers' Auto classes load, tokenizer included.

    Args:
        recipe: The run.
        resume: Continue from the newest checkpoint.

    Raises:
        ValueError: data, tokenizer and model do not fit each other, or the folder holds another run.
        FileNotFoundError: a path of the data does not exist.
        RuntimeError: as in `mull.train.train`.
    """
    out = recipe.run.out / recipe.run.name
    documents, held_out = _documents(recipe.data)
    tokenizer = _tokenizer(recipe, documents)
    torch.manual_seed(recipe.train.seed)
    model = _model(recipe.model, tokenizer)
    packed = _pack(documents, tokenizer, recipe.data.length, model)
    evaluation = _pack(held_out, tokenizer, recipe.data.length, model) if held_out else None
    depth = recipe.loss.iterations.maximum

    def evaluate(trained: MullForCausalLM) -> dict[str, float]:
        assert evaluation is not None
        return {"loss": held_out_loss(trained, evaluation, depth if trained.etd_config else None, max_rows=64)}

    result = train(
        model,
        NextToken(recipe.loss.iterations),
        ShuffledBatches(packed, recipe.data.batch_size, recipe.train.seed),
        recipe.train,
        out,
        evaluate=evaluate if evaluation is not None else None,
        resume=resume,
    )
    model.eval().save_pretrained(out / "model")
    tokenizer.save_pretrained(out / "model")
    return result


def _documents(data: DataSection) -> tuple[list[Document], list[Document]]:
    if data.paths is None:
        corpus = load_stdlib()
        documents, held_out = corpus.train, corpus.held_out
    else:
        documents, held_out = load_text_files(data.paths), []
    if data.held_out_paths is not None:
        held_out = load_text_files(data.held_out_paths)
    return (documents if data.max_bytes is None else subsample(documents, data.max_bytes)), held_out


def _tokenizer(recipe: Recipe, documents: Sequence[Document]) -> PreTrainedTokenizerBase:
    if recipe.model.checkpoint is None:
        return train_tokenizer((document.text for document in documents), recipe.data.vocab_size)
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(recipe.model.checkpoint)
    return tokenizer


def _model(section: ModelSection, tokenizer: PreTrainedTokenizerBase) -> MullForCausalLM:
    if section.checkpoint is not None:
        return from_pretrained(section.checkpoint, etd=section.etd)
    assert section.architecture is not None
    fields = {
        "vocab_size": len(tokenizer),
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
        **section.architecture,
    }
    config = CONFIG_MAPPING[fields.pop("model_type")](**fields)
    return wrap_transformer_with_etd(AutoModelForCausalLM.from_config(config), section.etd)


def _pack(
    documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, length: int, model: MullForCausalLM
) -> PackedDataset:
    text_config = model.config.get_text_config()
    if length > text_config.max_position_embeddings:
        raise ValueError(
            f"data.length={length} exceeds the {text_config.max_position_embeddings} positions of the model: shorten the rows."
        )
    texts = (document.text for document in documents)
    return pack_texts(texts, tokenizer, length=length, vocab_size=text_config.vocab_size)
