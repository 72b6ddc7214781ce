"""Claim: the loss is that of the next token with the router's stops, plus its z-loss, and the router learns who needs depth."""

from typing import Any

import pytest
import torch
from conftest import SPLIT, tiny
from torch import Tensor, nn
from torch.nn import functional as F

from mull import ETDConfig, HaltingConfig, MullForCausalLM, recursion, wrap_transformer_with_etd
from mull.model.depth_router import DepthRouter
from mull.model.halting import Halting
from mull.model.path import Visit
from mull.training.objectives.iterations import IterationSampling
from mull.training.objectives.recursions import Recursions, RecursionsConfig
from mull.training.objectives.resources import Resources
from mull.training.objectives.table import make_objective

ITERATIONS = 3
THREE = IterationSampling(maximum=ITERATIONS)


def model_of(most: int = ITERATIONS, **fields: Any) -> MullForCausalLM:
    halting = HaltingConfig(rule="router", **fields)
    etd = ETDConfig(**SPLIT.model_dump() | {"max_think_iterations": most, "halting": halting})
    return wrap_transformer_with_etd(tiny("qwen3", dtype=torch.float64), etd)


def router_of(model: MullForCausalLM) -> DepthRouter:
    assert model.etd is not None
    assert model.etd.depth_router is not None
    return model.etd.depth_router


def test_the_loss_is_that_of_the_next_token_with_a_z_loss() -> None:
    model = model_of().train()
    nn.init.normal_(router_of(model).gate.out.weight)
    ids = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    labels = torch.where(mask == 1, ids, -100)
    labels[0, 4:] = -100
    batch = {"input_ids": ids, "labels": labels, "attention_mask": mask}
    objective = make_objective(
        "mixture-of-recursions", Resources(model=model, iterations=THREE), RecursionsConfig(z_loss_weight=0.2)
    )
    output = objective(model, batch)
    out = model(ids, attention_mask=mask, adaptive=True, use_cache=False, output_hidden_states=True)
    valid = labels[:, 1:] != -100
    expected = F.cross_entropy(out.logits[:, :-1][valid], labels[:, 1:][valid], reduction="sum")
    entered = out.hidden_states[SPLIT.n_encoder_layers]
    z_loss = router_of(model).gate(entered)[mask == 1].exp().sum(-1).log().square().mean()
    torch.testing.assert_close(output.sum, expected + 0.2 * z_loss * valid.sum())
    assert output.weight == valid.sum()
    depths = out.metrics["think_iterations"][mask == 1]
    assert len(depths.unique()) > 1
    assert output.metrics["mean_iterations"] == pytest.approx(float(depths.double().mean()))
    output.sum.backward()
    assert all(parameter.grad is not None for parameter in router_of(model).parameters())
    with torch.no_grad():
        torch.testing.assert_close(objective(model.eval(), batch).sum, expected)


def published(self: Halting, visit: Visit, before: Tensor, after: Tensor) -> Tensor:
    """The gradient of the published form: the block's update counts with the probability of the chosen depth."""
    if self._entered is None or visit != (1, self.iterations - 1):
        return after
    assert self._router is not None
    assert self.depth is not None
    chance = self._router.gate(self._entered).softmax(-1).gather(-1, self.depth[..., None] - 1)
    return after + (chance - chance.detach()) * (after - self._entered).detach()


def learned_depths(seed: int) -> tuple[float, float]:
    """Mean iterations of tokens that want one, and of those that want more than the three they can have.

    The think layer adds a fixed step to the stream, and the teacher takes it once or five times, by the token's number.
    """
    base = tiny("qwen3", seed=seed, dtype=torch.float64, num_hidden_layers=3)
    layer, step = base.model.layers[1], 0.3 * torch.randn(32, dtype=torch.float64)
    nn.init.zeros_(layer.self_attn.o_proj.weight)
    nn.init.zeros_(layer.mlp.down_proj.weight)
    layer.register_forward_hook(lambda _module, _args, out: out + step)
    halting = HaltingConfig(rule="router", stop="share_first", balance_rate=0.005)
    split = {"n_encoder_layers": 1, "n_think_layers": 1, "n_decoder_layers": 1}
    model = wrap_transformer_with_etd(base, ETDConfig(**split, max_think_iterations=3, halting=halting)).train()
    model.requires_grad_(False)
    optimizer = torch.optim.Adam(router_of(model).requires_grad_(True).parameters(), lr=0.05)
    ids = torch.randint(3, 19, (4, 16))
    more = ids % 2 == 1
    with torch.no_grad():
        depths = model.model.given_depths(torch.where(more, 5, 1))
        taught = model.model(ids, path=recursion(1, 1, 1, 5), policy=depths, use_cache=False).last_hidden_state
    for _ in range(60):
        out = model.model(ids, adaptive=True, use_cache=False)
        (out.last_hidden_state - taught).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        found = model.eval().model(ids, adaptive=True).metrics["think_iterations"].double()
    return float(found[~more].mean()), float(found[more].mean())


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
def test_the_router_learns_which_tokens_need_more_iterations(seed: int) -> None:
    few, many = learned_depths(seed)
    assert few < 1.4
    assert many > 2.2


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_by_the_published_gradient_tokens_that_stopped_too_early_learn_to(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Halting, "weigh", published)
    few, many = learned_depths(seed)
    assert few < 1.4
    assert many < 1.5


def test_what_cannot_be_trained_is_refused() -> None:
    plain = wrap_transformer_with_etd(tiny("qwen3"), SPLIT)
    with pytest.raises(ValueError, match=r"halting: \{rule: router\}"):
        make_objective("mixture-of-recursions", Resources(model=plain, iterations=THREE))
    for iterations in (IterationSampling(maximum=1), IterationSampling(kind="uniform", maximum=3, per="token")):
        with pytest.raises(ValueError, match="lets the router give tokens their iterations"):
            Recursions(iterations, RecursionsConfig(), HaltingConfig(rule="router"))
