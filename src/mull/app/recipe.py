"""A run as one YAML file: which model, which data, which loss, how long; read strictly.

Unknown keys are refused with the nearest known one, and ``--set section.key=value`` of the command overrides the file. In values,
``${NAME}`` stands for an environment variable, ``${NAME:-default}`` has a default for one that is unset or empty, and ``$${`` is
a plain ``${``. An unquoted value gets its type after the replacement, so ``${LR:-1e-4}`` is a number; inside ``[…]`` and
``{…}`` YAML itself reads braces, so quote it there.

`mull.app.run` carries a recipe out.
"""

import difflib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from mull.data.arithmetic import MAX_DIGITS, OPERATIONS, ArithmeticTask
from mull.evaluation.rewards import REWARDS
from mull.model.configs import ETDConfig, MTPConfig
from mull.model.families import FAMILIES
from mull.runtime.checkpoint import CheckpointConfig
from mull.runtime.distributed import DistributedConfig
from mull.training.loop import TrainConfig
from mull.training.objectives.grpo import GRPOConfig
from mull.training.objectives.iterations import IterationSampling
from mull.training.objectives.weighted_mtp import Control, HeadTraining
from mull.training.objectives.weightings import CriticConfig, GradientConfig, Rho1Config, algorithm_names

NEXT_TOKEN = "next-token"
"""The algorithm that weighs nothing and trains the main head only."""

SECTIONS = {"critic": "critic-wmtp", "gradient": "gradient-wmtp", "grpo": "grpo-wmtp", "rho1": "rho1-wmtp"}
"""Sections of the recipe that belong to one algorithm."""


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class RunSection(_Section):
    """Where a run lives."""

    name: str
    """Name of the run, and of its folder."""

    out: Path = Path("out")
    """Folder that holds the run's own folder."""

    tags: dict[str, str] = {}
    """Labels of the run in MLflow."""


class ModelSection(_Section):
    """Which model is trained: a checkpoint, or one with random weights."""

    checkpoint: str | None = None
    """Directory or hub name to start from, with its tokenizer."""

    architecture: dict[str, Any] | None = None
    """``model_type`` and further fields of a transformers configuration, to start from random weights. The vocabulary is that of
    the tokenizer which is trained on the data."""

    etd: ETDConfig | None = None
    """Which layers think. A checkpoint that mull saved keeps its own without it."""

    mtp: MTPConfig | None = None
    """Heads that predict further tokens. A checkpoint that mull saved keeps its own without it."""

    dtype: Literal["fp32", "bf16"] = "fp32"
    """Type of the weights. Updates are often too small for ``bf16`` weights; ``train.precision`` computes in bf16 from ``fp32``
    ones as well."""

    @model_validator(mode="after")
    def _one_start(self) -> Self:
        if (self.checkpoint is None) == (self.architecture is None):
            raise ValueError("give either checkpoint or architecture")
        if self.architecture is not None and self.architecture.get("model_type") not in FAMILIES:
            raise ValueError(
                f"architecture.model_type={self.architecture.get('model_type')!r} is not supported; "
                f"supported are {', '.join(sorted(FAMILIES))}"
            )
        return self


READ_FROM_FILES = ("paths", "key", "split", "config", "held_out_paths", "held_out_split", "max_bytes")
"""Keys of the data that generated data does not read."""


class ArithmeticSection(_Section):
    """Generated questions such as ``12*34=`` and their answers, see `mull.data.arithmetic`."""

    digits: int = Field(default=2, ge=1, le=MAX_DIGITS)
    """Digits of the largest operand."""

    operations: str = OPERATIONS
    """Some of ``+``, ``-`` and ``*``."""

    questions: int = Field(default=10_000, ge=1)
    """Questions with answers to train on; ``grpo-wmtp`` asks new ones in every step."""

    @field_validator("operations")
    @classmethod
    def _check_operations(cls, operations: str) -> str:
        ArithmeticTask(operations=operations)
        return operations


class DataSection(_Section):
    """What it is trained on."""

    paths: tuple[str, ...] | None = Field(default=None, min_length=1)
    """Files, folders, URLs (``s3://…``) and datasets (``hf:…``), see `mull.data.sources`; without them, the sources of the
    Python standard library."""

    format: Literal["text", "mbpp", "humaneval", "code_contests", "examples", "arithmetic"] = "text"
    """``text``; a schema of tasks with answers, see `mull.data.tasks`, of which only right answers are trained on, and prompts
    are not; or ``arithmetic``, which is generated and written in characters."""

    key: str = "text"
    """Where a record has its text; read with ``text``."""

    split: str | None = None
    """Split of the datasets among `paths`; for ``mbpp`` one of its own, such as ``train``."""

    config: str | None = None
    """Configuration of the datasets among `paths`."""

    held_out_paths: tuple[str, ...] | None = Field(default=None, min_length=1)
    """The same as `paths` for evaluation. The standard library brings its own held-out files."""

    held_out_split: str | None = None
    """Split for evaluation, of `held_out_paths` or else of `paths`."""

    arithmetic: ArithmeticSection | None = None
    """Which questions ``arithmetic`` asks."""

    max_bytes: int | None = Field(default=None, ge=1)
    """Train on a random sample of the texts, at most this large."""

    vocab_size: int = Field(default=2048, ge=257)
    """Size of the byte-level BPE that is trained when the model starts from random weights."""

    length: int = Field(default=256, ge=2)
    """Tokens per row; documents are packed."""

    batch_size: int = Field(default=8, ge=1)
    """Rows per micro-batch."""

    @model_validator(mode="after")
    def _check_format(self) -> Self:
        if (self.format == "arithmetic") != (self.arithmetic is not None):
            raise ValueError(
                f"format={self.format} with arithmetic={self.arithmetic}: format arithmetic needs it, others do not"
            )
        given = {name for name in READ_FROM_FILES if name in self.model_fields_set}
        if self.format == "arithmetic" and given:
            raise ValueError(f"format=arithmetic is generated and reads no {', '.join(sorted(given))}: leave them out")
        if self.format not in ("text", "arithmetic"):
            if self.paths is None:
                raise ValueError(f"format={self.format} needs paths: the standard library holds texts only")
            if unread := sorted(given & {"key", "max_bytes"}):
                raise ValueError(
                    f"{' and '.join(unread)} are for texts, and format={self.format} reads tasks: leave them out"
                )
        return self

    @model_validator(mode="after")
    def _check_held_out(self) -> Self:
        if self.held_out_split is None or self.held_out_paths is not None:
            return self
        if self.paths is None:
            raise ValueError("held_out_split needs paths or held_out_paths that have splits")
        if self.held_out_split == self.split:
            raise ValueError(f"held_out_split={self.held_out_split!r} is what is trained on: choose another split")
        return self


class LossSection(_Section):
    """What is minimised, whatever the algorithm."""

    iterations: IterationSampling = IterationSampling(kind="fixed", maximum=1)
    """How many think iterations an optimizer step runs."""

    heads: HeadTraining = HeadTraining()
    """How the heads behind the main one are trained; not read by ``next-token``."""

    control: Control = "none"
    """Replace an algorithm's weights by ones that know nothing of the tokens, to see what they are worth: ``shuffled`` among the
    targets, or ``random`` of the same mean and deviation. Not read by ``next-token``."""


class TrainSection(TrainConfig):
    """How long, with which algorithm, optimizer and schedule, and at which precision to train."""

    algo: str = NEXT_TOKEN
    """``next-token``, or a weighting of tokens: ``baseline-mtp`` (all weights 1), ``critic-wmtp``, ``dft``, ``entropy``,
    ``gradient-wmtp``, ``grpo-wmtp``, ``rho1-wmtp``, or one of another package (entry points ``mull.objectives``)."""

    @field_validator("algo")
    @classmethod
    def _check_algo(cls, algo: str) -> str:
        known = sorted({NEXT_TOKEN, *SECTIONS.values(), *algorithm_names()})
        if algo not in known:
            raise ValueError(f"{algo!r} is not known. {_hint(algo, known, '')}")
        return algo


class PretrainSection(_Section):
    """First stage of ``critic-wmtp``: the value head learns to tell right from wrong answers; the model stays as it is."""

    steps: int = Field(ge=1)
    """Optimizer steps."""

    peak_lr: float = Field(default=1e-3, gt=0)
    """Learning rate of the value head after warm-up; everything else is as in ``train``."""

    per_problem: int | None = Field(default=None, ge=1)
    """Most pairs of a right and a wrong answer from one problem; without it, as many as there are."""

    corrupt: bool = False
    """Make synthetic wrong answers for problems that have none, by changing one operator, constant or variable."""


class CriticSection(CriticConfig):
    """Weights by the advantage of a token under a value head."""

    pretrain: PretrainSection
    """Training of the value head, before that of the model."""


class Rho1Section(Rho1Config):
    """Weights by excess loss over a reference model."""

    reference: str
    """Directory or hub name of the reference model, which has the model's tokenizer."""


class GradientSection(GradientConfig):
    """Weights by a target's own gradient of the unembedding."""

    paths: tuple[str, ...] | None = Field(default=None, min_length=1)
    """Texts or tasks, as in ``data``, with whose gradient ``alignment`` compares; not those of ``data.held_out_paths``, which
    would no longer be held out."""

    @model_validator(mode="after")
    def _check_paths(self) -> Self:
        if (self.mode == "alignment") != (self.paths is not None):
            raise ValueError(
                f"mode={self.mode} with paths={self.paths}: mode alignment needs paths, the other takes none"
            )
        return self


class GRPOSection(GRPOConfig):
    """Reinforcement by the relative reward of sampled answers."""

    reward: str
    """What grades an answer: ``arithmetic``."""

    reference: str | None = None
    """Directory or hub name of the model that the penalty of ``kl_coef`` keeps close to."""

    @model_validator(mode="after")
    def _check_parts(self) -> Self:
        if self.reward not in REWARDS:
            raise ValueError(f"reward={self.reward!r} is not known. {_hint(self.reward, [*REWARDS], '')}")
        if (self.kl_coef > 0) != (self.reference is not None):
            raise ValueError(
                f"kl_coef={self.kl_coef} with reference={self.reference}: the penalty needs one, and nothing else reads it"
            )
        return self


class EvalSection(_Section):
    """Evaluation during training: the loss of every head on held-out rows; of ``arithmetic`` the share of right answers."""

    every: int | None = Field(default=None, ge=1)
    """Optimizer steps between two evaluations; without it, only behind the last one."""

    rows: int = Field(default=64, ge=1)
    """Held-out rows or questions to evaluate, the first ones; fewer where there are fewer."""


class TrackingSection(_Section):
    """Where metrics go, beside ``metrics.jsonl`` in the run's folder."""

    mlflow: bool = False
    """Send them to MLflow."""

    uri: str | None = None
    """Database or server of MLflow; without it, ``mlflow.db`` (SQLite) in ``run.out``."""

    experiment: str = "mull"
    """Experiment that the run belongs to."""

    @model_validator(mode="after")
    def _check_uri(self) -> Self:
        if self.uri is not None and not self.mlflow:
            raise ValueError("uri is MLflow's, and mlflow is false: set mlflow to true, or leave uri out")
        return self


class Recipe(_Section):
    """A whole run of ``mull train``."""

    run: RunSection
    model: ModelSection
    data: DataSection = DataSection()
    train: TrainSection
    loss: LossSection = LossSection()
    critic: CriticSection | None = None
    rho1: Rho1Section | None = None
    gradient: GradientSection | None = None
    grpo: GRPOSection | None = None
    eval: EvalSection = EvalSection()
    checkpoint: CheckpointConfig = CheckpointConfig()
    tracking: TrackingSection = TrackingSection()
    distributed: DistributedConfig = DistributedConfig()

    @model_validator(mode="after")
    def _check_sections(self) -> Self:
        algo = self.train.algo
        for section, owner in SECTIONS.items():
            given = getattr(self, section) is not None
            if algo == owner and not given:
                raise ValueError(f"train.algo={algo} needs the section {section}")
            if algo != owner and given:
                raise ValueError(
                    f"the section {section} belongs to train.algo={owner}, but train.algo={algo}: remove the section, or choose "
                    "its algorithm"
                )
        data = self.data.format
        if algo == "critic-wmtp" and data in ("text", "arithmetic"):
            raise ValueError(
                f"train.algo=critic-wmtp needs tasks with right and wrong answers, and data.format={data} has none"
            )
        if self.grpo is not None and data != self.grpo.reward:
            raise ValueError(
                f"grpo.reward={self.grpo.reward} grades answers to data.format={self.grpo.reward}, not {data}"
            )
        if self.gradient is not None and self.gradient.paths is not None and data == "arithmetic":
            raise ValueError("gradient.paths is read as data.format says, and arithmetic is not read from files")
        return self

    @model_validator(mode="after")
    def _check_heads(self) -> Self:
        if self.train.algo != NEXT_TOKEN:
            return self
        for key, given in {
            "model.mtp": self.model.mtp is not None,
            "loss.heads": "heads" in self.loss.model_fields_set,
            "loss.control": self.loss.control != "none",
        }.items():
            if given:
                raise ValueError(
                    f"{key} is not read by train.algo={NEXT_TOKEN}, which trains the main head with equal weights: leave it out, "
                    "or choose another algorithm, such as baseline-mtp"
                )
        return self


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe.

    Args:
        path: YAML file.
        overrides: ``section.key=value``, the value in YAML; later ones win.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not YAML, a key given twice, an environment variable that is not set, an unknown key (the nearest known one is
            named), or a value that does not fit.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no recipe at {path}.")
    content = _read(path.read_text(encoding="utf-8"), str(path), ())
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold sections such as run, model and train, but holds {type(content).__name__}.")
    for override in overrides:
        _override(content, override)
    return parse_recipe(content)


def parse_recipe(content: Mapping[str, Any]) -> Recipe:
    """Check the content of a recipe, one sentence per mistake.

    Raises:
        ValueError: unknown, missing or unfitting keys.
    """
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        raise ValueError("; ".join(_sentence(mistake) for mistake in error.errors())) from None


def recipe_schema() -> dict[str, Any]:
    """JSON schema of a recipe, for editors that complete and explain its keys.

    ``${NAME}`` is allowed for every value that is no text, too.
    """
    schema = Recipe.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    variable = {"type": "string", "pattern": r"\$\{"}
    for section in (schema, *schema["$defs"].values()):
        for name, value in section.get("properties", {}).items():
            if section is not schema and (value.get("type") != "string" or "enum" in value):
                described = {key: value.pop(key) for key in ("description", "default", "title") if key in value}
                section["properties"][name] = {**described, "anyOf": [value, variable]}
    return schema


class _Loader(yaml.SafeLoader):
    """YAML in which ``1e-4`` is a number, as in YAML 1.2; PyYAML reads version 1.1, which wants ``1.0e-4``."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$"), list("-+.0123456789")
)

_VARIABLE = re.compile(r"\$\$\{|\$\{(?:([A-Za-z_][A-Za-z0-9_]*)(?::-([^{}]*))?\})?")


def _read(text: str, source: str, place: tuple[str, ...]) -> Any:
    """Parse YAML, with environment variables put in."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        for scalar, key in _scalars(node, place):
            if "${" in scalar.value:
                scalar.value = _VARIABLE.sub(partial(_expand, key), scalar.value)
                if scalar.style is None:  # not quoted
                    scalar.tag = loader.resolve(yaml.ScalarNode, scalar.value, (True, False))
        return loader.construct_document(node)
    except yaml.YAMLError as error:
        raise ValueError(f"{source} is not YAML: {' '.join(str(error).split())}") from None


def _scalars(node: yaml.Node, place: tuple[str, ...]) -> Iterator[tuple[yaml.ScalarNode, str]]:
    """Values of a document and their keys."""
    found: dict[int, tuple[yaml.ScalarNode, str]] = {}  # an alias is the node that it stands for
    waiting = [(node, place)]
    while waiting:
        current, where = waiting.pop()
        if isinstance(current, yaml.ScalarNode):
            found[id(current)] = (current, ".".join(where))
        elif isinstance(current, yaml.SequenceNode):
            waiting += [(value, (*where, str(index))) for index, value in enumerate(current.value)]
        elif isinstance(current, yaml.MappingNode):
            seen: dict[str, int] = {}
            for key, value in current.value:
                line = key.start_mark.line + 1
                if key.value in seen and isinstance(key, yaml.ScalarNode):
                    name = ".".join((*where, key.value))
                    raise ValueError(f"the key {name} is given twice, in lines {seen[key.value]} and {line}")
                seen[str(key.value)] = line
                waiting.append((value, (*where, str(key.value))))
    return iter(found.values())


def _expand(key: str, match: re.Match[str]) -> str:
    name, default = match.groups()
    if match.group() == "$${":
        return "${"
    if name is None:
        raise ValueError(
            f"{key}: ${{ must begin ${{NAME}} or ${{NAME:-default}}, with a name of letters, digits and underscores; $${{ is a "
            "plain ${."
        )
    value = os.environ.get(name)
    if default is not None and not value:
        return default
    if value is None:
        raise ValueError(
            f"{key} reads the environment variable {name}, which is not set: set it, or write ${{{name}:-default}}."
        )
    return value


def _override(content: dict[str, Any], override: str) -> None:
    key, separator, value = override.partition("=")
    if not separator:
        raise ValueError(f"--set {override} lacks a value: write --set section.key=value.")
    *sections, last = key.split(".")
    for section in sections:
        content = content.setdefault(section, {})
        if not isinstance(content, dict):
            raise ValueError(f"--set {key} goes through {section}, which is a value and has no keys.")
    content[last] = _read(value, f"--set {override}", tuple(key.split(".")))


def _sentence(mistake: Any) -> str:
    location = [str(part) for part in mistake["loc"]]
    key = ".".join(location)
    if mistake["type"] == "extra_forbidden":
        return f"unknown key {key}. {_hint(location[-1], _keys_of(location[:-1]), '.'.join(location[:-1]))}"
    if mistake["type"] == "missing":
        return f"the key {key} is missing"
    return wrong_value(mistake, key)


def wrong_value(mistake: Any, key: str) -> str:
    """Which value a configuration refuses and why; `mistake` is one of pydantic's errors."""
    message: str = mistake["msg"].removeprefix("Value error, ")
    if not key:
        return message
    # Our own messages name the value themselves.
    return f"{key}: {message}" if mistake["type"] == "value_error" else f"{key}={mistake['input']!r}: {message}"


def _hint(name: str, known: Sequence[str], section: str) -> str:
    """What a misspelt name may have meant; a key may also have its home in another section."""
    prefix = f"{section}." if section else ""
    near = [prefix + match for match in difflib.get_close_matches(name, known, n=1)]
    near += [f"{other}.{name}" for other in Recipe.model_fields if section and name in _keys_of([other])]
    return f"Did you mean {near[0]}?" if near else f"Known are {', '.join(known)}."


def _keys_of(location: Sequence[str]) -> list[str]:
    """Keys of the schema at a place in the recipe."""
    model: Any = Recipe
    for part in location:
        annotation = model.model_fields[part].annotation
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        model = next(kind for kind in candidates if isinstance(kind, type) and issubclass(kind, BaseModel))
    return list(model.model_fields)
