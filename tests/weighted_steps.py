"""Steps of token-weighted training on a tiny model, with everything observed that a claim is about."""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from conftest import VOCAB, tiny
from torch import Tensor
from transformers import PreTrainedModel

from mull import ETDConfig, MTPConfig, MullForCausalLM, wrap_transformer_with_etd
from mull.layers.value_head import ValueHead
from mull.runtime.distributed import full_state_dict
from mull.training.loop import TrainConfig, train
from mull.training.objectives.base import Batch
from mull.training.objectives.evidence import Evidence, Scorer
from mull.training.objectives.iterations import IterationSampling
from mull.training.objectives.resources import Resources, Settings
from mull.training.objectives.table import find_entry
from mull.training.objectives.weighted_mtp import Control, WeightedMTP
from mull.training.objectives.weightings import CriticConfig, GradientConfig, Rho1Config

ALGORITHMS = {
    "baseline": "baseline-mtp",
    "dft": "dft",
    "entropy": "entropy",
    "rho1-weighted": "rho1-wmtp",
    "rho1-skip": "rho1-wmtp",
    "critic": "critic-wmtp",
    "gradient-norm": "gradient-wmtp",
    "gradient-alignment": "gradient-wmtp",
}
"""Every way to weigh, and the name of its algorithm."""

SETTINGS: dict[str, Settings] = {
    "rho1-weighted": Rho1Config(mode="weighted"),
    "rho1-skip": Rho1Config(mode="token_skip"),
    "gradient-norm": GradientConfig(mode="norm"),
    "gradient-alignment": GradientConfig(mode="alignment"),
}

CONTROLS = ("none", "shuffled", "random")
ETD = ETDConfig(n_encoder_layers=1, n_think_layers=1, n_decoder_layers=1)
DEPTH = {"num_hidden_layers": 3}
TWO = IterationSampling(maximum=2)
TOKENS = 16
DOCUMENTS = [[16], [7, 9], [3, 1, 5, 7], [16], [2, 14], [8, 8], [1] * 16, [11, 5]]
"""Lengths of the packed documents of each of eight rows; the last but one has no target."""


def model_of(base: PreTrainedModel, heads: str | None = "mlp", n_heads: int = 2) -> MullForCausalLM:
    """A looped copy whose heads, if any, have random weights: as they start, they ignore most of what they read."""
    mtp = None if heads is None else MTPConfig(num_predict_tokens=n_heads, mtp_head_type=heads)  # type: ignore[arg-type]
    model = wrap_transformer_with_etd(copy.deepcopy(base), ETD, mtp)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in [] if model.mtp_heads is None else model.mtp_heads.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * 0.2)
    return model.train()


def data(seed: int = 0) -> dict[str, Tensor]:
    """Eight packed rows of unequal numbers of targets, with outcomes."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(3, VOCAB, (len(DOCUMENTS), TOKENS), generator=generator)
    position_ids = torch.stack([torch.cat([torch.arange(length) for length in row]) for row in DOCUMENTS])
    labels = input_ids.clone()
    labels[position_ids == 0] = -100
    labels[3, 4:13] = -100
    labels[0, 1:4] = -100
    rewards = torch.rand(labels.shape, generator=generator)
    return {"input_ids": input_ids, "labels": labels, "position_ids": position_ids, "rewards": rewards}


def split(batch: Batch, n: int) -> list[dict[str, Tensor]]:
    """The rows in `n` micro-batches of equal size."""
    size = len(batch["labels"]) // n
    return [{name: tensor[i * size : (i + 1) * size] for name, tensor in batch.items()} for i in range(n)]


def make_scorer(name: str, model: MullForCausalLM, settings: Settings | None = None, **resources: Any) -> Scorer:
    """The weighting of an objective."""
    entry = find_entry(name)
    if settings is None and entry.settings is not None:
        settings = entry.settings()
    scorer = entry.build(settings, Resources(model=model, **resources))
    assert isinstance(scorer, Scorer)
    return scorer


def resources_of(base: PreTrainedModel) -> dict[str, Any]:
    """What the algorithms need: a noisy copy as reference, a value head with random weights, held-out rows."""
    reference = wrap_transformer_with_etd(copy.deepcopy(base), None).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * 0.05)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        value_head = ValueHead(base.config.hidden_size).to(base.dtype)
        torch.nn.init.normal_(value_head.out.weight)
    held_out = split(data(seed=11), 4)
    return {"reference": reference, "value_head": value_head, "held_out": lambda number: held_out[number % 4]}


def objective_of(
    algorithm: str,
    model: MullForCausalLM,
    base: PreTrainedModel,
    iterations: IterationSampling = TWO,
    **options: Any,
) -> WeightedMTP:
    """The objective, with companions of its own."""
    critic = {name: options.pop(name) for name in tuple(options) if name in CriticConfig.model_fields}
    settings = CriticConfig(**critic) if algorithm == "critic" else SETTINGS.get(algorithm)
    scorer = make_scorer(ALGORITHMS[algorithm], model, settings, **resources_of(base))
    return WeightedMTP(scorer, iterations, **options)


def given(evidence: Evidence) -> Tensor:
    """An algorithm that finds its scores in the batch."""
    return evidence.batch["scores"]


def given_objective(**options: Any) -> WeightedMTP:
    """Weights that the test chooses: entry ``scores`` of the batch."""
    return WeightedMTP(Scorer(given), TWO, **options)


@dataclass
class Step:
    """What a step computed."""

    loss: float
    """The loss that the loop reports."""

    total_weight: float
    """What the loop divides by."""

    gradients: dict[str, Tensor]
    """Of the model, and of the companion with that prefix, after the division."""

    metrics: dict[str, float]
    targets: list[Tensor]
    """``[B, T, H]`` by micro-batch, as given to `MullForCausalLM.head_losses`."""

    coefficients: list[Tensor]
    """Likewise."""

    batches: Sequence[Batch]

    def effective(self, head_weights: Sequence[float]) -> list[Tensor]:
        """Weight of each target, ``[B, T, H]`` by micro-batch, that remains of the coefficients when the loop has divided.

        The formula divides a head's sum by its number of targets and multiplies it by its weight: this undoes both.
        """
        counts = sum((targets >= 0).sum((0, 1)) for targets in self.targets)
        scale = torch.tensor(head_weights[: len(counts)], dtype=torch.float64) / counts
        return [coefficients.double() / scale / self.total_weight for coefficients in self.coefficients]


def run_step(model: MullForCausalLM, objective: WeightedMTP, batches: Sequence[Batch]) -> Step:
    """One step as the training loop does it, without the update."""
    targets, coefficients = [], []
    head_losses = model.head_losses

    def observed(*arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
        targets.append(arguments[2])
        coefficients.append(arguments[3])
        return head_losses(*arguments, **options)

    modules = {"": model} | ({} if objective.companion is None else {"companion.": objective.companion})
    for module in modules.values():
        module.zero_grad()
    vars(model)["head_losses"] = observed
    with torch.no_grad():
        plan = objective.plan_step(model, batches)
    outputs = []
    for index in range(len(plan.batches)):
        outputs.append(objective.loss(model, plan, index))
        outputs[-1].sum.backward()
    del vars(model)["head_losses"]
    weight = math.fsum(float(output.weight) for output in outputs)
    gradients = {
        prefix + name: parameter.grad / weight
        for prefix, module in modules.items()
        for name, parameter in module.named_parameters()
        if parameter.grad is not None
    }
    loss = math.fsum(float(output.sum.detach()) for output in outputs) / weight
    metrics = objective.end_step(plan, [output.seen for output in outputs])
    return Step(loss, weight, gradients, metrics, targets, coefficients, plan.batches)


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Equal gradients, relative to the largest entry of each."""
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(actual[name], gradient, atol=tolerance * scale, rtol=0, msg=f"gradient of {name}")


Exact = Callable[..., PreTrainedModel]

TRAININGS: dict[str, tuple[str, Control, str]] = {
    "ranked over all ranks": ("rho1-skip", "none", "transformer"),
    "with a companion": ("critic", "none", "mlp"),
    "shuffled over all ranks": ("dft", "shuffled", "sequential"),
    "random weights": ("rho1-weighted", "random", "shared_lm_head"),
    "running mean": ("gradient-norm", "none", "mlp"),
    "held-out gradient": ("gradient-alignment", "none", "mlp"),
    "one chain for all steps": ("baseline", "none", "native"),
}
"""Algorithm, control and heads of trainings that several ranks run like one."""


def trainings() -> dict[str, tuple[dict[str, Tensor], list[dict[str, Any]]]]:
    """Weights after three steps, and what was logged, of each of `TRAININGS`; on any number of ranks, weights on rank 0 alone."""
    outcomes = {}
    for name, (algorithm, control, heads) in TRAININGS.items():
        base = tiny("qwen3", dtype=torch.float64, **DEPTH)
        model = model_of(base, heads)
        iterations = IterationSampling(kind="uniform", maximum=3)
        objective = objective_of(algorithm, model, base, iterations, control=control)
        config = TrainConfig(steps=3, accumulate=4, precision="fp32", log_every=1)
        result = train(model, objective, lambda number: split(data(number // 4), 4)[number % 4], config)
        timed = ("seconds", "tokens_per_second")
        records = [{key: value for key, value in record.items() if key not in timed} for record in result.history]
        companion = {} if objective.companion is None else full_state_dict(objective.companion)
        outcomes[name] = (
            full_state_dict(model) | {f"companion.{key}": value for key, value in companion.items()},
            records,
        )
    return outcomes
