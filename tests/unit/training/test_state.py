"""Claim: what a step depends on has stable names, and taking it changes nothing."""

import random

import numpy as np
import pytest
import torch
from noisy_module import Noisy, optimizers_of, step
from torch import Tensor, nn

from mull.training.state import rng_state, set_rng_state, training_tensors


def test_the_names_are_those_of_the_module_and_tied_weights_come_once():
    model = Noisy()
    tensors = training_tensors(model, optimizers_of(model))
    adamw = ["step", "exp_avg", "exp_avg_sq"]
    assert set(tensors) == {
        *(f"model.{name}" for name in ["embed.weight", "hidden.weight", "hidden.bias", "unused", "frozen", "steps"]),
        "optimizer.hidden.weight.momentum_buffer",
        *(f"optimizer.{name}.{state}" for name in ["embed.weight", "hidden.bias", "unused"] for state in adamw),
    }


@pytest.mark.parametrize("options", [{}, {"fused": False}, {"amsgrad": True}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_state_that_is_made_early_is_what_the_optimizer_makes_itself(options, dtype):
    def run(early: bool) -> tuple[Noisy, list[torch.optim.Optimizer]]:
        torch.manual_seed(1), random.seed(1), np.random.seed(1)
        model = Noisy().to(dtype)
        optimizers = optimizers_of(model, **options)
        if early:
            before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
            training_tensors(model, optimizers)
            assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
        for _ in range(2):
            step(model, optimizers)
        return model, optimizers

    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        (lazy, lazy_optimizers), (early, early_optimizers) = run(False), run(True)
    finally:
        torch.set_default_dtype(previous)
    for optimizer, other in zip(lazy_optimizers, early_optimizers, strict=True):
        for p, q in zip(lazy.parameters(), early.parameters(), strict=True):
            state, made = optimizer.state.get(p, {}), other.state.get(q, {})
            assert list(state) == list(made) or not any(value.any() for value in made.values()), "never used"
            for name, value in state.items():
                assert (value.dtype, value.device, value.shape) == (
                    made[name].dtype,
                    made[name].device,
                    made[name].shape,
                )
                assert torch.equal(value, made[name])
    assert all(torch.equal(p, q) for p, q in zip(lazy.parameters(), early.parameters(), strict=True))
    assert sum(len(optimizer.state) for optimizer in lazy_optimizers) == 3


def test_what_cannot_be_saved_is_refused():
    model = Noisy()
    with pytest.raises(ValueError, match=r"shape \(6, 6\) that is not in the module"):
        training_tensors(nn.Linear(1, 1), optimizers_of(model))
    with pytest.raises(ValueError, match="The state of SGD cannot be saved: use torch.optim.AdamW or Muon"):
        training_tensors(model, [torch.optim.SGD(model.parameters(), momentum=0.9)])

    class Stateful(nn.Module):
        def get_extra_state(self) -> dict[str, int]:
            return {"a": 1}

    with pytest.raises(ValueError, match="_extra_state of Stateful cannot be saved: it must be a tensor, but is dict"):
        training_tensors(Stateful(), [])


def test_random_generators_continue_where_they_were():
    def draw() -> tuple[float, ...]:
        return (float(torch.randn(())), float(np.random.randn()), random.gauss(0, 1), random.random())

    for draws in range(3):  # an odd number leaves half of a Gaussian pair
        for _ in range(draws):
            draw()
        state = rng_state()
        expected = [draw() for _ in range(3)]
        set_rng_state(state)
        assert [draw() for _ in range(3)] == expected
        assert all(isinstance(value, Tensor) for value in state.values())
