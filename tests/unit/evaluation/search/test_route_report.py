"""Claim: a report on routers counts what they decide by themselves, and measures it beside routes of equal cost.

Every cost is compared with passes of single questions along explicit paths.
"""

from collections import Counter
from typing import Any

import pytest
import torch
from conftest import SPLIT, tiny
from torch import Tensor, nn
from torch.nn import functional as F

from mull import ETDConfig, LayerRouterConfig, MullForCausalLM, from_actions, wrap_transformer_with_etd
from mull.data.route_labels import RouteRows
from mull.evaluation.search import route_report
from mull.evaluation.search.route_report import report_routers, route_agreement
from mull.model.executor import run

LABELS = [(1, 1, 0, 1, 1, 1, 1, 1), (1, 1, 1, 2, 1, 1, 1, 1), (1, 1, 1, 1, 1, 1, 1, 1), (1, 1, 0, 1, 2, 1, 1, 1)]
PROMPTS, ANSWERS = [6, 4, 9, 5], [3, 5, 2, 4]
GRANULARITIES = ["sequence", "token"]


def model_of(granularity: Any = "sequence", scale: float = 3.0, **fields: Any) -> MullForCausalLM:
    router = LayerRouterConfig(hidden_size=8, num_windows=2, granularity=granularity, **fields)
    config = ETDConfig(**SPLIT.model_dump() | {"layer_router": router, "router_warmup_steps": 0})
    model = wrap_transformer_with_etd(tiny("qwen3", dtype=torch.float64), config).eval()
    assert model.etd is not None
    assert model.etd.layer_routers is not None
    generator = torch.Generator().manual_seed(2)
    for router in model.etd.layer_routers.by_layer.values():
        nn.init.normal_(router.out.weight, std=scale, generator=generator)  # type: ignore[arg-type, union-attr]
    return model


def rows_of() -> RouteRows:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, 90, (p + a,), generator=generator) for p, a in zip(PROMPTS, ANSWERS, strict=True)]
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    place, prompts = torch.arange(ids.shape[1]), torch.tensor(PROMPTS)[:, None]
    mask = (place < prompts + torch.tensor(ANSWERS)[:, None]).long()
    labels = torch.where(mask.bool() & (place >= prompts), ids, -100)
    return RouteRows(ids, mask, labels, torch.tensor(LABELS))


def loss_along(model: MullForCausalLM, rows: RouteRows, number: int, **options: Any) -> tuple[float, int]:
    """Summed loss of an answer, and its tokens."""
    n_prompt, n_answer = PROMPTS[number], ANSWERS[number]
    ids = rows.input_ids[number : number + 1, : n_prompt + n_answer]
    with torch.no_grad():
        logits = model(ids, use_cache=False, **options).logits[0, n_prompt - 1 : -1]
    return float(F.cross_entropy(logits, ids[0, n_prompt:], reduction="sum")), n_answer


def free_run(model: MullForCausalLM, rows: RouteRows, number: int) -> tuple[float, int, Tensor]:
    """The same along what the routers decide, with the actions ``[R, T]``."""
    length = PROMPTS[number] + ANSWERS[number]
    prompt = torch.arange(length)[None] < PROMPTS[number]
    loss, n_tokens = loss_along(model, rows, number, prompt_mask=prompt, think_iterations=1)
    with torch.no_grad():
        ids = rows.input_ids[number : number + 1, :length]
        out = model(ids, prompt_mask=prompt, think_iterations=1, use_cache=False)
    return loss, n_tokens, torch.cat(out.metrics["router_actions"])


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_costs_are_those_of_single_passes(granularity: Any) -> None:
    model, rows = model_of(granularity), rows_of()
    found = report_routers(model, rows, routes={"mine": (1, 1, 2, 0, 1, 1, 1, 1)}, batch_size=3)
    free = [free_run(model, rows, number) for number in range(4)]
    assert len(set(torch.cat([actions.flatten() for _, _, actions in free]).tolist())) == 3
    expected = {
        "plain": [loss_along(model, rows, n, path=from_actions((1,) * 8)) for n in range(4)],
        "labels": [loss_along(model, rows, n, path=from_actions(LABELS[n])) for n in range(4)],
        "routers": [(loss, n_tokens) for loss, n_tokens, _ in free],
        "mine": [loss_along(model, rows, n, path=from_actions((1, 1, 2, 0, 1, 1, 1, 1))) for n in range(4)],
    }
    total = sum(ANSWERS)
    for name, each in expected.items():
        cost = found.costs[name]
        assert cost.loss == pytest.approx(sum(loss for loss, _ in each) / total, abs=1e-6), name
        changes = [loss - base for (loss, _), (base, _) in zip(each, expected["plain"], strict=True)]
        mean = sum(changes) / total
        assert cost.change == pytest.approx(mean, abs=1e-6)
        residuals = [change - mean * n for change, n in zip(changes, ANSWERS, strict=True)]
        assert cost.standard_error == pytest.approx((sum(r * r for r in residuals) * 4 / 3) ** 0.5 / total, abs=1e-6)
    assert found.costs["plain"].visits == 8
    assert found.costs["labels"].visits == found.agreement.label_visits == sum(map(sum, LABELS)) / 4
    visits = sum(4 + float(actions.double().sum(0).mean()) for _, _, actions in free) / 4
    assert found.costs["routers"].visits == pytest.approx(visits)
    assert found.agreement.visits == pytest.approx(visits)
    assert {*found.costs} == {"plain", "labels", "routers", "random", "fixed", "mine"}
    assert all(cost.correct == 0 for cost in found.costs.values()), "a random model writes no answer"


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_decisions_are_counted_by_label(granularity: Any) -> None:
    model, rows = model_of(granularity), rows_of()
    found = route_agreement(model, rows, batch_size=3)
    confusion = [[0.0] * 3 for _ in range(3)]
    right = [0.0] * 4
    for number, label in enumerate(LABELS):
        actions = free_run(model, rows, number)[2]
        for place, of_layer in enumerate(actions):
            for action in of_layer.tolist():
                confusion[label[2 + place]][action] += 1 / len(of_layer)
                right[place] += (action == label[2 + place]) / len(of_layer) / 4
    torch.testing.assert_close(torch.tensor(found.confusion), torch.tensor(confusion))
    assert found.layer_accuracy == pytest.approx(right)
    assert found.accuracy == pytest.approx(sum(right) / 4)
    assert found == report_routers(model, rows).agreement


def test_macro_f1_is_that_of_the_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 4 questions and 4 layers: skips 1 found of 2, with 1 too many; 1 repeat of 2, none too many; the rest executes."""
    decided = [(0, 1, 1, 1), (1, 2, 1, 1), (1, 0, 1, 1), (1, 1, 1, 1)]
    monkeypatch.setattr(
        route_report, "_decisions", lambda *_: [torch.tensor(row)[:, None].expand(-1, 3) for row in decided]
    )
    found = route_agreement(model_of(), rows_of())
    assert found.confusion == ((1, 1, 0), (1, 11, 0), (0, 1, 1))
    skip, execute, repeat = 2 * 1 / (2 + 2), 2 * 11 / (12 + 13), 2 * 1 / (2 + 1)
    assert found.macro_f1 == pytest.approx((skip + execute + repeat) / 3)
    assert found.accuracy == 13 / 16
    assert found.layer_accuracy == (3 / 4, 3 / 4, 3 / 4, 1)
    assert (found.visits, found.label_visits) == (8 - 1 / 4, 8)
    plain = RouteRows(
        *(getattr(rows_of(), name) for name in ("input_ids", "attention_mask", "labels")), torch.ones(4, 8).long()
    )
    monkeypatch.setattr(route_report, "_decisions", lambda *_: [torch.ones(4, 3).long()] * 4)
    assert route_agreement(model_of(), plain).macro_f1 == 1, "actions that nobody takes are left out"


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_random_routes_keep_what_each_layer_decides_how_often(granularity: Any) -> None:
    model, rows = model_of(granularity), rows_of()
    etd = model.etd_config
    assert etd is not None
    actions = route_report._decisions(model, rows, 2)
    draws = [route_report._dealt(actions, etd, seed) for seed in range(5)]
    counted = [of_row[:, :1] if granularity == "sequence" else of_row for of_row in actions]
    for draw in draws:
        assert [of_row.shape for of_row in draw] == [of_row.shape for of_row in actions]
        dealt = [of_row[:, :1] if granularity == "sequence" else of_row for of_row in draw]
        for layer in range(4):
            before, after = (Counter(torch.cat([row[layer] for row in each]).tolist()) for each in (counted, dealt))
            assert before == after
        if granularity == "sequence":
            assert all(torch.equal(row, row[:, :1].expand_as(row)) for row in draw), "one action for a question"
    assert any(not torch.equal(torch.cat(draw, 1), torch.cat(actions, 1)) for draw in draws)


def test_the_fixed_route_has_the_most_frequent_actions_and_the_average_cost() -> None:
    etd = model_of().etd_config
    assert etd is not None
    decided = [(0, 1, 0, 1), (0, 1, 1, 2), (0, 0, 1, 2), (1, 0, 1, 2)]
    shares = route_report._shares([torch.tensor(row)[:, None] for row in decided])
    # Six skips, so 1.5 in an average question, rounded to 2; three repeats, so 1.
    assert route_report._most_frequent(shares, etd) == (1, 1, 0, 0, 1, 2, 1, 1)


def test_equal_routes_run_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """New routers execute: labels aside, everything is the plain route."""
    model, rows, sizes = model_of(scale=0.0), rows_of(), list[int]()

    def counted(*args: Any, **options: Any) -> Tensor:
        sizes.append(len(args[3]))
        return run(*args, **options)

    monkeypatch.setattr("mull.model.base_model.run", counted)
    found = report_routers(model, rows)
    assert sizes == [4, 2, 2, 1, 2], "decisions in a batch, then each question along its distinct routes"
    assert found.costs["routers"] == found.costs["random"] == found.costs["fixed"] == found.costs["plain"]


def test_routers_that_do_not_decide_are_refused() -> None:
    rows = rows_of()
    plain = wrap_transformer_with_etd(tiny("qwen3"), SPLIT)
    with pytest.raises(ValueError, match="no layer routers"):
        report_routers(plain, rows)
    model = model_of()
    assert model.etd is not None
    assert model.etd.layer_routers is not None
    model.etd.layer_routers.warmup_steps = 10
    with pytest.raises(ValueError, match="0 of 10 steps"):
        route_agreement(model, rows)
    with pytest.raises(ValueError, match="1 of 2 labels skip or repeat layers that have no router"):
        report_routers(model_of(), rows, routes={"other": (0, 1, 1, 1, 1, 1, 1, 1)})
