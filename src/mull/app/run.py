"""Carry a recipe out: read the data, make the model, train it, save it; or say what that would cost.

The same on one process (``mull train``) and on several (``torchrun -m mull train``).
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import BaseModel
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from mull.app.build import Loader, load_model, meta_model
from mull.app.prepare import Prepared, arithmetic_task, check_length, prepare
from mull.app.recipe import NEXT_TOKEN, ModelSection, Recipe
from mull.data.sampler import ShuffledBatches
from mull.decoding.sample import sample
from mull.evaluation.cost.training import Estimate, Schedule, estimate, training_flops_per_token
from mull.evaluation.held_out import held_out_losses
from mull.evaluation.rewards import REWARDS
from mull.layers.value_head import ValueHead
from mull.model.causal_lm import MullForCausalLM
from mull.runtime import storage
from mull.runtime.distributed import device, full_state_dict, on_first_rank, rank, session, world_size
from mull.runtime.tracking import MlflowLog, flat, sqlite_uri
from mull.training.loop import METRICS, TrainConfig, TrainResult, train
from mull.training.objectives.base import Objective
from mull.training.objectives.critic import ValueTraining
from mull.training.objectives.evidence import Scorer
from mull.training.objectives.grpo import GroupRelative, GRPOConfig
from mull.training.objectives.iterations import IterationSampling
from mull.training.objectives.next_token import NextToken
from mull.training.objectives.weighted_mtp import WeightedMTP
from mull.training.objectives.weightings import CriticConfig, GradientConfig, Parts, Rho1Config, make_scorer
from mull.training.optimization import peak_flops, resolve_precision

logger = logging.getLogger(__name__)

CRITIC = "critic"
"""Folder of the first stage of critic-wmtp in the run's folder."""

MLFLOW_STATUS = {"finished": "FINISHED", "until": "FINISHED", "sigterm": "KILLED"}


def run_recipe(recipe: Recipe, resume: bool = False) -> TrainResult:
    """Carry out a recipe.

    The run's folder receives ``metrics.jsonl``, checkpoints, and when the training is finished

    * ``model/``: what was trained, heads included, for `mull.from_pretrained` and transformers' Auto classes once mull is
      imported; a value head as ``value_head.safetensors``;
    * ``trunk/``: its backbone, for transformers alone.

    Both hold the tokenizer. ``critic-wmtp`` trains its value head first, with a folder ``critic/`` of the same kind.

    Args:
        recipe: The run.
        resume: Continue from the newest checkpoint.

    Raises:
        ValueError: data, tokenizer and model do not fit each other, or the folder holds another run.
        FileNotFoundError: a path of the data does not exist.
        OSError: no checkpoint of a model where one is named.
        RuntimeError: as in `mull.training.loop.train`; a package is missing; or MLflow cannot be reached.
    """
    with session():
        prepared = prepare(recipe)
        torch.manual_seed(recipe.train.seed)
        model = load_model(recipe.model, prepared.tokenizer)
        nn.Module.to(model, device())
        model.path(recipe.loss.iterations.maximum)
        _announce(recipe, model, device())
        objective = _objective(recipe, prepared, model, load_model)
        folder = recipe.run.out / recipe.run.name
        if recipe.critic is not None:
            result = _train_value_head(recipe, prepared, model, objective, folder, resume)
            if result.stopped != "finished":
                return result
        result = _train(recipe, prepared, model, objective, folder, resume)
        if result.stopped == "finished":
            _export(model, objective.companion, prepared.tokenizer, folder)
        return result


def _train(
    recipe: Recipe, prepared: Prepared, model: MullForCausalLM, objective: Objective, folder: Path, resume: bool
) -> TrainResult:
    flops = None
    if recipe.grpo is None:  # its steps sample as well
        sampling = recipe.loss.iterations
        flops = training_flops_per_token(
            model, recipe.data.length, _mean_iterations(sampling), sampling.backprop_iterations
        )
    # `train` refuses a folder that holds a run, and that run's MLflow run is none of this one's.
    refused = not resume and (folder / METRICS).exists()
    tracker = None if refused else _open_mlflow(recipe, folder)
    status = "FAILED"
    try:
        result = train(
            model,
            objective,
            prepared.batches,
            _train_config(recipe),
            folder,
            evaluate=_evaluation(recipe, prepared),
            eval_every=recipe.eval.every,
            resume=resume,
            checkpoint=recipe.checkpoint,
            distributed=recipe.distributed,
            logs=[] if tracker is None else [tracker],
            flops_per_token=flops,
        )
        status = MLFLOW_STATUS[result.stopped]
    finally:
        if tracker is not None:
            tracker.close(status)
    return result


def _train_value_head(
    recipe: Recipe, prepared: Prepared, model: MullForCausalLM, objective: Objective, folder: Path, resume: bool
) -> TrainResult:
    """First stage of critic-wmtp. A finished one is loaded and not repeated."""
    assert recipe.critic is not None
    assert isinstance(objective.companion, ValueHead)
    assert prepared.outcomes is not None
    stage = recipe.critic.pretrain
    changes = {"steps": stage.steps, "max_seconds": None, "peak_lr": stage.peak_lr}
    url = recipe.checkpoint.url
    checkpoint = recipe.checkpoint.model_copy(
        update={"url": None if url is None else storage.join(url, CRITIC), "keep_last": 1}
    )
    return train(
        model,
        ValueTraining(_only(CriticConfig, recipe.critic), objective.companion),
        ShuffledBatches(prepared.outcomes, recipe.data.batch_size, recipe.train.seed),
        TrainConfig.model_validate({**_train_config(recipe).model_dump(), **changes}),
        folder / CRITIC,
        resume=resume,
        checkpoint=checkpoint,
        distributed=recipe.distributed,
    )


def _train_config(recipe: Recipe) -> TrainConfig:
    return TrainConfig(**recipe.train.model_dump(exclude={"algo"}))


def _mean_iterations(sampling: IterationSampling) -> float:
    if sampling.kind == "fixed":
        return sampling.maximum
    if sampling.kind == "uniform":
        return ((sampling.minimum or 1) + sampling.maximum) / 2
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        draws = [sampling.sample() for _ in range(1000)]
    return sum(draws) / len(draws)


def _objective(recipe: Recipe, prepared: Prepared, model: MullForCausalLM, load: Loader) -> Objective:
    """The loss that the recipe asks for, with whatever further models it takes on the model's device."""
    loss = recipe.loss
    if recipe.train.algo == NEXT_TOKEN:
        return NextToken(loss.iterations)
    scorer = _scorer(recipe, prepared, model, load)
    return WeightedMTP(scorer, loss.iterations, loss.heads, loss.control, recipe.train.seed)


def _scorer(recipe: Recipe, prepared: Prepared, model: MullForCausalLM, load: Loader) -> Scorer:
    def reference(name: str) -> MullForCausalLM:
        section = ModelSection(checkpoint=name, dtype=recipe.model.dtype)
        return load(section, prepared.tokenizer).eval().requires_grad_(False).to(model.device)

    if (grpo := recipe.grpo) is not None:
        kept_close = None if grpo.reference is None else reference(grpo.reference)
        task = arithmetic_task(recipe)
        config = _only(GRPOConfig, grpo)
        return GroupRelative(config, REWARDS[grpo.reward], [task.eos_id], task.pad_id, kept_close)
    parts: dict[str, Any] = {}
    if recipe.rho1 is not None:
        parts = {"rho1": _only(Rho1Config, recipe.rho1), "reference": reference(recipe.rho1.reference)}
    if recipe.critic is not None:
        head = ValueHead(model.lm_head.in_features).to(model.device, model.dtype)
        parts = {"critic": _only(CriticConfig, recipe.critic), "value_head": head}
    if recipe.gradient is not None:
        aligned = prepared.aligned
        batches = None if aligned is None else ShuffledBatches(aligned, recipe.data.batch_size, recipe.train.seed)
        parts = {"gradient": _only(GradientConfig, recipe.gradient), "held_out": batches}
    return make_scorer(recipe.train.algo, model, Parts(**parts))


S = TypeVar("S", bound=BaseModel)


def _only(kind: type[S], section: BaseModel) -> S:
    """The part of a section that an algorithm reads."""
    return kind(**{name: getattr(section, name) for name in kind.model_fields})


def _announce(recipe: Recipe, model: MullForCausalLM, here: torch.device) -> None:
    """Say what a user may not expect."""
    native = resolve_precision("auto", here)
    if recipe.train.precision == "bf16" and native != "bf16":
        _tell("%s emulates bf16, slower than it computes fp32: train.precision=auto would choose fp32.", here)
    if recipe.train.algo == NEXT_TOKEN and model.mtp_heads is not None:
        _tell("The model's %d heads are kept and not trained: train.algo=%s.", model.mtp_heads.n_heads, NEXT_TOKEN)
    if recipe.train.algo == "baseline-mtp" and model.mtp_heads is None:
        _tell("The model has no heads behind the main one (model.mtp), so baseline-mtp is next-token prediction.")


def _tell(message: str, *details: object) -> None:
    if rank() == 0:
        logger.warning(message, *details)


def _evaluation(recipe: Recipe, prepared: Prepared) -> Callable[[MullForCausalLM], Mapping[str, float]] | None:
    rows, depth = recipe.eval.rows, recipe.loss.iterations.maximum
    if recipe.data.arithmetic is not None:
        task = arithmetic_task(recipe)

        def right_answers(model: MullForCausalLM) -> Mapping[str, float]:
            batch = {name: tensor.to(model.device) for name, tensor in task.prompts(0, rows, train=False).items()}
            answers = sample(
                model,
                batch["input_ids"],
                batch["attention_mask"],
                end_ids=torch.tensor([task.eos_id], device=model.device),
                pad_id=task.pad_id,
                max_new_tokens=task.answer_length,
                iterations=None if model.etd_config is None else depth,
                generator=torch.Generator(model.device).manual_seed(recipe.train.seed),
            )
            return {"right_answers": float(task.reward(answers, batch).mean())}

        return right_answers
    held_out = prepared.held_out
    if held_out is None:
        return None

    def losses(model: MullForCausalLM) -> Mapping[str, float]:
        iterations = None if model.etd_config is None else depth
        return held_out_losses(model, held_out, iterations, batch_size=recipe.data.batch_size, max_rows=rows)

    return losses


def _open_mlflow(recipe: Recipe, folder: Path) -> MlflowLog | None:
    """On rank 0; what goes wrong there is raised on every rank."""
    tracking, opened = recipe.tracking, []
    if not tracking.mlflow:
        return None

    def begin() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        log = MlflowLog(
            tracking.uri or sqlite_uri(recipe.run.out),
            tracking.experiment,
            recipe.run.name,
            folder / "mlflow-run-id",
            parameters=flat(recipe.model_dump(mode="json")),
            tags=recipe.run.tags,
        )
        opened.append(log)

    on_first_rank(begin)
    return opened[0] if opened else None


def _export(
    model: MullForCausalLM, companion: nn.Module | None, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> None:
    """Write the whole model, its backbone and the value head; all ranks call this, and rank 0 writes."""
    state = full_state_dict(model)
    value_head = {} if companion is None else full_state_dict(companion)
    if rank() > 0:
        return
    text_config = model.config.get_text_config()
    trunk = {name: tensor for name, tensor in state.items() if not name.startswith("mtp_heads.")}
    with torch.device("meta"):
        whole, backbone = MullForCausalLM(model.config), AutoModelForCausalLM.from_config(text_config)
    for name, skeleton, weights in (("model", whole, state), ("trunk", backbone, trunk)):
        skeleton.load_state_dict(weights, assign=True)
        skeleton.tie_weights()
        skeleton.generation_config = model.generation_config
        skeleton.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    if value_head:
        save_file(value_head, folder / "model" / "value_head.safetensors")


def estimate_recipe(recipe: Recipe) -> str:
    """Check everything that can be checked without the weights, and say what the run would cost.

    Data is read and packed, the tokenizer loaded or trained, and the model built without its weights.

    Returns:
        A table.

    Raises:
        ValueError, OSError, RuntimeError: as in `run_recipe`.
    """
    with session():
        prepared = prepare(recipe)
        model = meta_model(recipe.model, prepared.tokenizer)
        _announce(recipe, model, device())
        model.path(recipe.loss.iterations.maximum)
        precision = resolve_precision(recipe.train.precision, device())
        schedule = _schedule(recipe, precision)
        check_length("A row", schedule.length, model.config.get_text_config())
        with torch.device("meta"):
            scorer = None if recipe.train.algo == NEXT_TOKEN else _scorer(recipe, prepared, model, meta_model)
        if scorer is not None:
            beside = scorer.whole_step or recipe.loss.control != "none" or recipe.grpo is not None
            schedule = replace(schedule, forward_passes=int(beside))
        found = estimate(
            model,
            recipe.train,
            schedule,
            distributed=recipe.distributed,
            companion=None if scorer is None else scorer.companion,
            reference=None if scorer is None else scorer.reference,
        )
        rows = [*found.rows(), *_plan_rows(recipe, prepared, found, peak_flops(device(), precision))]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:{width}}  {value}" for name, value in rows)


def _schedule(recipe: Recipe, precision: str) -> Schedule:
    rows, length = recipe.data.batch_size, recipe.data.length
    if recipe.grpo is not None:
        rows, length = rows * recipe.grpo.group_size, arithmetic_task(recipe).prompt_length + recipe.grpo.max_new_tokens
    sampling = recipe.loss.iterations
    return Schedule(
        rows=rows,
        length=length,
        accumulate=recipe.train.accumulate,
        max_iterations=sampling.maximum,
        mean_iterations=_mean_iterations(sampling),
        backprop_iterations=sampling.backprop_iterations,
        precision=precision,
        checkpointing=recipe.train.gradient_checkpointing,
        packed=recipe.grpo is None,
        world_size=world_size(),
    )


def _plan_rows(recipe: Recipe, prepared: Prepared, found: Estimate, peak: float) -> Iterator[tuple[str, str]]:
    """Data and time of the run, as text."""
    if prepared.train is not None:
        yield "rows to train on", f"{len(prepared.train):,} of {recipe.data.length:,} tokens"
    if prepared.held_out is not None:
        yield "rows held out", f"{len(prepared.held_out):,}"
    yield "tokens per step", f"{found.tokens_per_step:,}"
    if (steps := recipe.train.steps) is None:
        yield "length", f"{recipe.train.max_seconds:,} seconds"
        return
    yield "steps", f"{steps:,}"
    if prepared.train is not None:
        rows = steps * recipe.train.accumulate * recipe.data.batch_size
        yield "epochs", f"{rows / len(prepared.train):.2f}"
    seconds = steps * found.seconds_per_step(peak, world_size())
    yield (
        "time at full use of the peak",
        f"{seconds:,.0f} seconds ({peak / 1e12:,.2f} TFLOP/s per rank); real runs take longer",
    )
