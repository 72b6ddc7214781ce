"""Claim: every parameter meets the optimizer, learning rate and precision that its kind and the settings ask for."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from mull.training.optimization import (
    Muon,
    OptimizationConfig,
    build_optimizers,
    gradient_norm,
    learning_rate_factor,
    peak_flops,
    published_peak,
    resolve_precision,
    update,
)

CPU = torch.device("cpu")


class EveryKind(nn.Module):
    """One parameter of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.conv = nn.Conv1d(8, 8, 1, groups=8)
        self.hidden = nn.Linear(8, 6)
        self.norm = nn.LayerNorm(8)
        self.lm_head = nn.Linear(8, 11, bias=False)


def groups(model: nn.Module, optimizer: str, companion: nn.Module | None = None) -> list[tuple[str, float, set[str]]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    if companion is not None:
        names |= {id(parameter): f"beside.{name}" for name, parameter in companion.named_parameters()}
    config = OptimizationConfig(optimizer=optimizer, weight_decay=0.3)
    return [
        (type(o).__name__, group["weight_decay"], {names[id(p)] for p in group["params"]})
        for o in build_optimizers(model, config, companion)
        for group in o.param_groups
    ]


UNDECAYED = {"embed.weight", "conv.bias", "hidden.bias", "norm.weight", "norm.bias"}


def test_parameters_go_to_the_optimizer_that_suits_them() -> None:
    model = EveryKind()
    assert groups(model, "adamw") == [
        ("AdamW", 0.3, {"conv.weight", "hidden.weight", "lm_head.weight"}),
        ("AdamW", 0.0, UNDECAYED),
    ]
    assert groups(model, "muon") == [
        ("Muon", 0.3, {"hidden.weight"}),
        ("AdamW", 0.3, {"conv.weight", "lm_head.weight"}),
        ("AdamW", 0.0, UNDECAYED),
    ]
    model.lm_head.weight = model.embed.weight
    assert all("lm_head.weight" not in members for _, decay, members in groups(model, "muon") if decay)


def test_what_is_trained_beside_the_model_meets_adamw() -> None:
    # The matrix of a scalar head has one row: an orthogonal update of it would have the same length at every step.
    muon, decayed, undecayed = groups(EveryKind(), "muon", nn.Linear(8, 1))
    assert muon == ("Muon", 0.3, {"hidden.weight"})
    assert "beside.weight" in decayed[2]
    assert "beside.bias" in undecayed[2]


def test_a_model_without_trainable_parameters_is_refused() -> None:
    model = EveryKind().requires_grad_(False)
    with pytest.raises(ValueError, match="unfreeze"):
        build_optimizers(model, OptimizationConfig())
    assert build_optimizers(model, OptimizationConfig(), nn.Linear(2, 1)), "a companion alone may be trained"


def test_muon_without_ranks_is_that_of_torch() -> None:
    ours, theirs = ([nn.Parameter(torch.randn(4, 6, generator=seeded())) for _ in range(2)] for _ in range(2))
    optimizers = Muon(ours, lr=0.02), torch.optim.Muon(theirs, lr=0.02)
    for step in range(3):
        for number, (mine, reference) in enumerate(zip(ours, theirs, strict=True)):
            skipped = number == 1 and step == 0  # a parameter without gradient stays
            mine.grad = reference.grad = None if skipped else torch.randn(4, 6, generator=seeded(step))
        for optimizer in optimizers:
            optimizer.step()
    for mine, reference in zip(ours, theirs, strict=True):
        assert torch.equal(mine, reference)
        assert torch.equal(
            optimizers[0].state[mine]["momentum_buffer"], optimizers[1].state[reference]["momentum_buffer"]
        )
    assert len(optimizers[0].param_groups) == 1


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_an_update_is_proportional_to_the_learning_rate(optimizer: str) -> None:
    changes = []
    for factor in (1.0, 0.25):
        torch.manual_seed(0)
        model = EveryKind()
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        update(build_optimizers(model, OptimizationConfig(optimizer=optimizer, weight_decay=0)), factor)
        assert all(parameter.grad is None for parameter in model.parameters())
        changes.append({name: p.detach() - before[name] for name, p in model.named_parameters()})
    for name, change in changes[0].items():
        torch.testing.assert_close(changes[1][name], change / 4, atol=1e-6, rtol=1e-2)
        assert change.abs().max() > 0


def test_the_norm_is_that_of_all_gradients_together() -> None:
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in ((2, 3), (4,), (5,))]
    parameters[0].grad, parameters[1].grad = torch.full((2, 3), 2.0), torch.full((4,), -1.0)
    assert float(gradient_norm(parameters)) == pytest.approx(math.sqrt(6 * 4 + 4))


@pytest.mark.parametrize(
    ("schedule", "at"),
    [
        ("constant", {0: 0.25, 3: 1.0, 50: 1.0, 99: 1.0}),
        ("cosine", {0: 0.25, 50: 0.55, 25: 0.1 + 0.9 * (2 + math.sqrt(2)) / 4, 100: 0.1}),
        ("wsd", {1: 0.5, 50: 1.0, 79: 1.0, 90: 0.55, 100: 0.1}),
    ],
)
def test_schedule_by_hand(schedule: str, at: dict[int, float]) -> None:
    settings = OptimizationConfig(schedule=schedule, warmup_steps=4, final_lr_fraction=0.1, decay_share=0.2)
    for step, factor in at.items():
        assert learning_rate_factor(settings, step, share=step / 100) == pytest.approx(factor, abs=1e-3), step


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [({"avx512_bf16": True}, "bf16"), ({"avx512_bf16": False, "amx_bf16": True}, "bf16"), ({"neon": True}, "fp32")],
)
def test_auto_precision_follows_the_processor(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, bool], expected: str
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert resolve_precision("auto", CPU) == expected
    assert resolve_precision("fp32", CPU) == "fp32"
    assert resolve_precision("bf16", CPU) == "bf16"


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA GB200", 2500e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA L40", None),
        ("Tesla T4", None),
    ],
)
def test_published_peaks_are_found_by_name(name: str, peak: float | None) -> None:
    assert published_peak(name) == peak


def test_a_peak_that_is_not_published_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[Any] = []

    def measure(device: torch.device, dtype: torch.dtype) -> float:
        measured.append(dtype)
        return 1e9

    peak_flops.cache_clear()
    monkeypatch.setattr("mull.training.optimization.measured_peak", measure)
    assert [peak_flops(CPU, precision) for precision in ("fp32", "bf16", "fp32")] == [1e9] * 3
    assert measured == [torch.float32, torch.bfloat16]
    monkeypatch.undo()
    peak_flops.cache_clear()
    assert 1e8 < peak_flops(CPU, "fp32") < 1e14
