"""Claim: stage 1 teaches the value head what decides an outcome and leaves the model alone; stage 2 weighs by it.

The documents are made so that one token decides: everything else is random.
"""

import pytest
import torch
from conftest import tiny
from torch import Tensor
from weighted_steps import DEPTH, data, split

from mull import MullForCausalLM, wrap_transformer_with_etd
from mull.layers.value_head import ValueHead
from mull.objectives.algorithms import Critic, CriticConfig, Parts, make_scorer
from mull.objectives.critic import ValueTraining
from mull.objectives.iterations import IterationSampling
from mull.objectives.wmtp import WeightedMTP
from mull.train import TrainConfig, train

RIGHT, WRONG = 3, 4
DECISIVE, TOKENS = 3, 7


def documents(number: int, rows: int = 64) -> dict[str, Tensor]:
    """Rows of one document, whose token at `DECISIVE` is its outcome."""
    generator = torch.Generator().manual_seed(number)
    input_ids = torch.randint(5, 12, (rows, TOKENS), generator=generator)
    right = torch.rand(rows, generator=generator) < 0.5
    input_ids[:, DECISIVE] = torch.where(right, RIGHT, WRONG)
    rewards = right[:, None].float().expand(-1, TOKENS)
    return {"input_ids": input_ids, "labels": input_ids, "rewards": rewards}


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
    assert float(value_head.out.weight.abs().max()) > 0


def test_values_follow_the_deciding_token(trained: tuple[MullForCausalLM, ValueHead]) -> None:
    model, value_head = trained
    batch = documents(10_000, rows=256)
    with torch.no_grad():
        values = value_head(model.early_decoded(batch["input_ids"])[0])
    right = batch["rewards"][:, 0] == 1
    torch.testing.assert_close(values[:, :DECISIVE].mean(), torch.tensor(0.5), atol=0.1, rtol=0)
    assert float(values[right][:, DECISIVE].mean()) > 0.9
    assert float(values[~right][:, DECISIVE].mean()) < 0.1


@pytest.mark.parametrize("gae_lambda", [0.0, 0.5, 0.95])
def test_the_deciding_token_has_the_largest_or_smallest_weight(
    gae_lambda: float, trained: tuple[MullForCausalLM, ValueHead]
) -> None:
    model, value_head = trained
    config = CriticConfig(gae_lambda=gae_lambda, max_weight=100, min_weight=0)
    scorer = make_scorer("critic-wmtp", model, Parts(value_head=value_head, critic=config))
    batch = documents(10_001, rows=256)
    with torch.no_grad():
        evidence = scorer.evidence(model, batch, model.early_decoded(batch["input_ids"])[0])
        weights = scorer.settle(scorer(evidence).scores, evidence.valid, training=True).scores
    right = batch["rewards"][:, 0] == 1
    good, bad = weights[right].log().mean(0), weights[~right].log().mean(0)
    others = [token for token in range(1, TOKENS) if token != DECISIVE]
    assert all(good[DECISIVE] > good[other] for other in others)
    assert all(bad[DECISIVE] < bad[other] for other in others)
    # The tokens that led up to it share in its credit, those behind it do not.
    assert float(good[DECISIVE] - good[DECISIVE + 1]) > 0.5
    assert (float(good[DECISIVE - 1] - good[DECISIVE + 1]) > 0.5 * float(good[DECISIVE] - good[DECISIVE + 1])) == (
        gae_lambda > 0.9
    )


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
    with pytest.raises(ValueError, match="No label of this batch is a target"):
        objective(model, {**batch, "labels": torch.full_like(batch["labels"], -100)})


def test_stage_2_trains_the_value_head_along_and_remembers_the_spread_of_advantages() -> None:
    model = new_model()
    value_head = ValueHead(32)
    scorer = make_scorer("critic-wmtp", model, Parts(value_head=value_head))
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
    scorer = make_scorer("critic-wmtp", model, Parts(value_head=value_head))
    batch = documents(0, rows=4)
    hidden = model.early_decoded(batch["input_ids"])[0]
    unknown = {name: tensor for name, tensor in batch.items() if name != "rewards"}
    right = {**unknown, "rewards": torch.ones(4, TOKENS)}
    scores = [scorer(scorer.evidence(model, one, hidden)).scores for one in (unknown, right)]
    assert torch.equal(*scores)
