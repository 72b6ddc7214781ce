"""Claim: every weighting algorithm obeys one contract.

Weights are constants, belong to the target that a head predicts, stay within documents, have mean 1 over the targets of a step,
and do not depend on how these fall into micro-batches. Arithmetic is in fp64; tolerances as in `conftest.EXACT`.
"""

import copy
import json
import math
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from conftest import EXACT, tiny
from distributed_ranks import run_ranks
from torch import Tensor
from torch.nn import functional as F
from weighted_steps import (
    ALGORITHMS,
    CONTROLS,
    DEPTH,
    DOCUMENTS,
    TOKENS,
    Exact,
    Step,
    assert_same,
    data,
    given_objective,
    make_scorer,
    model_of,
    objective_of,
    resources_of,
    run_step,
    split,
    trainings,
)

from mull import MTPConfig, MullForCausalLM, wrap_transformer_with_etd
from mull.layers.value_head import value_loss
from mull.ops.targets import targets_of
from mull.ops.token_weights import lambda_returns
from mull.runtime.checkpoint import CheckpointConfig
from mull.training.loop import TrainConfig, train
from mull.training.objectives.iterations import IterationSampling
from mull.training.objectives.weighted_mtp import Control, HeadTraining, WeightedMTP
from mull.training.objectives.weightings import Critic, Rho1Config

HEAD_TYPES = ("transformer", "mlp", "shared_lm_head", "sequential", "native")
HEAD_WEIGHTS = (1.0, 0.3 * 2 / 3, 0.3 / 3)
"""Of the main head and two after it: ``mtp_loss_weight`` 0.3, decay 0.5."""


@pytest.fixture(params=ALGORITHMS)
def algorithm(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def random_scores(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.1


# --- weights are constants ---


def test_a_weight_scales_the_gradient_of_its_token(exact: Exact) -> None:
    """Before normalisation: the sum over a micro-batch is linear in the weights, one token at a time."""
    model, batch = model_of(exact("qwen3", **DEPTH)), data()
    scores = random_scores(batch["labels"].shape)
    token, factor = (1, 9), 3.5

    def unnormalised(scores: Tensor) -> dict[str, Tensor]:
        step = run_step(model, given_objective(), [{**batch, "scores": scores}])
        return {name: gradient * step.total_weight for name, gradient in step.gradients.items()}

    one, scaled = torch.zeros_like(scores), scores.clone()
    one[token], scaled[token] = scores[token], factor * scores[token]
    before, alone, after = unnormalised(scores), unnormalised(one), unnormalised(scaled)
    assert float(alone["model.layers.0.mlp.up_proj.weight"].abs().max()) > 1e-6
    expected = {name: before[name] + (factor - 1) * alone[name] for name in before}
    assert_same(after, expected, EXACT)


def test_only_relative_weights_change_the_training(exact: Exact) -> None:
    base, batch = exact("qwen3", **DEPTH), data()
    scores = random_scores(batch["labels"].shape)
    other = scores.clone()
    other[1, 9] *= 5

    def trained(scores: Tensor) -> Tensor:
        model = model_of(base)
        steps = TrainConfig(steps=2, precision="fp32")
        train(model, given_objective(), lambda _: {**batch, "scores": scores}, steps)
        return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])

    reference = trained(scores)
    torch.testing.assert_close(trained(scores * 1000), reference, atol=EXACT, rtol=0)
    assert float((trained(other) - reference).abs().max()) > 1e-5


def test_no_gradient_flows_through_weights(algorithm: str, exact: Exact) -> None:
    """The gradient is that of the logits' cross-entropy with the step's coefficients as numbers."""
    base = exact("qwen3", **DEPTH)
    model, batches = model_of(base), split(data(), 2)
    objective = objective_of(algorithm, model, base, auxiliary_loss_coef=0)
    run_step(model, objective, batches)  # gradient scores have a scale from the second step on
    step = run_step(model, objective, batches)
    loss = torch.zeros((), dtype=torch.float64)
    for batch, targets, coefficients in zip(batches, step.targets, step.coefficients, strict=True):
        hidden = model.hidden_states(batch["input_ids"], position_ids=batch["position_ids"], think_iterations=2)
        states = [hidden, *(model.mtp_heads(k, hidden, None, lambda _block, h, _k: h) for k in (1, 2))]
        losses = F.cross_entropy(model.lm_head(torch.stack(states, 2)).movedim(-1, 1), targets, reduction="none")
        loss = loss + (losses * coefficients).sum() / step.total_weight
    assert step.loss == pytest.approx(float(loss.detach()), rel=EXACT)
    model.zero_grad()
    loss.backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert_same(step.gradients, expected, EXACT)


def test_the_baseline_is_the_loss_of_the_model_itself(exact: Exact) -> None:
    """`MullForCausalLM.forward` computes the same loss from logits, row means apart: whole rows of equal length here."""
    base = exact("qwen3", **DEPTH)
    model = model_of(base)
    batch = {"input_ids": data()["input_ids"], "labels": data()["input_ids"]}
    step = run_step(model, objective_of("baseline", model, base), split(batch, 4))
    output = model(**batch, think_iterations=2, use_cache=False)
    assert step.loss == pytest.approx(float(output.loss.detach()), rel=EXACT)
    assert step.metrics["head2_loss"] == pytest.approx(float(output.mtp_step_losses["mtp_2"]), rel=EXACT)
    model.zero_grad()
    output.loss.backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert_same(step.gradients, expected, EXACT)


# --- weights belong to their targets ---


def places_by_hand(
    documents: list[int], labels: list[int], padding: set[int], n_heads: int
) -> Iterator[tuple[int, int]]:
    """Position and head of every target of a row, in loops over documents; the row may end within one."""
    start = 0
    for length in documents:
        end = min(start + length, len(labels))
        for i in range(start, end):
            for target in range(i + 1, min(i + 1 + n_heads, end)):
                if labels[target] != -100 and not {i, target} & padding:
                    yield i, target - i - 1
        start += length


@pytest.mark.parametrize("n_heads", [1, 2, 4])
@pytest.mark.parametrize("tokens", [2, 3, TOKENS])
def test_a_weight_is_the_score_of_the_predicted_token(n_heads: int, tokens: int, exact: Exact) -> None:
    heads = None if n_heads == 1 else "sequential"
    model = model_of(exact("qwen3", **DEPTH), heads, n_heads - 1)
    batch = {name: tensor[:6, :tokens] for name, tensor in data().items()}
    batch["scores"] = random_scores((6, tokens))
    step = run_step(model, given_objective(heads=HeadTraining(weights="uniform")), split(batch, 3))
    check_places(step, batch, [(DOCUMENTS[row], set()) for row in range(6)], n_heads)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_never_a_target_nor_predicts_one(side: str, exact: Exact) -> None:
    model = model_of(exact("qwen3", **DEPTH), "transformer", 3)
    batch = {"input_ids": data()["input_ids"], "scores": random_scores((8, TOKENS))}
    lengths = torch.tensor([2, 3, 4, 9, 15, 16, 7, 5])[:, None]
    column = torch.arange(TOKENS)[None]
    mask = column < lengths if side == "right" else column >= TOKENS - lengths
    batch |= {"attention_mask": mask.long(), "labels": torch.where(mask, batch["input_ids"], -100)}
    step = run_step(model, given_objective(heads=HeadTraining(weights="uniform")), split(batch, 4))
    rows = [([TOKENS], {i for i in range(TOKENS) if not mask[row, i]}) for row in range(8)]
    check_places(step, batch, rows, 4)


def check_places(step: Step, batch: dict[str, Tensor], rows: list[tuple[list[int], set[int]]], n_heads: int) -> None:
    targets, coefficients = torch.cat(step.targets), torch.cat(step.coefficients)
    expected, weights = torch.full_like(targets, -100), torch.zeros_like(coefficients)
    for row, (documents, padding) in enumerate(rows):
        labels = batch["labels"][row].tolist()
        for i, head in places_by_hand(documents, labels, padding, n_heads):
            expected[row, i, head] = labels[i + 1 + head]
            weights[row, i, head] = batch["scores"][row, i + 1 + head]
    assert torch.equal(targets, expected)
    torch.testing.assert_close(coefficients * (expected >= 0).sum(), weights, atol=EXACT, rtol=0)


MIXED = {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}
FAMILIES = {"qwen3": (DEPTH, EXACT), "qwen3_next-dense": (DEPTH | MIXED, 1e-5)}
"""Layers and tolerance. The hybrid computes its decay in fp32, and the gradient of its scale is a difference of large sums."""


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.latin(4, "family", "algorithm")
def test_packed_documents_train_like_separate_ones(family: str, algorithm: str, exact: Exact) -> None:
    row, documents = 2, DOCUMENTS[2]
    layers, tolerance = FAMILIES[family]
    base, packed = exact(family, **layers), {name: tensor[row : row + 1] for name, tensor in data().items()}
    spans = [slice(sum(documents[:place]), sum(documents[: place + 1])) for place in range(len(documents))]
    separate = [{name: tensor[:, span] for name, tensor in packed.items()} for span in spans]
    model = model_of(base, "transformer")
    together, apart = (objective_of(algorithm, model, base) for _ in range(2))
    for _ in range(2):
        one, other = run_step(model, together, [packed]), run_step(model, apart, separate)
        for span, weights in zip(spans, other.coefficients, strict=True):
            torch.testing.assert_close(one.coefficients[0][:, span], weights, atol=EXACT, rtol=0)
        assert_same(other.gradients, one.gradients, tolerance)


# --- mean 1, whatever the split ---


@cache
def second_step(algorithm: str, control: Control, heads: str, n: int) -> Step:
    """The step in `n` micro-batches after a first one: gradient scores have a scale from then on."""
    base = tiny("qwen3", dtype=torch.float64, **DEPTH)
    model = model_of(base, heads)
    objective = objective_of(algorithm, model, base, control=control)
    run_step(model, objective, split(data(), n))
    return run_step(model, objective, split(data(), n))


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.latin(8, "algorithm", "control")
def test_the_mean_weight_is_1_over_all_targets_of_the_step(algorithm: str, control: Control) -> None:
    step = second_step(algorithm, control, "mlp", 8)
    valid = torch.cat(step.targets) >= 0
    per_row = valid.sum((1, 2)).tolist()
    assert len(set(per_row)) > 4, "micro-batches of unequal numbers of targets"
    assert 0 in per_row
    effective = torch.cat(step.effective(HEAD_WEIGHTS))
    assert float(effective[valid].mean()) == pytest.approx(1, abs=EXACT)
    assert float(effective[~valid].abs().max()) == 0


COMBINATIONS = [(name, control, "mlp") for name in ALGORITHMS for control in CONTROLS]
COMBINATIONS += [
    (name, control, heads)
    for name, control in (("rho1-skip", "shuffled"), ("critic", "none"))
    for heads in HEAD_TYPES
    if heads != "mlp"
]


@pytest.mark.parametrize(("algorithm", "control", "heads"), COMBINATIONS)
@pytest.mark.latin(8, "algorithm")
def test_the_split_into_micro_batches_changes_nothing(algorithm: str, control: Control, heads: str) -> None:
    whole = second_step(algorithm, control, heads, 1)
    for n in (2, 8):
        parts = second_step(algorithm, control, heads, n)
        assert parts.loss == pytest.approx(whole.loss, rel=EXACT)
        assert_same(parts.gradients, whole.gradients, EXACT)
        assert parts.metrics == pytest.approx(whole.metrics, rel=EXACT)


@pytest.mark.slow
def test_two_ranks_weigh_and_train_as_one_process(tmp_path: Path) -> None:
    """The steps of a rank are half of the micro-batches; every rank logs the numbers of the whole step."""
    ranks, alone = run_ranks(trainings, folder=tmp_path), trainings()
    for name, (weights, records) in alone.items():
        assert_same(ranks[0][name][0], weights, EXACT)
        for of_rank in ranks:
            assert len(of_rank[name][1]) == len(records)
            for record, expected in zip(of_rank[name][1], records, strict=True):
                assert record == pytest.approx(expected, rel=EXACT), name


def test_marked_tokens_are_reported_and_not_seen(exact: Exact) -> None:
    base, batch = exact("qwen3", **DEPTH), data()
    model = model_of(base)
    marked = torch.rand(batch["labels"].shape, generator=torch.Generator().manual_seed(1)) < 0.3
    plain = run_step(model, objective_of("dft", model, base), split(batch, 4))
    step = run_step(model, objective_of("dft", model, base), split({**batch, "marked": marked}, 4))
    assert step.loss == plain.loss
    effective, targets = torch.cat(step.effective(HEAD_WEIGHTS)), torch.cat(step.targets)
    chosen = torch.zeros_like(targets, dtype=torch.bool)
    for head in range(3):
        chosen[:, : TOKENS - 1 - head, head] = marked[:, 1 + head :]
    expected = float(effective[chosen & (targets >= 0)].mean())
    assert step.metrics["weights/marked"] == pytest.approx(expected, rel=EXACT)
    assert "weights/marked" not in plain.metrics


# --- Rho-1 ---


def test_rho1_with_the_model_as_reference_is_the_baseline() -> None:
    """Bit for bit: the excess is 0 and its exponential 1."""
    base = tiny("qwen3", **DEPTH)
    model = wrap_transformer_with_etd(base, None, MTPConfig(num_predict_tokens=2, mtp_head_type="mlp")).train()
    reference = wrap_transformer_with_etd(copy.deepcopy(base), None).eval()
    iterations = IterationSampling(maximum=1)
    rho1 = make_scorer("rho1-wmtp", model, Rho1Config(mode="weighted"), reference=reference)
    weighted, plain = (
        run_step(model, WeightedMTP(scorer, iterations), split(data(), 4))
        for scorer in (rho1, make_scorer("baseline-mtp", model))
    )
    assert weighted.metrics == plain.metrics
    assert weighted.loss == plain.loss
    for name, gradient in plain.gradients.items():
        assert torch.equal(weighted.gradients[name], gradient), name


@pytest.mark.parametrize("skip_share", [0.0, 0.3, 0.97])
def test_token_skip_keeps_its_share_of_the_step(skip_share: float, exact: Exact) -> None:
    """Also where a micro-batch keeps nothing at all."""
    base = exact("qwen3", **DEPTH)
    model = model_of(base)
    for n in (1, 4, 8):
        scorer = make_scorer("rho1-wmtp", model, Rho1Config(skip_share=skip_share), **resources_of(base))
        objective = WeightedMTP(scorer, IterationSampling(maximum=2))
        step = run_step(model, objective, split(data(), n))
        kept = [int((coefficients[..., 0] > 0).sum()) for coefficients in step.coefficients]
        n_targets = int((torch.cat(step.targets)[..., 0] >= 0).sum())
        assert sum(kept) == math.ceil(round((1 - skip_share) * n_targets, 6))
        if skip_share == 0.97 and n == 8:
            assert 0 in kept
        assert step.metrics["weights/head0/zero_rate"] == pytest.approx(1 - sum(kept) / n_targets)


def test_the_excess_is_signed(exact: Exact) -> None:
    """A token that the reference finds harder counts less than one on which both agree."""
    base, batch = exact("qwen3", **DEPTH), data()
    model = model_of(base, None)
    objective = objective_of("rho1-weighted", model, base)
    step = run_step(model, objective, [batch])
    reference = resources_of(base)["reference"]
    with torch.no_grad():
        ours = model(batch["input_ids"], position_ids=batch["position_ids"], think_iterations=2).logits
        theirs = reference(batch["input_ids"], position_ids=batch["position_ids"]).logits
    targets = step.targets[0][..., 0]
    excess = F.cross_entropy(ours.mT, targets, reduction="none") - F.cross_entropy(theirs.mT, targets, reduction="none")
    valid = targets >= 0
    assert (excess[valid] < -0.1).any()
    assert (excess[valid] > 0.1).any()
    weights = step.coefficients[0][..., 0] * valid.sum()
    torch.testing.assert_close(weights[valid].log(), excess[valid], atol=EXACT, rtol=0)


# --- state ---

REMEMBERING = [("critic", "none"), ("gradient-norm", "none"), ("gradient-alignment", "none"), ("dft", "shuffled")]


@pytest.mark.parametrize(("algorithm", "control"), REMEMBERING)
def test_a_restored_state_continues_exactly(algorithm: str, control: Control, exact: Exact) -> None:
    base = exact("qwen3", **DEPTH)
    model = model_of(base)

    def fresh() -> WeightedMTP:
        return objective_of(algorithm, model, base, control=control)

    def step_on(objective: WeightedMTP, seed: int) -> Step:
        return run_step(model, objective, split(data(seed), 2))

    straight, stopped, resumed, forgetful = fresh(), fresh(), fresh(), fresh()
    for seed in (1, 2):
        step_on(straight, seed)
        step_on(stopped, seed)
    state = stopped.state_dict()
    tensors = {name: value.clone() for name, value in state.items() if isinstance(value, Tensor)}
    values = json.loads(json.dumps({name: value for name, value in state.items() if name not in tensors}))
    resumed.load_state_dict({**values, **tensors})
    expected, actual, other = (step_on(objective, 3) for objective in (straight, resumed, forgetful))
    for name, gradient in expected.gradients.items():
        assert torch.equal(actual.gradients[name], gradient), name
    assert actual.metrics == expected.metrics
    assert any(not torch.allclose(other.gradients[name], gradient) for name, gradient in expected.gradients.items())


@pytest.mark.parametrize("algorithm", ["critic", "gradient-alignment"])
def test_a_resumed_training_is_the_uninterrupted_one(algorithm: str, tmp_path: Path) -> None:
    base = tiny("qwen3", **DEPTH)

    def trained(folder: str, **options: object) -> MullForCausalLM:
        model = model_of(base)
        objective = objective_of(algorithm, model, base)
        config = TrainConfig(steps=4, accumulate=2, precision="fp32", log_every=1)
        train(
            model,
            objective,
            lambda number: split(data(number // 2), 2)[number % 2],
            config,
            tmp_path / folder,
            checkpoint=CheckpointConfig(every=2),
            **options,
        )
        return model

    straight = trained("straight").state_dict()
    trained("stopped", until=lambda record: record["step"] == 2)
    resumed = trained("stopped", resume=True).state_dict()
    for name, weight in straight.items():
        assert torch.equal(resumed[name], weight), name


@pytest.mark.parametrize("algorithm", ["critic", "gradient-norm", "gradient-alignment", "rho1-skip"])
def test_evaluation_leaves_no_trace(algorithm: str, exact: Exact) -> None:
    base = exact("qwen3", **DEPTH)
    model = model_of(base)
    watched, alone = (objective_of(algorithm, model, base) for _ in range(2))
    for seed in (1, 2):
        model.eval()
        with torch.no_grad():
            assert torch.isfinite(watched(model, data(9)).sum)
        model.train()
        one, other = (run_step(model, objective, split(data(seed), 2)) for objective in (watched, alone))
        assert one.loss == other.loss
        assert one.metrics == other.metrics


# --- the critic's own loss ---


@pytest.mark.parametrize("coefficient", [0.0, 0.1])
def test_the_auxiliary_loss_is_a_mean_squared_error_beside_the_token_loss(coefficient: float, exact: Exact) -> None:
    """Its size does not depend on the weights, nor on the number of micro-batches; its gradient reaches the trunk."""
    base, batch = exact("qwen3", **DEPTH), data()
    model = model_of(base)
    plain = run_step(model, objective_of("critic", model, base, auxiliary_loss_coef=0), split(batch, 4))
    objective = objective_of("critic", model, base, auxiliary_loss_coef=coefficient)
    step = run_step(model, objective, split(batch, 4))
    assert all(torch.equal(a, b) for a, b in zip(plain.coefficients, step.coefficients, strict=True))

    critic = objective._scorer
    assert isinstance(critic, Critic)
    hidden = model.hidden_states(batch["input_ids"], position_ids=batch["position_ids"], think_iterations=2)
    evidence = critic.evidence(model, batch, hidden, critic.plan_step(model, [batch], 2, [0]))
    values = critic.companion(hidden)
    returns = lambda_returns(critic(evidence).scores, values.detach(), evidence.valid)
    model.zero_grad()
    critic.companion.zero_grad()
    (coefficient * value_loss(values, returns, evidence.valid) / evidence.valid.sum()).backward()
    modules = {"": model, "companion.": critic.companion}
    expected = dict(plain.gradients)
    for prefix, module in modules.items():
        for name, parameter in module.named_parameters():
            if coefficient and parameter.grad is not None:
                expected[prefix + name] = expected.get(prefix + name, 0) + parameter.grad
    assert_same(step.gradients, expected, EXACT)
    trunk = "model.layers.0.mlp.up_proj.weight"
    assert torch.allclose(step.gradients[trunk], plain.gradients[trunk], rtol=1e-9, atol=0) == (coefficient == 0)
    assert any(name.startswith("companion.") for name in step.gradients) == (coefficient > 0)


# --- controls ---


@pytest.mark.parametrize("algorithm", ["dft", "rho1-skip", "critic"])
def test_controls_keep_the_weights_or_the_mean_of_each_head(algorithm: str) -> None:
    steps = [second_step(algorithm, control, "mlp", 8) for control in CONTROLS]
    plain, shuffled, random = (torch.cat(step.effective(HEAD_WEIGHTS)) for step in steps)
    valid = torch.cat(steps[0].targets) >= 0
    for head in range(3):
        among = valid[..., head]
        expected, kept, drawn = (values[..., head][among] for values in (plain, shuffled, random))
        torch.testing.assert_close(kept.sort().values, expected.sort().values, atol=1e-6, rtol=0)
        assert not torch.allclose(kept, expected, atol=1e-3)
        assert float(drawn.mean()) == pytest.approx(float(expected.mean()), rel=1e-6)
        assert not torch.allclose(drawn.sort().values, expected.sort().values, atol=1e-3)


@pytest.mark.parametrize("control", ["shuffled", "random"])
def test_controls_follow_from_seed_and_step_alone(control: Control, exact: Exact) -> None:
    base = exact("qwen3", **DEPTH)
    model = model_of(base)

    def steps(seed: int) -> list[Tensor]:
        objective = objective_of("dft", model, base, control=control, seed=seed)
        return [torch.cat(run_step(model, objective, split(data(), 2)).coefficients) for _ in range(2)]

    before = torch.get_rng_state()
    first = steps(3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(5)
    again, other = steps(3), steps(4)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], other[0])


# --- heads ---


def test_the_curriculum_adds_one_head_after_the_other(exact: Exact) -> None:
    base = exact("qwen3", **DEPTH)
    model = model_of(base, "mlp", 3)
    objective = objective_of("baseline", model, base, heads=HeadTraining(curriculum_steps=6))
    trained = []
    for _ in range(8):
        step = run_step(model, objective, split(data(), 2))
        heads = {int(name.split(".")[2]) + 1 for name in step.gradients if name.startswith("mtp_heads.")}
        assert heads == set(range(1, 1 + int(step.metrics["active_heads"])))
        assert step.targets[0].shape[-1] == 1 + len(heads)
        trained.append(len(heads))
    assert trained == [1, 1, 2, 2, 3, 3, 3, 3]


def test_the_warm_up_raises_the_heads_gradient_into_the_trunk_alone(exact: Exact) -> None:
    base = exact("qwen3", **DEPTH)
    model, batches = model_of(base, "transformer"), split(data(), 2)
    full = run_step(model, objective_of("baseline", model, base), batches).gradients
    main = run_step(model_of(base, None), objective_of("baseline", model, base), batches).gradients
    objective = objective_of("baseline", model, base, heads=HeadTraining(warmup_steps=4))
    for numerator in (0, 1, 2, 3, 4, 4):
        gradients = run_step(model, objective, batches).gradients
        share = numerator / 4
        expected = {
            name: main[name] + share * (gradient - main[name]) if name.startswith("model.") else gradient
            for name, gradient in full.items()
        }
        assert_same(gradients, expected, EXACT)


@pytest.mark.parametrize("heads", HEAD_TYPES)
def test_detached_heads_leave_the_trunk_to_the_main_head(heads: str, exact: Exact) -> None:
    base, batches = exact("qwen3", **DEPTH), split(data(), 2)
    model, bare = model_of(base, heads), model_of(base, None)
    detached = run_step(model, objective_of("baseline", model, base, heads=HeadTraining(detach=True)), batches)
    main = run_step(bare, objective_of("baseline", bare, base), batches)
    trunk = {name: gradient for name, gradient in detached.gradients.items() if name.startswith("model.")}
    assert_same(trunk, {name: main.gradients[name] for name in trunk}, EXACT)
    assert any(float(g.abs().max()) > 0 for name, g in detached.gradients.items() if name.startswith("mtp"))


# --- what is learnt ---


def losses_on_noise(heads: str) -> list[float]:
    """Loss of each head on fresh random tokens after a training on others, in nats."""
    base = tiny("qwen3", vocab_size=12, hidden_size=16, head_dim=8, **DEPTH)
    model = model_of(base, heads)
    objective = WeightedMTP(make_scorer("baseline-mtp", model), IterationSampling(maximum=1))
    generator = torch.Generator().manual_seed(0)

    def batch(_number: int) -> dict[str, Tensor]:
        tokens = torch.randint(12, (12, 12), generator=generator)
        return {"input_ids": tokens, "labels": tokens}

    train(model, objective, batch, TrainConfig(steps=60, peak_lr=2e-2, weight_decay=0, precision="fp32", log_every=60))
    model.eval()
    with torch.no_grad():
        plan = objective.plan_step(model, [batch(0) for _ in range(16)])
        seen = [objective.loss(model, plan, index).seen for index in range(16)]
    metrics = objective.end_step(plan, seen)
    return [metrics[f"head{k}_loss"] for k in range(3)]


@pytest.mark.parametrize("heads", ["transformer", "sequential", "native"])
@pytest.mark.latin(3, "heads")
def test_nothing_is_learnt_where_there_is_nothing_to_learn(heads: str) -> None:
    """Tokens drawn at random cannot be predicted: a head below ln V would have seen its label."""
    for loss in losses_on_noise(heads):
        assert math.log(12) - 0.02 < loss < math.log(12) + 0.2


@pytest.mark.parametrize("heads", ["transformer", "sequential", "native"])
@pytest.mark.latin(3, "heads")
def test_labels_shifted_by_one_are_caught(heads: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above, with every head asked for the token before its own, can fail: what a head sees, it learns."""

    def too_early(labels: Tensor, positions: Tensor | None, n_heads: int) -> Tensor:
        return targets_of(F.pad(labels[:, :-1], (1, 0), value=-100), positions, n_heads)

    monkeypatch.setattr("mull.training.objectives.weighted_mtp.targets_of", too_early)
    losses = losses_on_noise(heads)
    sees_its_label = [True, False, False] if heads == "transformer" else [True, True, True]
    assert [loss < math.log(12) - 0.1 for loss in losses] == sees_its_label
