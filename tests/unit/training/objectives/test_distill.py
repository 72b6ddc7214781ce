"""Claim: distillation is ``alpha · T² · D + (1 - alpha) · CE`` per target, whatever is around it, by a teacher or its record."""

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import VOCAB, tiny
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel
from weighted_steps import data, split

from mull import CrossArchTransferConfig, ETDConfig, MTPConfig, MullForCausalLM, wrap_transformer_with_etd
from mull.data.packing import PackedDataset
from mull.data.sampler import ShuffledBatches
from mull.training.loop import TrainConfig, train
from mull.training.objectives.base import Batch, LossOutput
from mull.training.objectives.distill import Distill, DistillationTrainer, DistillConfig
from mull.training.objectives.iterations import IterationSampling
from mull.training.objectives.next_token import NextToken
from mull.training.objectives.resources import ONCE, Resources
from mull.training.objectives.table import make_objective
from mull.training.objectives.teacher_cache import CacheIdentity, TeacherCache

Ids = Callable[..., Tensor]
EXACT = 1e-12
DEPTH = {"num_hidden_layers": 2}
HYBRID = {**DEPTH, "layer_types": ["linear_attention", "full_attention"]}
ETD = ETDConfig(n_encoder_layers=0, n_think_layers=1, n_decoder_layers=1)


def teacher_of(dtype: torch.dtype = torch.float64, **changes: Any) -> MullForCausalLM:
    return wrap_transformer_with_etd(tiny("qwen3", seed=3, dtype=dtype, **DEPTH, **changes), None)


def student_of(
    dtype: torch.dtype = torch.float64, etd: ETDConfig | None = None, mtp: MTPConfig | None = None
) -> MullForCausalLM:
    """A hybrid: a recurrent layer and one of attention."""
    return wrap_transformer_with_etd(tiny("qwen3_5", dtype=dtype, **HYBRID), etd, mtp).train()


def objective_of(teacher: MullForCausalLM, **settings: Any) -> Distill:
    objective = make_objective("distill", Resources(model=teacher, reference=teacher), DistillConfig(**settings))
    assert isinstance(objective, Distill)
    return objective


def gradients(model: MullForCausalLM, *outputs: LossOutput) -> dict[str, Tensor]:
    """Of the mean over the targets."""
    model.zero_grad()
    total: Any = sum(output.sum for output in outputs)
    (total / sum(output.weight for output in outputs)).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def mean(output: LossOutput) -> float:
    return float(output.sum.detach() / output.weight)


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-6) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        scale = max(float(value.abs().max()), 1e-30)
        torch.testing.assert_close(actual[name], value, atol=tolerance * scale, rtol=0, msg=f"{name} differs")


def naive(model: MullForCausalLM, teacher: MullForCausalLM, batch: Batch, alpha: float, temperature: float) -> Tensor:
    """From materialised logits of transformers' own forward pass."""
    options = {"position_ids": batch["position_ids"], "use_cache": False}
    ours = model(batch["input_ids"], **options).logits[:, :-1]
    with torch.no_grad():
        theirs = teacher(batch["input_ids"], **options).logits[:, :-1]
    valid = batch["labels"][:, 1:] != -100
    log_q, log_p = ((logits[valid] / temperature).log_softmax(-1) for logits in (ours, theirs))
    apart = F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1).mean()
    own = F.cross_entropy(ours[valid], batch["labels"][:, 1:][valid])
    return alpha * temperature**2 * apart + (1 - alpha) * own


@pytest.mark.usefixtures("exact")
def test_the_loss_and_its_gradient_are_those_of_materialised_logits() -> None:
    model, teacher = student_of(), teacher_of()
    objective = objective_of(teacher, alpha=0.3, temperature=2.5)
    output = objective(model, data())
    actual = gradients(model, output)
    expected = naive(model, teacher, data(), 0.3, 2.5)
    model.zero_grad()
    expected.backward()
    assert mean(output) == pytest.approx(float(expected.detach()), rel=1e-6)
    assert_same(actual, {name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert all(parameter.grad is None for parameter in teacher.parameters())
    parts = 0.3 * output.metrics["divergence"] + 0.7 * output.metrics["cross_entropy"]
    assert mean(output) == pytest.approx(parts)


def test_the_extremes_of_alpha_are_cross_entropy_and_divergence_exactly() -> None:
    model, teacher = student_of(), teacher_of()
    none, whole = (objective_of(teacher, alpha=alpha) for alpha in (0.0, 1.0))
    plain = NextToken(ONCE)
    output = none(model, data())
    assert torch.equal(output.sum, plain(model, data()).sum)
    assert_same(gradients(model, output), gradients(model, plain(model, data())), 0.0)
    relabelled = {**data(), "labels": torch.where(data()["labels"] == -100, -100, 5)}
    assert torch.equal(whole(model, data()).sum, whole(model, relabelled).sum)
    assert mean(whole(model, data())) == pytest.approx(output.metrics["divergence"])


@pytest.mark.parametrize("kind", ["forward", "reverse", "jsd"])
def test_a_student_that_is_its_teacher_has_nothing_to_learn(kind: str) -> None:
    teacher = wrap_transformer_with_etd(tiny("qwen3_5", **HYBRID), None)
    model = copy.deepcopy(teacher).train()
    output = objective_of(teacher, alpha=1.0, divergence=kind)(model, data())
    assert float(output.sum.detach()) == 0
    assert not any(gradient.any() for gradient in gradients(model, output).values())


@pytest.mark.usefixtures("exact")
def test_padding_and_duplicates_change_nothing() -> None:
    model, teacher = student_of(), teacher_of()
    objective = objective_of(teacher)
    ids = torch.randint(3, VOCAB, (2, 9))
    plain = {"input_ids": ids, "labels": ids}
    expected = gradients(model, objective(model, plain))
    loss = mean(objective(model, plain))
    variants: dict[str, Batch] = {"twice": {name: torch.cat([x, x]) for name, x in plain.items()}}
    for side, sizes in {"left": (4, 0), "right": (0, 4)}.items():
        mask = F.pad(torch.ones_like(ids), sizes)
        variants[side] = {
            "input_ids": F.pad(ids, sizes, value=7),
            "labels": F.pad(ids, sizes, value=-100),
            "attention_mask": mask,
        }
    # Both rows in one, as documents.
    positions = torch.arange(9).repeat(2)[None]
    variants["packed"] = {"input_ids": ids.view(1, -1), "labels": ids.view(1, -1), "position_ids": positions}
    for name, batch in variants.items():
        output = objective(model, batch)
        assert mean(output) == pytest.approx(loss, rel=1e-6), name
        assert_same(gradients(model, output), expected)


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("micro_batches", [8, pytest.param(2, marks=pytest.mark.slow)])
def test_the_split_into_micro_batches_changes_no_gradient(micro_batches: int) -> None:
    model, teacher = student_of(), teacher_of()
    objective = objective_of(teacher)
    whole = gradients(model, objective(model, data()))
    plan = objective.plan_step(model, split(data(), micro_batches))  # one of eight has no target
    parts = [objective.loss(model, plan, index) for index in range(micro_batches)]
    assert_same(gradients(model, *parts), whole)


def test_a_retrofitted_student_learns_with_its_iterations_and_its_heads_stay() -> None:
    """Its last iteration's prediction is compared; the teacher runs once, as it is configured."""
    mtp = MTPConfig(num_predict_tokens=1, mtp_head_type="mlp")
    model, teacher = student_of(etd=ETD, mtp=mtp), teacher_of()
    resources = Resources(model=model, reference=teacher, iterations=IterationSampling(maximum=3))
    objective = make_objective("distill", resources, DistillConfig(alpha=1.0, temperature=1.0))
    output = objective(model, data())
    options = {"position_ids": data()["position_ids"], "use_cache": False}
    valid = data()["labels"][:, 1:] != -100
    ours = model(data()["input_ids"], think_iterations=3, **options).logits[:, :-1][valid]
    theirs = teacher(data()["input_ids"], **options).logits[:, :-1][valid]
    expected = F.kl_div(ours.log_softmax(-1), theirs.log_softmax(-1), log_target=True, reduction="none").sum(-1).mean()
    assert mean(output) == pytest.approx(float(expected.detach()), rel=1e-6)
    found = gradients(model, output)
    assert not any("mtp" in name for name in found)
    assert any("linear_attn" in name for name in found)


def test_a_teacher_with_a_vocabulary_of_its_own_padding_is_compared_in_the_tokens() -> None:
    model, teacher = student_of(), teacher_of(vocab_size=VOCAB + 31)
    with pytest.raises(ValueError, match=rf"vocabulary of {VOCAB + 31} tokens, the model one of {VOCAB}"):
        make_objective("distill", Resources(model=model, reference=teacher))
    objective = make_objective(
        "distill", Resources(model=model, reference=teacher, n_tokens=90), DistillConfig(alpha=1.0)
    )
    before = mean(objective(model, data()))
    with torch.no_grad():
        teacher.lm_head.weight[90:] *= 50
    assert mean(objective(model, data())) == before


def test_a_teacher_may_have_another_type_of_weights() -> None:
    """And nothing but rounding changes."""
    model, teacher = student_of(torch.float32), teacher_of(torch.float32)
    exact = objective_of(teacher)(model, data())
    rounded = objective_of(teacher_of(torch.bfloat16))(model, data())
    assert rounded.sum.dtype == exact.sum.dtype == torch.float32
    assert mean(rounded) == pytest.approx(mean(exact), rel=2e-2)


# --- the record of a teacher ---


def dataset() -> PackedDataset:
    rows = [data(seed) for seed in range(2)]
    tensors = [torch.cat([row[name] for row in rows]) for name in ("input_ids", "labels", "position_ids")]
    kept = (tensors[1] != -100).any(1)
    return PackedDataset(*(tensor[kept] for tensor in tensors))


def identity(**changes: Any) -> CacheIdentity:
    given = {"teacher": "a", "dtype": "fp32", "data": "rows", "rows": len(dataset()), "length": 16, "top_k": 8}
    return CacheIdentity(**{**given, "temperature": 2.0, "n_tokens": VOCAB, **changes})


def recorded(folder: Path, teacher: MullForCausalLM, **changes: Any) -> TeacherCache:
    cache = TeacherCache(folder, identity(**changes))
    cache.record(teacher, dataset(), 4)
    return cache


@pytest.fixture
def _small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three rows in a file; the last one has fewer."""
    monkeypatch.setattr("mull.training.objectives.teacher_cache.TOKENS_PER_FILE", 3 * 16)


@pytest.mark.usefixtures("_small_files")
def test_a_record_of_nearly_all_tokens_trains_like_the_teacher(tmp_path: Path) -> None:
    model, teacher = student_of(torch.float32), teacher_of(torch.float32)
    cache = recorded(tmp_path, teacher, top_k=VOCAB - 1)
    assert cache.complete
    batches = ShuffledBatches(dataset(), 4, numbered=True)
    resources = Resources(model=model, predictions=cache)
    objective = make_objective("distill", resources, DistillConfig(alpha=0.5))
    assert objective.reference is None
    full = objective_of(teacher)
    for number in (0, 5, 9):  # of the first epochs
        batch = batches(number)
        one, other = objective(model, batch), full(model, batch)
        assert mean(one) == pytest.approx(mean(other), rel=1e-5)
        assert_same(gradients(model, objective(model, batch)), gradients(model, full(model, batch)), 1e-4)


@pytest.mark.usefixtures("_small_files")
def test_a_killed_recording_goes_on_and_ends_as_an_uninterrupted_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher, calls = teacher_of(torch.float32), []
    whole = recorded(tmp_path / "whole", teacher)
    predict = TeacherCache._predict

    def dies(self: TeacherCache, model: MullForCausalLM, batch: Batch) -> Any:
        calls.append(batch["input_ids"])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return predict(self, model, batch)

    monkeypatch.setattr(TeacherCache, "_predict", dies)
    with pytest.raises(KeyboardInterrupt):
        recorded(tmp_path / "killed", teacher)
    cache = TeacherCache(tmp_path / "killed", identity())
    assert not cache.complete
    assert cache.n_recorded == 6
    (tmp_path / "killed" / "rows-000000006.partial").write_bytes(b"half a file")
    cache.record(teacher, dataset(), 4)
    assert torch.equal(torch.cat(calls[3:]), dataset().input_ids[6:]), "rows that were recorded are not predicted again"
    assert cache.complete
    assert cache.n_recorded == len(dataset())
    numbers = torch.randperm(len(dataset()))
    for one, other in zip(cache.rows(numbers), whole.rows(numbers), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("name", "value"),
    [("teacher", "b"), ("data", "others"), ("top_k", 9), ("temperature", 1.0), ("dtype", "bf16"), ("n_tokens", 90)],
)
def test_a_record_of_something_else_is_refused_in_one_sentence(tmp_path: Path, name: str, value: Any) -> None:
    recorded(tmp_path, teacher_of(torch.float32))
    with pytest.raises(
        ValueError, match=rf"holds predictions with another {name}, .* instead of {value!r}: choose another"
    ):
        TeacherCache(tmp_path, identity(**{name: value}))


def test_nothing_is_written_before_something_is_recorded(tmp_path: Path) -> None:
    cache = TeacherCache(tmp_path / "none", identity())
    assert not cache.complete
    assert cache.n_recorded == 0
    assert cache.size == len(dataset()) * 16 * (8 * 4 + 9 * 4)
    assert not (tmp_path / "none").exists()


def test_batches_without_numbers_are_refused(tmp_path: Path) -> None:
    model, teacher = student_of(torch.float32), teacher_of(torch.float32)
    objective = Distill(recorded(tmp_path, teacher), ONCE, DistillConfig())
    with pytest.raises(ValueError, match=r"found by row_numbers.*numbered=True"):
        objective(model, data())


def cut(folder: Path) -> None:
    file = sorted(folder.glob("rows-*"))[1]
    file.write_bytes(file.read_bytes()[:-7])


def emptied(folder: Path) -> None:
    sorted(folder.glob("rows-*"))[1].write_bytes(b"")


@pytest.mark.usefixtures("_small_files")
@pytest.mark.parametrize("damage", [cut, emptied])
def test_a_damaged_file_counts_as_not_recorded(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    teacher = teacher_of(torch.float32)
    whole = recorded(tmp_path, teacher).rows(torch.arange(6))
    damage(tmp_path)
    cache = TeacherCache(tmp_path, identity())
    assert not cache.complete
    assert cache.n_recorded == len(dataset()) - 3
    with pytest.raises(ValueError, match=r"rows-000000003.* is not recorded, or damaged"):
        cache.rows(torch.tensor([4]))
    cache.record(teacher, dataset(), 4)
    assert cache.complete
    assert all(torch.equal(*pair) for pair in zip(cache.rows(torch.arange(6)), whole, strict=True))


def test_rows_know_whose_they_are_without_the_manifest(tmp_path: Path) -> None:
    teacher = teacher_of(torch.float32)
    recorded(tmp_path, teacher)
    (tmp_path / "cache.json").unlink()
    with pytest.raises(ValueError, match=r"holds predictions with another teacher, 'a' instead of 'b'"):
        TeacherCache(tmp_path, identity(teacher="b"))
    cache = TeacherCache(tmp_path, identity())
    assert not cache.complete
    cache.record(teacher, dataset(), 4)
    assert cache.complete
    for text in ("", "[1]", "{"):
        (tmp_path / "cache.json").write_text(text)
        with pytest.raises(ValueError, match=r"cache.json is damaged: remove .*"):
            TeacherCache(tmp_path, identity())


def test_a_record_has_neither_dropout_nor_nan(tmp_path: Path) -> None:
    teacher = teacher_of(torch.float32, attention_dropout=0.5)
    expected = recorded(tmp_path / "a", teacher.eval()).rows(torch.arange(4))
    found = recorded(tmp_path / "b", teacher.train()).rows(torch.arange(4))
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    assert teacher.model.layers[0].training
    with torch.no_grad():
        teacher.lm_head.weight[3, 3] = torch.nan
    with pytest.raises(ValueError, match="The teacher predicts NaN"):
        recorded(tmp_path / "c", teacher)


@pytest.mark.parametrize(
    ("config", "n_tokens", "batch", "message"),
    [
        ({"temperature": 5.0}, None, {}, r"recorded at temperature=2.0, and distillation has temperature=5.0"),
        ({}, 90, {}, rf"about {VOCAB} tokens of the vocabulary, and 90 are compared"),
        ({}, None, {"row_numbers": torch.tensor([999] * 4)}, r"row_numbers has 999"),
        ({}, None, {"row_numbers": torch.arange(3)}, r"input_ids has shape \(4, 16\), and the records of 3 rows"),
        ({}, None, "short", r"input_ids has shape \(4, 9\)"),
    ],
)
def test_a_record_that_does_not_fit_the_call_is_refused_in_one_sentence(
    config: Any, n_tokens: int | None, batch: Any, message: str, tmp_path: Path
) -> None:
    cache = recorded(tmp_path, teacher_of(torch.float32))
    whole = ShuffledBatches(dataset(), 4, numbered=True)(0)
    short = {name: tensor[:, :9] if tensor.ndim > 1 else tensor for name, tensor in whole.items()}
    with pytest.raises(ValueError, match=message):
        Distill(cache, ONCE, DistillConfig(**config), n_tokens)(
            student_of(torch.float32), short if batch == "short" else {**whole, **batch}
        )


# --- training ---


def trained(
    objective: Distill, model: MullForCausalLM, batches: Any, steps: int = 3, **options: Any
) -> dict[str, Tensor]:
    config = TrainConfig(steps=steps, accumulate=2, precision="fp32", peak_lr=1e-2, schedule="constant")
    train(model, objective, batches, config, **options)
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("name", ["record", pytest.param("teacher", marks=pytest.mark.slow)])
def test_a_resumed_distillation_is_an_uninterrupted_one(name: str, tmp_path: Path) -> None:
    teacher = teacher_of(torch.float32)
    batches = ShuffledBatches(dataset(), 4, numbered=True)
    objectives: dict[str, Callable[[], Distill]] = {
        "teacher": lambda: objective_of(teacher),
        "record": lambda: Distill(TeacherCache(tmp_path / "cache", identity()), ONCE, DistillConfig()),
    }
    recorded(tmp_path / "cache", teacher)
    objective = objectives[name]
    straight = trained(objective(), student_of(torch.float32), batches)
    stopped = {"until": lambda record: record["step"] == 2, "out_dir": tmp_path / name}
    trained(objective(), student_of(torch.float32), batches, **stopped)
    resumed = trained(objective(), student_of(torch.float32), batches, out_dir=tmp_path / name, resume=True)
    assert all(torch.equal(resumed[key], tensor) for key, tensor in straight.items())


def test_another_teacher_cannot_continue_a_run(tmp_path: Path) -> None:
    batches = ShuffledBatches(dataset(), 4, numbered=True)
    trained(objective_of(teacher_of(torch.float32)), student_of(torch.float32), batches, 1, out_dir=tmp_path)
    other = teacher_of(torch.float32)
    with torch.no_grad():
        other.lm_head.weight[3, 3] += 1
    with pytest.raises(ValueError, match="reference"):
        trained(objective_of(other), student_of(torch.float32), batches, 1, out_dir=tmp_path, resume=True)


def test_distillation_brings_the_student_to_its_teacher() -> None:
    """On one batch, by divergence alone."""
    model, teacher = student_of(torch.float32), teacher_of(torch.float32)
    objective = objective_of(teacher, alpha=1.0, temperature=1.0)
    before = mean(objective(model, data()))
    config = TrainConfig(steps=6, precision="fp32", peak_lr=1e-2, schedule="constant")
    train(model, objective, lambda _: data(), config)
    assert mean(objective(model, data())) < 0.8 * before


# --- hand-written loops ---


def test_the_promised_trainer_computes_the_same_loss() -> None:
    """On models of transformers, whose weights it shares."""
    student: PreTrainedModel = tiny("qwen3_5", dtype=torch.float64, **HYBRID).train()
    base: PreTrainedModel = tiny("qwen3", seed=3, dtype=torch.float64, **DEPTH)
    config = CrossArchTransferConfig(distillation_temperature=2.5, distillation_alpha=0.3)
    trainer = DistillationTrainer(base.train(), student, config)
    batch = data()
    found = trainer.compute_loss(batch["input_ids"], batch["labels"], position_ids=batch["position_ids"])
    expected = objective_of(teacher_of(), alpha=0.3, temperature=2.5)(student_of(), batch)
    assert float(found["loss"].detach()) == pytest.approx(mean(expected), rel=1e-9)
    assert float(found["kd_loss"]) == pytest.approx(expected.metrics["divergence"], rel=1e-9)
    assert float(found["task_loss"]) == pytest.approx(expected.metrics["cross_entropy"], rel=1e-9)
    assert not found["kd_loss"].requires_grad
    found["loss"].backward()
    assert student.model.layers[0].linear_attn.in_proj_qkv.weight.grad.any()
    assert all(parameter.grad is None for parameter in base.parameters())
    assert student.training
    assert base.model.layers[0].training, "the teacher runs in evaluation mode, and keeps its own"


def test_the_trainers_loss_does_not_grow_with_the_length(ids: Ids) -> None:
    """``batchmean`` of the logits grows with the number of tokens of a row: 12 tokens 0.295, 48 tokens 1.091 elsewhere."""
    trainer = DistillationTrainer(tiny("qwen3", seed=3, **DEPTH), tiny("qwen3_5", **HYBRID), DistillConfig(alpha=1.0))
    losses = [float(trainer.compute_loss(ids(4, length), ids(4, length))["loss"].detach()) for length in (12, 48)]
    assert losses[1] == pytest.approx(losses[0], rel=0.25)
    with pytest.raises(ValueError, match="No label of shape"):
        trainer.compute_loss(ids(1, 4), torch.full((1, 4), -100))


def test_defaults_are_the_promised_ones() -> None:
    assert (DistillConfig().temperature, DistillConfig().alpha, DistillConfig().divergence) == (2.0, 0.5, "forward")
    conversion = CrossArchTransferConfig()
    assert (conversion.distillation_temperature, conversion.distillation_alpha) == (2.0, 0.5)
    assert conversion.model_dump().keys() == {"hybrid_attention", "gate_init_strategy"}, "conversions resume by these"
    sequence: Sequence[float] = (0.0, 1e-300, 101.0)
    for value in sequence:
        with pytest.raises(ValueError, match="temperature"):
            DistillConfig(temperature=value)
        with pytest.raises(ValueError, match="temperature"):
            CrossArchTransferConfig(distillation_temperature=value)


def test_the_teacher_has_no_dropout_whatever_its_mode() -> None:
    """And what it shares with the student keeps the student's."""
    base = tiny("qwen3", dtype=torch.float64, **DEPTH, attention_dropout=0.5)
    trainer = DistillationTrainer(base, copy.deepcopy(base).eval(), DistillConfig(alpha=1.0))
    base.train()
    ids = data()["input_ids"]
    assert float(trainer.compute_loss(ids, ids)["kd_loss"]) == 0
    shared = wrap_transformer_with_etd(base, None)
    assert float(DistillationTrainer(shared, base).compute_loss(ids, ids)["kd_loss"]) > 0, "the student has dropout"
    assert base.model.layers[0].training
    with pytest.raises(ValueError, match=r"are one model.*give a copy"):
        DistillationTrainer(base, base)


@pytest.mark.parametrize("n_tokens", [128, VOCAB + 1, -5, 0, True, 3.0])
def test_the_number_of_tokens_has_to_be_in_both_vocabularies(n_tokens: Any) -> None:
    for size in (VOCAB, 128):
        teacher = tiny("qwen3", **DEPTH, vocab_size=size)
        with pytest.raises((ValueError, TypeError), match=r"n_tokens( is|=).*(must be|whole number)|vocabulary of 128"):
            DistillationTrainer(teacher, tiny("qwen3_5", **HYBRID), n_tokens=n_tokens)


@pytest.mark.parametrize(
    ("ids", "labels", "message"),
    [
        (None, torch.full((2, 5), 3), r"labels has shape \(2, 5\)"),
        (None, torch.full((2, 6), 3.0), r"labels has the type torch.float32"),
        (None, torch.full((2, 6), VOCAB), rf"labels has {VOCAB}: give token numbers"),
        (None, torch.full((2, 6), -1), r"labels has -1: give token numbers"),
        (None, None, r"labels is NoneType None: give a tensor"),
        (torch.full((2, 6), 80), None, r"input_ids has 80 to 80: give token numbers from 0 to 79"),
    ],
)
def test_tokens_and_labels_that_do_not_fit_are_refused_in_one_sentence(ids: Any, labels: Any, message: str) -> None:
    teacher, student = tiny("qwen3", **DEPTH, vocab_size=80), tiny("qwen3_5", **HYBRID)
    trainer = DistillationTrainer(teacher, student, n_tokens=70)
    with pytest.raises((ValueError, TypeError), match=message):
        trainer.compute_loss(torch.full((2, 6), 3) if ids is None else ids, labels)
