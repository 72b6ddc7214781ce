"""Claim: exits are a distribution, the loss is its expectation, every exit parameter learns, and labels are what was measured."""

from typing import Any

import pytest
import torch
from conftest import SPLIT, tiny
from torch.nn import functional as F

from mull import ETDConfig, HaltingConfig, MullForCausalLM, wrap_transformer_with_etd
from mull.training.objectives.exits import Exits, ExitsConfig, exit_log_probabilities
from mull.training.objectives.iterations import IterationSampling
from mull.training.objectives.resources import Resources
from mull.training.objectives.table import make_objective

ITERATIONS = 3
THREE = IterationSampling(maximum=ITERATIONS)


def model_of() -> MullForCausalLM:
    etd = ETDConfig(**SPLIT.model_dump() | {"halting": HaltingConfig(rule="learned")})
    model = wrap_transformer_with_etd(tiny("qwen3", dtype=torch.float64), etd)
    assert model.model.exit_head is not None
    torch.nn.init.normal_(model.model.exit_head.weight, generator=torch.Generator().manual_seed(1))
    return model


def batch_of() -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[0, 4:] = -100
    return {"input_ids": ids, "labels": labels}


def by_hand(model: MullForCausalLM, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses and exit probabilities of each iteration ``[k, N]``, written out."""
    thoughts: list[torch.Tensor] = []
    states = model.hidden_states_by_iteration(batch["input_ids"], think_iterations=ITERATIONS, think_states=thoughts)
    targets = batch["labels"][:, 1:]
    valid = targets != -100
    losses = torch.stack(
        [F.cross_entropy(model.lm_head(s[:, :-1][valid]), targets[valid], reduction="none") for s in states]
    )
    assert model.model.exit_head is not None
    stops = [model.model.exit_head(h[:, :-1][valid])[:, 0].sigmoid() for h in thoughts]
    p = torch.stack([stops[0], (1 - stops[0]) * stops[1], (1 - stops[0]) * (1 - stops[1])])
    return losses, p


def test_the_exit_distribution_sums_to_one() -> None:
    log_p = exit_log_probabilities(torch.randn(4, 7, dtype=torch.float64))
    torch.testing.assert_close(log_p.exp().sum(0), torch.ones(7, dtype=torch.float64))


@pytest.mark.parametrize("prior", ["uniform", "geometric"])
def test_the_loss_and_its_gradient_are_those_of_the_expectation(prior: Any) -> None:
    model, batch = model_of(), batch_of()
    objective = Exits(THREE, ExitsConfig(prior=prior, stop_probability=0.3, prior_weight=0.2))
    losses, p = by_hand(model, batch)
    q = torch.tensor([1 / 3] * 3 if prior == "uniform" else [0.3, 0.7 * 0.3, 0.7 * 0.7], dtype=torch.float64)[:, None]
    expected = (p * losses).sum() + 0.2 * (p * (p / q).log()).sum()
    parameters = dict(model.named_parameters())
    gradients = torch.autograd.grad(expected, list(parameters.values()))
    output = objective(model, batch)
    torch.testing.assert_close(output.sum, expected)
    assert output.weight == (batch["labels"][:, 1:] != -100).sum()
    output.sum.backward()
    for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, msg=name)
    numbers = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)[:, None]
    assert output.metrics["exit_iteration"] == pytest.approx(float((p.detach() * numbers).sum(0).mean()))


def test_measured_improvement_teaches_the_head_alone() -> None:
    model, batch = model_of(), batch_of()
    losses, p = by_hand(model, batch)
    losses = losses.detach()
    tolerance = float((losses.max(0).values - losses.min(0).values).median()) / 2
    first, second = p[0], p[1] / (1 - p[0])
    total = torch.zeros((), dtype=torch.float64)
    for token in range(losses.shape[1]):
        good = [bool(losses[j, token] <= losses[:, token].min() + tolerance) for j in range(ITERATIONS)]
        if good[0]:
            total = total - first[token].log()
        elif good[1]:
            total = total - ((1 - first[token]).log() + second[token].log()) / 2
        else:
            total = total - ((1 - first[token]).log() + (1 - second[token]).log()) / 2
    output = Exits(THREE, ExitsConfig(supervision="improvement", tolerance=tolerance))(model, batch)
    torch.testing.assert_close(output.sum, total)
    output.sum.backward()
    learning = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert learning == {"model.exit_head.weight", "model.exit_head.bias"}


def test_what_cannot_be_trained_is_refused() -> None:
    plain = wrap_transformer_with_etd(tiny("qwen3"), SPLIT)
    with pytest.raises(ValueError, match=r"halting: \{rule: learned\}"):
        make_objective("exits", Resources(model=plain, iterations=THREE))
    for iterations in (
        IterationSampling(maximum=1),
        IterationSampling(maximum=3, backprop_iterations=1),
        IterationSampling(kind="uniform", maximum=3, per="token"),
    ):
        with pytest.raises(ValueError, match="exits weighs every iteration"):
            make_objective("exits", Resources(model=model_of(), iterations=iterations))
