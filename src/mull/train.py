"""The training loop: one for every objective.

An optimizer step accumulates the summed losses of its micro-batches, divides the gradient by their total weight once, clips,
steps and logs. Everything that a step depends on (weights, optimizer, objective, random generators, number of the next batch)
is in the checkpoint, so a resumed run continues bit for bit.
"""

import contextlib
import json
import logging
import math
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn
from tqdm import tqdm

from mull.checkpoint import latest, load_checkpoint, rng_state, save_checkpoint, set_rng_state
from mull.objectives.base import Batch, Objective
from mull.tracking import MetricsLog

if TYPE_CHECKING:
    from mull.model import MullForCausalLM

logger = logging.getLogger(__name__)

Batches = Callable[[int], Batch]
"""Number of a batch, from 0, to the batch: a pure function, so that a resumed run only needs the number."""

Record = dict[str, Any]
"""One line of the metrics."""

METRICS = "metrics.jsonl"
PRINT_EVERY_SECONDS = 10.0
"""Pause between the progress lines of a run without a terminal."""

REPORTING = {"log_every", "eval_every", "save_every", "keep_last"}
"""Fields of `TrainConfig` that do not influence the weights, and may change between a checkpoint and its resumption."""


class TrainConfig(BaseModel):
    """How long, with which optimizer and schedule, and at which precision to train."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: int | None = Field(default=None, ge=1)
    """Optimizer steps of the run. Give either this or `max_seconds`."""

    max_seconds: float | None = Field(default=None, gt=0)
    """Time budget in seconds of training steps: evaluation and saving are not counted. For comparisons at equal time. The
    schedule then follows the elapsed share of the budget, so such a run is not reproducible bit for bit."""

    accumulate: int = Field(default=1, ge=1)
    """Micro-batches per optimizer step; step ``s`` (from 0) takes batches ``s · accumulate`` and following."""

    optimizer: Literal["adamw", "muon"] = "adamw"
    """``muon`` trains the two-dimensional hidden matrices with Muon, and embeddings, unembedding, norms, biases and
    convolutions with AdamW."""

    peak_lr: float = Field(default=3e-4, gt=0)
    """Learning rate of AdamW after warm-up."""

    muon_lr: float = Field(default=0.02, gt=0)
    """Learning rate of Muon after warm-up, for updates of orthogonal matrices scaled by ``sqrt(max(1, rows / columns))``."""

    weight_decay: float = Field(default=0.1, ge=0)
    """Decoupled weight decay, per unit of learning rate. Embeddings, norms and biases do not decay."""

    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of AdamW's two moving averages."""

    clip_norm: float | None = Field(default=1.0, gt=0)
    """Largest norm of the whole gradient, in nats per unit of weight of a target; ``None`` does not clip."""

    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """Learning rate after warm-up: half a cosine; warm-up, stable, linear decay; or constant."""

    warmup_steps: int = Field(default=0, ge=0)
    """Steps over which the learning rate rises linearly from 0. It multiplies the schedule, which starts at step 0."""

    decay_share: float = Field(default=0.2, gt=0, le=1)
    """Share of the run in which ``wsd`` decays; other schedules do not read it."""

    final_lr_fraction: float = Field(default=0.0, ge=0, le=1)
    """Where ``cosine`` and ``wsd`` end, as a fraction of the peak."""

    precision: Literal["fp32", "bf16", "auto"] = "auto"
    """``bf16`` runs the loss under autocast; the weights keep their type. ``auto`` is bf16 on devices that compute it natively
    (CUDA; CPUs with AVX512-BF16 or AMX), otherwise fp32."""

    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass instead of storing them."""

    seed: int = 0
    """Seed of the global random generators of torch, numpy and Python, set at the start of the run."""

    log_every: int = Field(default=10, ge=1)
    """Steps between two records; the first, the last and evaluated steps are always recorded. A record describes its own step."""

    eval_every: int | None = Field(default=None, ge=1)
    """Steps between two evaluations; ``None`` evaluates after the last step only."""

    save_every: int | None = Field(default=None, ge=1)
    """Steps between two checkpoints; ``None`` saves after the last step only."""

    keep_last: int | None = Field(default=2, ge=1)
    """Checkpoints to keep; ``None`` keeps all."""

    @model_validator(mode="after")
    def _check_length(self) -> Self:
        if (self.steps is None) == (self.max_seconds is None):
            raise ValueError(
                f"steps={self.steps} and max_seconds={self.max_seconds}: give exactly one of them, it is the length of the run."
            )
        return self


@dataclass
class TrainResult:
    """What a run did, a resumed run including what came before."""

    step: int
    """Optimizer steps done."""

    seconds: float
    """Time spent in training steps; evaluation and saving are not counted."""

    tokens: int
    """Input tokens consumed, padding not counted where an attention mask ``[B, T]`` marks it."""

    history: list[Record]
    """The records, as in ``metrics.jsonl``."""

    stopped: Literal["finished", "until", "sigterm"]
    """Why the run ended: its length was reached, `until` said so, or the process was asked to terminate."""

    precision: Literal["fp32", "bf16"]
    """Precision that ran."""


@dataclass
class _Run:
    """Everything the steps of one run share."""

    model: "MullForCausalLM"
    objective: Objective
    batches: Batches
    config: TrainConfig
    optimizers: list[torch.optim.Optimizer]
    device: torch.device
    precision: Literal["fp32", "bf16"]
    configuration: dict[str, Any]
    step: int = 0
    seconds: float = 0.0
    tokens: int = 0
    terminated: bool = field(default=False)

    @property
    def finished(self) -> bool:
        """Whether the run has reached its length."""
        return elapsed_share(self.config, self.step, self.seconds) >= 1

    def state_dict(self) -> dict[str, Any]:
        """All that the next step depends on."""
        return {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "objective": self.objective.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
            "tokens": self.tokens,
            "rng": rng_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict`."""
        self.model.load_state_dict(state["model"])
        for optimizer, stored in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(stored)
        self.objective.load_state_dict(state["objective"])
        self.step, self.seconds, self.tokens = state["step"], state["seconds"], state["tokens"]
        set_rng_state(state["rng"])


def train(
    model: "MullForCausalLM",
    objective: Objective,
    batches: Batches,
    config: TrainConfig,
    out_dir: Path | str | None = None,
    *,
    evaluate: Callable[["MullForCausalLM"], Mapping[str, float]] | None = None,
    until: Callable[[Record], bool] | None = None,
    resume: bool = False,
) -> TrainResult:
    """Train `model` in place.

    SIGTERM finishes the step, saves and returns. The global random generators are seeded, except when resuming.

    Args:
        model: Trained where it is, on its device and in its dtype; parameters that require no gradient stay as they are.
        objective: The loss.
        batches: Number of a batch to the batch, a pure function; tensors are moved to the model's device.
        config: Length, optimizer, schedule, precision and reporting.
        out_dir: Directory for ``metrics.jsonl`` and the checkpoints; ``None`` writes nothing.
        evaluate: Called with the model in evaluation mode, without gradient or autocast; its numbers are recorded as
            ``eval_<name>``. It may draw random numbers without changing the training.
        until: Called with the record of every step; True ends the run.
        resume: Continue from the newest checkpoint in `out_dir`, or start when there is none.

    Returns:
        Steps, seconds, tokens, records, and why the run ended.

    Raises:
        ValueError: `out_dir` holds another run and `resume` is False, the checkpoint belongs to another configuration, nothing
            in the model is trainable, or `resume` without `out_dir`.
        RuntimeError: a loss or gradient is not finite, or no micro-batch of a step has a target (the weights are those of
            the step before); a checkpoint cannot be written.
    """
    directory = None if out_dir is None else Path(out_dir)
    checkpoint = _checkpoint_to_resume(directory, resume)
    run = _start(model, objective, batches, config)
    if checkpoint is not None:
        run.load_state_dict(load_checkpoint(checkpoint, run.configuration))
        logger.info("Resuming from %s.", checkpoint)
    if directory is not None:
        directory.mkdir(parents=True, exist_ok=True)
    with (
        MetricsLog(None if directory is None else directory / METRICS, run.step) as log,
        _training_mode(model, config),
        _sigterm(run),
        _Progress(run) as progress,
    ):
        stopped = _loop(run, log, progress, directory, evaluate, until)
        return TrainResult(run.step, run.seconds, run.tokens, log.records, stopped, run.precision)


def _loop(
    run: _Run,
    log: MetricsLog,
    progress: "_Progress",
    directory: Path | None,
    evaluate: Callable[["MullForCausalLM"], Mapping[str, float]] | None,
    until: Callable[[Record], bool] | None,
) -> Literal["finished", "until", "sigterm"]:
    config = run.config
    finished = run.finished
    while not finished:
        record = _optimizer_step(run)
        finished = run.finished
        evaluated = finished or _is_due(run.step, config.eval_every)
        if evaluate is not None and evaluated:
            record |= {f"eval_{name}": value for name, value in _evaluate(run.model, evaluate).items()}
        reached = until is not None and until(record)
        last = finished or reached or run.terminated
        if last or evaluated or run.step == 1 or _is_due(run.step, config.log_every):
            log.log(record)
        progress.show(record, last)
        if directory is not None and (last or _is_due(run.step, config.save_every)):
            save_checkpoint(directory, run.step, run.state_dict(), run.configuration, config.keep_last)
        if last and not finished:
            return "until" if reached else "sigterm"
    return "finished"


def _optimizer_step(run: _Run) -> Record:
    """One step: accumulate, divide by the global weight, clip, update."""
    started = time.perf_counter()
    config = run.config
    factor = learning_rate_factor(config, run.step, run.seconds)
    numbers = range(run.step * config.accumulate, (run.step + 1) * config.accumulate)
    loss, metrics, tokens = _accumulate(run, numbers)
    grad_norm = _clip(run, numbers)
    for optimizer in run.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
        optimizer.step()
        optimizer.zero_grad()
    seconds = _elapsed(run.device, started)
    run.step += 1
    run.seconds += seconds
    run.tokens += tokens
    return {
        "step": run.step,
        **metrics,
        "loss": loss,
        "grad_norm": grad_norm,
        "lr": config.peak_lr * factor,
        "tokens": run.tokens,
        "seconds": run.seconds,
        "tokens_per_second": tokens / seconds,
    }


def _accumulate(run: _Run, numbers: range) -> tuple[float, dict[str, float], int]:
    """Leave the gradient of the step's mean loss in the parameters.

    Returns:
        Mean loss over all targets of the step, metrics averaged over micro-batches, tokens.
    """
    total_loss, total_weight, tokens = 0.0, 0.0, 0
    metrics: dict[str, float] = {}
    run.objective.begin_step()
    for number in numbers:
        batch = {name: tensor.to(run.device, non_blocking=True) for name, tensor in run.batches(number).items()}
        with torch.autocast(run.device.type, dtype=torch.bfloat16, enabled=run.precision == "bf16"):
            output = run.objective(run.model, batch)
        loss = float(output.sum.detach())
        if not math.isfinite(loss):
            raise _stop(run, f"the loss of batch {number} is {loss}")
        output.sum.backward()
        total_loss += loss
        total_weight += float(output.weight)
        tokens += _count_tokens(batch)
        for name, value in output.metrics.items():
            metrics[name] = metrics.get(name, 0.0) + value / len(numbers)
    if total_weight <= 0:
        raise _stop(run, f"{_named(numbers)} weigh {total_weight} together, so there is nothing to learn from")
    # Once per step, so that the gradient does not depend on how targets fall into micro-batches.
    for gradient in _gradients(run.model):
        gradient.div_(total_weight)
    return total_loss / total_weight, metrics, tokens


def _clip(run: _Run, numbers: range) -> float:
    """Bound the gradient's norm, refuse one that is not finite, and return the norm before clipping."""
    norm = nn.utils.get_total_norm(_gradients(run.model))
    if not torch.isfinite(norm):
        raise _stop(run, f"the norm of the gradient of {_named(numbers)} is {float(norm)}")
    if run.config.clip_norm is not None:
        nn.utils.clip_grads_with_norm_(run.model.parameters(), run.config.clip_norm, norm)
    return float(norm)


def _stop(run: _Run, reason: str) -> RuntimeError:
    """The error that ends a run before the optimizer touches the weights."""
    run.model.zero_grad()
    return RuntimeError(
        f"Training stopped in step {run.step + 1}, before the weights changed: {reason}. Look at the data of that step, "
        "or lower the learning rate and resume from a checkpoint."
    )


def _named(numbers: range) -> str:
    return f"batch {numbers[0]}" if len(numbers) == 1 else f"batches {numbers[0]} to {numbers[-1]}"


def _gradients(model: nn.Module) -> list[Tensor]:
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def _count_tokens(batch: Batch) -> int:
    mask = batch.get("attention_mask")
    return int(mask.sum()) if mask is not None and mask.ndim == 2 else batch["input_ids"].numel()


def _elapsed(device: torch.device, started: float) -> float:
    """Seconds since `started`, with the device's queue drained."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def _is_due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def _evaluate(
    model: "MullForCausalLM", evaluate: Callable[["MullForCausalLM"], Mapping[str, float]]
) -> Mapping[str, float]:
    """Evaluate without leaving a trace in the training: mode and random generators are restored."""
    rng = rng_state()
    model.eval()
    with torch.no_grad():
        values = evaluate(model)
    model.train()
    set_rng_state(rng)
    return values


def elapsed_share(config: TrainConfig, step: int, seconds: float) -> float:
    """Share of the run that is done, from 0; 1 or more ends it. Counts steps, or seconds where there is a time budget."""
    if config.max_seconds is not None:
        return seconds / config.max_seconds
    assert config.steps is not None
    return step / config.steps


def learning_rate_factor(config: TrainConfig, step: int, seconds: float) -> float:
    """Fraction of the peak learning rate in a step.

    Args:
        config: The schedule and the length of the run.
        step: Optimizer steps done before.
        seconds: Training seconds before; read by runs with a time budget.
    """
    share = elapsed_share(config, step, seconds)
    warmup = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    decay = {
        "constant": 0.0,
        "cosine": (1 - math.cos(math.pi * min(share, 1.0))) / 2,
        "wsd": min(max(0.0, (share - 1 + config.decay_share) / config.decay_share), 1.0),
    }[config.schedule]
    return warmup * (1 - decay * (1 - config.final_lr_fraction))


def build_optimizers(model: nn.Module, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """AdamW, or Muon for the hidden matrices and AdamW for the rest.

    Embeddings are the weights of `nn.Embedding` and whatever is tied to them. Weight decay applies to all parameters of two
    or more dimensions but embeddings. Each group keeps its learning rate after warm-up as ``peak_lr``.

    Raises:
        ValueError: no parameter requires a gradient.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trainable:
        raise ValueError("No parameter of the model requires a gradient: unfreeze some before training.")
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    unembedding = id(getattr(getattr(model, "lm_head", None), "weight", None))
    decayed = {id(p) for p in trainable if p.ndim >= 2} - embeddings
    hidden = (
        {id(p) for p in trainable if p.ndim == 2} - embeddings - {unembedding} if config.optimizer == "muon" else set()
    )

    adamw_parameters = [p for p in trainable if id(p) not in hidden]
    groups = [
        {"params": [p for p in adamw_parameters if id(p) in decayed], "weight_decay": config.weight_decay},
        {"params": [p for p in adamw_parameters if id(p) not in decayed], "weight_decay": 0.0},
    ]
    optimizers: list[torch.optim.Optimizer] = []
    if hidden:
        matrices = [p for p in trainable if id(p) in hidden]
        optimizers.append(torch.optim.Muon(matrices, lr=config.muon_lr, weight_decay=config.weight_decay))
    if groups := [group for group in groups if group["params"]]:
        # The default loop over parameters is several times slower on a CPU.
        optimizers.append(torch.optim.AdamW(groups, lr=config.peak_lr, betas=config.betas, fused=True))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def resolve_precision(precision: Literal["fp32", "bf16", "auto"], device: torch.device) -> Literal["fp32", "bf16"]:
    """Replace ``auto`` by what the device computes natively: emulated bf16 is slower than fp32."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        native = bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    else:
        native = False
    return "bf16" if native else "fp32"


def _start(model: "MullForCausalLM", objective: Objective, batches: Batches, config: TrainConfig) -> _Run:
    device = next(model.parameters()).device
    precision = resolve_precision(config.precision, device)
    logger.info("Training on %s in %s (precision=%s).", device, precision, config.precision)
    model.zero_grad()
    random.seed(config.seed)
    np.random.seed(config.seed)
    torch.manual_seed(config.seed)
    return _Run(
        model=model,
        objective=objective,
        batches=batches,
        config=config,
        optimizers=build_optimizers(model, config),
        device=device,
        precision=precision,
        configuration=run_configuration(model, objective, config),
    )


def run_configuration(model: nn.Module, objective: Objective, config: TrainConfig) -> dict[str, Any]:
    """Settings that a checkpoint shares with the run that resumes it, flat: ``train.peak_lr``, ``model.hidden_size``, ….

    The settings of an objective are its public attributes; what it remembers is private, and in its `state_dict`. Where the
    library, and not the user, may have changed a value (version and path of the model's configuration), it is left out.
    """
    settings: dict[str, Any] = {"train": config.model_dump(mode="json", exclude=REPORTING)}
    public = {name: value for name, value in vars(objective).items() if not name.startswith("_")}
    settings["objective"] = {"name": type(objective).__name__} | {
        name: value.model_dump(mode="json") if isinstance(value, BaseModel) else value for name, value in public.items()
    }
    model_config = getattr(model, "config", None)
    if model_config is not None:
        settings["model"] = json.loads(model_config.to_json_string(use_diff=False))
        for name in ("transformers_version", "_name_or_path"):
            settings["model"].pop(name, None)
    return dict(_flat("", settings))


def _flat(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            yield from _flat(f"{prefix}.{name}" if prefix else str(name), inner)
    else:
        yield prefix, value


def _checkpoint_to_resume(directory: Path | None, resume: bool) -> Path | None:
    if directory is None:
        if resume:
            raise ValueError("resume=True needs out_dir: the directory with the checkpoints of the run to continue.")
        return None
    checkpoint = latest(directory)
    if resume:
        return checkpoint
    if checkpoint is not None or (directory / METRICS).exists():
        raise ValueError(
            f"{directory} already holds a run. Pass resume=True to continue it, choose another out_dir, or remove the directory."
        )
    return None


@contextlib.contextmanager
def _training_mode(model: "MullForCausalLM", config: TrainConfig) -> Iterator[None]:
    """Training mode, with gradient checkpointing when asked for; both are undone at the end."""
    was_training = model.training
    enable = config.gradient_checkpointing and not model.is_activation_checkpointing
    if enable:
        model.activation_checkpointing_enable({"use_reentrant": False})
    model.train()
    try:
        yield
    finally:
        model.train(was_training)
        if enable:
            model.activation_checkpointing_disable()


@contextlib.contextmanager
def _sigterm(run: _Run) -> Iterator[None]:
    """Note SIGTERM instead of dying of it. Only the main thread may install a handler; elsewhere nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def note(_signal: int, _frame: FrameType | None) -> None:
        run.terminated = True

    previous = signal.signal(signal.SIGTERM, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


class _Progress:
    """A progress bar on a terminal; elsewhere a line every ten seconds, and one for the last step."""

    def __init__(self, run: _Run) -> None:
        self._run = run
        self._interactive = sys.stderr.isatty()
        self._bar = tqdm(total=run.config.steps, initial=run.step, unit="step", disable=not self._interactive)
        self._printed = -math.inf

    def show(self, record: Record, last: bool) -> None:
        speed = f"{self._run.tokens / self._run.seconds:,.0f} tokens/s"
        if self._interactive:
            self._bar.set_postfix_str(f"loss {record['loss']:.4f}, {speed}", refresh=False)
            self._bar.update()
        elif last or time.monotonic() - self._printed >= PRINT_EVERY_SECONDS:
            self._printed = time.monotonic()
            print(f"step {record['step']}, loss {record['loss']:.4f}, {speed}", file=sys.stderr, flush=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
