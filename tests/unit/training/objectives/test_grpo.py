"""Claim: grpo-wmtp takes the policy gradient of the model's own samples, exactly, and samples from what it trains.

The reference is REINFORCE written out: every answer alone, without padding, its logits from a plain forward pass, autograd.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
import torch
from conftest import EXACT, VOCAB, tiny
from distributed_ranks import run_ranks
from torch import Tensor

from mull.data.arithmetic import ArithmeticTask
from mull.decoding import rounds
from mull.decoding.generate import generate
from mull.decoding.rollouts import rollouts
from mull.evaluation.rewards import REWARDS
from mull.model.causal_lm import MullForCausalLM
from mull.model.configs import ETDConfig, HaltingConfig, MTPConfig
from mull.retrofit.wrap import wrap_transformer_with_etd
from mull.runtime.distributed import full_state_dict, rank, whole
from mull.training.loop import TrainConfig, train
from mull.training.objectives import grpo
from mull.training.objectives.base import Batch, StepPlan
from mull.training.objectives.grpo import GroupRelative, GRPOConfig, RolloutPlan
from mull.training.objectives.iterations import IterationSampling
from mull.training.objectives.resources import Graded as Graded_
from mull.training.objectives.resources import Resources
from mull.training.objectives.table import make_objective as make_objective_of_table
from mull.training.objectives.weighted_mtp import HeadTraining, WeightedMTP
from mull.training.step import DistributedConfig, accumulate, make_stage, normalise, total_weight

PAD, ENDS = 0, tuple(range(2, 12))
"""A tenth of the vocabulary ends an answer, so that answers have all lengths and some are cut off."""

LIMIT, GROUP = 7, 4
TWICE = IterationSampling(maximum=2)


def make_model(family: str = "qwen3", heads: int = 0, seed: int = 0, **changes: Any) -> MullForCausalLM:
    """Four layers in fp64, two of them looped, with heads that do not predict what the model does."""
    base = tiny(family, seed=seed, dtype=torch.float64, num_hidden_layers=4, **changes)
    mtp = MTPConfig(num_predict_tokens=heads, mtp_head_type="shared_lm_head") if heads else None
    model = wrap_transformer_with_etd(base, ETDConfig(n_encoder_layers=1, n_think_layers=2, n_decoder_layers=1), mtp)
    if model.mtp_heads is not None:
        for parameter in model.mtp_heads.parameters():
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model.train()


def prompts(rows: int = 3, longest: int = 5, seed: int = 0) -> dict[str, Tensor]:
    """Prompts of unequal lengths, padded on the left."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(12, VOCAB, (rows, longest), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(rows):
        mask[row, : row % (longest - 1)] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


class Graded:
    """A reward that keeps what it graded. It counts even tokens: groups differ, and not by a function of the length."""

    def __init__(self, grade: Callable[[Tensor], Tensor] | None = None) -> None:
        self.grade = grade or (lambda completions: (completions % 2 == 0).double().sum(1))
        self.completions: list[Tensor] = []
        self.batches: list[Batch] = []

    def __call__(self, completions: Tensor, batch: Batch) -> Tensor:
        self.completions.append(completions)
        self.batches.append(batch)
        return self.grade(completions)


def make_objective(
    reward: Any, reference: MullForCausalLM | None = None, iterations: IterationSampling = TWICE, **options: Any
) -> WeightedMTP:
    own = {name: options.pop(name) for name in ("control", "seed", "heads") if name in options}
    config = GRPOConfig(**{"group_size": GROUP, "max_new_tokens": LIMIT, **options})
    return WeightedMTP(GroupRelative(config, reward, ENDS, PAD, reference), iterations, **own)


def step(
    model: MullForCausalLM, objective: WeightedMTP, batches: Sequence[Batch]
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Gradient and metrics of a training step as the loop takes it."""
    stage = make_stage(model, objective, DistributedConfig()).train()
    stage.zero_grad()
    parts, plan, seen = accumulate(stage, dict(enumerate(batches)), "fp32")
    assert total_weight(parts) == pytest.approx(1, rel=1e-6), "signed weights are not normalised"
    normalise(list(model.parameters()), parts, None)
    gradient = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return gradient, objective.end_step(plan, seen)


def until_end(completion: Tensor) -> list[int]:
    """Tokens up to the first end, itself included."""
    kept: list[int] = []
    for token in completion.tolist():
        kept.append(token)
        if token in ENDS:
            break
    return kept


def answers_of(reward: Graded) -> list[tuple[list[int], list[int], float]]:
    """Prompt, answer and reward of every sample, without padding."""
    found = []
    for completions, batch in zip(reward.completions, reward.batches, strict=True):
        for row, (completion, value) in enumerate(zip(completions, reward.grade(completions).tolist(), strict=True)):
            mask = batch["attention_mask"][row] == 1
            found.append((batch["input_ids"][row][mask].tolist(), until_end(completion), value))
    return found


def expected_advantages(rewards: list[float], normalise_std: bool) -> list[float]:
    found = []
    for first in range(0, len(rewards), GROUP):
        group = rewards[first : first + GROUP]
        mean = sum(group) / GROUP
        std = math.sqrt(sum((r - mean) ** 2 for r in group) / (GROUP - 1))
        found += [(r - mean) / ((std + 1e-4) if normalise_std else 1) for r in group]
    return found


def reinforce(
    model: MullForCausalLM, reward: Graded, config: GRPOConfig, reference: MullForCausalLM | None = None
) -> tuple[dict[str, Tensor], float]:
    """Gradient of the surrogate loss, written out, and the mean k3."""
    model.zero_grad()
    samples = answers_of(reward)
    advantages = expected_advantages([value for *_, value in samples], config.normalise_std)
    n_heads = 1 if model.mtp_config is None else 1 + model.mtp_config.num_predict_tokens
    losses: list[list[Tensor]] = [[] for _ in range(n_heads)]
    divergences = []
    for (prompt, answer, _), advantage in zip(samples, advantages, strict=True):
        ids = torch.tensor([prompt + answer])
        hidden = model.hidden_states(ids, think_iterations=2)
        log_p = (model.lm_head(hidden[0]) / config.temperature).log_softmax(-1)
        worth = {}
        for place in range(len(prompt), ids.shape[1]):
            worth[place] = advantage
            term = -advantage * log_p[place - 1, ids[0, place]]
            if reference is not None:
                logits = reference(ids, use_cache=False, think_iterations=2).logits[0, place - 1] / config.temperature
                delta = logits.log_softmax(-1)[ids[0, place]] - log_p[place - 1, ids[0, place]]
                divergences.append(delta.exp() - delta - 1)
                term = term + config.kl_coef * divergences[-1]
                worth[place] += config.kl_coef * float(delta.detach().exp() - 1)
            losses[0].append(term)
        for k in range(1, n_heads):
            states = model.mtp_heads(k, hidden[0], None, lambda _block, h, _k: h)
            log_q = model.lm_head(states).log_softmax(-1)
            losses[k] += [
                -max(worth[place], 0.0) * log_q[place - 1 - k, ids[0, place]]
                for place in range(max(len(prompt), k + 1), ids.shape[1])
            ]
    weights = [1.0] if model.mtp_config is None else model.mtp_config.head_weights
    total = sum(w * torch.stack(terms).mean() for w, terms in zip(weights, losses, strict=True))
    total.backward()
    kl = float(torch.stack(divergences).mean().detach()) if divergences else 0.0
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}, kl


def assert_same_gradient(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        error = (actual[name] - gradient).norm() / (gradient.norm() + 1e-12)
        assert error < EXACT, f"{name}: relative error {error:.2e}"


CASES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "plain": ("qwen3", 0, {}),
    "Dr. GRPO": ("qwen3", 0, {"normalise_std": False}),
    "recurrent layers": ("qwen3_next-dense", 0, {}),
    "heads": ("qwen3", 2, {}),
    "drafts": ("qwen3", 2, {"draft_length": 2, "temperature": 0.8}),
    "penalty": ("qwen3", 0, {"kl_coef": 0.3}),
    "temperature": ("qwen3", 0, {"temperature": 0.6}),
    "tied, temperature, heads, penalty": ("qwen3-tied", 1, {"temperature": 1.7, "kl_coef": 0.5}),
}


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("case", CASES)
@pytest.mark.latin(3)
def test_a_step_has_the_gradient_of_reinforce(case: str) -> None:
    family, heads, options = CASES[case]
    model, reward = make_model(family, heads), Graded()
    reference = make_model(family, seed=5).eval() if "kl_coef" in options else None
    objective = make_objective(reward, reference, **options)
    actual, metrics = step(model, objective, [prompts()])
    expected, kl = reinforce(model, reward, objective.settings, reference)
    samples = answers_of(reward)
    for first in range(0, len(samples), GROUP):
        assert len({tuple(prompt) for prompt, *_ in samples[first : first + GROUP]}) == 1, "a group answers one prompt"
    assert len({len(answer) for _, answer, _ in samples}) > 2
    assert any(answer[-1] not in ENDS for _, answer, _ in samples), "an answer that is cut off counts as it is"
    assert_same_gradient(actual, expected)
    assert metrics.get("kl", 0.0) == pytest.approx(kl, rel=1e-5)
    assert metrics["reward"] == pytest.approx(sum(value for *_, value in samples) / len(samples))
    assert metrics["completion_length"] == pytest.approx(sum(len(a) for _, a, _ in samples) / len(samples))
    assert metrics["truncated"] == sum(a[-1] not in ENDS for _, a, _ in samples) / len(samples)


def test_the_penalty_of_the_reference_itself_is_nothing() -> None:
    model, reward = make_model(), Graded()
    penalised = make_objective(reward, make_model().eval(), kl_coef=10.0)
    gradient, metrics = step(model, penalised, [prompts()])
    assert_same_gradient(gradient, step(model, make_objective(Graded()), [prompts()])[0])
    assert metrics["kl"] == pytest.approx(0, abs=1e-12)


class Given(GroupRelative):
    """Answers of an earlier rollout."""

    def plan_step(self, _model: Any, batches: Sequence[Batch], iterations: int, _seed: Any) -> StepPlan:
        return RolloutPlan(batches=batches, iterations=iterations, counts=torch.ones(6))


@pytest.mark.parametrize("heads", [0, 2])
def test_the_gradient_does_not_depend_on_how_answers_fall_into_micro_batches(heads: int) -> None:
    model = make_model(heads=heads)
    reward = Graded(lambda completions: (completions[:, 0] % 2 == 0).float() * (completions[:, 0] > 40))
    objective = make_objective(reward)
    (everything,) = objective.plan_step(model, [prompts(4)]).batches
    assert (everything["advantages"].view(4, GROUP) == 0).all(1).any(), "a group teaches nothing"
    assert everything["advantages"].any()

    def gradient(parts: int) -> dict[str, Tensor]:
        batches = [
            {name: entry[rows] for name, entry in everything.items()} for rows in torch.arange(4 * GROUP).chunk(parts)
        ]
        given = Given(objective.settings, reward, ENDS, PAD)
        return step(model, WeightedMTP(given, TWICE), batches)[0]

    whole_step = gradient(1)
    assert_same_gradient(gradient(2), whole_step)
    assert_same_gradient(gradient(4), whole_step)
    assert_same_gradient(gradient(16), whole_step)


@pytest.mark.parametrize("heads", [0, 1])
@pytest.mark.parametrize("value", [0.0, 1.0, 0.1])
def test_equal_rewards_teach_nothing_and_do_not_stop_the_training(heads: int, value: float) -> None:
    model = make_model(heads=heads)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    objective = make_objective(Graded(lambda completions: torch.full((len(completions),), value)))
    config = TrainConfig(steps=2, accumulate=2, precision="fp32", peak_lr=1e-2, weight_decay=0.0, log_every=1)
    result = train(model, objective, lambda number: prompts(seed=number), config)
    for record in result.history:
        assert record["loss"] == pytest.approx(0, abs=1e-9)
        assert record["grad_norm"] == pytest.approx(0, abs=1e-9)
        assert record["equal_groups"] == 1
        assert record["reward"] == pytest.approx(value)
    if value != 0.1:  # whose mean rounds
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_what_follows_the_end_is_no_target_and_is_not_seen() -> None:
    model, reward = make_model(), Graded()
    (batch,) = make_objective(reward).plan_step(model, [prompts()]).batches
    width = prompts()["input_ids"].shape[1]
    assert batch["input_ids"][:, width:].equal(reward.completions[0])
    assert (batch["labels"][:, :width] == -100).all()
    for row, completion in enumerate(reward.completions[0]):
        n_kept = len(until_end(completion))
        assert batch["labels"][row, width : width + n_kept].equal(completion[:n_kept])
        assert (batch["labels"][row, width + n_kept :] == -100).all()
        assert batch["attention_mask"][row, width:].tolist() == [1] * n_kept + [0] * (len(completion) - n_kept)
        assert (completion[n_kept:] == PAD).all()


@pytest.mark.parametrize(("temperature", "draft_length"), [(1.0, 0), (0.5, 0), (1.0, 2), (0.5, 1)])
def test_samples_follow_the_distribution_that_is_trained_whatever_the_generation_settings(
    temperature: float, draft_length: int
) -> None:
    size, n = 8, 2500
    model = make_model(heads=draft_length, vocab_size=size, initializer_range=0.2).eval()
    model.generation_config.update(top_k=1, repetition_penalty=5.0, temperature=0.1, min_new_tokens=2, do_sample=False)
    ids, mask = torch.tensor([[0, 0, 5, 3], [4, 6, 1, 7]]), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    drawn = rollouts(
        model,
        ids.repeat_interleave(n, 0),
        mask.repeat_interleave(n, 0),
        seeds=range(2 * n),
        end_ids=[2],
        pad_id=0,
        max_new_tokens=2,
        temperature=temperature,
        iterations=3,
        draft_length=draft_length,
    )
    for row, prompt in enumerate([[5, 3], [4, 6, 1, 7]]):
        expected = torch.zeros(size, size, dtype=torch.float64)
        for first in range(size):
            rows = torch.tensor([[*prompt, first]])
            p = (model(rows, think_iterations=3, use_cache=False).logits[0] / temperature).softmax(-1).detach()
            second = torch.eye(size, dtype=torch.float64)[0] if first == 2 else p[-1]
            expected[first] = p[-2, first] * second
        mine = drawn[row * n : (row + 1) * n]
        counts = torch.bincount(mine[:, 0] * size + mine[:, 1], minlength=size**2).view(size, size)
        likely = n * expected >= 5
        assert likely.sum() > 15
        chi_square = ((counts - n * expected).square() / (n * expected))[likely].sum()
        freedom = int(likely.sum())
        assert chi_square < freedom + 5 * math.sqrt(2 * freedom)
        assert counts[expected == 0].sum() == 0


def test_samples_are_drawn_at_the_iterations_that_the_step_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    monkeypatch.setattr(
        grpo,
        "rollouts",
        lambda *args, iterations, **more: (drawn.append(iterations), rollouts(*args, iterations=iterations, **more))[1],
    )
    model = make_model()
    objective = make_objective(Graded(), iterations=IterationSampling(kind="uniform", maximum=4))
    for _ in range(8):
        plan = objective.plan_step(model, [prompts()])
        assert objective.loss(model, plan, 0).metrics["iterations"] == drawn[-1]
    assert len(set(drawn)) > 1


def test_dropout_rests_while_sampling_and_the_mode_returns_even_after_an_error() -> None:
    model = make_model(attention_dropout=0.5)
    modes = []

    def reward(completions: Tensor, _: Batch) -> Tensor:
        modes.append(model.training)
        raise KeyError("a grader fails")

    with pytest.raises(KeyError):
        make_objective(reward).plan_step(model, [prompts()])
    assert modes == [False]
    assert model.training
    model.eval()
    make_objective(Graded()).plan_step(model, [prompts()])
    assert not model.training


def sampled(objective: WeightedMTP, reward: Graded, model: MullForCausalLM) -> list[Tensor]:
    """Answers of one step of two equal micro-batches."""
    reward.completions.clear()
    with torch.no_grad():
        plan = objective.plan_step(model, [prompts(), prompts()])
        objective.end_step(plan, [objective.loss(model, plan, index).seen for index in range(2)])
    return list(reward.completions)


def test_micro_batches_and_steps_draw_anew_and_a_resumed_run_draws_the_same() -> None:
    model, reward = make_model(), Graded()
    objective = make_objective(reward, seed=3)
    first, second = sampled(objective, reward, model)
    assert not torch.equal(first, second)
    state = objective.state_dict()
    torch.manual_seed(1)
    third = sampled(objective, reward, model)
    assert not torch.equal(first, third[0])
    resumed = make_objective(reward, seed=3)
    resumed.load_state_dict(state)
    torch.manual_seed(2)
    assert all(map(torch.equal, sampled(resumed, reward, model), third))
    assert not torch.equal(sampled(make_objective(reward, seed=4), reward, model)[0], first)


def drawn_in(parts: int, draft_length: int, rows: int = 4) -> list[list[int]]:
    """Answers to the same prompts in micro-batches of several sizes."""
    model, reward = make_model(heads=2), Graded()
    everything = prompts(rows)
    batches = [{name: t[i] for name, t in everything.items()} for i in torch.arange(rows).chunk(parts)]
    make_objective(reward, draft_length=draft_length, seed=5).plan_step(model, batches)
    return [until_end(completion) for completions in reward.completions for completion in completions]


@pytest.mark.parametrize("draft_length", [0, 2])
def test_an_answer_does_not_depend_on_the_rows_beside_it(draft_length: int) -> None:
    everything = drawn_in(1, draft_length)
    assert drawn_in(2, draft_length) == everything
    assert drawn_in(4, draft_length) == everything
    assert drawn_in(1, 0, rows=2) == drawn_in(1, 0)[: 2 * GROUP]


def test_tokens_think_as_long_as_they_do_in_training_also_where_the_model_would_stop_them() -> None:
    model = make_model().eval()
    options = {"seeds": range(3), "end_ids": ENDS, "pad_id": PAD, "max_new_tokens": LIMIT, "iterations": 4}
    ids, mask = prompts()["input_ids"], prompts()["attention_mask"]
    drawn = rollouts(model, ids, mask, **options)
    stops = {"adaptive_depth": True, "halting": HaltingConfig(rule="state", threshold=0.01)}
    eager = wrap_transformer_with_etd(
        tiny("qwen3", seed=0, dtype=torch.float64, num_hidden_layers=4),
        ETDConfig(n_encoder_layers=1, n_think_layers=2, n_decoder_layers=1, **stops),
    ).eval()
    eager.load_state_dict(model.state_dict())
    assert torch.equal(rollouts(eager, ids, mask, **options), drawn)
    stopped = generate(
        eager,
        ids,
        mask,
        seed=[0, 1, 2],
        temperature=1.0,
        max_new_tokens=LIMIT,
        eos_token_id=(),
        pad_token_id=PAD,
        think_iterations=4,
    )
    assert stopped.stats.mean_think_iterations < 4, "else this shows nothing"


@pytest.mark.slow
@pytest.mark.parametrize("draft_length", [0, 1])
def test_compiled_rounds_draw_the_same_answers_from_the_weights_of_each_step(
    draft_length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # its checks cannot be compiled
    found = []
    for compiled in (False, True):
        model, reward = make_model(heads=1), Graded()
        objective = make_objective(reward, compile_rounds=compiled, draft_length=draft_length)
        config = TrainConfig(steps=3, precision="fp32", peak_lr=0.03, warmup_steps=0, log_every=1)
        train(model, objective, lambda number: prompts(seed=number), config)
        found.append([until_end(completion) for completions in reward.completions for completion in completions])
    assert found[1] == found[0]


def test_drafts_for_which_the_model_has_no_heads_are_refused() -> None:
    for heads, drafts in ((0, 1), (2, 3)):
        resources = Resources(model=make_model(heads=heads), reward=Graded(), end_ids=ENDS, pad_id=PAD)
        with pytest.raises(ValueError, match=f"heads draft {heads} tokens at most"):
            make_objective_of_table("grpo-wmtp", resources, GRPOConfig(draft_length=drafts))


def test_a_step_logs_what_the_reward_says_about_answers_and_its_times() -> None:
    def reward(completions: Tensor, _: Batch) -> Graded_:
        return Graded_(
            (completions[:, 0] % 2).float(), {"late": completions[:, 0] % 3 == 0, "always": completions[:, 0] >= 0}
        )

    model, seen = make_model(), Graded()
    (batch,) = make_objective(seen).plan_step(model, [prompts()]).batches
    first = seen.completions[0][:, 0]
    _, metrics = step(model, make_objective(reward), [prompts()])
    assert metrics["late"] == pytest.approx(float((first % 3 == 0).double().mean()))
    assert 0 < metrics["late"] < 1
    assert metrics["always"] == 1
    assert metrics["reward"] == pytest.approx(float((first % 2).double().mean()))
    assert metrics["rollout_seconds"] > 0
    assert metrics["grading_seconds"] > 0
    assert batch["input_ids"].shape[0] == len(first)


def ranks_of_training() -> dict[str, Any]:
    """Two steps of four micro-batches, on one process or on ranks."""
    model, reference = make_model(heads=1), make_model(seed=5).eval()
    objective = make_objective(Graded(), reference, kl_coef=0.1)
    config = TrainConfig(steps=2, accumulate=4, precision="fp32", peak_lr=1e-3, log_every=1, warmup_steps=0)
    history = train(model, objective, lambda number: prompts(2, seed=number), config).history
    clock = {"seconds", "tokens_per_second", "rollout_seconds", "grading_seconds"}
    return {
        "rank": rank(),
        "history": [{name: value for name, value in r.items() if name not in clock} for r in history],
        "weights": full_state_dict(model),
    }


def ranks_of_unequal_prompts() -> dict[str, Any]:
    """The same with prompts of other lengths on every rank, which are read in several parts; and with drafts."""
    rounds.PREFILL_TOKENS = 2  # in a process of its own
    objective = make_objective(Graded(), draft_length=1)
    config = TrainConfig(steps=2, accumulate=2, precision="fp32", peak_lr=1e-3, log_every=1, warmup_steps=0)
    model = make_model(heads=1)
    history = train(model, objective, lambda number: prompts(2, 3 + 4 * (number % 2), seed=number), config).history
    clock = {"seconds", "tokens_per_second", "rollout_seconds", "grading_seconds"}
    return {
        "rank": rank(),
        "history": [{name: value for name, value in r.items() if name not in clock} for r in history],
        "weights": full_state_dict(model),
    }


@pytest.mark.slow
@pytest.mark.parametrize("training", [ranks_of_training, ranks_of_unequal_prompts])
def test_two_ranks_sample_and_train_as_one(
    tmp_path: Path, training: Callable[[], dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rounds, "PREFILL_TOKENS", rounds.PREFILL_TOKENS)  # restored afterwards
    alone = training()
    first, second = run_ranks(training, folder=tmp_path)
    assert first["history"] == second["history"]
    for here, there in zip(alone["history"], first["history"], strict=True):
        assert there == pytest.approx(here, rel=1e-5)
    for name, weight in alone["weights"].items():
        torch.testing.assert_close(first["weights"][name], whole(weight), rtol=1e-5, atol=1e-7)


def test_heads_behind_the_main_one_are_never_pushed_away_from_a_token() -> None:
    model, reward = make_model(heads=2), Graded()
    objective = make_objective(reward, heads=HeadTraining(weights="uniform"))
    plan = objective.plan_step(model, [prompts()])
    (batch,) = plan.batches
    with torch.no_grad():
        hidden = model.hidden_states(batch["input_ids"])
        evidence = objective._scorer.evidence(model, batch, hidden, plan.scoring)
        weights = objective._weigh(plan, evidence, training=True).weights
    assert (weights[..., 0] < 0).any()
    assert (weights[..., 1:] >= 0).all()
    assert (weights[..., 1:] > 0).any()


def test_the_shuffled_control_keeps_the_weights_and_the_random_one_is_refused() -> None:
    model, reward = make_model(heads=1), Graded()
    treated, shuffled = make_objective(reward), make_objective(reward, control="shuffled")
    records = [step(model, objective, [prompts(), prompts(seed=1)])[1] for objective in (treated, shuffled)]
    same = [name for name in records[0] if name.startswith("weights/")]
    assert len(same) > 10
    for name in same:
        assert records[1][name] == pytest.approx(records[0][name], rel=1e-6), name
    with pytest.raises(ValueError, match="shuffled control"):
        make_objective(reward, control="random").plan_step(model, [prompts(), prompts()])


def test_the_arithmetic_reward_grades_exact_answers() -> None:
    task = ArithmeticTask(digits=1, operations="+")
    batch = task.prompts(0, 6)
    wrong = batch["answers"].clone()
    wrong[1, 0] = (wrong[1, 0] + 1) % 10
    reward = REWARDS["arithmetic"](task)
    assert reward(batch["answers"], batch).tolist() == [1.0] * 6
    assert reward(wrong, batch).tolist() == [1.0, 0.0, 1.0, 1.0, 1.0, 1.0]
    with pytest.raises(ValueError, match="prompts of an arithmetic task"):
        reward(wrong, prompts())


def test_what_cannot_work_is_refused_in_one_sentence() -> None:
    model, reward = make_model(), Graded()
    with pytest.raises(ValueError, match="kl_coef=0.5 penalises the distance"):
        make_objective(reward, kl_coef=0.5)
    with pytest.raises(ValueError, match="end_ids is empty"):
        GroupRelative(GRPOConfig(), reward, (), PAD)
    with pytest.raises(ValueError, match="pad prompts on the left"):
        make_objective(reward).plan_step(model, [{n: t.flip(1) for n, t in prompts().items()}])
    with pytest.raises(ValueError, match=r"rows of 1005, but the model has 256 positions"):
        make_objective(reward, max_new_tokens=1000).plan_step(model, [prompts()])
    for grade in (lambda c: torch.ones(len(c), 1), lambda c: torch.full((len(c),), math.nan), lambda _: torch.ones(1)):
        with pytest.raises(ValueError, match="one finite number for each"):
            make_objective(Graded(grade)).plan_step(model, [prompts()])
    with pytest.raises(ValueError, match="greater than or equal to 2"):
        GRPOConfig(group_size=1)
