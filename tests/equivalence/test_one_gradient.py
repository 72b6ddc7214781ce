"""Claim: the gradient of a step is that of the mean over its targets, however they fall into micro-batches and ranks.

1x8, 2x4 and 8x1 micro-batches in one process, and two ranks with sharded weights, train alike; what stops one rank stops both.
The objective weighs its targets unequally, by the model, and trains a companion. Everything is in fp64: differences are 1e-15,
and an error of bookkeeping is 1e-3 and more.
"""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_ranks import run_ranks
from distributed_training import (
    CASES,
    HEALING,
    Split,
    Weighted,
    curriculum,
    everything_on_ranks,
    gradient,
    healed,
    model_of,
    second,
    training,
    two_trainings,
)
from torch import Tensor
from torch.nn import functional as F

from mull.runtime.tracking import read_metrics
from mull.training.objectives.iterations import IterationSampling

TOLERANCE = 1e-6
PLAIN, HYBRID = "untied, AdamW", "hybrid with experts"

Outcomes = dict[str, Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    training(PLAIN, 4, folder / "by-one", until=second)
    return folder


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[Outcomes]:
    """What two ranks did, in one group: starting one takes seconds."""
    exchange = folder / "exchange"
    exchange.mkdir()
    return run_ranks(everything_on_ranks, folder, folder=exchange, seconds=240)


@pytest.fixture(scope="module")
def alone() -> Outcomes:
    """The same with 4 micro-batches in one process."""
    return {case: training(case, 4) for case in CASES}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = TOLERANCE) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        scale = float(value.abs().max())
        torch.testing.assert_close(actual[name], value, atol=tolerance * scale, rtol=0, msg=f"{name} differs")


def assert_same_run(actual: Outcomes, expected: Outcomes) -> None:
    assert_same(actual["weights"], expected["weights"])
    assert len(actual["history"]) == len(expected["history"])
    for record, other in zip(actual["history"], expected["history"], strict=True):
        assert record == pytest.approx(other, rel=TOLERANCE)


@pytest.mark.parametrize("micro_batches", [2, 8])
def test_the_split_changes_no_gradient(micro_batches: int) -> None:
    assert_same(gradient(micro_batches), gradient(1))


def test_the_gradient_is_that_of_the_weighted_mean() -> None:
    """By autograd, over all rows at once: the reference that the splits are compared with."""
    model, objective = model_of("qwen3-tied").train(), Weighted(IterationSampling(maximum=3))
    batch = Split(1)(0)
    with torch.no_grad():
        weights = objective.weights(model, batch)
    hidden = model.hidden_states(batch["input_ids"], think_iterations=3)[:, :-1]
    losses = F.cross_entropy(model.lm_head(hidden).mT, batch["labels"][:, 1:], reduction="none")
    regression = (objective.companion(hidden)[..., 0] - 1).square()
    (((losses + regression) * weights).sum() / weights.sum()).backward()
    expected = {f"model.{name}": p.grad for name, p in model.named_parameters()}
    expected |= {f"companion.{name}": p.grad for name, p in objective.companion.named_parameters()}
    assert_same(gradient(8), expected)


# Not the hybrid: transformers' delta rule rounds to fp32, and Muon's bf16 enlarges what rounding does to other shapes of batches.
@pytest.mark.parametrize("case", [case for case in CASES if case != HYBRID])
@pytest.mark.parametrize("micro_batches", [1, 8])
@pytest.mark.latin(4, "case", "micro_batches")
def test_the_split_changes_no_training(case: str, micro_batches: int, alone: Outcomes) -> None:
    assert_same_run(training(case, micro_batches), alone[case])


def test_two_ranks_have_the_gradient_of_one(ranks: list[Outcomes]) -> None:
    for of_rank in ranks:
        assert_same(of_rank["gradient"], gradient(1))


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_train_as_one(case: str, ranks: list[Outcomes], alone: Outcomes) -> None:
    assert_same_run(ranks[0][case], alone[case])
    assert ranks[1][case]["history"] == ranks[0][case]["history"]
    assert ranks[1][case]["weights"] == {}


def test_ranks_take_the_batches_in_turns(ranks: list[Outcomes], alone: Outcomes) -> None:
    assert alone[PLAIN]["loaded"] == list(range(12))
    assert [of_rank[PLAIN]["loaded"] for of_rank in ranks] == [list(range(0, 12, 2)), list(range(1, 12, 2))]


def test_keeping_gathered_weights_changes_nothing(ranks: list[Outcomes], alone: Outcomes) -> None:
    assert_same_run(ranks[0]["kept gathered"], alone[PLAIN])


def test_gathering_in_bf16_rounds_the_computation_and_not_the_weights(ranks: list[Outcomes], alone: Outcomes) -> None:
    rounded, exact = (run["history"][0]["loss"] for run in (ranks[0]["in bf16"], alone[PLAIN]))
    assert rounded == pytest.approx(exact, rel=2e-2)
    assert rounded != pytest.approx(exact, rel=1e-5)
    weights = ranks[0]["in bf16"]["weights"].values()
    assert all(weight.dtype == torch.float64 for weight in weights)
    assert any(not torch.equal(weight, weight.bfloat16().double()) for weight in weights)


def test_a_loss_that_is_no_number_on_one_rank_stops_both_before_the_weights_change(ranks: list[Outcomes]) -> None:
    for message, unchanged in (of_rank["not a number"] for of_rank in ranks):
        assert "step 2, before the weights changed: the loss of batch 7 is nan" in message
        assert unchanged


def test_micro_batches_that_ranks_cannot_share_are_refused(ranks: list[Outcomes]) -> None:
    for of_rank in ranks:
        assert "train.accumulate=3" in of_rank["indivisible"]
        assert "multiple of 2" in of_rank["indivisible"]


def test_a_model_trains_twice_with_one_companion(ranks: list[Outcomes]) -> None:
    refused = ranks[0]["two trainings"].pop("refused")
    assert "same companion" in refused
    assert_same_run(ranks[0]["two trainings"], two_trainings())


def test_what_is_trained_later_keeps_its_precision(ranks: list[Outcomes]) -> None:
    """FSDP reads the types of the trained weights once; in the first training there are none among the model's."""
    exact, rounded = ranks[0]["two trainings"]["weights"], ranks[0]["two trainings in bf16"]["weights"]
    for name, weight in rounded.items():
        assert weight.dtype == torch.float64
        torch.testing.assert_close(weight, exact[name], atol=0.05, rtol=0)


def test_evaluation_changes_no_training_and_rank_0_alone_writes(
    ranks: list[Outcomes], alone: Outcomes, folder: Path
) -> None:
    assert_same(ranks[0]["evaluated"]["weights"], alone[PLAIN]["weights"])
    logits = [[record["eval_logit"] for record in of_rank["evaluated"]["history"]] for of_rank in ranks]
    assert logits[0] == logits[1]
    assert len(set(logits[0])) == 3
    assert [record["step"] for record in read_metrics(folder / "evaluated" / "metrics.jsonl")] == [1, 2, 3]


def test_a_request_to_one_rank_ends_both_in_the_same_step(ranks: list[Outcomes]) -> None:
    for of_rank in ranks:
        assert of_rank["terminated"]["stopped"] == "sigterm"
        assert of_rank["terminated"]["history"][-1]["step"] == 2


def test_a_run_resumes_on_another_number_of_ranks(ranks: list[Outcomes], alone: Outcomes, folder: Path) -> None:
    assert ranks[0]["interrupted"]["stopped"] == "until"
    assert_same_run(ranks[0]["resumed"], alone[PLAIN])
    assert_same_run(training(PLAIN, 4, folder / "by-ranks", resume=True), alone[PLAIN])


def test_an_error_of_rank_0_is_everyones(ranks: list[Outcomes]) -> None:
    assert [of_rank["rank 0 fails"] for of_rank in ranks] == ["only rank 0 was asked"] * 2


def test_ranks_share_one_curriculum(ranks: list[Outcomes]) -> None:
    expected = curriculum()
    # 1/6 · (1 - 0.9^n) first exceeds the threshold of 0.04 after three steps.
    assert expected["first_step_accuracy"] == pytest.approx([2 / 12] * 5)
    assert expected["iterations"][:3] == [1, 1, 1]
    assert min(expected["iterations"][3:]) >= 2
    assert ranks[0]["curriculum"] == ranks[1]["curriculum"] == expected


@pytest.mark.parametrize("name", HEALING)
def test_two_ranks_learn_from_a_teacher_as_one(name: str, ranks: list[Outcomes], tmp_path: Path) -> None:
    assert_same_run(ranks[0]["healed"][name], healed(name, tmp_path))
    assert ranks[1]["healed"][name]["history"] == ranks[0]["healed"][name]["history"]


@pytest.mark.slow
def test_torchrun_starts_the_same_training(alone: Outcomes, tmp_path: Path) -> None:
    script = Path(__file__).parents[1] / "distributed_training.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run([*command, str(script), str(tmp_path / "result.pt")], check=True, timeout=120)
    assert_same_run(torch.load(tmp_path / "result.pt"), alone[PLAIN])
