"""Claim: stage 1 teaches the value head what decides an outcome and leaves the model alone; stage 2 weighs by it.

The documents are made so that one token decides, at a place of its own in each; the others are all alike.
"""

import pytest
import torch
from conftest import tiny
from torch import Tensor
from weighted_steps import DEPTH, data, make_scorer, split

from mull import MullForCausalLM, wrap_transformer_with_etd
from mull.layers.value_head import ValueHead
from mull.training.loop import TrainConfig, train
from mull.training.objectives.critic import ValueTraining
from mull.training.objectives.iterations import IterationSampling
from mull.training.objectives.weighted_mtp import WeightedMTP
from mull.training.objectives.weightings import Critic, CriticConfig

OTHER, RIGHT, WRONG = 3, 4, 5
TOKENS = 7


def documents(number: int, rows: int = 64) -> dict[str, Tensor]:
    """Rows of one document, one of whose tokens 2 to 4 is its outcome."""
    generator = torch.Generator().manual_seed(number)
    right = torch.rand(rows, 1, generator=generator) < 0.5
    place = torch.randint(2, 5, (rows, 1), generator=generator)
    decides = torch.arange(TOKENS)[None] == place
    input_ids = torch.where(decides, torch.where(right, RIGHT, WRONG), OTHER)
    return {"input_ids": input_ids, "labels": input_ids, "rewards": right.float().expand(-1, TOKENS)}


def new_model() -> MullForCausalLM:
    return wrap_transformer_with_etd(tiny("qwen3", vocab_size=12, num_hidden_layers=2), None)


@pytest.fixture(scope="module")
def trained() -> tuple[MullForCausalLM, ValueHead]:
    """A model and the value head that stage 1 made of it."""
    torch.set_num_threads(1)
    model = new_model()
    value_head = ValueHead(32)
    config = TrainConfig(steps=150, peak_lr=2e-2, weight_decay=0, precision="fp32", log_every=150)
    train(model, ValueTraining(CriticConfig(), value_head), documents, config)
    return model, value_head


def test_stage_1_leaves_the_model_as_it_was(trained: tuple[MullForCausalLM, ValueHead]) -> None:
    model, value_head = trained
    untouched = new_model().state_dict()
    assert all(torch.equal(untouched[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert float(value_head.out.weight.detach().abs().max()) > 0


def test_values_follow_the_deciding_token(trained: tuple[MullForCausalLM, ValueHead]) -> None:
    model, value_head = trained
    batch = documents(10_000, rows=256)
    with torch.no_grad():
        values = value_head(model.hidden_states(batch["input_ids"]))
    right = batch["rewards"] == 1
    decided = (batch["input_ids"] != OTHER).cumsum(1) > 0
    assert float(values[~decided].mean()) == pytest.approx(0.5, abs=0.1)
    assert float(values[decided & right].mean()) > 0.9
    assert float(values[decided & ~right].mean()) < 0.1


@pytest.mark.parametrize("gae_lambda", [0.0, 0.5, 0.95])
def test_the_deciding_token_has_the_largest_or_smallest_weight(
    gae_lambda: float, trained: tuple[MullForCausalLM, ValueHead]
) -> None:
    """Of its document, in nearly all of them. What follows it has none of its credit; what precedes it has λ per token."""
    model, value_head = trained
    config = CriticConfig(gae_lambda=gae_lambda, max_weight=100, min_weight=0)
    scorer = make_scorer("critic-wmtp", model, config, value_head=value_head)
    batch = documents(10_001, rows=256)
    with torch.no_grad():
        plan = scorer.plan_step(model, [batch], 1, [0])
        evidence = scorer.evidence(model, batch, model.hidden_states(batch["input_ids"]), plan)
        weights = scorer.settle(scorer(evidence).scores, evidence.valid, training=True).scores
    credit = weights.log() * torch.where(batch["rewards"] == 1, 1.0, -1.0)
    place = (batch["input_ids"] != OTHER).int().argmax(1)
    rows = torch.arange(256)
    decisive, before, after = (credit[rows, place + offset] for offset in (0, -1, 1))
    first = credit[:, 1:].argmax(1) + 1 == place
    assert float(first.double().mean()) > (0.95 if gae_lambda < 0.9 else 0.5)
    assert float((decisive - after).mean()) > 0.5
    share = float((before - after).mean() / (decisive - after).mean())
    assert share == pytest.approx(gae_lambda, abs=0.2)


def test_the_loss_of_stage_1_does_not_depend_on_the_split() -> None:
    model = wrap_transformer_with_etd(tiny("qwen3", **DEPTH), None)
    value_head = ValueHead(32)
    torch.nn.init.normal_(value_head.out.weight)
    batch = {name: tensor[:6] for name, tensor in data().items()}

    def gradient(n: int) -> Tensor:
        value_head.zero_grad()
        objective = ValueTraining(CriticConfig(), value_head)
        outputs = [objective(model, part) for part in split(batch, n)]
        for output in outputs:
            output.sum.backward()
        assert value_head.inner.weight.grad is not None
        return value_head.inner.weight.grad / sum(int(output.weight) for output in outputs)

    torch.testing.assert_close(gradient(6), gradient(1), atol=1e-5, rtol=1e-4)


def test_stage_1_asks_for_outcomes_and_targets() -> None:
    model = new_model()
    objective = ValueTraining(CriticConfig(), ValueHead(32))
    batch = documents(0, rows=2)
    with pytest.raises(ValueError, match="no rewards"):
        objective(model, {name: tensor for name, tensor in batch.items() if name != "rewards"})
    with pytest.raises(ValueError, match="No label of shape .* is a target"):
        objective(model, {**batch, "labels": torch.full_like(batch["labels"], -100)})


def test_stage_2_trains_the_value_head_along_and_remembers_the_spread_of_advantages() -> None:
    model = new_model()
    value_head = ValueHead(32)
    scorer = make_scorer("critic-wmtp", model, value_head=value_head)
    assert isinstance(scorer, Critic)
    objective = WeightedMTP(scorer, IterationSampling(maximum=1))
    assert objective.companion is value_head
    result = train(model, objective, documents, TrainConfig(steps=2, accumulate=2, precision="fp32", log_every=1))
    assert float(value_head.out.bias.detach().abs()) > 0
    assert objective.state_dict()["scorer.moments"]["count"] > 0
    assert 0 < result.history[-1]["weights/ess"] <= 1


def test_documents_without_outcomes_count_as_right() -> None:
    """As in training on solutions that are all correct."""
    model, value_head = new_model(), ValueHead(32)
    torch.nn.init.normal_(value_head.out.weight)
    scorer = make_scorer("critic-wmtp", model, value_head=value_head)
    batch = documents(0, rows=4)
    hidden = model.hidden_states(batch["input_ids"])
    unknown = {name: tensor for name, tensor in batch.items() if name != "rewards"}
    right = {**unknown, "rewards": torch.ones(4, TOKENS)}
    plan = scorer.plan_step(model, [unknown, right], 1, [0, 1])
    scores = [scorer(scorer.evidence(model, one, hidden, plan)).scores for one in plan.batches]
    assert torch.equal(*scores)
