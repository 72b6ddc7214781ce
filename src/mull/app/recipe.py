"""A run as one YAML file: which model, which data, which loss, how long.

Unknown keys are refused with the nearest known one. ``--set section.key=value`` of the command overrides the file. In values,
``${NAME}`` is replaced by an environment variable, ``${NAME:-default}`` by the default if the variable is unset or empty, and
``$${`` by a plain ``${``. An unquoted value gets its type after the replacement, so ``${LR:-1e-4}`` is a number. Inside ``[…]``
and ``{…}`` YAML itself reads braces, so quote it there.

`mull.app.run` carries a recipe out.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, get_args

from pydantic import BaseModel, BeforeValidator, Field, ValidationError, create_model, field_validator, model_validator

from mull.app.architecture import make_config
from mull.app.data_section import DataSection, Section
from mull.app.yaml_text import MAX_CHARACTERS, override, read_yaml
from mull.evaluation.rewards import REWARDS
from mull.model.configs import ETDConfig, GatedAttentionConfig, MTPConfig
from mull.runtime import storage
from mull.runtime.arguments import nearest, require
from mull.runtime.checkpoint import CheckpointConfig
from mull.training.loop import TrainConfig
from mull.training.objectives.critic import ValueSection
from mull.training.objectives.grpo import GRPOSection
from mull.training.objectives.iterations import IterationSampling
from mull.training.objectives.routing import RoutingSection
from mull.training.objectives.table import MAIN_HEAD_ALONE, NEXT_TOKEN, OBJECTIVES, OWN_CHOICE, objective_names
from mull.training.objectives.weighted_mtp import Control, HeadTraining
from mull.training.objectives.weightings import CriticSection, GradientSection, PretrainSection
from mull.training.step import DistributedConfig

SECTIONS = {entry.section[0]: name for name, entry in OBJECTIVES.items() if entry.section is not None}
"""Sections with the settings of an objective, and the name of the objective."""

_SETTINGS = dict(entry.section for entry in OBJECTIVES.values() if entry.section is not None)


class RunSection(Section):
    """Where a run lives."""

    name: str = Field(min_length=1)
    """Name of the run, and of its folder."""

    out: Annotated[Path, BeforeValidator(storage.local_path)] = Path("out")
    """Folder that holds the run's own folder."""

    tags: dict[str, str] = {}
    """Labels of the run in MLflow."""

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        if "\0" in name or Path(name).is_absolute() or ".." in Path(name).parts or Path(name) == Path():
            raise ValueError(f"{name!r} is no name of a folder inside run.out")
        return name


class ModelSection(Section):
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

    gated_attention: GatedAttentionConfig | None = None
    """Gates on the output of attention, which start open. A checkpoint that mull saved keeps its own without it."""

    dtype: Literal["fp32", "bf16"] = "fp32"
    """Type of the weights. Updates are often too small for ``bf16`` weights; ``train.precision`` computes in bf16 from ``fp32``
    ones as well."""

    @model_validator(mode="after")
    def _one_start(self) -> Self:
        if (self.checkpoint is None) == (self.architecture is None):
            raise ValueError("give either checkpoint or architecture")
        if self.architecture is not None:
            make_config(self.architecture)
        return self


class LossSection(Section):
    """How the loss is computed, whatever the objective."""

    iterations: IterationSampling = IterationSampling(kind="fixed", maximum=1)
    """How many think iterations an optimizer step runs."""

    heads: HeadTraining = HeadTraining()
    """How the extra heads are trained; not read by ``next-token``."""

    control: Control = "none"
    """Replace an algorithm's weights by ones that do not depend on the tokens, to see what the algorithm is worth: ``shuffled``
    among the targets, or ``random`` with the same mean and deviation. Not read by ``next-token``."""


class TrainSection(TrainConfig):
    """How long, with which objective, optimizer and schedule, and at which precision to train."""

    algo: str = NEXT_TOKEN
    """``next-token``, or a weighting of tokens: ``baseline-mtp`` (all weights 1), ``critic-wmtp``, ``dft``, ``entropy``,
    ``gradient-wmtp``, ``grpo-wmtp``, ``rho1-wmtp``, or one of another package (entry points ``mull.objectives``);
    ``distill``, which learns a teacher's predictions; ``align``, which aligns the mixers of converted layers with a teacher's
    attention; ``value-head``, which trains the value head that ``critic-wmtp`` reads; or ``routing``, which trains layer routers
    alone."""

    @field_validator("algo")
    @classmethod
    def _check_algo(cls, algo: str) -> str:
        known = objective_names()
        if algo not in known:
            raise ValueError(f"{algo!r} is not known. {nearest(algo, known)}")
        return algo


class EvalSection(Section):
    """Evaluation during training: losses of all heads, right answers (``arithmetic``), decisions of ``routes``, pass@1."""

    every: int | None = Field(default=None, ge=1)
    """Optimizer steps between two evaluations; without it, only after the last one."""

    rows: int = Field(default=64, ge=1)
    """Held-out rows or questions to evaluate, the first ones; all if there are fewer."""


class TrackingSection(Section):
    """Where metrics go, besides ``metrics.jsonl`` in the run's folder."""

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


class Stage(Section):
    """One training of the run: its objective, data, trainable parts and length.

    An objective with settings has a section of its own (`SECTIONS`), such as ``rho1``.
    """

    name: str | None = Field(default=None, pattern=r"^\w[\w.-]*$")
    """Name of the stage, and of its folder inside the run's; the last stage lives in the run's folder itself."""

    data: DataSection = DataSection()
    """Data of the stage."""

    train: TrainSection
    """Objective, length, optimizer and schedule of the stage."""

    loss: LossSection = LossSection()
    """Iterations, extra heads and control of the stage."""

    eval: EvalSection = EvalSection()
    """Evaluation during the stage."""

    @property
    def settings(self) -> Any:
        """The section of the objective, if it has one."""
        return next((getattr(self, section) for section, owner in SECTIONS.items() if owner == self.train.algo), None)

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
        if algo in MAIN_HEAD_ALONE:
            _refuse_unread("loss.heads", algo, "heads" in self.loss.model_fields_set)
            _refuse_unread("loss.control", algo, self.loss.control != "none")
            _refuse_unread("train.trainable=heads", algo, self.train.trainable == "heads")
        if algo in OWN_CHOICE and self.train.trainable != "all":
            raise ValueError(f"train.trainable is not read by train.algo={algo}, which trains {OWN_CHOICE[algo]}")
        return self

    @model_validator(mode="after")
    def _check_data(self) -> Self:
        settings, kind = self.settings, self.data.format
        if (self.train.algo == "routing") != (kind == "routes"):
            raise ValueError(f"train.algo={self.train.algo}, data.format={kind}: routing and routes need each other")
        if isinstance(settings, RoutingSection) and settings.held_out_share and self.data.held_out_paths is not None:
            raise ValueError("routing.held_out_share and data.held_out_paths both hold rows out: give one of them")
        if isinstance(settings, CriticSection | ValueSection) and kind in ("text", "arithmetic", "programs"):
            raise ValueError(
                f"train.algo={self.train.algo} needs tasks with right and wrong answers, and data.format={kind} has none"
            )
        if isinstance(settings, GRPOSection):
            if settings.reward not in REWARDS:
                raise ValueError(f"grpo.reward={settings.reward!r} is not known. {nearest(settings.reward, REWARDS)}")
            if kind != settings.reward:
                raise ValueError(
                    f"grpo.reward={settings.reward} grades answers to data.format={settings.reward}, not {kind}"
                )
            unread = sorted(settings.model_fields_set & {"workers", "timeout", "allow_weak_sandbox"})
            if settings.reward != "programs" and unread:
                raise ValueError(f"grpo.{unread[0]} is for grpo.reward=programs, and {settings.reward} runs nothing")
        elif kind == "programs" and not self.data.generated:
            raise ValueError(
                f"data.format=programs with paths has tasks to answer, for train.algo=grpo-wmtp, not {self.train.algo}: "
                "data.format=mbpp trains on the programs of such files"
            )
        if isinstance(settings, GradientSection) and settings.paths is not None and kind in ("arithmetic", "programs"):
            raise ValueError(f"gradient.paths is read as data.format says, and {kind} is not read from files")
        return self


def _refuse_unread(key: str, algo: str, given: bool) -> None:
    if given:
        raise ValueError(
            f"{key} is not read by train.algo={algo}, which trains the main head with equal weights: leave it out, or "
            "choose another algorithm, such as baseline-mtp"
        )


if TYPE_CHECKING:
    StageSection = Stage
else:
    StageSection = create_model(
        "StageSection",
        __base__=Stage,
        __doc__=Stage.__doc__,
        **{key: (kind | None, Field(default=None, description=kind.__doc__)) for key, kind in _SETTINGS.items()},
    )
SHARED = [name for name in StageSection.model_fields if name != "name"]
"""Sections that may be at the top of a recipe, where they serve all its stages."""

RESERVED = ("checkpoints", "model", "trunk")
"""What a run writes into its folder besides its stages."""


class Recipe(Section):
    """A whole run of ``mull train``."""

    run: RunSection
    """Name and folder of the run."""

    model: ModelSection
    """The model and what is added to it."""

    stages: tuple[StageSection, ...]
    """Trainings that run one after the other. Without it, the sections at the top are the only stage. With it, they are defaults:
    a stage's own section adds keys to the one at the top, or replaces them."""

    checkpoint: CheckpointConfig = CheckpointConfig()
    """Where, how often and how the run saves what it needs to continue."""

    tracking: TrackingSection = TrackingSection()
    """Where metrics go, besides ``metrics.jsonl`` in the run's folder."""

    distributed: DistributedConfig = DistributedConfig()
    """How several ranks share the weights."""

    @model_validator(mode="after")
    def _check_stages(self) -> Self:
        if not self.stages:
            raise ValueError(
                "stages is empty: give at least one, or leave it out and train with the sections at the top"
            )
        if all(stage.train.algo in MAIN_HEAD_ALONE for stage in self.stages):
            _refuse_unread("model.mtp", self.stages[0].train.algo, self.model.mtp is not None)
        if len({stage.data.format == "arithmetic" for stage in self.stages}) > 1:
            raise ValueError(
                "stages share a tokenizer, and format=arithmetic has its own: use it in all stages or in none"
            )
        if self.model.checkpoint is None:
            if len({stage.data.format == "programs" and stage.data.generated for stage in self.stages}) > 1:
                raise ValueError(
                    "stages share a tokenizer, and generated programs have their own where a model starts from random weights: "
                    "use them in all stages or in none, or start from model.checkpoint"
                )
            if self.stages[0].data.format == "programs" and not self.stages[0].data.generated:
                raise ValueError("a model with random weights writes no programs: start from model.checkpoint")
        if self.model.checkpoint is None and self.stages[0].data.format == "routes":
            raise ValueError("data.format=routes has routes of a trained model: start from model.checkpoint")
        stages = self.schedule()
        algorithms = [stage.train.algo for stage in stages]
        if "critic-wmtp" in algorithms and "value-head" not in algorithms[: algorithms.index("critic-wmtp")]:
            raise ValueError("the key critic.pretrain is missing")
        names = [stage.name for stage in stages]
        for name in names[:-1]:
            if name in RESERVED or names.count(name) > 1:
                raise ValueError(f"the name {name} of a stage is taken: give every stage a name of its own")
        return self

    def schedule(self) -> list[Stage]:
        """The stages in the order in which they run, all named; ``critic.pretrain`` is a stage of its own."""
        found: list[Stage] = []
        for number, stage in enumerate(self.stages, start=1):
            if isinstance(stage.settings, CriticSection) and stage.settings.pretrain is not None:
                found.append(_pretraining(stage, stage.settings.pretrain))
            found.append(stage.model_copy(update={"name": stage.name or f"stage-{number}"}))
        return found

    def parameters(self) -> dict[str, Any]:
        """All settings as nested JSON values; those of a single stage are at the top, as in the file."""
        settings = self.model_dump(mode="json")
        if len(self.stages) > 1:
            return settings
        (stage,) = settings.pop("stages")
        return settings | {name: stage[name] for name in SHARED}


def _pretraining(stage: Stage, pretrain: PretrainSection) -> Stage:
    """The stage that trains the value head of a stage with ``critic-wmtp``."""
    name = "critic" if stage.name is None else f"{stage.name}-critic"
    own = {"algo": "value-head", "steps": pretrain.steps, "max_seconds": None, "peak_lr": pretrain.peak_lr}
    train = {**stage.train.model_dump(), **own, "trainable": "all"}
    returns = stage.settings.model_dump(include={"gamma", "gae_lambda"})
    value_head = {**returns, **pretrain.model_dump(include={"per_problem", "corrupt"})}
    return StageSection.model_validate({"name": name, "data": stage.data, "train": train, "value_head": value_head})


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe.

    Args:
        path: YAML file.
        overrides: ``section.key=value``, the value in YAML; later ones win.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not YAML, a key given twice, an environment variable that is not set, an unknown key (the nearest known one is
            named), or a value that does not fit.
    """
    path = storage.local_path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no recipe at {path}.")
    with path.open("rb") as file:
        raw = file.read(4 * MAX_CHARACTERS + 1)  # UTF-8 has at most four bytes per character
    try:
        content = read_yaml(
            raw.decode("utf-8-sig", "strict" if len(raw) <= 4 * MAX_CHARACTERS else "replace"), str(path), ()
        )
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise ValueError(f"{path} is not UTF-8 in line {line}: is it a recipe?") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold sections such as run, model and train, but holds {type(content).__name__}.")
    require("overrides", overrides, (list, tuple), "a list of section.key=value")
    for assignment in overrides:
        override(content, assignment)
    return parse_recipe(content)


def parse_recipe(content: Mapping[str, Any]) -> Recipe:
    """Check the content of a recipe, one sentence per mistake.

    Raises:
        ValueError: unknown, missing or unfitting keys.
    """
    require("content", content, Mapping, "sections such as run, model and train")
    shared = {key: value for key, value in content.items() if key in SHARED}
    stages = [shared] if "stages" not in content else _with_defaults(content["stages"], shared)
    whole = {key: value for key, value in content.items() if key not in SHARED} | {"stages": stages}
    try:
        return Recipe.model_validate(whole)
    except ValidationError as error:
        sentences = [_sentence(mistake, _place(mistake["loc"], content)) for mistake in error.errors()]
        raise ValueError("; ".join(dict.fromkeys(sentences))) from None


def _with_defaults(stages: Any, shared: Mapping[str, Any]) -> Any:
    """Stages with the sections at the top of the recipe as defaults; what is not a list of stages is left to the check."""
    if not isinstance(stages, list) or not all(isinstance(stage, dict) for stage in stages):
        return stages
    merged = [{**shared, **{key: _merged(shared.get(key), value) for key, value in stage.items()}} for stage in stages]
    algorithms = [stage["train"].get("algo") if isinstance(stage.get("train"), dict) else None for stage in merged]
    for section in SECTIONS.keys() & shared.keys():
        if SECTIONS[section] not in algorithms:
            raise ValueError(f"the section {section} belongs to train.algo={SECTIONS[section]}, and no stage has that")
        for stage, own, algo in zip(merged, stages, algorithms, strict=True):
            if section not in own and algo != SECTIONS[section]:
                del stage[section]
    return merged


def _merged(default: Any, own: Any) -> Any:
    return {**default, **own} if isinstance(default, dict) and isinstance(own, dict) else own


def _place(location: Sequence[Any], content: Mapping[str, Any]) -> Sequence[Any]:
    """Where the user wrote what has this place in the checked recipe: at the top, or in a stage."""
    if len(location) < 2 or location[0] != "stages":
        return location
    inner = location[2:]
    # A stage inherits the sections at the top key by key, so the first two names tell who wrote the value.
    in_stage = "stages" in content and _has(content["stages"][location[1]], inner[:2])
    at_top = "stages" not in content or _has(content, inner[:2])
    return inner if at_top and not in_stage else location


def _has(content: Any, keys: Sequence[Any]) -> bool:
    for key in keys:
        if not isinstance(content, Mapping) or key not in content:
            return False
        content = content[key]
    return bool(keys)


def recipe_schema() -> dict[str, Any]:
    """JSON schema of a recipe, for editors that complete and explain its keys.

    ``${NAME}`` is allowed for every value that is not a text, too.
    """
    schema = Recipe.model_json_schema()
    stage = schema["$defs"]["StageSection"]["properties"]
    schema["properties"] |= {name: stage[name] for name in SHARED}
    schema["required"].remove("stages")
    schema["anyOf"] = [{"required": ["train"]}, {"required": ["stages"]}]
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    variable = {"type": "string", "pattern": r"\$\{"}
    for section in schema["$defs"].values():
        for name, value in section.get("properties", {}).items():
            if value.get("type") != "string" or "enum" in value:
                described = {key: value.pop(key) for key in ("description", "default", "title") if key in value}
                section["properties"][name] = {**described, "anyOf": [value, variable]}
    return schema


def _sentence(mistake: Any, place: Sequence[Any]) -> str:
    location = [str(part) for part in place]
    key = ".".join(location)
    if mistake["type"] == "extra_forbidden":
        *sections, name = location
        elsewhere = [f"{other}.{name}" for other in _keys_of([]) if sections and name in _keys_of([other])]
        return f"unknown key {key}. {nearest(name, _keys_of(sections), ''.join(f'{s}.' for s in sections), elsewhere)}"
    if mistake["type"] == "missing":
        return f"the key {key} is missing"
    return wrong_value(mistake, key)


def wrong_value(mistake: Any, key: str) -> str:
    """Which value a configuration refuses and why; `mistake` is one of pydantic's errors."""
    message: str = mistake["msg"].removeprefix("Value error, ")
    if not key:
        return message
    if mistake["type"] in NESTED:
        return f"{key}={mistake['input']!r}: {_what_belongs(mistake, key)}"
    # Our own messages name the value themselves.
    return f"{key}: {message}" if mistake["type"] == "value_error" else f"{key}={mistake['input']!r}: {message}"


NESTED = {"model_type": "section", "dict_type": "section", "tuple_type": "list"}
"""Mistakes of a value where keys or items belong, by pydantic's names for them."""

EXAMPLES: dict[str, tuple[str, Any]] = {
    "run": ("{{name: {}}}", "first"),
    "tags": ("{{team: {}}}", "mine"),
    "model": ("{{checkpoint: {}}}", "Qwen/Qwen3-0.6B"),
    "architecture": ("{{model_type: {}, hidden_size: 64}}", "qwen3"),
    "etd": ("{{n_encoder_layers: 12, n_think_layers: {}, n_decoder_layers: 9}}", 7),
    "mtp": ("{{num_predict_tokens: {}}}", 4),
    "data": ("{{paths: [{}]}}", "texts.jsonl"),
    "arithmetic": ("{{digits: {}}}", 2),
    "programs": ("{{wrong: {}}}", 0.5),
    "loss": ("{{iterations: {{kind: fixed, maximum: {}}}}}", 2),
    "iterations": ("{{kind: fixed, maximum: {}}}", 2),
    "train": ("{{steps: {}}}", 100),
    "eval": ("{{every: {}}}", 100),
    "checkpoint": ("{{every: {}}}", 100),
    "stages": ("[{{train: {{steps: {}}}}}]", 100),
}
"""What may stand under a key, and the value in it, for which a user's own of the same type is put."""


def _what_belongs(mistake: Any, key: str) -> str:
    """What belongs under a key that has a single value, as a sentence with an example."""
    given, kind = mistake["input"], NESTED[mistake["type"]]
    names = [part for part in key.split(".") if not part.isdigit()]
    if names[-1] in EXAMPLES:
        template, value = EXAMPLES[names[-1]]
        return f"a {kind} belongs here, such as {names[-1]}: {template.format(given if type(given) is type(value) else value)}"
    keys = ", ".join(_keys_of(names))
    return (
        f"a list belongs here, such as {names[-1]}: [{given}]"
        if kind == "list"
        else f"a section of {keys} belongs here"
    )


def _keys_of(location: Sequence[str]) -> list[str]:
    """Keys that a recipe may have at a place; none where a value is not a section."""
    if not location:
        return [*Recipe.model_fields, *SHARED]
    models: list[type[BaseModel]] = [Recipe, StageSection]
    for part in location:
        if not part.isdigit():
            fields = [model.model_fields[part] for model in models if part in model.model_fields]
            models = [model for field in fields for model in _models_in(field.annotation)]
    return [name for model in models for name in model.model_fields]


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    """Classes of settings that an annotation allows."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models_in(part)]
