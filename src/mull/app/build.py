"""Build what a recipe names: models, with or without weights, and objectives."""

import contextlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerBase

from mull.app.prepare import Prepared, StageData, arithmetic_task, backbone_config
from mull.app.recipe import ModelSection, Recipe, Stage
from mull.data.programs import PromptBatches
from mull.data.route_labels import RouteRows
from mull.data.sampler import ShuffledBatches
from mull.evaluation.program_reward import ProgramReward
from mull.evaluation.rewards import arithmetic_reward
from mull.layers.value_head import ValueHead
from mull.model.causal_lm import MullForCausalLM
from mull.model.configuration import MullConfig
from mull.model.families import require_supported
from mull.retrofit.source import GGUF, find_source, load_config, load_tokenizer
from mull.retrofit.wrap import from_pretrained, wrap_transformer_with_etd
from mull.runtime.distributed import on_first_rank
from mull.training.content import batches_content, files_digest
from mull.training.objectives.base import Objective
from mull.training.objectives.distill import DistillSection
from mull.training.objectives.evidence import check_reference
from mull.training.objectives.grpo import GRPOSection
from mull.training.objectives.resources import Resources, Reward, TeacherSource
from mull.training.objectives.table import make_objective
from mull.training.objectives.teacher_cache import CacheIdentity, TeacherCache
from mull.training.objectives.weightings import ReturnConfig

WEIGHTS = (".safetensors", ".bin", GGUF)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


Loader = Callable[[ModelSection, PreTrainedTokenizerBase], MullForCausalLM]
"""`load_model` or `meta_model`."""


def load_model(section: ModelSection, tokenizer: PreTrainedTokenizerBase) -> MullForCausalLM:
    """Load the checkpoint, or make a model with random weights for the tokenizer's vocabulary; on the CPU.

    Raises:
        OSError: no checkpoint where one is named.
        ValueError: as in `mull.retrofit.wrap.wrap_transformer_with_etd`.
    """
    dtype, gates = DTYPES[section.dtype], section.gated_attention
    if section.checkpoint is not None:
        return from_pretrained(
            section.checkpoint, section.etd, section.mtp, gated_attention=gates, dtype=dtype, allow_missing=False
        )
    # Not built in fp32 and converted: `to` would round the buffers too, and no checkpoint brings them back.
    base = AutoModelForCausalLM.from_config(backbone_config(section, tokenizer), dtype=dtype)
    return wrap_transformer_with_etd(base, section.etd, section.mtp, gates)


def meta_model(section: ModelSection, tokenizer: PreTrainedTokenizerBase) -> MullForCausalLM:
    """The same model without its weights, on the meta device.

    Raises:
        OSError: no checkpoint where one is named, or one without weights.
        ValueError: as in `load_model`.
    """
    config = backbone_config(section, tokenizer)
    _check_weights(section.checkpoint)
    if not isinstance(config, MullConfig):
        require_supported(config.get_text_config())
        config = MullConfig(text_config=config.get_text_config())
    for name in ("etd", "mtp", "gated_attention"):
        if (part := getattr(section, name)) is not None:
            setattr(config, name, part.model_dump())
    with torch.device("meta"):
        model: MullForCausalLM = AutoModelForCausalLM.from_config(config, dtype=DTYPES[section.dtype])
    model.tie_weights()
    if section.checkpoint is not None:
        with contextlib.suppress(OSError):  # a checkpoint may lack one
            model.generation_config = GenerationConfig.from_pretrained(section.checkpoint)
    return model


def _check_weights(checkpoint: str | None) -> None:
    """Refuse a local checkpoint without weights, which only loading would find."""
    folder = None if checkpoint is None else Path(find_source(checkpoint).name)
    if folder is None or not folder.is_dir():
        return
    if not any(file.suffix.lower() in WEIGHTS for file in folder.iterdir()):
        raise FileNotFoundError(f"{checkpoint} holds no weights (.safetensors): it is no finished checkpoint.")


def build_rewards(recipe: Recipe, prepared: Prepared, model: MullForCausalLM) -> list[Reward | None]:
    """What grades sampled answers in each stage; None where none are sampled.

    `mull.evaluation.program_reward.ProgramReward` still has to be opened.
    """
    rewards: list[Reward | None] = []
    for stage, data in zip(recipe.schedule(), prepared.stages, strict=True):
        settings = stage.settings
        if not isinstance(settings, GRPOSection):
            rewards.append(None)
        elif data.programs is None:
            rewards.append(arithmetic_reward(arithmetic_task(stage)))
        else:
            reward = ProgramReward(
                data.programs.tasks,
                prepared.tokenizer,
                end_ids(model),
                chat=data.programs.chat,
                workers=settings.workers,
                timeout=settings.timeout,
                allow_weak=settings.allow_weak_sandbox,
            )
            rewards.append(reward)
    return rewards


def end_ids(model: MullForCausalLM) -> list[int]:
    """The tokens that end a text of the model."""
    ends = model.generation_config.eos_token_id
    return [ends] if isinstance(ends, int) else list(ends or ())


def build_objectives(
    recipe: Recipe, prepared: Prepared, model: MullForCausalLM, load: Loader, rewards: Sequence[Reward | None]
) -> list[Objective]:
    """The objectives of all stages, with the reference models and the value head that they need on the model's device.

    `rewards` are those of `build_rewards`.

    All stages share one value head. Everything is built before the first stage, so that what cannot work is refused then, and
    a resumed run draws the same initial weights.

    Raises:
        OSError: no checkpoint of a reference model where one is named.
        ValueError: a resource does not fit the model, or a reference has another tokenizer.
    """
    value_head: ValueHead | None = None
    objectives = []
    for stage, data, reward in zip(recipe.schedule(), prepared.stages, rewards, strict=True):
        settings = stage.settings
        if isinstance(settings, ReturnConfig) and value_head is None:
            value_head = ValueHead(model.lm_head.in_features).to(model.device, model.dtype)
        source = _source(settings, recipe.model.dtype)
        frozen = None if source is None else partial(_frozen, source, model, prepared.tokenizer, load)
        predictions = None
        if isinstance(settings, DistillSection) and settings.cache is not None:
            assert frozen is not None
            predictions = _predictions(settings, stage, data, model, len(prepared.tokenizer), frozen)
        resources = Resources(
            model=model,
            iterations=stage.loss.iterations,
            reference=None if frozen is None or predictions is not None else frozen(),
            predictions=predictions,
            n_tokens=len(prepared.tokenizer),
            value_head=value_head,
            held_out=data.aligned,
            route_labels=data.rows.route_labels if isinstance(data.rows, RouteRows) else None,
            reward=reward,
            **_ends(stage, data, model),
        )
        loss, train = stage.loss, stage.train
        built = make_objective(train.algo, resources, settings, heads=loss.heads, control=loss.control, seed=train.seed)
        objectives.append(built)
    for objective in objectives if value_head is not None else ():
        # Ranks shard the model once, together with the value head, so it belongs to every stage; only those with a gradient
        # for it change it.
        objective.companion = value_head
    return objectives


def _source(settings: Any, dtype: Literal["fp32", "bf16"]) -> TeacherSource | None:
    """Where the frozen model of a stage comes from, with the type of its weights; None if it has none."""
    if isinstance(settings, TeacherSource):
        return TeacherSource(teacher=settings.teacher, dtype=settings.dtype or dtype, device=settings.device)
    name = getattr(settings, "reference", None)
    return None if name is None else TeacherSource(teacher=name, dtype=dtype)


def _frozen(
    source: TeacherSource, model: MullForCausalLM, tokenizer: PreTrainedTokenizerBase, load: Loader
) -> MullForCausalLM:
    """Load a reference or a teacher; without weights where the model has none."""
    assert source.dtype is not None
    place = model.device
    if source.device is not None and model.device.type != "meta":
        place = torch.device(source.device)
        if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
            raise ValueError(
                f"device={source.device} for {source.teacher}: this machine has {torch.cuda.device_count()} GPUs, counted from 0."
            )
    loaded = load(ModelSection(checkpoint=source.teacher, dtype=source.dtype), tokenizer)
    frozen = loaded.eval().requires_grad_(False)
    nn.Module.to(frozen, place)  # the type of transformers' wrapped `to` does not fit a call
    check_reference(model, frozen, len(tokenizer))
    _check_same_tokens(tokenizer, load_tokenizer(source.teacher), source.teacher)
    return frozen


def _predictions(
    settings: DistillSection,
    stage: Stage,
    data: StageData,
    model: MullForCausalLM,
    n_tokens: int,
    teacher: Callable[[], MullForCausalLM],
) -> TeacherCache:
    """The recorded predictions of a stage's teacher, which is loaded only if some are missing.

    They are recorded here, before the first stage. A model without weights has nothing recorded.
    """
    assert isinstance(data.batches, ShuffledBatches)
    assert settings.cache is not None
    assert settings.top_k is not None
    rows = data.batches.dataset
    identity = CacheIdentity(
        teacher=on_first_rank(partial(_digest, settings.teacher)),
        dtype=settings.dtype or str(model.dtype).removeprefix("torch."),
        data=batches_content(data.batches)["rows"],
        rows=len(rows),
        length=stage.data.length,
        top_k=settings.top_k,
        temperature=settings.temperature,
        n_tokens=min(n_tokens, model.lm_head.out_features),
    )
    cache = TeacherCache(settings.cache, identity)
    if model.device.type != "meta" and not cache.complete:
        cache.record(teacher(), rows, stage.data.batch_size)
    return cache


def _digest(name: str) -> str:
    """What tells a checkpoint from every other one, without loading it."""
    source = find_source(name)
    folder = Path(source.name)
    if not folder.is_dir():
        return f"{name}@{load_config(source, {})._commit_hash}"
    files = (file for file in folder.iterdir() if file.suffix.lower() in WEIGHTS or file.name == "config.json")
    return files_digest(files)


def _check_same_tokens(tokenizer: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase, name: str) -> None:
    """Refuse a reference to whose model a token means something else, or nothing."""
    theirs = other.get_vocab()
    for token, index in tokenizer.get_vocab().items():
        if theirs.get(token) != index:
            raise ValueError(
                f"The reference {name} has another tokenizer: {token!r} is token {index} for the model, and "
                f"{theirs.get(token)} for the reference. Use a reference with the model's tokenizer."
            )


def _ends(stage: Stage, data: StageData, model: MullForCausalLM) -> dict[str, Any]:
    """How sampled answers end, if the objective samples any."""
    if not isinstance(stage.settings, GRPOSection):
        return {}
    if isinstance(data.batches, PromptBatches):
        return {"end_ids": end_ids(model), "pad_id": data.batches.pad_id}
    task = arithmetic_task(stage)
    return {"end_ids": [task.eos_id], "pad_id": task.pad_id}
