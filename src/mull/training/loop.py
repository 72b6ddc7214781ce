"""The training loop: one for every objective, on one device or many.

An optimizer step computes the gradient of the mean loss (`mull.training.step`), clips, updates and logs. Everything that a step
depends on is in the checkpoint: weights, optimizer, objective, random generators, number of the next batch. So a resumed run
continues bit for bit.
"""

import contextlib
import json
import logging
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal, Protocol, Self

import numpy as np
import torch
from pydantic import BaseModel, Field, field_validator, model_validator
from torch import Tensor, nn

from mull.data.sampler import ShuffledBatches
from mull.model.causal_lm import MullForCausalLM
from mull.runtime import storage
from mull.runtime.arguments import require, require_callable
from mull.runtime.checkpoint import CheckpointConfig, CheckpointWriter, latest, load_checkpoint, stored_tensors
from mull.runtime.distributed import gather_objects, on_first_rank, rank, same_everywhere, world_size
from mull.runtime.progress import Progress
from mull.runtime.storage import exclusive, is_local, local_path, redact
from mull.runtime.timing import synchronize
from mull.runtime.tracking import MetricsLog, flat
from mull.training.content import batches_content, module_digest
from mull.training.objectives.base import Batch, Objective
from mull.training.optimization import (
    OptimizationConfig,
    Precision,
    build_optimizers,
    learning_rate_factor,
    peak_flops,
    resolve_precision,
    update,
)
from mull.training.state import (
    first_not_finite,
    rng_state,
    rng_tensors,
    set_rng_state,
    set_rng_tensors,
    training_tensors,
)
from mull.training.step import (
    DistributedConfig,
    WrongStepError,
    accumulate,
    make_stage,
    mean_metrics,
    normalise,
    total_weight,
)
from mull.training.trainable import CHOICES, frozen_except

logger = logging.getLogger(__name__)

Batches = Callable[[int], Batch]
"""From the number of a batch, from 0, to the batch. A pure function: ranks and a resumed run only need the number."""

Record = dict[str, Any]
"""One line of the metrics."""

METRICS = "metrics.jsonl"
CHECKPOINTS = "checkpoints"
OWN = "objective."
"""Prefix of the objective's tensors in a checkpoint."""

CONTENT = "content."
"""Prefix of digests in the configuration that a checkpoint stores."""

DEFAULT_CHECKPOINTS = CheckpointConfig()
DEFAULT_SHARDING = DistributedConfig()
MAX_SEED = 2**32 - 2**20
"""Numpy's global generator takes seeds below 2^32, and every rank adds its number."""

REPORTING = {"log_every"}
"""Fields of `TrainConfig` that do not influence the weights and may change when a run resumes."""


class MetricSink(Protocol):
    """Where records go, besides ``metrics.jsonl``. The caller of `train` opens and closes it."""

    def log(self, record: Mapping[str, Any]) -> None:
        """Take one record."""


@dataclass(frozen=True)
class Evaluation:
    """Measure the model during training."""

    evaluate: Callable[[MullForCausalLM], Mapping[str, float]]
    """Called on every rank, with the model in evaluation mode, without gradient or autocast; its numbers are recorded as
    ``eval_<name>``. It may draw random numbers without changing the training. All ranks must run equally many layers."""

    every: int | None = None
    """Steps between two evaluations; None evaluates after the last step only."""


class TrainConfig(OptimizationConfig):
    """What to train, how long, with which optimizer and schedule, and at which precision."""

    steps: int | None = Field(default=None, ge=1)
    """Optimizer steps of the run. Give either this or `max_seconds`."""

    max_seconds: float | None = Field(default=None, gt=0)
    """Time budget in seconds of training steps, for comparisons at equal time; evaluation and saving are not counted. The
    schedule follows the elapsed share of the budget, so such a run is not reproducible bit for bit."""

    trainable: str | tuple[str, ...] = "all"
    """Which parameters of the model are trained: ``all`` that require a gradient; ``heads``, the extra heads; ``new``, everything
    that mull added to the backbone; or a list of patterns of names, such as ``model.layers.2?.*``. The others are frozen: they
    have no gradient and no optimizer state. What an objective trains beside the model is always trained."""

    accumulate: int = Field(default=1, ge=1, le=1_000_000)
    """Micro-batches per optimizer step, over all ranks. Each rank runs an equal share, and the training is the same on any number
    of ranks. Step ``s`` (from 0) starts at batch ``s · accumulate``; ranks take the batches in turns."""

    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass instead of storing them."""

    seed: int = Field(default=0, ge=0, le=MAX_SEED)
    """Seed of the global random generators of torch, numpy and Python, set at the start of the run; rank r uses ``seed + r``."""

    log_every: int = Field(default=10, ge=1)
    """Steps between two records; the first, the last and evaluated steps are always recorded. A record describes its own step."""

    @model_validator(mode="after")
    def _check_length(self) -> Self:
        if (self.steps is None) == (self.max_seconds is None):
            raise ValueError(
                f"steps={self.steps} and max_seconds={self.max_seconds}: give exactly one of them, it is the length of the run."
            )
        return self

    @field_validator("trainable")
    @classmethod
    def _check_trainable(cls, trainable: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if not trainable or (isinstance(trainable, str) and trainable not in CHOICES):
            raise ValueError(
                f"{trainable!r} must be one of {', '.join(CHOICES)}, or a list of patterns of parameter names"
            )
        return trainable


@dataclass
class TrainResult:
    """What a run did; of a resumed run, including what came before."""

    step: int
    """Optimizer steps done."""

    seconds: float
    """Time spent in training steps; evaluation and saving are not counted."""

    tokens: int
    """Input tokens consumed by all ranks, without padding that an attention mask ``[B, T]`` marks."""

    history: list[Record]
    """The records, as in ``metrics.jsonl``; ranks other than 0 lack those from before a resumption."""

    stopped: Literal["finished", "until", "sigterm"]
    """Why the run ended: it reached its length, `until` returned True, or a process received SIGTERM."""

    precision: Precision
    """Precision of the computation."""

    terminated: bool = False
    """Whether a process received SIGTERM, if only in the last step of a finished run."""


class _Run:
    """What the steps of one run share; made by all ranks alike."""

    def __init__(
        self,
        model: MullForCausalLM,
        objective: Objective,
        batches: Batches,
        config: TrainConfig,
        distributed: DistributedConfig,
        flops_per_token: Callable[[], float] | float | None,
        content: Mapping[str, Any] | None,
    ) -> None:
        if config.accumulate % world_size():
            raise ValueError(
                f"train.accumulate={config.accumulate} micro-batches per step cannot be shared evenly by {world_size()} "
                f"ranks: use a multiple of {world_size()}, or another number of ranks."
            )
        self.batches, self.config, self.flops_per_token = batches, config, flops_per_token
        self.device = next(model.parameters()).device
        self.precision = resolve_precision(config.precision, self.device)
        ranks = "" if world_size() == 1 else f" and {world_size() - 1} other ranks"
        _tell("Training on %s%s in %s (precision=%s).", self.device, ranks, self.precision, config.precision)
        self.configuration = run_configuration(model, objective, config, distributed)
        if content is not None:
            found = flat({**content, **_reference_content(objective)})
            self.configuration |= {CONTENT + name: value for name, value in found.items()}
        self.stage = make_stage(model, objective, distributed)
        self.stage.zero_grad()  # the caller may have left gradients in the model
        _seed(config.seed + rank())
        self.optimizers = build_optimizers(self.stage.model, config, self.stage.companion)
        self.step, self.seconds, self.tokens = 0, 0.0, 0
        self.asked_to_terminate = False  # this process received SIGTERM
        self.terminated = False  # any process has; updated at the end of a step, on all ranks alike

    @property
    def finished(self) -> bool:
        """Whether the run has reached its length."""
        return elapsed_share(self.config, self.step, self.seconds) >= 1

    def next_batches(self) -> dict[int, Batch]:
        """This rank's batches of the next step by number, on the device."""
        first = self.step * self.config.accumulate
        return {
            number: {name: tensor.to(self.device, non_blocking=True) for name, tensor in self.batches(number).items()}
            for number in range(first + rank(), first + self.config.accumulate, world_size())
        }

    def tensors(self) -> dict[str, Tensor]:
        """Tensors that the next step depends on, by name; not copies, so they can be loaded into."""
        objective = self.stage.objective.state_dict()
        own = {OWN + name: value for name, value in objective.items() if isinstance(value, Tensor)}
        return {**training_tensors(self.stage, self.optimizers), **own}

    def values(self) -> dict[str, Any]:
        """What else the next step depends on, as JSON."""
        objective = self.stage.objective.state_dict()
        plain = {name: value for name, value in objective.items() if not isinstance(value, Tensor)}
        return {"step": self.step, "seconds": self.seconds, "tokens": self.tokens, "objective": plain}

    def not_finite(self) -> str | None:
        """Name of a tensor with a NaN or an infinity on any rank; all ranks together."""
        found = gather_objects(first_not_finite(self.stage, self.optimizers))
        return next((name for name in found if name is not None), None)

    def check_finite(self) -> None:
        """Refuse a state that must not be saved or exported, all ranks together."""
        if (wrong := self.not_finite()) is not None:
            raise RuntimeError(
                f"Training stopped after step {self.step}: {wrong} is not finite, so nothing of this state is saved, and earlier "
                "checkpoints stay as they are. Lower the learning rate and start a new run; a resumed one repeats its steps."
            )

    def save(self, writer: CheckpointWriter) -> None:
        """Save the state, all ranks together."""
        tensors = {**self.tensors(), **rng_tensors(rank())}
        writer.save(self.step, tensors, self.values(), self.configuration)

    def load(self, checkpoint: str) -> None:
        """Restore `save`, all ranks together. A rank without generators in the checkpoint is seeded by its number and step."""
        stored = stored_tensors(checkpoint)
        rng = {name: tensor for name, tensor in rng_tensors(rank()).items() if name in stored}
        tensors = {**self.tensors(), **rng}
        values = load_checkpoint(checkpoint, tensors, self.configuration, CONTENT)
        own = {name.removeprefix(OWN): tensor for name, tensor in tensors.items() if name.startswith(OWN)}
        self.stage.objective.load_state_dict({**values["objective"], **own})
        self.step, self.seconds, self.tokens = values["step"], values["seconds"], values["tokens"]
        if (wrong := self.not_finite()) is not None:
            raise RuntimeError(
                f"{checkpoint} holds values of {wrong} that are not finite. Remove the folder to resume from the previous "
                "checkpoint."
            )
        if rng:
            set_rng_tensors(tensors, rank())
        else:
            _seed(self.config.seed, self.step, rank())


def train(
    model: MullForCausalLM,
    objective: Objective,
    batches: Batches,
    config: TrainConfig,
    out_dir: Path | str | None = None,
    *,
    evaluation: Evaluation | None = None,
    until: Callable[[Record], bool] | None = None,
    resume: bool = False,
    checkpoint: CheckpointConfig = DEFAULT_CHECKPOINTS,
    distributed: DistributedConfig = DEFAULT_SHARDING,
    logs: Sequence[MetricSink] = (),
    flops_per_token: Callable[[], float] | float | None = None,
    content: Mapping[str, Any] | None = None,
) -> TrainResult:
    """Train `model` in place.

    SIGTERM finishes the step, saves and returns. The global random generators are seeded, except when resuming. In a
    `mull.runtime.distributed.session` of several ranks, all call this alike. The model's weights are then shared among the ranks
    (FSDP2) and stay so: `mull.runtime.distributed.full_state_dict` collects them. Only rank 0 writes metrics, prints and logs.

    Args:
        model: Trained where it is, on its device and in its dtype.
        objective: The loss.
        batches: Pure function from the number of a batch to the batch; tensors are moved to the model's device.
        config: Length, trainable parameters, optimizer, schedule, precision and reporting.
        out_dir: Directory for ``metrics.jsonl`` and the checkpoints; ``None`` writes no metrics.
        evaluation: Measures the model during training.
        until: Called with the record of every step; True on rank 0 ends the run.
        resume: Continue from the newest checkpoint, or start when there is none.
        checkpoint: Where and how often to save; without a URL in ``checkpoints`` of `out_dir`, and not at all without `out_dir`.
        distributed: How ranks share the weights.
        logs: Receive the records, besides ``metrics.jsonl``.
        flops_per_token: FLOPs of training on one token, forward and backward, or a function that returns them at each step.
            Records then have ``mfu``, the share of the devices' `mull.training.optimization.peak_flops`.

        content: What decides the result besides the settings, as JSON, such as digests of the data (`mull.training.content`). A
            resumed run must have the same. None takes those of `batches` if it is a `ShuffledBatches`.

    Returns:
        Steps, seconds, tokens, records, and why the run ended.

    Raises:
        TypeError: an argument of another type.
        ValueError: `out_dir` holds another run and `resume` is False, the checkpoint belongs to another configuration, nothing
            is trainable or what is trainable does not influence the loss, `resume` without a place of checkpoints, or
            micro-batches that ranks cannot share.
        RuntimeError: a loss or gradient is not finite, or no micro-batch of a step has a target (the weights are those of
            the step before, and every rank raises); weights or optimizer state to be saved or returned are not finite; a
            checkpoint is damaged or cannot be written; another process trains there.
    """
    require("model", model, nn.Module, "a model of mull")
    require("objective", objective, Objective, "an objective of make_objective")
    require_callable("batches", batches, "a function from the number of a batch to the batch")
    require("config", config, TrainConfig, "a TrainConfig")
    require("checkpoint", checkpoint, CheckpointConfig, "a CheckpointConfig")
    require("distributed", distributed, DistributedConfig, "a DistributedConfig")
    directory = None if out_dir is None else storage.local_path(out_dir)
    url = checkpoint.url or (None if directory is None else str(directory / CHECKPOINTS))
    with contextlib.ExitStack() as stack:
        if url is not None and is_local(url):
            place = local_path(url)
            on_first_rank(lambda: stack.enter_context(exclusive(place)))
        source = on_first_rank(lambda: checkpoint_to_resume(directory, url, resume))
        stack.enter_context(frozen_except(model, config.trainable if objective.trains is None else objective.trains))
        if url is None:
            content = None  # nothing is saved
        elif content is None:
            content = {"data": batches_content(batches)} if isinstance(batches, ShuffledBatches) else {}
        run = _Run(model, objective, batches, config, distributed, flops_per_token, content)
        if source is not None:
            run.load(source)
            _tell("Resuming from %s.", source)
        log = stack.enter_context(contextlib.closing(MetricsLog(_metrics_file(directory), run.step)))
        stack.enter_context(_sigterm(run))
        writer = None
        if url is not None:
            writer = CheckpointWriter(url, checkpoint.keep_last, checkpoint.asynchronous)
            stack.callback(writer.close)
        stack.enter_context(_training_mode(run))
        progress = stack.enter_context(Progress(config.steps, "step", done=run.step))
        sinks = [log, *(logs if rank() == 0 else ())]
        stopped = _run_to_end(run, sinks, progress, evaluation, until, writer, checkpoint.every)
    return TrainResult(run.step, run.seconds, run.tokens, log.records, stopped, run.precision, run.terminated)


def _run_to_end(
    run: _Run,
    sinks: Sequence[MetricSink],
    progress: Progress,
    evaluation: Evaluation | None,
    until: Callable[[Record], bool] | None,
    writer: CheckpointWriter | None,
    save_every: int | None,
) -> Literal["finished", "until", "sigterm"]:
    """Steps, and what happens between them."""
    finished = run.finished
    while not finished:
        record = _optimizer_step(run)
        finished = run.finished
        evaluated = finished or (evaluation is not None and _is_due(run.step, evaluation.every))
        if evaluation is not None and evaluated:
            record |= {f"eval_{name}": value for name, value in _evaluate(run, evaluation.evaluate).items()}
        reached = until is not None and bool(same_everywhere(int(until(record))))
        last = finished or reached or run.terminated
        if last or evaluated or run.step == 1 or _is_due(run.step, run.config.log_every):
            for sink in sinks:
                sink.log(record)
        progress.advance(text=_shown(record, run.tokens / run.seconds), last=last)
        saves = last or (writer is not None and _is_due(run.step, save_every))
        if saves:
            run.check_finite()
        if writer is not None:
            writer.poll()
            if saves:
                run.save(writer)
        if last and not finished:
            return "until" if reached else "sigterm"
    return "finished"


def _optimizer_step(run: _Run) -> Record:
    """One step: accumulate, divide by the global weight, clip, update."""
    started = time.perf_counter()
    config = run.config
    factor = learning_rate_factor(config, run.step, elapsed_share(config, run.step, run.seconds))
    trained = [p for optimizer in run.optimizers for group in optimizer.param_groups for p in group["params"]]
    parts, plan, seen = accumulate(run.stage, run.next_batches(), run.precision)
    try:
        weight = total_weight(parts)
        metrics = mean_metrics(parts) | run.stage.objective.end_step(plan, seen)
        norm = normalise(trained, parts, config.clip_norm)
    except WrongStepError as error:
        run.stage.zero_grad()
        run.check_finite()  # otherwise the cause is in an earlier update
        raise RuntimeError(
            f"Training stopped in step {run.step + 1}, before the weights changed: {error}. Look at the data of that step, "
            "or lower the learning rate and start a new run; a resumed one repeats its steps."
        ) from None
    update(run.optimizers, factor)
    tokens = sum(part.tokens for part in parts)
    synchronize(run.device)  # a GPU may still have work of this step in its queue
    # The clock of rank 0 counts, and all ranks learn here whether one was asked to terminate.
    reports = gather_objects((time.perf_counter() - started, run.asked_to_terminate))
    seconds, _ = reports[0]
    run.terminated = any(asked for _, asked in reports)
    run.step += 1
    run.seconds += seconds
    run.tokens += tokens
    return {
        "step": run.step,
        **metrics,
        "loss": sum(part.loss for part in parts) / weight,
        "grad_norm": norm,
        "lr": config.peak_lr * factor,
        "tokens": run.tokens,
        "seconds": run.seconds,
        "tokens_per_second": tokens / seconds,
        **_utilisation(run, tokens / seconds),
    }


def _utilisation(run: _Run, tokens_per_second: float) -> dict[str, float]:
    if run.flops_per_token is None:
        return {}
    flops = run.flops_per_token() if callable(run.flops_per_token) else run.flops_per_token
    return {"mfu": flops * tokens_per_second / (peak_flops(run.device, run.precision) * world_size())}


def _is_due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def _shown(record: Record, tokens_per_second: float) -> str:
    """What the user sees of a step; the speed is that of the whole run."""
    losses = "".join(f"{name} {value:.4f}, " for name, value in losses_of(record).items())
    utilisation = f", MFU {record['mfu']:.1%}" if "mfu" in record else ""
    return f"{losses}{tokens_per_second:,.0f} tokens/s{utilisation}"


def losses_of(record: Record) -> dict[str, float]:
    """Losses of a step, as far as it has them: all heads with their weights, the main head alone, and that on held-out rows."""
    names = {"loss": "loss", "main head": "head0_loss", "held out": "eval_loss"}
    return {name: record[key] for name, key in names.items() if key in record}


def _evaluate(run: _Run, evaluate: Callable[[MullForCausalLM], Mapping[str, float]]) -> Mapping[str, float]:
    """Evaluate, and restore mode and random generators, so the training does not change."""
    rng = rng_state()
    run.stage.eval()
    with torch.no_grad():
        values = run.stage.evaluate(evaluate)
    run.stage.train()
    set_rng_state(rng)
    return values


def elapsed_share(config: TrainConfig, step: int, seconds: float) -> float:
    """Share of the run that is done, from 0; 1 or more ends it. It counts steps, or seconds if there is a time budget."""
    if config.max_seconds is not None:
        return seconds / config.max_seconds
    assert config.steps is not None
    return step / config.steps


def _seed(*numbers: int) -> None:
    """Seed the global random generators, with a number or a mixture of several."""
    seed = numbers[0] if len(numbers) == 1 else int(np.random.SeedSequence(numbers).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def run_configuration(
    model: nn.Module, objective: Objective, config: TrainConfig, distributed: DistributedConfig
) -> dict[str, Any]:
    """Settings that a checkpoint shares with the run that resumes it, flat: ``train.peak_lr``, ``model.hidden_size``, ….

    The settings of an objective are its public attributes, except modules. Left out is what does not influence the weights, what
    only says where something comes from, and what the library may have changed (version and path of the model's configuration).
    """
    # Checkpoints of versions that always trained everything do not store `trainable`.
    left_out = REPORTING | ({"trainable"} if config.trainable == "all" else set())
    settings: dict[str, Any] = {"train": config.model_dump(mode="json", exclude=left_out)}
    settings["distributed"] = {"param_dtype": distributed.param_dtype}
    settings["objective"] = {"name": type(objective).__name__}
    for name, value in vars(objective).items():
        if isinstance(value, nn.Module) or name.startswith("_"):
            continue
        if isinstance(value, BaseModel):
            value = value.model_dump(mode="json", exclude=set(getattr(value, "sources", ())))
        settings["objective"][name] = value
    model_config = getattr(model, "config", None)
    if model_config is not None:
        settings["model"] = json.loads(model_config.to_json_string(use_diff=False))
        for name in ("transformers_version", "_name_or_path"):
            settings["model"].pop(name, None)
    return flat(settings)


def _reference_content(objective: Objective) -> dict[str, str]:
    """Digest of the frozen model that the loss runs, if there is one."""
    return {} if objective.reference is None else {"reference": module_digest(objective.reference)}


def checkpoint_to_resume(directory: Path | None, url: str | None, resume: bool) -> str | None:
    """The checkpoint that a run in these places continues from; None starts from the beginning.

    Raises:
        ValueError: the places hold a run and `resume` is False, or `resume` without a place of checkpoints.
    """
    if url is None and resume:
        raise ValueError(
            "resume=True needs out_dir or checkpoint.url: the place where the run to continue has its checkpoints."
        )
    checkpoint = None if url is None else latest(url)
    has_metrics = directory is not None and (directory / METRICS).exists()
    if not resume and (checkpoint is not None or has_metrics):
        raise ValueError(
            f"{directory if has_metrics else url} already holds a run. Pass resume=True (--resume) to continue it, "
            "choose another place, or remove it."
        )
    return checkpoint


def _metrics_file(directory: Path | None) -> Path | None:
    """The file that rank 0 writes; other ranks keep their records in memory."""
    if directory is None or rank() > 0:
        return None
    directory.mkdir(parents=True, exist_ok=True)
    return directory / METRICS


@contextlib.contextmanager
def _training_mode(run: _Run) -> Iterator[None]:
    """Training mode, with gradient checkpointing if configured; both are undone at the end."""
    model, stage = run.stage.model, run.stage
    was_training = model.training
    enable = run.config.gradient_checkpointing and not model.is_activation_checkpointing
    if enable:
        model.activation_checkpointing_enable({"use_reentrant": False})
    stage.train()
    try:
        yield
    finally:
        stage.train(was_training)
        stage.free()
        if enable:
            model.activation_checkpointing_disable()


@contextlib.contextmanager
def _sigterm(run: _Run) -> Iterator[None]:
    """Remember SIGTERM instead of ending at once. Only the main thread may install a handler; other threads change nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def note(_signal: int, _frame: FrameType | None) -> None:
        run.asked_to_terminate = True

    previous = signal.signal(signal.SIGTERM, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _tell(message: str, *details: object) -> None:
    """Log on rank 0."""
    if rank() == 0:
        logger.info(message, *(redact(str(detail)) for detail in details))
