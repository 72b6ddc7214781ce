"""Carry a recipe out: read the data, make the model, train it, save it; or say what that would cost.

The same on one process (``mull train``) and on several (``torchrun -m mull train``).
"""

import contextlib
import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from mull.app.build import build_objectives, build_rewards, end_ids, load_model, meta_model
from mull.app.prepare import StageData, arithmetic_task, check_length, prepare
from mull.app.recipe import Recipe, Stage
from mull.data.programs import PromptBatches, tasks_digest
from mull.data.route_labels import RouteRows
from mull.data.sampler import ShuffledBatches
from mull.data.tokenizer import TextEncoder
from mull.evaluation.cost.disk import Saving, disk_rows, in_bytes
from mull.evaluation.cost.training import Estimate, Schedule, estimate, training_flops_per_token
from mull.evaluation.held_out import held_out_losses
from mull.evaluation.program_reward import ProgramReward, pass_rates
from mull.evaluation.rewards import right_answers
from mull.evaluation.search.route_report import route_agreement
from mull.model.causal_lm import MullForCausalLM
from mull.retrofit.convert import add_engine_keys
from mull.retrofit.reading import TokenizersErrors
from mull.runtime import storage
from mull.runtime.checkpoint import CheckpointConfig
from mull.runtime.distributed import device, full_state_dict, on_first_rank, rank, session, world_size
from mull.runtime.tracking import MlflowLog, flat, sqlite_uri
from mull.training.content import batches_content, tokenizer_digest
from mull.training.loop import CHECKPOINTS, Evaluation, TrainConfig, TrainResult, checkpoint_to_resume, train
from mull.training.objectives.align import Align, AlignSection
from mull.training.objectives.base import Objective
from mull.training.objectives.distill import Distill
from mull.training.objectives.grpo import GRPOSection
from mull.training.objectives.resources import Reward
from mull.training.objectives.table import MAIN_HEAD_ALONE, find_entry
from mull.training.objectives.weighted_mtp import WeightedMTP
from mull.training.optimization import peak_flops, resolve_precision
from mull.training.trainable import frozen_except, summary

logger = logging.getLogger(__name__)

STAGING = ".export"
"""Where a run writes its models before they get their names."""

MLFLOW_STATUS = {"finished": "FINISHED", "until": "FINISHED", "sigterm": "KILLED"}


def run_recipe(recipe: Recipe, resume: bool = False) -> TrainResult:
    """Carry out a recipe, stage by stage.

    The run's folder receives ``metrics.jsonl`` and the checkpoints of the last stage, and when the training is finished

    * ``model/``: what was trained, extra heads included, for `mull.from_pretrained` and, once mull is imported, transformers'
      Auto classes; a value head as ``value_head.safetensors``;
    * ``trunk/``: its backbone, for transformers alone.

    Both have the tokenizer. Earlier stages have a folder of their own inside it, with their metrics and last checkpoint.

    Args:
        recipe: The run.
        resume: Continue from the newest checkpoint of the stage that was interrupted; finished stages are not repeated.

    Returns:
        Of the stage that ran last.

    Raises:
        ValueError: data, tokenizer and model do not fit each other, or the folder holds another run.
        FileNotFoundError: a path of the data does not exist.
        OSError: no checkpoint of a model where one is named, or the run's folder cannot be written.
        RuntimeError: as in `mull.training.loop.train`; a package is missing; MLflow cannot be reached; or another process uses
            the run's folder.
    """
    folder = recipe.run.out / recipe.run.name
    with session(), contextlib.ExitStack() as stack:
        on_first_rank(lambda: stack.enter_context(storage.exclusive(folder)))
        on_first_rank(partial(_check_writable, folder))
        on_first_rank(lambda: _remove_unfinished(folder))
        stages = recipe.schedule()
        places = [*(str(stage.name) for stage in stages[:-1]), ""]
        if not resume:
            _check_unused(recipe, places)  # before the first stage has run for hours
        prepared = prepare(recipe)
        torch.manual_seed(stages[0].train.seed)
        model = load_model(recipe.model, prepared.tokenizer)
        nn.Module.to(model, device())  # the type of transformers' wrapped `to` does not fit a call
        _adopt_ends(model, prepared.tokenizer)
        on_first_rank(partial(_try_export, model, prepared.tokenizer))
        for stage in stages:
            _check_stage(stage, model)
        rewards = build_rewards(recipe, prepared, model)
        for reward in rewards:
            if isinstance(reward, ProgramReward):
                stack.enter_context(reward)
        objectives = build_objectives(recipe, prepared, model, load_model, rewards)
        flops = [_flops_per_token(stage, model) for stage in stages]  # before the first stage shards the model
        parts = zip(places, stages, prepared.stages, objectives, rewards, flops, strict=True)
        for place, stage, data, objective, reward, cost in parts:
            content = _content(stage, data, prepared.tokenizer)
            evaluation = _evaluation(stage, data, reward) if objective.trains != () else None
            result = _run_stage(recipe, stage, data, model, objective, evaluation, place, resume, content, cost)
            if result.stopped != "finished":
                return result
            if result.terminated and place:
                return replace(result, stopped="sigterm")
        _export(model, objectives[-1].companion, prepared.tokenizer, folder)
        return result


def _check_unused(recipe: Recipe, places: Sequence[str]) -> None:
    """Refuse to start where another run is."""
    for place in places:
        folder = recipe.run.out / recipe.run.name / place
        url = _checkpoints(recipe.checkpoint, place).url or str(folder / CHECKPOINTS)
        on_first_rank(partial(checkpoint_to_resume, folder, url, resume=False))


def _adopt_ends(model: MullForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    """Let the model end in use where its training texts end."""
    stated = model.generation_config.eos_token_id
    ends = TextEncoder(tokenizer).ends(stated)
    if ends in (stated, [stated]) or not ends:
        return
    if stated is not None:
        _warn(
            "The generation config ends texts at %s, the tokenizer at %s: the model will end at %s.",
            stated,
            ends[0],
            ends,
        )
    for config in (model.generation_config, model.config, model.config.get_text_config()):
        config.eos_token_id = ends[0] if len(ends) == 1 else ends


def _check_stage(stage: Stage, model: MullForCausalLM) -> None:
    """Refuse iterations without a think block, and tell the user what may be unexpected."""
    model.path(stage.loss.iterations.maximum)  # raises ValueError
    native = resolve_precision("auto", device())
    algo, n_heads = stage.train.algo, 0 if model.mtp_heads is None else model.mtp_heads.n_heads
    if stage.train.precision == "bf16" and native != "bf16":
        _warn("%s emulates bf16, slower than it computes fp32: train.precision=auto would choose fp32.", device())
    if algo in MAIN_HEAD_ALONE and n_heads:
        _warn("The model's %d extra heads are kept and not trained: train.algo=%s.", n_heads, algo)
    if algo == "baseline-mtp" and not n_heads:
        _warn("The model has no extra heads (model.mtp), so baseline-mtp is next-token prediction.")


def _run_stage(
    recipe: Recipe,
    stage: Stage,
    data: StageData,
    model: MullForCausalLM,
    objective: Objective,
    evaluation: Evaluation | None,
    place: str,
    resume: bool,
    content: dict[str, Any],
    flops: float | None,
) -> TrainResult:
    """Train one stage; `place` is its folder in the run's, empty for the last stage. A finished stage is loaded."""
    folder = recipe.run.out / recipe.run.name / place
    tracker = _open_mlflow(recipe, folder, place)
    status = "FAILED"
    try:
        result = train(
            model,
            objective,
            data.batches,
            train_config(stage),
            folder,
            evaluation=evaluation,
            resume=resume,
            checkpoint=_checkpoints(recipe.checkpoint, place),
            distributed=recipe.distributed,
            logs=[] if tracker is None else [tracker],
            flops_per_token=flops,
            content=content,
        )
        status = MLFLOW_STATUS[result.stopped]
    finally:
        if tracker is not None:
            tracker.close(status)
    return result


def _flops_per_token(stage: Stage, model: MullForCausalLM) -> float | None:
    """The numerator of a stage's MFU; None for objectives that also sample, or that do not back-propagate through the model."""
    if find_entry(stage.train.algo).data != "rows" or isinstance(stage.settings, AlignSection):
        return None
    length, sampling = stage.data.length, stage.loss.iterations
    with frozen_except(model, stage.train.trainable):
        return training_flops_per_token(
            model, length, sampling.average(), sampling.backprop_iterations, _trained_heads(stage)
        )


def _trained_heads(stage: Stage) -> int | None:
    """Extra heads that a stage runs; None for all."""
    return 0 if stage.train.algo in MAIN_HEAD_ALONE else None


def _content(stage: Stage, data: StageData, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What decides the result of a stage besides its settings; not where it was read from."""
    task = stage.data.arithmetic
    found: dict[str, Any] = {"tokenizer": tokenizer_digest(tokenizer)}
    for name, batches in (("data", data.batches), ("aligned", data.aligned)):
        if isinstance(batches, ShuffledBatches):
            found[name] = batches_content(batches)
        elif data.programs is not None and isinstance(batches, PromptBatches):
            digest = tasks_digest(data.programs.tasks)
            found[name] = {"batch_size": batches.batch_size, "tasks": digest, "chat": data.programs.chat}
        elif batches is not None:  # questions without end
            found[name] = {"batch_size": stage.data.batch_size, **({} if task is None else task.model_dump())}
    return found


def train_config(stage: Stage) -> TrainConfig:
    """The part of a stage's section ``train`` that the loop reads."""
    return TrainConfig(**stage.train.model_dump(exclude={"algo"}))


def _checkpoints(config: CheckpointConfig, place: str) -> CheckpointConfig:
    """Earlier stages keep their last checkpoint only, in a folder of their own."""
    if not place:
        return config
    url = None if config.url is None else storage.join(config.url, place)
    return config.model_copy(update={"url": url, "keep_last": 1})


def _warn(message: str, *details: object) -> None:
    if rank() == 0:
        logger.warning(message, *details)


def _evaluation(stage: Stage, data: StageData, reward: Reward | None) -> Evaluation | None:
    rows, held_out = stage.eval.rows, data.held_out
    prompts = None if data.programs is None else data.programs.held_out

    def measure(model: MullForCausalLM) -> dict[str, float]:
        depth = None if model.etd_config is None else stage.loss.iterations.maximum
        if isinstance(held_out, RouteRows):
            found = route_agreement(model, held_out.part(torch.arange(min(rows, len(held_out)))), stage.data.batch_size)
            return {name: getattr(found, name) for name in ("macro_f1", "accuracy", "visits", "label_visits")}
        if prompts is not None:
            assert isinstance(reward, ProgramReward)
            return pass_rates(
                model,
                prompts,
                reward,
                rows=rows,
                end_ids=end_ids(model),
                pad_id=prompts.pad_id,
                max_new_tokens=stage.settings.max_new_tokens,
                temperature=stage.settings.temperature,
                iterations=depth,
                seed=stage.train.seed,
            )._asdict()
        if held_out is None:
            return {"right_answers": right_answers(model, arithmetic_task(stage), rows=rows, iterations=depth)}
        return held_out_losses(model, held_out, depth, batch_size=stage.data.batch_size, max_rows=rows)

    measurable = held_out is not None or stage.data.arithmetic is not None or prompts is not None
    return Evaluation(measure, stage.eval.every) if measurable else None


def _open_mlflow(recipe: Recipe, folder: Path, place: str) -> MlflowLog | None:
    """Open the stage's MLflow run on rank 0; an error there is raised on every rank."""
    tracking, opened = recipe.tracking, []
    if not tracking.mlflow:
        return None

    def begin() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        uri, run_id_file = tracking.uri or sqlite_uri(recipe.run.out), folder / "mlflow-run-id"
        name = f"{recipe.run.name}/{place}" if place else recipe.run.name
        parameters, tags = flat(recipe.parameters()), recipe.run.tags
        opened.append(MlflowLog(uri, tracking.experiment, name, run_id_file, parameters=parameters, tags=tags))

    on_first_rank(begin)
    return opened[0] if opened else None


def _export(
    model: MullForCausalLM, companion: nn.Module | None, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> None:
    """Write the whole model, its backbone and the value head. All ranks call this, and rank 0 writes.

    Raises:
        RuntimeError: it cannot be written, such as to a full disk. What was there before stays, and nothing half-written does.
    """
    state = full_state_dict(model)
    value_head = {} if companion is None else full_state_dict(companion)
    if rank() > 0:
        return
    staging = folder / STAGING
    try:
        for name, skeleton in _skeletons(model, state).items():
            skeleton.save_pretrained(staging / name)
            add_engine_keys(staging / name)
            with TokenizersErrors():
                tokenizer.save_pretrained(staging / name)
        if value_head:
            save_file(value_head, staging / "model" / "value_head.safetensors")
        for name in ("trunk", "model"):
            storage.publish(staging / name, folder / name)
    except (OSError, SafetensorError) as error:
        raise RuntimeError(
            f"The trained model could not be written to {folder}: {error}. Its checkpoints are intact: make room on the disk, "
            "and resume the run."
        ) from error
    finally:
        _remove_unfinished(folder)


def _remove_unfinished(folder: Path) -> None:
    """Remove what a killed export left: its folder, or files of the safetensors library in those of earlier versions."""
    storage.remove_tree(str(folder / STAGING))
    for name in ("model", "trunk"):
        for file in (folder / name).glob(".tmp??????"):
            file.unlink()


def _skeletons(model: MullForCausalLM, state: Mapping[str, Tensor]) -> dict[str, PreTrainedModel]:
    """What is saved, by the name of its folder: the whole model and its backbone, with the weights `state`."""
    with torch.device("meta"):
        whole = MullForCausalLM(model.config)
        backbone = AutoModelForCausalLM.from_config(model.config.get_text_config())
    trunk = {name: state[name] for name in backbone.state_dict()}
    for skeleton, weights in ((whole, state), (backbone, trunk)):
        skeleton.load_state_dict(weights, assign=True)
        skeleton.tie_weights()
        skeleton.generation_config = model.generation_config
    return {"model": whole, "trunk": backbone}


def _try_export(model: MullForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    """Save everything but the weights in a temporary folder, to find before the training what would fail after it.

    Raises:
        ValueError: a configuration that transformers refuses to save.
    """
    state = {name: tensor.to("meta") for name, tensor in model.state_dict().items()}
    with tempfile.TemporaryDirectory() as folder:
        for skeleton in _skeletons(model, state).values():
            try:
                skeleton.config.save_pretrained(folder)
                skeleton.generation_config.save_pretrained(folder)
            except ValueError as error:
                raise ValueError(
                    f"The trained model could not be saved: {error} Correct config.json or generation_config.json of the "
                    "checkpoint."
                ) from None
        tokenizer.save_pretrained(folder)


def _check_writable(folder: Path) -> None:
    """Refuse a run whose result could not be written; nothing stays on the disk."""
    for place in (folder / "model", folder / "trunk"):
        try:
            with tempfile.TemporaryFile(dir=next(path for path in (place, *place.parents) if path.exists())):
                pass
        except OSError as error:
            raise OSError(
                f"The trained model could not be written to {place}: {error}. Choose another run.out."
            ) from None


def estimate_recipe(recipe: Recipe) -> str:
    """Check everything that can be checked without the weights, and say what the run will cost.

    Data is read and packed, the tokenizer loaded or trained, the model built without its weights, and saved without them in a
    temporary folder.

    Returns:
        A table per stage.

    Raises:
        ValueError, OSError, RuntimeError: as in `run_recipe`.
    """
    with session():
        on_first_rank(partial(_check_writable, recipe.run.out / recipe.run.name))
        prepared, stages = prepare(recipe), recipe.schedule()
        model = meta_model(recipe.model, prepared.tokenizer)
        _adopt_ends(model, prepared.tokenizer)
        on_first_rank(partial(_try_export, model, prepared.tokenizer))
        for stage in stages:
            _check_stage(stage, model)
        rewards = build_rewards(recipe, prepared, model)
        for reward in rewards:
            if isinstance(reward, ProgramReward):
                with reward:  # refused where the sandbox lacks a layer
                    pass
        with torch.device("meta"):
            objectives = build_objectives(recipe, prepared, model, meta_model, rewards)
        rows: list[tuple[str, str]] = []
        savings: list[Saving] = []
        for stage, data, objective in zip(stages, prepared.stages, objectives, strict=True):
            if len(stages) > 1:
                rows += [("stage", f"{stage.name}, {stage.train.algo}")]
            found, described = _estimate_stage(recipe, stage, data, model, objective)
            rows += described
            config = _checkpoints(recipe.checkpoint, "" if stage is stages[-1] else str(stage.name))
            savings.append(Saving(config, stage.train.steps, found.memory.optimizer * world_size()))
        rows += disk_rows(model, objectives[-1].companion, savings)
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:{width}}  {value}" for name, value in rows)


def _estimate_stage(
    recipe: Recipe, stage: Stage, data: StageData, model: MullForCausalLM, objective: Objective
) -> tuple[Estimate, list[tuple[str, str]]]:
    precision = resolve_precision(stage.train.precision, device())
    schedule = _schedule(stage, data, objective, precision)
    check_length("A row", schedule.length, model.config.get_text_config())
    sharding, companion = recipe.distributed, objective.companion
    chosen = stage.train.trainable if objective.trains is None else objective.trains
    with frozen_except(model, chosen) as trainable:
        found = estimate(
            model, stage.train, schedule, distributed=sharding, companion=companion, reference=objective.reference
        )
    rows = [*found.rows(), *_plan_rows(stage, data, found, peak_flops(device(), precision))]
    if isinstance(objective, Align):
        rows.append(("upper bound", "the whole model is counted, and align runs the mixers of its layers only"))
    if isinstance(objective, Distill) and (cache := objective.predictions) is not None:
        done = f"{cache.n_recorded:,} of {cache.identity.rows:,} rows recorded"
        rows.append(("teacher's predictions", f"{done}, {in_bytes(cache.size)} on the disk when complete"))
    if chosen != "all":
        rows += [(f"trains {name}", f"{count:,}") for name, count in summary(trainable).items()]
    return found, rows


def _schedule(stage: Stage, data: StageData, objective: Objective, precision: str) -> Schedule:
    rows, length, settings = stage.data.batch_size, stage.data.length, stage.settings
    samples = isinstance(settings, GRPOSection)
    if samples:
        batches = data.batches
        prompt = batches.longest if isinstance(batches, PromptBatches) else arithmetic_task(stage).prompt_length
        rows, length = rows * settings.group_size, prompt + settings.max_new_tokens
    sampling = stage.loss.iterations
    return Schedule(
        rows=rows,
        length=length,
        accumulate=stage.train.accumulate,
        max_iterations=sampling.maximum,
        mean_iterations=sampling.average(),
        backprop_iterations=sampling.backprop_iterations,
        precision=precision,
        checkpointing=stage.train.gradient_checkpointing,
        forward_passes=int(samples or (isinstance(objective, WeightedMTP) and objective.needs_whole_step)),
        n_heads=_trained_heads(stage),
        packed=not samples,
        world_size=world_size(),
    )


def _plan_rows(stage: Stage, data: StageData, found: Estimate, peak: float) -> Iterator[tuple[str, str]]:
    """Data and time of a stage, as text."""
    if data.rows is not None:
        yield "rows to train on", f"{len(data.rows):,} of {stage.data.length:,} tokens"
    if data.held_out is not None:
        yield "rows held out", f"{len(data.held_out):,}"
    yield "tokens per step", f"{found.tokens_per_step:,}"
    if (steps := stage.train.steps) is None:
        yield "length", f"{stage.train.max_seconds:,} seconds"
        return
    yield "steps", f"{steps:,}"
    if data.rows is not None:
        rows = steps * stage.train.accumulate * stage.data.batch_size
        yield "epochs", f"{rows / len(data.rows):.2f}"
    seconds = steps * found.seconds_per_step(peak, world_size())
    time = f"{seconds:,.0f} seconds ({peak / 1e12:,.2f} TFLOP/s per rank); real runs take longer"
    yield "time at full use of the peak", time
