"""Claim: the loop computes the gradient it says, and stopping a run anywhere changes nothing in it.

However the rows of a step fall into micro-batches, the weights are the same. A killed and resumed run equals an uninterrupted
one bit for bit. A step that cannot be right stops the run before it touches the weights.
"""

import math
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import SPLIT, tiny
from torch import Tensor, nn

from mull.data.packing import pack_tokens
from mull.data.sampler import ShuffledBatches
from mull.retrofit.wrap import wrap_transformer_with_etd
from mull.runtime.checkpoint import CheckpointConfig, checkpoints, latest
from mull.runtime.tracking import read_metrics
from mull.training.loop import Evaluation, TrainConfig, _shown, losses_of, train
from mull.training.objectives.base import LossOutput, Objective, StepPlan
from mull.training.objectives.iterations import IterationSampling
from mull.training.objectives.next_token import NextToken

VOCAB, WIDTH = 11, 8
CLOCK = {"seconds", "tokens_per_second"}


class Thinker(nn.Module):
    """The parts of the model that training uses, with one parameter of every kind and dropout in the loop."""

    def __init__(self, dropout: float = 0.0, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.conv = nn.Conv1d(WIDTH, WIDTH, 1, groups=WIDTH)
        self.think = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.dropout = nn.Dropout(dropout)
        self.lm_head = nn.Linear(WIDTH, VOCAB, bias=False)

    def hidden_states(self, input_ids: Tensor, *, think_iterations: int, **_: Any) -> Tensor:
        h = self.embed(input_ids)
        h = h + self.conv(h.mT).mT
        for _iteration in range(think_iterations):
            h = h + self.dropout(torch.tanh(self.think(h)))
        return self.norm(h)

    def unembedding(self) -> Tensor:
        return self.lm_head.weight


class Remembering(NextToken):
    """An objective whose loss depends on what it has seen, a number and a tensor, and on a module of its own."""

    def __init__(self, iterations: IterationSampling) -> None:
        super().__init__(iterations)
        self.companion = nn.Linear(WIDTH, 1)
        self._seen, self._trace = 0, torch.zeros(2)

    def loss(self, model: Any, plan: StepPlan, index: int) -> LossOutput:
        noise = torch.rand(2)
        total, weight, metrics, _ = super().loss(model, plan, index)
        beside = self.companion(model.embed(plan.batches[index]["input_ids"])).square().sum()
        factor = 1 + 0.1 * self._seen + self._trace.sum() + noise.sum()
        return LossOutput((total + beside) * factor, weight, metrics, noise)

    def end_step(self, plan: StepPlan, seen: Any) -> dict[str, float]:
        for noise in seen:
            self._seen += 1
            self._trace = 0.5 * self._trace + noise
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self._seen, "trace": self._trace}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._seen, self._trace = state["seen"], state["trace"]


def rows(index: int, n_rows: int = 4) -> dict[str, Tensor]:
    """A pure function of the index; the next token is the current one plus one, and rows have unequal numbers of targets."""
    generator = torch.Generator().manual_seed(index)
    start = torch.randint(VOCAB, (n_rows, 1), generator=generator)
    ids = (start + torch.arange(9)) % VOCAB
    labels = ids.clone()
    for row in range(n_rows):
        labels[row, : row % 7] = -100
    return {"input_ids": ids, "labels": labels}


def fixed(iterations: int = 2) -> NextToken:
    return NextToken(IterationSampling(maximum=iterations))


def config(**changes: Any) -> TrainConfig:
    return TrainConfig(**{"steps": 6, "peak_lr": 1e-2, "precision": "fp32", "log_every": 1, **changes})


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def newest(out: Path) -> str:
    checkpoint = latest(str(out / "checkpoints"))
    assert checkpoint is not None
    return Path(checkpoint).name


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def test_loss_falls_on_a_learnable_task() -> None:
    result = train(Thinker(), fixed(), rows, config(steps=60, peak_lr=3e-2, warmup_steps=5))
    first, last = result.history[0]["loss"], result.history[-1]["loss"]
    assert first > 2
    assert last < 0.3
    assert result.step == 60
    assert result.tokens == 60 * 36
    assert result.stopped == "finished"


@pytest.mark.parametrize("split", [1, 4, 8], ids=["8x1", "2x4", "1x8"])
def test_gradient_does_not_depend_on_micro_batches(split: int) -> None:
    # Reference: one graph over all rows, mean over all targets, written out with autograd.
    whole = rows(0, 8)
    model = Thinker()
    logits = model.lm_head(model.hidden_states(whole["input_ids"], think_iterations=2))[:, :-1]
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), whole["labels"][:, 1:].flatten(), ignore_index=-100)
    loss.backward()
    reference = torch.optim.SGD(model.parameters(), lr=0.1)
    reference.step()

    def parts(index: int) -> dict[str, Tensor]:
        return {name: value[index * split : (index + 1) * split] for name, value in whole.items()}

    trained = Thinker()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mull.training.loop.build_optimizers", lambda model, *_: [sgd(model)])
        result = train(trained, fixed(), parts, config(steps=1, accumulate=8 // split, clip_norm=None, peak_lr=0.1))
    for name, value in weights(trained).items():
        torch.testing.assert_close(value, weights(model)[name], atol=1e-6, rtol=0)  # fp32, another order of summation
    assert result.history[0]["loss"] == pytest.approx(float(loss.detach()), abs=1e-6)


def sgd(model: nn.Module, lr: float = 0.1) -> torch.optim.Optimizer:
    """Unlike AdamW, it shows a wrong scale of the gradient."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    optimizer.param_groups[0]["peak_lr"] = lr
    return optimizer


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_resumed_equals_uninterrupted(tmp_path: Path, optimizer: str) -> None:
    settings = config(optimizer=optimizer, steps=8, accumulate=2, warmup_steps=3)
    sampled = IterationSampling(kind="poisson_lognormal", mean=2, maximum=5)

    def evaluate(_model: Any) -> dict[str, float]:
        return {"noise": float(torch.rand(()))}

    saving = {"checkpoint": CheckpointConfig(every=3), "evaluation": Evaluation(evaluate, 2)}
    straight = Thinker(dropout=0.3)
    expected = train(straight, Remembering(sampled), rows, settings, tmp_path / "straight", **saving)

    def killed(index: int) -> dict[str, Tensor]:
        if index == 10:  # first micro-batch of step 6; the checkpoint is of step 3
            raise KeyboardInterrupt
        return rows(index)

    with pytest.raises(KeyboardInterrupt):
        train(
            Thinker(dropout=0.3),
            Remembering(sampled),
            killed,
            settings,
            tmp_path / "killed",
            **saving,
        )
    assert newest(tmp_path / "killed") == "step-000003"
    assert len(read_metrics(tmp_path / "killed" / "metrics.jsonl")) == 5

    resumed = Thinker(dropout=0.3, seed=9)
    torch.manual_seed(123)
    actual = train(resumed, Remembering(sampled), rows, settings, tmp_path / "killed", resume=True, **saving)
    assert same(weights(straight), weights(resumed))
    without_clock = [
        [{k: v for k, v in r.items() if k not in CLOCK} for r in run.history] for run in (expected, actual)
    ]
    assert without_clock[0] == without_clock[1]
    assert [r["step"] for r in read_metrics(tmp_path / "killed" / "metrics.jsonl")] == list(range(1, 9))
    assert len({r["iterations"] for r in actual.history}) > 1, "the number of iterations never varied"


def test_evaluation_leaves_no_trace_in_training() -> None:
    modes = []

    def evaluate(model: nn.Module) -> dict[str, float]:
        modes.append((model.training, torch.is_grad_enabled()))
        return {"noise": float(torch.rand(()))}

    with_evaluation, without = Thinker(dropout=0.5), Thinker(dropout=0.5)
    result = train(with_evaluation, fixed(), rows, config(), evaluation=Evaluation(evaluate, 1))
    train(without, fixed(), rows, config())
    assert same(weights(with_evaluation), weights(without))
    assert modes == [(False, False)] * 6
    assert all("eval_noise" in record for record in result.history)


def test_sigterm_finishes_the_step_saves_and_stops(tmp_path: Path) -> None:
    def terminating(index: int) -> dict[str, Tensor]:
        if index == 2:
            signal.raise_signal(signal.SIGTERM)
        return rows(index)

    before = signal.getsignal(signal.SIGTERM)
    interrupted, straight = Thinker(dropout=0.3), Thinker(dropout=0.3)
    result = train(interrupted, fixed(), terminating, config(), tmp_path)
    assert result.stopped == "sigterm"
    assert result.step == 3
    assert newest(tmp_path) == "step-000003"
    assert signal.getsignal(signal.SIGTERM) == before
    assert train(interrupted, fixed(), rows, config(), tmp_path, resume=True).stopped == "finished"
    train(straight, fixed(), rows, config())
    assert same(weights(interrupted), weights(straight))


class Scaled(Objective):
    """Cross-entropy times a factor per call, to make a step fail."""

    def __init__(self, factors: list[float], weight: float | None = None, gradient_only: bool = False) -> None:
        self._factors, self._weight, self._gradient_only = iter(factors), weight, gradient_only

    def loss(self, model: Any, plan: StepPlan, index: int) -> LossOutput:
        total, weight, metrics, _ = fixed()(model, plan.batches[index])
        factor = next(self._factors)
        if self._gradient_only:
            total.register_hook(lambda gradient: gradient * factor)
        else:
            total = total * factor
        return LossOutput(total, weight if self._weight is None else torch.tensor(self._weight), metrics)


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (lambda: Scaled([1, 1, 1, math.nan]), r"step 2, before the weights changed: the loss of batch 3 is nan"),
        (lambda: Scaled([1, 1, 1, math.inf]), r"step 2, before the weights changed: the loss of batch 3 is inf"),
        (lambda: Scaled([1, 1, 1, math.nan], gradient_only=True), r"step 2, .* gradient of batches 2 to 3 is nan"),
    ],
)
def test_a_step_that_is_not_finite_leaves_the_weights(objective: Callable[[], Objective], message: str) -> None:
    model, one_step = Thinker(), Thinker()
    # Not to the end of its schedule: the first step of two at a constant learning rate is a run of one step.
    settings = {"accumulate": 2, "schedule": "constant"}
    train(one_step, fixed(), rows, config(steps=1, **settings))
    with pytest.raises(RuntimeError, match=message):
        train(model, objective(), rows, config(steps=2, **settings))
    assert same(weights(model), weights(one_step))
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("steps", [1, 3], ids=["last", "not the last"])
@pytest.mark.parametrize("factor", [math.inf, 1e30], ids=["infinite", "huge"])
def test_weights_that_are_not_finite_are_neither_saved_nor_returned(tmp_path: Path, steps: int, factor: float) -> None:
    """The first step is right, and each one after it destroys the weights."""
    saving = CheckpointConfig(every=1, asynchronous=False)
    whole = steps + 1

    def broken(optimizers: Any, _factor: float) -> None:
        calls.append(1)
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            for parameter in group["params"]:
                parameter.data.mul_(1 if len(calls) == 1 else factor * factor)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    for folder in (tmp_path, None):
        calls: list[int] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("mull.training.loop.update", broken)
            with pytest.raises(
                RuntimeError, match=r"after step 2: .* is not finite, so nothing of this state is saved.*new run"
            ):
                train(Thinker(), fixed(), rows, config(steps=whole), folder, checkpoint=saving)
        assert len(calls) == 2
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000001"]
    assert train(Thinker(), fixed(), rows, config(steps=whole), tmp_path, resume=True).step == whole


def test_shuffled_batches_are_compared_when_a_run_resumes(tmp_path: Path) -> None:
    def data(changed: int = 0, batch_size: int = 2, seed: int = 0) -> ShuffledBatches:
        tokens = [[1 + (place + number) % 9 for place in range(6)] for number in range(8)]
        tokens[-1][-1] += changed
        return ShuffledBatches(pack_tokens(tokens, length=6, pad_id=0), batch_size, seed)

    train(Thinker(), fixed(), data(), config(steps=2), tmp_path)
    assert train(Thinker(), fixed(), data(), config(steps=2), tmp_path, resume=True).step == 2
    for other, message in (
        (data(1), "rows"),
        (data(0, 4), "batch_size: 2 stored, 4"),
        (data(0, 2, 1), "seed: 0 stored, 1"),
    ):
        with pytest.raises(ValueError, match=rf"content\.data\.{message}"):
            train(Thinker(), fixed(), other, config(steps=2), tmp_path, resume=True)
    with pytest.raises(ValueError, match=r"content\.mine: None stored, 3 given"):
        train(Thinker(), fixed(), data(), config(steps=2), tmp_path, resume=True, content={"mine": 3, "data": {}})


def test_a_checkpoint_of_earlier_versions_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    model = Thinker()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mull.training.loop.update", lambda *_: model.think.bias.data.fill_(math.nan))
        patch.setattr("mull.training.loop.first_not_finite", lambda *_: None)
        train(model, fixed(), rows, config(steps=1), tmp_path)
    with pytest.raises(RuntimeError, match=r"step-000001 holds values of .* that are not finite. Remove the folder"):
        train(Thinker(), fixed(), rows, config(steps=1), tmp_path, resume=True)


def test_a_step_without_weight_is_refused() -> None:
    model = Thinker()
    before = weights(model)
    with pytest.raises(RuntimeError, match=r"step 1, .* batches 0 to 1 weigh 0\.0 together"):
        train(model, Scaled([1, 1], weight=0.0), rows, config(accumulate=2))
    assert same(weights(model), before)


def first_update(**changes: Any) -> tuple[float, float]:
    """Norm of the first update of plain gradient descent at learning rate 1, and the logged norm of the gradient."""
    model = Thinker()
    before = weights(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mull.training.loop.build_optimizers", lambda model, *_: [sgd(model, 1.0)])
        result = train(model, fixed(), rows, config(steps=1, **changes))
    change = torch.cat([(weights(model)[name] - before[name]).flatten() for name in before])
    return float(change.norm()), result.history[0]["grad_norm"]


def test_clipping_bounds_the_gradient_of_the_mean_loss() -> None:
    free, logged = first_update(clip_norm=None)
    clipped, logged_before_clipping = first_update(clip_norm=0.01)
    assert free == pytest.approx(logged, rel=1e-3)
    assert logged == logged_before_clipping
    assert clipped == pytest.approx(0.01, rel=1e-2)


def test_the_schedule_reaches_the_optimizer() -> None:
    assert first_update(warmup_steps=4)[0] == pytest.approx(first_update()[0] / 4, rel=1e-3)


def test_frozen_parameters_stay_and_a_frozen_model_is_refused() -> None:
    model = Thinker()
    model.embed.requires_grad_(False)
    before = weights(model)
    train(model, fixed(), rows, config())
    assert torch.equal(model.embed.weight, before["embed.weight"])
    assert not torch.equal(model.think.weight, before["think.weight"])
    with pytest.raises(ValueError, match="unfreeze"):
        train(model.requires_grad_(False), fixed(), rows, config())


def test_a_time_budget_ends_the_run_and_excludes_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(
        "mull.training.loop.time", SimpleNamespace(perf_counter=lambda: now[0], monotonic=lambda: now[0])
    )

    def slow(index: int) -> dict[str, Tensor]:
        now[0] += 1.0
        return rows(index)

    def evaluate(_model: Any) -> dict[str, float]:
        now[0] += 100.0
        return {"x": 0.0}

    result = train(Thinker(), fixed(), slow, config(steps=None, max_seconds=4.5), evaluation=Evaluation(evaluate, 1))
    assert (result.step, result.seconds) == (5, 5.0)
    lr = [record["lr"] for record in result.history]
    assert lr == pytest.approx([1e-2 * (1 + math.cos(math.pi * s / 4.5)) / 2 for s in range(5)])


def test_until_sees_every_record_and_ends_the_run(tmp_path: Path) -> None:
    seen = []

    def until(record: dict[str, Any]) -> bool:
        seen.append(record["step"])
        return record["step"] == 3

    result = train(Thinker(), fixed(), rows, config(log_every=100), tmp_path, until=until)
    assert result.stopped == "until"
    assert seen == [1, 2, 3]
    assert [record["step"] for record in result.history] == [1, 3]
    assert newest(tmp_path) == "step-000003"


def test_a_directory_that_holds_another_run_is_refused(tmp_path: Path) -> None:
    train(Thinker(), fixed(), rows, config(steps=4), tmp_path, checkpoint=CheckpointConfig(every=1))
    assert [Path(url).name for url in checkpoints(str(tmp_path / "checkpoints"))] == ["step-000003", "step-000004"]
    with pytest.raises(ValueError, match="already holds a run"):
        train(Thinker(), fixed(), rows, config(), tmp_path)
    with pytest.raises(ValueError, match=r"train\.peak_lr: 0\.01 stored, 0\.5 given"):
        train(Thinker(), fixed(), rows, config(steps=4, peak_lr=0.5), tmp_path, resume=True)
    with pytest.raises(ValueError, match=r"objective\.iterations\.maximum: 2 stored, 3 given"):
        train(Thinker(), fixed(3), rows, config(steps=4), tmp_path, resume=True)
    with pytest.raises(ValueError, match=r"out_dir or checkpoint\.url"):
        train(Thinker(), fixed(), rows, config(), resume=True)
    finished = train(Thinker(), fixed(), rows, config(steps=4, log_every=2), tmp_path, resume=True)
    assert finished.step == 4
    assert len(finished.history) == 4


def test_the_run_has_exactly_one_length() -> None:
    for lengths in ({}, {"steps": 1, "max_seconds": 1.0}):
        with pytest.raises(ValueError, match="exactly one"):
            TrainConfig(**lengths)
    with pytest.raises(ValueError, match="peek_lr"):
        TrainConfig(steps=1, peek_lr=1.0)


def test_bf16_runs_the_products_in_bf16_and_keeps_fp32_weights() -> None:
    seen = []
    model = Thinker()
    model.think.register_forward_hook(lambda _module, _inputs, output: seen.append(output.dtype))
    result = train(model, fixed(), rows, config(steps=2, precision="bf16"))
    assert set(seen) == {torch.bfloat16}
    assert result.precision == "bf16"
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_gradient_checkpointing_recomputes_and_changes_nothing() -> None:
    # Dropout: the recomputation must see the same mask.
    def run(gradient_checkpointing: bool) -> tuple[dict[str, Tensor], int]:
        model = wrap_transformer_with_etd(tiny("llama", attention_dropout=0.3), SPLIT)
        calls = []
        model.model.layers[3].self_attn.register_forward_hook(lambda *_: calls.append(1))
        settings = config(steps=2, gradient_checkpointing=gradient_checkpointing, log_every=2)
        train(model, fixed(), rows, settings)
        assert not model.is_activation_checkpointing
        assert not model.training
        return weights(model), len(calls)

    (stored, once), (recomputed, twice) = run(False), run(True)
    assert (once, twice) == (4, 8)
    assert same(stored, recomputed)


@pytest.mark.parametrize("family", ["qwen3-tied", "qwen3_5"])
def test_a_real_model_resumes_bit_for_bit(tmp_path: Path, family: str) -> None:
    settings = config(steps=3, optimizer="muon")
    saving = {"checkpoint": CheckpointConfig(every=2)}
    sampled = NextToken(IterationSampling(kind="uniform", maximum=3, backprop_iterations=2))

    def killed(index: int) -> dict[str, Tensor]:
        if index == 2:
            raise KeyboardInterrupt
        return rows(index)

    straight, first, second = (wrap_transformer_with_etd(tiny(family, seed=seed), SPLIT) for seed in (0, 0, 1))
    train(straight, sampled, rows, settings)
    with pytest.raises(KeyboardInterrupt):
        train(first, sampled, killed, settings, tmp_path, **saving)
    train(second, sampled, rows, settings, tmp_path, resume=True, **saving)
    assert same(weights(straight), weights(second))
    assert not same(weights(straight), weights(first))


def test_a_step_is_a_plan_losses_and_an_end() -> None:
    seen: list[Any] = []

    class Telling(NextToken):
        def plan_step(self, model: Any, batches: Any) -> StepPlan:
            seen.append((len(batches), torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), model.training))
            extended = [{**batch, "extra": torch.tensor(float(n))} for n, batch in enumerate(batches)]
            return replace(super().plan_step(model, batches), batches=extended)

        def loss(self, model: Any, plan: StepPlan, index: int) -> LossOutput:
            seen.append(float(plan.batches[index]["extra"]))
            return super().loss(model, plan, index)._replace(seen=index)

        def end_step(self, plan: StepPlan, shown: Any) -> dict[str, float]:
            seen.append(float(model.think.weight.detach().sum()))
            assert shown == [0, 1]
            return {"whole_step": 7.0, "iterations": 9.0}

    model = Thinker()
    before = float(model.think.weight.detach().sum())
    result = train(model, Telling(IterationSampling(maximum=1)), rows, config(steps=1, accumulate=2, precision="bf16"))
    assert seen == [(2, False, True, True), 0.0, 1.0, before], "the weights changed before the step was over"
    assert (result.history[0]["whole_step"], result.history[0]["iterations"]) == (7.0, 9.0)


def test_a_companion_is_trained_and_saved(tmp_path: Path) -> None:
    torch.manual_seed(1)
    objective, other = (Remembering(IterationSampling(maximum=2)) for _ in range(2))
    model = Thinker()
    before = weights(objective.companion)
    train(model, objective, rows, config(steps=2, optimizer="muon"), tmp_path)
    assert not torch.equal(objective.companion.weight, before["weight"])
    train(Thinker(seed=3), other, rows, config(steps=2, optimizer="muon"), tmp_path, resume=True)
    assert same(weights(objective.companion), weights(other.companion))


def test_checkpoints_go_where_they_are_sent(tmp_path: Path) -> None:
    elsewhere = CheckpointConfig(url=str(tmp_path / "elsewhere"), asynchronous=False)
    straight, model = Thinker(), Thinker()
    train(straight, fixed(), rows, config(steps=4))
    train(model, fixed(), rows, config(steps=4), until=lambda r: r["step"] == 2, checkpoint=elsewhere)
    assert [Path(url).name for url in checkpoints(str(tmp_path / "elsewhere"))] == ["step-000002"]
    resumed = Thinker(seed=5)
    result = train(resumed, fixed(), rows, config(steps=4), resume=True, checkpoint=elsewhere)
    assert [record["step"] for record in result.history] == [3, 4]
    assert same(weights(resumed), weights(straight))


def test_other_logs_receive_the_records(tmp_path: Path) -> None:
    received: list[Any] = []
    sink = SimpleNamespace(log=lambda record: received.append(dict(record)))
    result = train(Thinker(), fixed(), rows, config(steps=3, log_every=2), logs=[sink])
    assert received == result.history
    assert [record["step"] for record in received] == [1, 2, 3]


def test_the_loss_of_the_main_head_and_that_on_held_out_rows_are_shown_where_they_are_known() -> None:
    assert losses_of({"loss": 3.0, "lr": 1.0}) == {"loss": 3.0}
    record = {"head0_loss": 2.0, "eval_loss": 2.5, "loss": 3.0, "seconds": 1.0}
    assert losses_of(record) == {"loss": 3.0, "main head": 2.0, "held out": 2.5}
    assert _shown(record, 10) == "loss 3.0000, main head 2.0000, held out 2.5000, 10 tokens/s"


@pytest.mark.parametrize("flops", [1e6, lambda: 1e6], ids=["number", "function"])
def test_utilisation_is_the_share_of_the_peak(monkeypatch: pytest.MonkeyPatch, flops: Any) -> None:
    monkeypatch.setattr("mull.training.loop.peak_flops", lambda device, precision: 1e12)
    (record,) = train(Thinker(), fixed(), rows, config(steps=1), flops_per_token=flops).history
    assert record["mfu"] == pytest.approx(record["tokens_per_second"] * 1e6 / 1e12)
    assert "mfu" not in train(Thinker(), fixed(), rows, config(steps=1)).history[0]
