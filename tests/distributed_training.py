"""Trainings that one process and several ranks run alike, and what only several ranks can do."""

import math
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny
from torch import Tensor, nn
from torch.nn import functional as F

from mull.data.packing import PackedDataset
from mull.data.sampler import ShuffledBatches
from mull.model.causal_lm import MullForCausalLM
from mull.model.configs import ETDConfig, GatedAttentionConfig, LayerRouterConfig, LoRAExpertConfig
from mull.retrofit.wrap import wrap_transformer_with_etd
from mull.runtime.distributed import full_state_dict, on_first_rank, rank, same_everywhere, session, whole, world_size
from mull.training.loop import DEFAULT_SHARDING, Evaluation, TrainConfig, TrainResult, train
from mull.training.objectives import teacher_cache
from mull.training.objectives.base import Batch, LossOutput, Objective, StepPlan, batch_states
from mull.training.objectives.iterations import IterationSampling
from mull.training.objectives.resources import Resources
from mull.training.objectives.step_supervision import StepSupervision
from mull.training.objectives.table import make_objective
from mull.training.objectives.teacher_cache import CacheIdentity, TeacherCache
from mull.training.step import DistributedConfig, accumulate, make_stage, normalise

VOCAB = 97
ROWS, STEPS = 8, 3
UP_TO_THREE = IterationSampling(kind="uniform", minimum=2, maximum=3)


class RankByRank(IterationSampling):
    """Of micro-batches of two rows, every other one thinks three times, the rest once: one of two ranks is idle then."""

    def depths(self, shapes: Any) -> list[Tensor]:
        found = []
        for number, (n_rows, n_tokens) in enumerate(shapes):
            first = (rank() + number * world_size()) * n_rows
            rows = torch.arange(first, first + n_rows)
            found.append(torch.where(rows // 2 % 2 == 0, 3, 1)[:, None].expand(-1, n_tokens))
        return found


class Weighted(Objective):
    """Cross-entropy with a weight per token that depends on the model, and a companion that regresses the hidden states."""

    def __init__(self, iterations: IterationSampling = UP_TO_THREE, width: int = 32) -> None:
        torch.manual_seed(7)
        self.iterations = iterations
        self.companion = nn.Linear(width, 1).double()
        self._seen = torch.zeros(3, dtype=torch.float64)

    def plan_step(self, model: Any, batches: Any) -> StepPlan:
        depth = same_everywhere(self.iterations.sample())
        weighted = [{**batch, "weights": self.weights(model, batch)} for batch in batches]
        depths = self.iterations.depths([batch["input_ids"].shape for batch in batches])
        return StepPlan(batches=weighted, iterations=depth, depths=depths)

    def weights(self, model: Any, batch: Batch) -> Tensor:
        assert not torch.is_grad_enabled()
        hidden = model.hidden_states(batch["input_ids"], think_iterations=1)
        return 3 * torch.sigmoid(hidden[:, :-1].mean(-1) * 5) * (batch["labels"][:, 1:] != -100)

    def loss(self, model: Any, plan: StepPlan, index: int) -> LossOutput:
        batch, depth = plan.batches[index], plan.iterations
        hidden = batch_states(model, batch, depth, self.iterations.backprop(depth), plan.depths_of(index))
        logits = model.lm_head(hidden[:, :-1])
        losses = F.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="none")
        assert self.companion is not None
        regression = (self.companion(hidden)[:, :-1, 0] - 1).square()
        total = ((losses.view_as(regression) + regression) * batch["weights"]).sum() * batch["factor"]
        return LossOutput(total, batch["weights"].sum(), {"iterations": float(depth)}, depth)

    def end_step(self, plan: StepPlan, seen: Any) -> dict[str, float]:
        assert seen == [plan.iterations] * len(plan.batches)
        self._seen += torch.arange(3)
        return {"seen": float(self._seen[2])}

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self._seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._seen = state["seen"]


class Split:
    """Step ``s`` has the same rows however it is split; rows have unequal numbers of targets, and some have almost none."""

    def __init__(self, micro_batches: int, factors: dict[int, float] | None = None) -> None:
        self._parts, self._factors = micro_batches, factors or {}

    def __call__(self, number: int) -> Batch:
        step, part = divmod(number, self._parts)
        ids = torch.randint(3, VOCAB, (ROWS, 10), generator=torch.Generator().manual_seed(step))
        labels = ids.clone()
        for row in range(ROWS):
            labels[row, : (2 + 5 * row) % 9] = -100
        rows = slice(part * ROWS // self._parts, (part + 1) * ROWS // self._parts)
        factor = torch.tensor(self._factors.get(number, 1.0), dtype=torch.float64)
        return {"input_ids": ids[rows], "labels": labels[rows], "factor": factor}


def model_of(
    family: str, n_layers: int = 3, gates: GatedAttentionConfig | None = None, **options: Any
) -> MullForCausalLM:
    etd = ETDConfig(n_encoder_layers=1, n_think_layers=n_layers - 2, n_decoder_layers=1, **options)
    return wrap_transformer_with_etd(tiny(family, dtype=torch.float64, num_hidden_layers=n_layers), etd, None, gates)


CASES: dict[str, tuple[str, dict[str, Any], IterationSampling]] = {
    "untied, AdamW": ("qwen3", {}, UP_TO_THREE),
    "tied, Muon, checkpointing": ("qwen3-tied", {"optimizer": "muon", "gradient_checkpointing": True}, UP_TO_THREE),
    "truncated, clipped": (
        "qwen3-tied",
        {"clip_norm": 0.05},
        IterationSampling(maximum=3, backprop_iterations=1),
    ),
    "a part, checkpointing": (
        "qwen3-tied",
        {"trainable": ("model.layers.[12].mlp.*", "model.norm.*"), "gradient_checkpointing": True, "weight_decay": 0.5},
        UP_TO_THREE,
    ),
    "per token": ("qwen3", {}, IterationSampling(kind="uniform", maximum=3, per="token")),
    "ranks of two depths, checkpointing": ("qwen3_5", {"gradient_checkpointing": True}, RankByRank(maximum=3)),
    "routers, LoRA and gates": ("qwen3", {"gradient_checkpointing": True}, UP_TO_THREE),
    "hybrid with experts": ("qwen3_next-moe", {"optimizer": "muon"}, IterationSampling(maximum=2)),
}


ROUTED: dict[str, Any] = {
    "layer_router": LayerRouterConfig(hidden_size=8, granularity="token"),
    "router_warmup_steps": 1,
    "lora_expert": LoRAExpertConfig(rank=2, balance_rate=0.02),
    "expert_warmup_steps": 0,
    "gates": GatedAttentionConfig(granularity="element"),
}
"""A warm-up ends, experts are told apart after a step, and their bias moves."""


def settings(micro_batches: int, **changes: Any) -> TrainConfig:
    common = {"steps": STEPS, "peak_lr": 1e-2, "muon_lr": 1e-2, "precision": "fp32", "log_every": 1, "clip_norm": None}
    return TrainConfig(**{**common, "accumulate": micro_batches, **changes})


def weights_of(model: nn.Module, objective: Objective) -> dict[str, Tensor]:
    assert objective.companion is not None
    return {**full_state_dict(model), **full_state_dict(objective.companion)}


def outcome(result: TrainResult, model: nn.Module, objective: Objective) -> dict[str, Any]:
    clock = {"seconds", "tokens_per_second"}
    history = [{name: value for name, value in r.items() if name not in clock} for r in result.history]
    return {"history": history, "weights": weights_of(model, objective), "stopped": result.stopped}


def training(case: str, micro_batches: int, out: Path | None = None, **options: Any) -> dict[str, Any]:
    """Train a case from its beginning."""
    family, changes, iterations = CASES[case]
    parts = ROUTED if "routers" in case else {}
    model, objective = model_of(family, 4 if "hybrid" in case else 3, **parts), Weighted(iterations)
    if rank() > 0:
        model.lm_head.weight.data.mul_(2)  # the weights of rank 0 count
    config = settings(micro_batches, **{**changes, **options.pop("config", {})})
    batches, loaded = options.pop("batches", Split(micro_batches)), []

    def load(number: int) -> Batch:
        loaded.append(number)
        return batches(number)

    result = train(model, objective, load, config, out, **options)
    return {**outcome(result, model, objective), "loaded": loaded}


def gradient(micro_batches: int) -> dict[str, Tensor]:
    """Gradient of the first step, whole and by name; the ranks take the micro-batches in turns."""
    model, objective = model_of("qwen3-tied"), Weighted(IterationSampling(maximum=3))
    stage = make_stage(model, objective, DistributedConfig()).train()
    n_ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    batches = {number: Split(micro_batches)(number) for number in range(rank(), micro_batches, n_ranks)}
    normalise(list(stage.parameters()), accumulate(stage, batches, "fp32").parts, None)
    return {name: whole(p.grad) for name, p in stage.named_parameters() if p.grad is not None}


def everything_on_ranks(folder: Path) -> dict[str, Any]:
    """What a group of ranks does; the test compares it with one process."""
    plain = "untied, AdamW"
    return {
        "gradient": gradient(8),
        **{case: training(case, 4) for case in CASES},
        "kept gathered": training(plain, 4, distributed=DistributedConfig(reshard_after_forward=False)),
        "in bf16": training(plain, 4, distributed=DistributedConfig(param_dtype="bf16")),
        "not a number": not_a_number(),
        "indivisible": refused(lambda: training(plain, 3)),
        "two trainings": two_trainings(),
        "two trainings in bf16": two_trainings(DistributedConfig(param_dtype="bf16")),
        "evaluated": training(plain, 4, folder / "evaluated", evaluation=Evaluation(evaluate, 1)),
        "terminated": training(plain, 4, batches=Terminating()),
        "interrupted": training(plain, 4, folder / "by-ranks", until=second),
        "resumed": training(plain, 4, folder / "by-one", resume=True),
        "curriculum": curriculum(),
        "healed": {name: healed(name, folder / "record") for name in HEALING},
        "rank 0 fails": refused(lambda: on_first_rank(fails)),
    }


def second(record: dict[str, Any]) -> bool:
    return bool(record["step"] == 2)


def fails() -> None:
    raise ValueError("only rank 0 was asked")


def refused(call: Any) -> str:
    with pytest.raises((ValueError, RuntimeError)) as error:
        call()
    return str(error.value)


def not_a_number() -> tuple[str, bool]:
    """The message of a loss that is no number on rank 1 in the second step, and whether the weights are those of the first."""
    model, objective = model_of("qwen3"), Weighted()
    once, other = model_of("qwen3"), Weighted()
    schedule = {"schedule": "constant"}
    train(once, other, Split(4), settings(4, steps=1, **schedule))
    message = refused(lambda: train(model, objective, Split(4, {7: math.nan}), settings(4, **schedule)))
    expected, actual = weights_of(once, other), weights_of(model, objective)
    return message, all(torch.equal(actual[name], expected[name]) for name in expected)


def two_trainings(distributed: DistributedConfig = DEFAULT_SHARDING) -> dict[str, Any]:
    """First the companion alone, then everything, with another objective; and an objective with another companion."""
    model, first, second = model_of("qwen3"), Weighted(), Weighted()
    second.companion = first.companion
    model.requires_grad_(False)
    train(model, first, Split(4), settings(4), evaluation=Evaluation(evaluate), distributed=distributed)
    model.requires_grad_(True)
    result = train(model, second, Split(4), settings(4), distributed=distributed)
    both = outcome(result, model, second)
    if torch.distributed.is_initialized():
        both["refused"] = refused(lambda: train(model, Weighted(), Split(4), settings(4)))
    return both


def evaluate(model: MullForCausalLM) -> dict[str, float]:
    logits = model(Split(1)(5)["input_ids"], think_iterations=2, use_cache=False).logits
    return {"logit": float(logits.square().mean()), "noise": float(torch.rand(()))}


class Terminating(Split):
    """Asks rank 1, or the only process, to terminate while it loads its batch of the second step."""

    def __init__(self) -> None:
        super().__init__(4)

    def __call__(self, number: int) -> Batch:
        if number == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().__call__(number)


def curriculum() -> dict[str, Any]:
    """Step supervision in which the batches of rank 1 have more first steps, and all of them wrong."""
    model = model_of("qwen3").eval()
    objective = StepSupervision(IterationSampling(kind="uniform", minimum=2, maximum=3), threshold=0.04)

    def batches(number: int) -> Batch:
        ids = torch.randint(3, VOCAB, (2, 6), generator=torch.Generator().manual_seed(number))
        with torch.no_grad():
            right = fresh(ids, think_iterations=1).logits.argmax(-1)
        labels = torch.full((2, 6, 3), -100)
        labels[:, 5] = right[:, 5, None]
        if number % 2:
            labels[:, 1:] = (right[:, 1:, None] + 1) % VOCAB
        return {"input_ids": ids, "step_labels": labels}

    fresh = model_of("qwen3")
    config = settings(4, steps=5, peak_lr=1e-9, schedule="constant")
    result = train(model, objective, batches, config)
    shown = ("first_step_accuracy", "iterations")
    return {**{name: [r[name] for r in result.history] for name in shown}, "state": objective.state_dict()}


HEALING = ("distill", "distill by record", "align", "align, checkpointing")


def healed(name: str, folder: Path) -> dict[str, Any]:
    """A hybrid that learns from a teacher with attention alone; ranks share the recording of the teacher's predictions."""
    kinds = ["linear_attention", "full_attention", "linear_attention"]
    base = tiny("qwen3_5", dtype=torch.float64, num_hidden_layers=3, layer_types=kinds)
    model, teacher = wrap_transformer_with_etd(base, None), model_of("qwen3")
    if rank() > 0:
        model.lm_head.weight.data.mul_(2)  # the weights of rank 0 count
    rows = [Split(1)(number) for number in range(3)]
    ids, labels = (torch.cat([row[key] for row in rows]) for key in ("input_ids", "labels"))
    dataset = PackedDataset(ids, labels, torch.arange(ids.shape[1]).expand(len(ids), -1))
    predictions, reference = None, teacher.eval().requires_grad_(False)
    if "record" in name:
        identity = CacheIdentity(
            teacher="a",
            dtype="fp64",
            data="b",
            rows=len(ids),
            length=ids.shape[1],
            top_k=5,
            temperature=2.0,
            n_tokens=VOCAB,
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(teacher_cache, "TOKENS_PER_FILE", 50)  # five rows, so both ranks write files
            predictions, reference = TeacherCache(folder, identity), None
        predictions.record(teacher, dataset, 3)
        assert predictions.complete
    resources = Resources(model=model, reference=reference, predictions=predictions)
    objective = make_objective(name.split()[0].rstrip(","), resources)
    config = settings(4, gradient_checkpointing="checkpointing" in name)
    result = train(model, objective, ShuffledBatches(dataset, 2, numbered=True), config)
    clock = {"seconds", "tokens_per_second"}
    history = [{key: value for key, value in r.items() if key not in clock} for r in result.history]
    return {"history": history, "weights": full_state_dict(model)}


if __name__ == "__main__":
    with session():
        trained = training("untied, AdamW", 4)
        if rank() == 0:
            torch.save(trained, sys.argv[1])
