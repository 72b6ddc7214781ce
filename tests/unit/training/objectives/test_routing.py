"""Claim: routers learn the labelled routes, on the states that these give, by the published loss; nothing else learns.

The losses are written out in fp64, on states of passes along explicit paths.
"""

from typing import Any

import pytest
import torch
from conftest import SPLIT, tiny
from torch import Tensor, nn
from torch.nn import functional as F

from mull import ETDConfig, LayerRouterConfig, MullForCausalLM, from_actions, wrap_transformer_with_etd
from mull.layers.routers import EXECUTE, REPEAT, SKIP
from mull.training.loop import TrainConfig, train
from mull.training.objectives.iterations import IterationSampling
from mull.training.objectives.resources import Resources
from mull.training.objectives.routing import RoutingConfig, class_weights, focal_loss, router_logits
from mull.training.objectives.table import make_objective

GRANULARITIES = ["sequence", "token"]
ROUTES = [(1, 1, 1, 0, 2, 1, 1, 1), (1, 1, 2, 1, 0, 1, 1, 1), (1, 1, 1, 1, 1, 1, 1, 1)]
PROMPTS, ANSWERS = [7, 5, 9], [3, 6, 2]


def model_of(family: str = "qwen3", granularity: Any = "sequence", **fields: Any) -> MullForCausalLM:
    """Routers with random weights; the warm-up is far from over."""
    router = LayerRouterConfig(hidden_size=8, num_windows=3, granularity=granularity, **fields)
    config = ETDConfig(**SPLIT.model_dump() | {"layer_router": router, "router_warmup_steps": 1000})
    model = wrap_transformer_with_etd(tiny(family, dtype=torch.float64), config)
    assert model.etd is not None
    assert model.etd.layer_routers is not None
    generator = torch.Generator().manual_seed(1)
    for router in model.etd.layer_routers.by_layer.values():
        nn.init.normal_(router.out.weight, generator=generator)  # type: ignore[arg-type, union-attr]
    return model


def batch_of() -> dict[str, Tensor]:
    rows = [
        torch.randint(3, 90, (p + a,), generator=torch.Generator().manual_seed(p))
        for p, a in zip(PROMPTS, ANSWERS, strict=True)
    ]
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    place = torch.arange(ids.shape[1])
    lengths, prompts = torch.tensor([len(row) for row in rows]), torch.tensor(PROMPTS)
    real = place < lengths[:, None]
    labels = torch.where(real & (place >= prompts[:, None]), ids, -100)
    return {
        "input_ids": ids,
        "attention_mask": real.long(),
        "labels": labels,
        "route_labels": torch.tensor(ROUTES),
    }


def objective_of(model: MullForCausalLM, labels: Tensor, iterations: int = 1, **settings: Any) -> Any:
    sampling = IterationSampling(kind="fixed", maximum=iterations)
    resources = Resources(model=model, iterations=sampling, route_labels=labels)
    return make_objective("routing", resources, RoutingConfig(**settings))


def entering(model: MullForCausalLM, ids: Tensor, route: tuple[int, ...]) -> dict[int, Tensor]:
    """States ``[1, T, D]`` before each layer of the think block, along an explicit path."""
    found: dict[int, Tensor] = {}
    stream: list[Tensor] = [model.model.embed_tokens(ids)]

    def watch(visit: Any, before: Tensor, after: Tensor) -> None:
        found.setdefault(visit.layer, before)
        stream.append(after)

    model.model(ids, path=from_actions(route), on_visit=watch, use_cache=False)
    for layer in SPLIT.think_layers:
        if layer not in found:  # a skipped layer is asked about what the next one gets
            found[layer] = next(found[later] for later in range(layer + 1, 8) if later in found)
    return found


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("family_name", ["qwen3", "qwen3_5", "olmo3"])
def test_the_loss_is_the_published_one_along_the_labelled_routes(family_name: str, granularity: Any) -> None:
    model, batch = model_of(family_name, granularity).train(), batch_of()
    assert model.etd is not None
    assert model.etd.layer_routers is not None
    weights = class_weights([2, 8, 2], 0.9)  # by hand from ROUTES: layers 2 to 5 of three rows
    gamma, expected, right = 1.5, torch.zeros((), dtype=torch.float64), 0.0
    for row, route in enumerate(ROUTES):
        ids = batch["input_ids"][row : row + 1, : PROMPTS[row] + ANSWERS[row]]
        with torch.no_grad():
            states = entering(model, ids, route)
        for layer in SPLIT.think_layers:
            router: Any = model.etd.layer_routers.by_layer[str(layer)]
            if granularity == "token":
                logits = router(states[layer])[0]
            else:
                x = F.rms_norm(states[layer][0, : PROMPTS[row]], (32,))
                logits = router(torch.stack([part.mean(0) for part in windows(x)])).mean(0, keepdim=True)
            p = logits.softmax(-1)[:, route[layer]]
            expected = expected + (-weights[route[layer]] * (1 - p) ** gamma * p.log()).mean() / 4
            right += float((logits.argmax(-1) == route[layer]).double().mean()) / 12
    parameters = [*model.etd.parameters()]
    gradients = torch.autograd.grad(expected, parameters)
    output = objective_of(model, batch["route_labels"], balance=0.9, focal_gamma=gamma)(model, batch)
    torch.testing.assert_close(output.sum, expected)
    assert output.weight == 3
    assert output.metrics["accuracy"] == pytest.approx(right)
    output.sum.backward()
    for parameter, gradient in zip(parameters, gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
        assert gradient.any(), "every router parameter learns"
    others = {name for name, p in model.named_parameters() if p.grad is not None and "layer_routers" not in name}
    assert not others, "nothing else has a gradient, even where nobody froze it"


def windows(x: Tensor) -> list[Tensor]:
    """Three windows of equal length, up to one token."""
    rank = torch.arange(len(x)) * 3 // len(x)
    return [x[rank == window] for window in range(3)]


def test_experts_go_on_deciding_and_learn_nothing() -> None:
    """Their gates decide in the same pass; new experts change nothing, so the loss is that without them."""
    plain, batch = model_of(), batch_of()
    assert plain.etd is not None
    config = ETDConfig(**plain.etd_config.model_dump() | {"use_lora_experts": True})  # type: ignore[union-attr]
    model = wrap_transformer_with_etd(tiny("qwen3", dtype=torch.float64), config)
    assert model.etd is not None
    model.etd.load_state_dict(plain.etd.state_dict(), strict=False)
    output = objective_of(model, batch["route_labels"])(model, batch)
    torch.testing.assert_close(output.sum, objective_of(plain, batch["route_labels"])(plain, batch).sum)
    output.sum.backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {
        name for name, _ in model.named_parameters() if "layer_routers" in name
    }


def test_every_iteration_has_the_label() -> None:
    """The second iteration's states are those of a path that repeats the block."""
    model, batch = model_of("qwen3", "token"), batch_of()
    ids = batch["input_ids"][2:, : PROMPTS[2] + ANSWERS[2]]
    one = {name: tensor[2:, : ids.shape[1]] for name, tensor in batch.items()} | {
        "route_labels": batch["route_labels"][2:]
    }
    assert model.etd is not None
    assert model.etd.layer_routers is not None
    before: dict[tuple[int, int], Tensor] = {}
    path = SPLIT.path(2)
    model.model(ids, path=path, on_visit=lambda v, h, _: before.setdefault((v.layer, v.occurrence), h), use_cache=False)
    found = router_logits(model, one, 2)
    assert len(found) == 8
    for visit, logits in found.items():
        router: Any = model.etd.layer_routers.by_layer[str(visit.layer)]
        torch.testing.assert_close(logits, router(before[visit.layer, visit.occurrence // 2]), atol=0, rtol=0)
    objective = objective_of(model, one["route_labels"], iterations=2, focal_gamma=0, balance=0)
    expected = torch.stack([-logits.log_softmax(-1)[..., EXECUTE].mean() for logits in found.values()]).mean()
    torch.testing.assert_close(objective(model, one).sum, expected)


def test_the_effective_number_saturates() -> None:
    """Counts that Dr.LLM's repository states; at its b = 0.999 the weights are almost equal."""
    counts = [4399, 120956, 1457]
    for balance, expected in {
        0.999: (0.916, 0.905, 1.179),
        0.9999: (0.75, 0.27, 1.98),
        0.99999: (0.74, 0.05, 2.21),
    }.items():
        found = class_weights(counts, balance)
        assert found == pytest.approx(expected, abs=0.006)
        by_hand = [(1 - balance) / (1 - balance**n) for n in counts]
        assert found == pytest.approx([weight / (sum(by_hand) / 3) for weight in by_hand])
    assert class_weights(counts, 0) == [1, 1, 1]
    assert class_weights([0, 7, 7], 0.99) == pytest.approx([0, 1, 1]), (
        "a class without a label is no part of the average"
    )
    assert class_weights([3, 5], 0) == [1, 1]


def test_the_focal_loss_forgets_what_is_right() -> None:
    logits = torch.tensor(
        [[0.0, 2.0, -1.0], [30.0, 0.0, 0.0], [90.0, 0.0, 0.0]], dtype=torch.float64, requires_grad=True
    )
    labels = torch.tensor([1, 0, 0])
    for gamma in (0.0, 0.5, 2.0):
        found = focal_loss(logits, labels, [0.5, 2.0, 1.0], gamma)
        p = float(logits[0].detach().softmax(-1)[1])
        assert float(found[0].detach()) == pytest.approx(-2 * (1 - p) ** gamma * torch.tensor(p).double().log())
        (gradient,) = torch.autograd.grad(found.sum(), logits)
        assert gradient.isfinite().all()


@pytest.mark.latin(2)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("seed", range(3))
def test_supervised_routers_learn_to_skip_and_to_repeat(granularity: Any, seed: int) -> None:
    """Prompts that begin with 5 are answered without layer 3, those with 6 by running layer 4 twice."""
    torch.manual_seed(seed)
    base = tiny("qwen3", seed=seed)
    router = LayerRouterConfig(hidden_size=16, granularity=granularity)
    model = wrap_transformer_with_etd(base, ETDConfig(**SPLIT.model_dump() | {"layer_router": router}))
    assert model.etd is not None
    assert model.etd.layer_routers is not None
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}

    trainable = set[str]()

    def batches(number: int) -> dict[str, Tensor]:
        trainable.update(name for name, parameter in model.named_parameters() if parameter.requires_grad)
        ids = torch.randint(10, 97, (8, 12), generator=torch.Generator().manual_seed(number))
        kind = torch.arange(8) % 2
        ids[:, :4] = 5 + kind[:, None]
        routes = torch.ones(8, 8, dtype=torch.long)
        routes[kind == 0, 3], routes[kind == 1, 4] = SKIP, REPEAT
        return {"input_ids": ids, "labels": ids.masked_fill(torch.arange(12) < 6, -100), "route_labels": routes}

    config = TrainConfig(steps=30, peak_lr=0.04, warmup_steps=0, log_every=30)
    objective = objective_of(model, batches(0)["route_labels"])
    trainable.clear()
    result = train(model, objective, batches, config)
    assert trainable == {name for name in before if "layer_routers" in name}, "the others are frozen meanwhile"
    batch = batches(1000)
    model.eval()
    with torch.no_grad():
        found = router_logits(model, batch)
        p = torch.stack([
            logits.softmax(-1)[range(8), ..., batch["route_labels"][:, visit.layer]] for visit, logits in found.items()
        ])  # fmt: skip
        out = model(batch["input_ids"], prompt_mask=batch["labels"] == -100, think_iterations=1, use_cache=False)
    taken = torch.stack(out.metrics["router_actions"], 1)  # the warm-up is over
    expected = batch["route_labels"][:, 2:6, None].expand_as(taken)
    # The prompt's first tokens say which kind it is; random ones say it by attention alone.
    assert p[..., : 4 if p.ndim == 3 else None].min() > 0.9
    assert torch.equal(taken[..., :4], expected[..., :4])
    assert result.history[-1]["accuracy"] > 0.9
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != ("layer_routers" in name), name


@pytest.mark.parametrize(
    ("fields", "route", "message"),
    [
        ({}, (1,) * 6, r"through 6 layers, and the model has 8"),
        ({}, (0, 1, 1, 1, 1, 1, 1, 1), r"1 of 1 labels skip or repeat layers that have no router"),
        ({"num_actions": 2}, (1, 1, 1, 2, 1, 1, 1, 1), r"1 of 1 labels repeat a layer, and routers with num_actions=2"),
    ],
)
def test_labels_that_routers_cannot_follow_are_refused(fields: Any, route: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        objective_of(model_of(**fields), torch.tensor([route]))


def test_what_routing_needs_is_said() -> None:
    model = model_of()
    plain = wrap_transformer_with_etd(tiny("qwen3"), SPLIT)
    with pytest.raises(ValueError, match="layer_router"):
        make_objective("routing", Resources(model=plain, route_labels=torch.ones(1, 8, dtype=torch.long)))
    with pytest.raises(ValueError, match="route_labels"):
        make_objective("routing", Resources(model=model))
    objective = objective_of(model, torch.tensor(ROUTES))
    batch = batch_of()
    del batch["route_labels"]
    with pytest.raises(ValueError, match="format routes"):
        objective(model, batch)
    with pytest.raises(ValueError, match="backprop_iterations"):
        make_objective(
            "routing",
            Resources(
                model=model, iterations=IterationSampling(per="token", maximum=2), route_labels=torch.tensor(ROUTES)
            ),
        )
