"""Claim: step supervision teaches iteration j the label of step j, and runs one iteration until the first step is mastered."""

from collections.abc import Callable

import pytest
import torch
from conftest import SPLIT, VOCAB, tiny
from torch import Tensor, nn

from mull.model.causal_lm import MullForCausalLM
from mull.model.policy import GivenTokens
from mull.retrofit.wrap import wrap_transformer_with_etd
from mull.training.objectives.iterations import IterationSampling
from mull.training.objectives.step_supervision import StepSupervision

Ids = Callable[..., Tensor]
UP_TO_FOUR = IterationSampling(kind="uniform", minimum=2, maximum=4)


@pytest.fixture
def model() -> MullForCausalLM:
    return wrap_transformer_with_etd(tiny("qwen3"), SPLIT)


def batch(ids: Ids) -> dict[str, Tensor]:
    tokens = ids(2, 6)
    labels = torch.full((2, 6, 4), -100)
    labels[0, 3:] = torch.randint(VOCAB, (3, 4))
    labels[1, 5] = torch.randint(VOCAB, (4,))
    labels[0, 4, 2:] = -100  # a shorter procedure
    return {"input_ids": tokens, "step_labels": labels}


def mastered() -> StepSupervision:
    objective = StepSupervision(UP_TO_FOUR)
    objective.load_state_dict({"first_step_accuracy": 0.99, "mastered": True})
    return objective


def step(objective: StepSupervision, model: MullForCausalLM, *batches: dict[str, Tensor]) -> tuple[list[int], float]:
    """One optimizer step: iterations of each micro-batch, and the first-step accuracy of all together."""
    plan = objective.plan_step(model, batches)
    outputs = [objective.loss(model, plan, index) for index in range(len(batches))]
    iterations = [int(output.metrics["iterations"]) for output in outputs]
    return iterations, objective.end_step(plan, [output.seen for output in outputs])["first_step_accuracy"]


def test_every_iteration_meets_the_label_of_its_own_step(model: MullForCausalLM, ids: Ids) -> None:
    data = batch(ids)
    for step in range(1, 4):  # later steps are right in some places, or every accuracy would be 0
        right = model(data["input_ids"], think_iterations=step + 1).logits.argmax(-1)
        data["step_labels"][0, 5, step] = right[0, 5]
    outputs = {}
    for _ in range(30):
        output = mastered()(model, data)
        outputs[int(output.metrics["iterations"])] = output
    assert set(outputs) == {2, 3, 4}
    for iterations, output in outputs.items():
        expected, count, hits = torch.zeros(()), 0, 0
        for step in range(iterations):
            logits = model(data["input_ids"], think_iterations=step + 1).logits
            labels = data["step_labels"][..., step]
            expected = expected + nn.functional.cross_entropy(
                logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum"
            )
            count += int((labels != -100).sum())
            hits = (logits.argmax(-1) == labels).sum() / (labels != -100).sum()
        torch.testing.assert_close(output.sum, expected, atol=1e-4, rtol=0)
        assert output.weight == count
        assert output.metrics["last_step_accuracy"] == pytest.approx(float(hits))
        assert output.metrics["loss"] == pytest.approx(float(expected.detach()) / count, abs=1e-5)


def test_tokens_without_a_label_can_stop_after_the_first_iteration(model: MullForCausalLM, ids: Ids) -> None:
    data, sums = batch(ids), {}
    labelled = (data["step_labels"] != -100).any(-1)
    for stops in (False, True):
        objective = StepSupervision(IterationSampling(maximum=3), stop_unlabelled=stops)
        objective.load_state_dict({"first_step_accuracy": 0.99, "mastered": True})
        sums[stops] = objective(model, data).sum
    expected = torch.zeros(())
    for iterations in (1, 2, 3):
        masks = {visit: labelled for visit in model.path(iterations) if visit.occurrence}
        out = model(data["input_ids"], think_iterations=iterations, policy=GivenTokens(masks), use_cache=False)
        targets = data["step_labels"][..., iterations - 1].flatten()
        expected = expected + nn.functional.cross_entropy(out.logits.flatten(0, 1), targets, reduction="sum")
    torch.testing.assert_close(sums[True], expected, atol=1e-4, rtol=0)
    assert (sums[True] - sums[False]).detach().abs() > 1e-2


def test_the_first_phase_ends_when_the_first_step_is_mastered(model: MullForCausalLM, ids: Ids) -> None:
    data = batch(ids)
    right = model(data["input_ids"], think_iterations=1).logits.argmax(-1)
    known = (data["step_labels"][..., 0] != -100).nonzero(as_tuple=True)
    data["step_labels"][..., 0][known] = right[known]
    objective = StepSupervision(UP_TO_FOUR, threshold=0.5)
    iterations = [step(objective, model, data)[0][0] for _ in range(12)]
    # 1 - 0.9^n first exceeds 0.5 after seven steps of accuracy 1.
    assert iterations[:7] == [1] * 7
    assert min(iterations[7:]) >= 2

    data["step_labels"][..., 0][known] = (right[known] + 1) % VOCAB
    again = [step(objective, model, data)[0][0] for _ in range(12)]
    assert min(again) >= 2, "the phase went back"


def test_the_phase_is_state_and_calls_outside_a_step_leave_it(model: MullForCausalLM, ids: Ids) -> None:
    data = batch(ids)
    objective = StepSupervision(UP_TO_FOUR)
    objective.load_state_dict({"first_step_accuracy": 0.5, "mastered": False})
    objective(model.train(), data)
    assert objective.state_dict() == {"first_step_accuracy": 0.5, "mastered": False}
    _, accuracy = step(objective, model, data)
    assert objective.state_dict()["first_step_accuracy"] == pytest.approx(0.9 * 0.5 + 0.1 * accuracy)
    after = objective.state_dict()
    objective(model, data)
    assert objective.state_dict() == after


def test_the_curriculum_does_not_depend_on_micro_batches(model: MullForCausalLM, ids: Ids) -> None:
    # Row 0 has three first steps, all right, and row 1 has one, wrong: 3 of 4, where the mean of the rows would be 1/2.
    data = batch(ids)
    right = model(data["input_ids"], think_iterations=1).logits.argmax(-1)
    data["step_labels"][0, 3:, 0] = right[0, 3:]
    data["step_labels"][1, 5, 0] = (right[1, 5] + 1) % VOCAB
    parts = [{name: value[row : row + 1] for name, value in data.items()} for row in range(2)]
    states = []
    for split in ([data], parts):
        objective = StepSupervision(UP_TO_FOUR)
        assert step(objective, model, *split)[1] == 0.75
        states.append(objective.state_dict())
    assert states[0] == states[1]


def test_micro_batches_of_a_step_run_equally_deep(model: MullForCausalLM, ids: Ids) -> None:
    objective, data = mastered(), batch(ids)
    depths = [step(objective, model, data, data, data)[0] for _ in range(20)]
    assert all(len(set(of_step)) == 1 for of_step in depths)
    assert {of_step[0] for of_step in depths} == {2, 3, 4}


def test_what_cannot_work_is_refused(model: MullForCausalLM, ids: Ids) -> None:
    with pytest.raises(ValueError, match="backprop_iterations=2"):
        StepSupervision(IterationSampling(maximum=4, backprop_iterations=2))
    with pytest.raises(ValueError, match="between 0 and 1"):
        StepSupervision(UP_TO_FOUR, threshold=93)
    data = batch(ids)
    with pytest.raises(ValueError, match="label 3 steps, but up to 4"):
        StepSupervision(UP_TO_FOUR)(model, {**data, "step_labels": data["step_labels"][..., :3]})
    with pytest.raises(ValueError, match="has a label"):
        StepSupervision(UP_TO_FOUR)(model, {**data, "step_labels": torch.full_like(data["step_labels"], -100)})
