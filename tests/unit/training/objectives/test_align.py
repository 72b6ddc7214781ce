"""Claim: alignment gives each converted mixer what enters the teacher's layer, and compares the outputs of the two."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import VOCAB, tiny
from torch import Tensor
from torch.nn import functional as F
from weighted_steps import data, split

from mull import ETDConfig, MTPConfig, MullForCausalLM, wrap_transformer_with_etd
from mull.training.loop import TrainConfig, train
from mull.training.objectives.align import Align, AlignConfig, attention_outputs, mixer_output
from mull.training.objectives.base import Batch, LossOutput, layout
from mull.training.objectives.iterations import IterationSampling
from mull.training.objectives.resources import Resources
from mull.training.objectives.table import make_objective

DEPTH = {"num_hidden_layers": 3}
KINDS = ["linear_attention", "full_attention", "linear_attention"]
FAMILIES_OF_TEACHERS = ["qwen3", "olmo3", "qwen3_5"]

pytestmark = pytest.mark.usefixtures("exact")


def teacher_of(dtype: torch.dtype = torch.float64) -> MullForCausalLM:
    return wrap_transformer_with_etd(tiny("qwen3", seed=3, dtype=dtype, **DEPTH), None)


def student_of(dtype: torch.dtype = torch.float64, **retrofit: Any) -> MullForCausalLM:
    base = tiny("qwen3_5", dtype=dtype, **DEPTH, layer_types=KINDS)
    return wrap_transformer_with_etd(base, retrofit.get("etd"), retrofit.get("mtp")).train()


def objective_of(model: MullForCausalLM, teacher: MullForCausalLM, **settings: Any) -> Align:
    objective = make_objective("align", Resources(model=model, reference=teacher), AlignConfig(**settings))
    assert isinstance(objective, Align)
    return objective


def gradients(model: MullForCausalLM, *outputs: LossOutput) -> dict[str, Tensor]:
    model.zero_grad()
    total: Any = sum(output.sum for output in outputs)
    (total / sum(output.weight for output in outputs)).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def mean(output: LossOutput) -> float:
    return float(output.sum.detach() / output.weight)


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        scale = max(float(value.abs().max()), 1e-30)
        torch.testing.assert_close(actual[name], value, atol=1e-6 * scale, rtol=0, msg=f"{name} differs")


def whole_row(seed: int = 0) -> dict[str, Tensor]:
    """Two rows of one document each, as transformers' own modules run them."""
    ids = torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids}


def by_hand(model: MullForCausalLM, teacher: MullForCausalLM, batch: Batch) -> Tensor:
    """Hooks in the teacher; the student's own norm and mixer called directly."""
    entered, returned = {}, {}
    hooks = []
    for number, layer in enumerate(teacher.model.layers):
        hooks.append(layer.register_forward_pre_hook(lambda _m, args, n=number: entered.update({n: args[0]})))
        hooks.append(layer.self_attn.register_forward_hook(lambda _m, _a, out, n=number: returned.update({n: out[0]})))
    with torch.no_grad():
        teacher(batch["input_ids"], use_cache=False)
    for hook in hooks:
        hook.remove()
    errors = []
    for number in (0, 2):
        layer = model.model.layers[number]
        output = layer.linear_attn(layer.input_layernorm(entered[number]))
        wanted = returned[number]
        valid = batch["labels"][:, 1:] != -100
        error = (output - wanted)[:, :-1][valid].square().sum(-1).mean()
        errors.append(error / wanted[:, :-1][valid].square().sum(-1).mean())
    return torch.stack(errors).mean()


def test_the_loss_is_the_error_of_each_mixer_on_the_teachers_states() -> None:
    model, teacher = student_of(), teacher_of()
    batch = whole_row()
    batch["labels"] = batch["labels"].clone()
    batch["labels"][0, 3:6] = -100
    objective = objective_of(model, teacher)
    assert objective.layers == (0, 2)
    output = objective(model, batch)
    actual = gradients(model, output)
    expected = by_hand(model, teacher, batch)
    model.zero_grad()
    expected.backward()
    assert mean(output) == pytest.approx(float(expected.detach()), rel=1e-6)
    assert_same(actual, {name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert mean(output) == pytest.approx((output.metrics["align/0"] + output.metrics["align/2"]) / 2)
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_a_mixer_that_returns_the_teachers_output_has_no_loss_and_one_that_returns_nothing_has_one() -> None:
    teacher = student_of().eval()
    model = copy.deepcopy(teacher).train()
    objective = objective_of(model, teacher, layers=(0, 1, 2))
    assert mean(objective(model, data())) == 0
    with torch.no_grad():
        model.model.layers[0].linear_attn.out_proj.weight.zero_()
        model.model.layers[1].self_attn.o_proj.weight.zero_()
    output = objective(model, data())
    assert output.metrics["align/0"] == pytest.approx(1)
    assert output.metrics["align/1"] == pytest.approx(1)
    assert output.metrics["align/2"] == 0


@pytest.mark.parametrize("family", FAMILIES_OF_TEACHERS)
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_a_layer_runs_its_mixer_on_documents_and_padding_as_in_the_model(family: str, packed: bool) -> None:
    """The mixer's output in the model's own pass, taken by a hook, of each document by itself."""
    model = wrap_transformer_with_etd(tiny(family, dtype=torch.float64, **DEPTH), None)
    ids = torch.randint(3, VOCAB, (1, 11))
    parts = [ids[:, :4], ids[:, 4:]] if packed else [ids[:, 4:]]
    batch: Batch = {"input_ids": ids, "labels": ids}
    if packed:
        batch = {**batch, "position_ids": torch.cat([torch.arange(4), torch.arange(7)])[None]}
    else:
        batch = {**batch, "attention_mask": (torch.arange(11) >= 4).long()[None]}
    expected = []
    for part in parts:
        seen: list[Tensor] = []
        layer = model.model.layers[1]
        mixer = layer.linear_attn if hasattr(layer, "linear_attn") else layer.self_attn
        hook = mixer.register_forward_hook(
            lambda _m, _a, out, s=seen: s.append(out[0] if isinstance(out, tuple) else out)
        )
        model(part, use_cache=False)
        hook.remove()
        expected.append(seen[0])
    ((_, h, output),) = attention_outputs(model, batch, [1])
    real = output[:, 11 - sum(part.shape[1] for part in parts) :]
    torch.testing.assert_close(real, torch.cat(expected, 1), atol=1e-6, rtol=0)
    again = mixer_output(model, 1, h, model.model.layer_inputs(h, **layout(batch)))
    assert torch.equal(again, output)


def test_a_teacher_may_have_another_type_of_weights() -> None:
    model = student_of()
    exact = mean(objective_of(model, teacher_of())(model, data()))
    assert mean(objective_of(model, teacher_of(torch.bfloat16))(model, data())) == pytest.approx(exact, rel=2e-2)


def test_looking_at_a_mixer_leaves_the_layer_as_it_was() -> None:
    model = student_of()
    before = model(whole_row()["input_ids"]).logits
    objective = objective_of(model, teacher_of())
    objective(model, whole_row()).sum.backward()
    assert torch.equal(model(whole_row()["input_ids"]).logits, before)
    for layer in model.model.layers:
        assert not layer._forward_hooks
        assert "forward" not in vars(layer.mlp)


def test_checkpointing_changes_no_gradient_and_recomputes_the_mixers() -> None:
    model, teacher = student_of(), teacher_of()
    objective = objective_of(model, teacher)
    expected = gradients(model, objective(model, data()))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    calls: list[int] = []
    model.model.layers[0].linear_attn.register_forward_pre_hook(lambda *_: calls.append(1))
    assert_same(gradients(model, objective(model, data())), expected)
    assert len(calls) == 2
    assert model.model.layers[0].gradient_checkpointing


def test_padding_and_duplicates_change_nothing() -> None:
    model, teacher = student_of(), teacher_of()
    plain = whole_row()
    loss, expected = mean(objective_of(model, teacher)(model, plain)), None
    expected = gradients(model, objective_of(model, teacher)(model, plain))
    ids = plain["input_ids"]
    variants: dict[str, Batch] = {"twice": {name: torch.cat([x, x]) for name, x in plain.items()}}
    for side, sizes in {"left": (4, 0), "right": (0, 4)}.items():
        variants[side] = {
            "input_ids": F.pad(ids, sizes, value=7),
            "labels": F.pad(ids, sizes, value=-100),
            "attention_mask": F.pad(torch.ones_like(ids), sizes),
        }
    for name, batch in variants.items():
        output = objective_of(model, teacher)(model, batch)
        assert mean(output) == pytest.approx(loss, rel=1e-6), name
        assert_same(gradients(model, output), expected)


@pytest.mark.parametrize("micro_batches", [2, pytest.param(8, marks=pytest.mark.slow)])
def test_the_split_into_micro_batches_changes_no_gradient(micro_batches: int) -> None:
    """Each has its own power, so a loss that divided by that would."""
    model, teacher = student_of(), teacher_of()
    whole = gradients(model, objective_of(model, teacher)(model, data()))
    objective = objective_of(model, teacher)
    plan = objective.plan_step(model, split(data(), micro_batches))
    parts = [objective.loss(model, plan, index) for index in range(micro_batches)]
    assert_same(gradients(model, *parts), whole)


def config(steps: int = 2) -> TrainConfig:
    return TrainConfig(steps=steps, accumulate=1, precision="fp32", peak_lr=1e-2, schedule="constant", weight_decay=0.5)


def batches(number: int) -> Batch:
    return split(data(number // 2), 2)[number % 2]


def test_training_changes_the_mixers_alone_and_lowers_the_loss() -> None:
    model, teacher = student_of(), teacher_of()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    frozen = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    objective = objective_of(model, teacher)
    first = mean(objective_of(model, teacher)(model, data()))
    train(model, objective, batches, config(4))
    assert mean(objective_of(model, teacher)(model, data())) < 0.9 * first
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed
    assert all(".linear_attn." in name and ".layers.1." not in name for name in changed)
    assert all(torch.equal(tensor, frozen[name]) for name, tensor in teacher.state_dict().items())


def test_other_parameters_are_trained_if_they_are_named() -> None:
    model, teacher = student_of(), teacher_of()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    objective = objective_of(model, teacher, layers=(2,), trainable=("model.layers.2.input_layernorm.*",))
    train(model, objective, batches, config(1))
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {"model.layers.2.input_layernorm.weight"}


def test_a_resumed_alignment_is_an_uninterrupted_one(tmp_path: Path) -> None:
    """With the power of the first step, which the later batches do not have."""
    teacher = teacher_of()

    def run(**options: Any) -> dict[str, Tensor]:
        model = student_of()
        train(model, objective_of(model, teacher), batches, config(), **options)
        return dict(model.state_dict())

    straight = run()
    run(out_dir=tmp_path, until=lambda record: record["step"] == 1)
    resumed = run(out_dir=tmp_path, resume=True)
    assert all(torch.equal(resumed[name], tensor) for name, tensor in straight.items())


def test_a_retrofitted_student_is_aligned_layer_by_layer() -> None:
    """Recursion and heads are beside the mixers, so they change nothing."""
    etd = ETDConfig(n_encoder_layers=1, n_think_layers=1, n_decoder_layers=1)
    plain, teacher = student_of(), teacher_of()
    retrofitted = student_of(etd=etd, mtp=MTPConfig(num_predict_tokens=1, mtp_head_type="mlp"))
    losses = [mean(objective_of(model, teacher)(model, data())) for model in (plain, retrofitted)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m, t: make_objective("align", Resources(model=m)), "none was given"),
        (lambda m, t: objective_of(m, m), "none is to be aligned: name some"),
        (lambda m, t: objective_of(m, t, layers=(3,)), "layers names 3, and the model has the layers 0 to 2"),
        (lambda m, t: objective_of(m, t, layers=(1, 1)), "names a layer twice"),
        (
            lambda m, t: make_objective(
                "align", Resources(model=m, reference=t, iterations=IterationSampling(maximum=2))
            ),
            "leave loss.iterations out",
        ),
        (
            lambda m, t: objective_of(m, wrap_transformer_with_etd(tiny("qwen3", num_hidden_layers=2), None)),
            "The teacher has 2 layers of width 32, the model 3 of width 32",
        ),
    ],
)
def test_what_cannot_be_aligned_is_refused(make: Callable[..., Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(student_of(), teacher_of())


def test_a_teacher_layer_that_returns_nothing_does_not_drown_the_others() -> None:
    model, teacher = student_of(), teacher_of()
    whole = objective_of(model, teacher)(model, data()).metrics
    with torch.no_grad():
        teacher.model.layers[2].self_attn.o_proj.weight.zero_()
    metrics = objective_of(model, teacher)(model, data()).metrics
    assert metrics["align/0"] == whole["align/0"]
    assert metrics["align/2"] < 100 * whole["align/2"]
    with torch.no_grad():
        model.model.layers[2].linear_attn.out_proj.weight.zero_()
    assert objective_of(model, teacher)(model, data()).metrics["align/2"] == 0
    for value in (0.0, torch.nan):
        with torch.no_grad():
            teacher.model.layers[0].self_attn.o_proj.weight.fill_(value)
        with pytest.raises(ValueError, match="layers 0, 2 returns only 0, or what is no number"):
            objective_of(model, teacher)(model, data())


def test_the_teacher_has_no_dropout() -> None:
    teacher = wrap_transformer_with_etd(tiny("qwen3", **DEPTH, attention_dropout=0.5), None)
    for training in (False, True):
        ((_, _, one),) = attention_outputs(teacher.train(training), whole_row(), [2])
        ((_, _, other),) = attention_outputs(teacher.eval(), whole_row(), [2])
        assert torch.equal(one, other)


def test_a_teacher_without_some_of_the_tokens_is_refused() -> None:
    model, teacher = student_of(), wrap_transformer_with_etd(tiny("qwen3", **DEPTH, vocab_size=VOCAB - 7), None)
    with pytest.raises(ValueError, match=rf"vocabulary of {VOCAB - 7} tokens, the model one of {VOCAB}"):
        make_objective("align", Resources(model=model, reference=teacher))
    make_objective("align", Resources(model=model, reference=teacher, n_tokens=VOCAB - 7))
