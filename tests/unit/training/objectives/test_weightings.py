"""Claim: each algorithm weighs by its formula, is found by its name, and says what it lacks.

The formulas are computed from logits and by autograd, in fp64.
"""

import math
from collections.abc import Callable

import pytest
import torch
from conftest import EXACT, VOCAB, tiny
from torch import Tensor
from torch.nn import functional as F
from weighted_steps import DEPTH, Exact, data, make_scorer, model_of, objective_of, resources_of, run_step, split

from mull import MullForCausalLM, wrap_transformer_with_etd
from mull.training.loop import TrainConfig, train
from mull.training.objectives import table
from mull.training.objectives.base import StepPlan
from mull.training.objectives.evidence import Evidence, Scorer
from mull.training.objectives.iterations import IterationSampling
from mull.training.objectives.resources import Resources, Settings
from mull.training.objectives.table import make_objective, objective_names
from mull.training.objectives.weighted_mtp import WeightedMTP
from mull.training.objectives.weightings import CriticConfig, GradientConfig, Rho1Config


@pytest.fixture
def model(exact: Exact) -> MullForCausalLM:
    return model_of(exact("qwen3", **DEPTH), None)


def hidden_of(model: MullForCausalLM, batch: dict[str, Tensor]) -> Tensor:
    return model.hidden_states(batch["input_ids"], position_ids=batch["position_ids"], think_iterations=2)


def seen(name: str, model: MullForCausalLM) -> tuple[Tensor, Evidence]:
    """Scores of the valid targets, and the evidence."""
    scorer = make_scorer(name, model)
    _, evidence = planned(scorer, model)
    return scorer(evidence).scores[evidence.valid], evidence


def planned(scorer: Scorer, model: MullForCausalLM) -> tuple[StepPlan, Evidence]:
    """A step of one micro-batch, and its evidence."""
    plan = scorer.plan_step(model, [data()], 2, [0])
    return plan, scorer.evidence(model, data(), hidden_of(model, data()), plan)


def rows_of(evidence: Evidence) -> tuple[Tensor, Tensor, Tensor]:
    """States that predict the valid targets ``[N, D]``, their logits ``[N, V]`` and the targets."""
    rows = evidence.hidden[:, :-1][evidence.valid[:, 1:]]
    return rows, rows @ evidence.model.lm_head.weight.T, evidence.batch["labels"][evidence.valid]


def own_gradients(evidence: Evidence) -> list[Tensor]:
    """Gradient of the unembedding by each target alone, by autograd."""
    weight = evidence.model.lm_head.weight.detach().clone().requires_grad_()
    rows, _, targets = rows_of(evidence)
    return [
        torch.autograd.grad(F.cross_entropy(row @ weight.T, target), weight)[0]
        for row, target in zip(rows.detach(), targets, strict=True)
    ]


# --- formulas ---


def test_dft_is_the_probability_of_the_target(model: MullForCausalLM) -> None:
    scores, evidence = seen("dft", model)
    _, logits, targets = rows_of(evidence)
    torch.testing.assert_close(scores, logits.softmax(-1).gather(-1, targets[:, None])[:, 0], atol=EXACT, rtol=0)


def test_entropy_is_that_of_the_prediction_over_its_largest_value(model: MullForCausalLM) -> None:
    scores, evidence = seen("entropy", model)
    expected = torch.distributions.Categorical(logits=rows_of(evidence)[1]).entropy() / math.log(VOCAB)
    torch.testing.assert_close(scores, expected, atol=EXACT, rtol=0)


def test_the_gradient_score_is_the_norm_of_the_targets_own_gradient(model: MullForCausalLM) -> None:
    """Relative to the mean of the step before, which is the same step here."""
    scorer = make_scorer("gradient-wmtp", model, GradientConfig(max_weight=1e9))
    plan, evidence = planned(scorer, model)
    first = scorer(evidence)
    assert torch.equal(first.scores, torch.ones_like(first.scores)), "there is no mean before the first step"
    norms = torch.stack([gradient.norm() for gradient in own_gradients(evidence)])
    assert scorer.end_step(plan, [first.seen]) == {"gradient_score": pytest.approx(float(norms.mean()), rel=EXACT)}
    torch.testing.assert_close(scorer(evidence).scores[evidence.valid], norms / norms.mean(), atol=EXACT, rtol=0)


def test_alignment_is_what_a_step_on_the_target_would_gain_on_held_out_text(model: MullForCausalLM) -> None:
    """The inner product of the two gradients of the unembedding; where it is negative, the target counts 0."""
    held_out = {name: tensor[:5] for name, tensor in data(seed=3).items()}
    config = GradientConfig(mode="alignment", max_weight=1e9)
    scorer = make_scorer("gradient-wmtp", model, config, held_out=lambda _: held_out)
    weight = model.lm_head.weight.detach().clone().requires_grad_()
    # The held-out loss is that of the model as it is called by default.
    states = model(
        **{k: v for k, v in held_out.items() if k in ("input_ids", "position_ids")}, output_hidden_states=True
    )
    valid = (held_out["labels"] != -100)[:, 1:]
    loss = F.cross_entropy(states.hidden_states[-1][:, :-1][valid] @ weight.T, held_out["labels"][:, 1:][valid])
    (direction,) = torch.autograd.grad(loss, weight)

    plan, evidence = planned(scorer, model)
    inner = torch.stack([(gradient * direction).sum() for gradient in own_gradients(evidence)])
    assert (inner < 0).any()
    scorer.end_step(plan, [scorer(evidence).seen])
    expected = inner.clamp(min=0) / inner.clamp(min=0).mean()
    torch.testing.assert_close(scorer(evidence).scores[evidence.valid], expected, atol=1e-5, rtol=0)


def test_the_held_out_gradient_is_averaged_over_steps(model: MullForCausalLM) -> None:
    """Each step reads the next batch; evaluation reads none."""
    asked = []

    def held_out(number: int) -> dict[str, Tensor]:
        asked.append(number)
        return data(seed=number)

    def directions(momentum: float) -> list[Tensor]:
        config = GradientConfig(mode="alignment", momentum=momentum)
        scorer = make_scorer("gradient-wmtp", model, config, held_out=held_out)
        found = []
        for _ in range(2):
            plan, evidence = planned(scorer, model)
            scorer.end_step(plan, [scorer(evidence).seen])
            found.append(scorer.state_dict()["direction"])
        return found

    (first, second), (_, mixed) = directions(1.0), directions(0.25)
    assert asked == [0, 1, 0, 1]
    torch.testing.assert_close(mixed, 0.75 * first + 0.25 * second)
    assert not torch.allclose(first, second, atol=1e-4)


def test_gradient_scores_are_limited_and_the_limit_is_reported(model: MullForCausalLM) -> None:
    scorer = make_scorer("gradient-wmtp", model, GradientConfig(max_weight=1.0))
    objective = WeightedMTP(scorer, IterationSampling(maximum=2))
    run_step(model, objective, [data()])
    step = run_step(model, objective, [data()])
    count = int((step.targets[0] >= 0).sum())
    weights = step.coefficients[0] * count
    clipped = int((weights > 1 - 1e-6).sum())
    assert 0 < clipped < count
    assert float(weights.max()) == pytest.approx(1, abs=1e-6)
    assert step.metrics["weights/clip_rate"] == pytest.approx(clipped / count)


# --- what a model converges to ---

TAUGHT = torch.arange(1, 13, dtype=torch.float64) / 78
"""Distribution of the token after one context: token v occurs v + 1 times in 78 rows."""


def gradient_at(mapping: Callable[[Tensor], Tensor], algorithm: str, **rho1: float) -> Tensor:
    """Gradient of the logits where the model predicts ``mapping(reference's prediction)`` and is taught `TAUGHT`."""
    base = tiny("qwen3", vocab_size=12, dtype=torch.float64, num_hidden_layers=1)
    model = wrap_transformer_with_etd(base, None).train()
    reference = wrap_transformer_with_etd(
        tiny("qwen3", vocab_size=12, dtype=torch.float64, num_hidden_layers=1, seed=4), None
    )
    tokens = torch.repeat_interleave(torch.arange(12), torch.arange(1, 13))
    input_ids = torch.stack([torch.full_like(tokens, 5), tokens], 1)
    batch = {"input_ids": input_ids, "labels": input_ids}
    with torch.no_grad():
        prior = reference(input_ids[:1]).logits[0, 0].softmax(-1)
        state = model.hidden_states(input_ids[:1])[0, 0]
        model.lm_head.weight.copy_(mapping(prior).log()[:, None] * state / state.square().sum())
    settings = Rho1Config(mode="weighted", **rho1) if algorithm == "rho1-wmtp" else None
    objective = WeightedMTP(make_scorer(algorithm, model, settings, reference=reference), IterationSampling(maximum=1))
    run_step(model, objective, [batch])
    gradient = run_step(model, objective, [batch]).gradients["lm_head.weight"]
    return gradient @ state / state.square().sum()


def normed(weights: Tensor) -> Tensor:
    return weights / weights.sum()


@pytest.mark.parametrize("algorithm", ["baseline-mtp", "entropy"])
def test_weights_that_do_not_see_the_target_leave_the_optimum_in_place(algorithm: str) -> None:
    assert float(gradient_at(lambda _: TAUGHT, algorithm).abs().max()) < EXACT


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_rho1_weights_converge_to_a_geometric_mean_of_data_and_reference(temperature: float) -> None:
    """The excess weighs a target by ``(p_ref / q)^(1/τ)``, so ``q ∝ data · weight`` holds where ``q^(1+τ) ∝ data^τ · p_ref``."""

    def mean(prior: Tensor) -> Tensor:
        return normed((TAUGHT**temperature * prior) ** (1 / (1 + temperature)))

    assert float(gradient_at(mean, "rho1-wmtp", temperature=temperature).abs().max()) < EXACT
    assert float(gradient_at(lambda _: TAUGHT, "rho1-wmtp", temperature=temperature).abs().max()) > 1e-2


def test_dft_sharpens_and_gradient_norms_flatten_what_is_already_learnt() -> None:
    """At the data's own distribution, where the baseline rests; a negative gradient raises a logit."""
    dft, norm = (gradient_at(lambda _: TAUGHT, name) for name in ("dft", "gradient-wmtp"))
    assert torch.equal(dft < 0, (TAUGHT**2).sum() < TAUGHT)
    assert float(norm[-1]) > 1e-3
    assert float(norm[0]) < -1e-4


# --- names ---


class Point:
    """An entry point of another package."""

    def __init__(self, name: str, function: Callable[[Evidence], Tensor]) -> None:
        self.name = name
        self._function = function

    def load(self) -> Callable[[Evidence], Tensor]:
        return self._function


@pytest.fixture
def third_party(monkeypatch: pytest.MonkeyPatch) -> None:
    def later_counts_more(evidence: Evidence) -> Tensor:
        assert evidence.positions is not None
        return 1.0 + evidence.positions

    points = [Point("later", later_counts_more), Point("dft", later_counts_more)]
    monkeypatch.setattr(table, "entry_points", lambda group: points if group == "mull.objectives" else [])


@pytest.mark.usefixtures("third_party")
def test_an_algorithm_of_another_package_trains() -> None:
    model = model_of(tiny("qwen3", **DEPTH))
    before = model.lm_head.weight.detach().clone()
    objective = make_objective("later", Resources(model=model, iterations=IterationSampling(maximum=2)))
    assert isinstance(objective, WeightedMTP)
    assert objective.algorithm == "later_counts_more"
    step = run_step(model, objective, split(data(), 2))
    assert float(step.effective((1.0, 0.2, 0.1))[0][0, 14, 0]) > float(step.effective((1.0, 0.2, 0.1))[0][0, 4, 0])
    config = TrainConfig(steps=1, accumulate=2, precision="fp32")
    result = train(model, objective, lambda number: split(data(), 2)[number], config)
    assert result.history[-1]["weights/ess"] < 1
    assert not torch.equal(model.lm_head.weight, before)


@pytest.mark.usefixtures("third_party")
def test_names_of_mull_itself_come_first() -> None:
    model = model_of(tiny("qwen3", **DEPTH))
    assert make_scorer("dft", model).name == "dft"
    assert "later" in objective_names()


def test_an_unknown_name_is_answered_with_the_known_ones() -> None:
    model = model_of(tiny("qwen3", **DEPTH))
    with pytest.raises(
        ValueError, match=r"'rho2' is not known\. Known are align, baseline-mtp, .*critic-wmtp.*rho1-wmtp"
    ):
        make_objective("rho2", Resources(model=model))


@pytest.mark.parametrize(
    ("name", "settings", "missing"),
    [
        ("rho1-wmtp", None, "reference model"),
        ("critic-wmtp", None, "value head"),
        ("value-head", None, "value head"),
        ("gradient-wmtp", GradientConfig(mode="alignment"), "held-out"),
        ("grpo-wmtp", None, "reward"),
    ],
)
def test_a_missing_resource_is_named(name: str, settings: Settings | None, missing: str) -> None:
    model = model_of(tiny("qwen3", **DEPTH))
    with pytest.raises(ValueError, match=rf"^{name}.*{missing}"):
        make_objective(name, Resources(model=model), settings)


def test_a_reference_with_another_vocabulary_is_refused() -> None:
    model = model_of(tiny("qwen3", **DEPTH))
    reference = wrap_transformer_with_etd(tiny("qwen3", vocab_size=VOCAB + 1, **DEPTH), None)
    with pytest.raises(ValueError, match=rf"vocabulary of {VOCAB + 1} tokens, the model one of {VOCAB}"):
        make_scorer("rho1-wmtp", model, reference=reference)


def test_a_step_without_targets_is_refused() -> None:
    base = tiny("qwen3", **DEPTH)
    model = model_of(base)
    nothing = {**data(), "labels": torch.full_like(data()["labels"], -100)}
    for name in ("baseline", "critic", "rho1-skip"):
        with pytest.raises(ValueError, match="No label of shape"):
            run_step(model, objective_of(name, model, base), [nothing])


@pytest.mark.parametrize(
    ("config", "field", "value"),
    [
        (Rho1Config, "temperature", 0.0),
        (Rho1Config, "skip_share", 1.0),
        (CriticConfig, "gae_lambda", 1.1),
        (CriticConfig, "max_weight", 0.1),
        (GradientConfig, "momentum", 0.0),
        (GradientConfig, "percentile", 0.3),
    ],
)
def test_settings_out_of_range_or_unknown_are_refused(config: type, field: str, value: float) -> None:
    with pytest.raises(ValueError, match=r"min_weight" if field == "max_weight" else field):
        config(**{field: value})


def test_the_reference_is_only_read() -> None:
    base = tiny("qwen3", **DEPTH)
    model, reference = model_of(base), resources_of(base)["reference"]
    before = {name: tensor.clone() for name, tensor in reference.state_dict().items()}
    settings = Rho1Config(mode="weighted")
    objective = make_objective("rho1-wmtp", Resources(model=model, reference=reference), settings)
    train(model, objective, lambda _: data(), TrainConfig(steps=2, precision="fp32"))
    assert all(torch.equal(before[name], tensor) for name, tensor in reference.state_dict().items())
    assert all(parameter.grad is None for parameter in reference.parameters())
