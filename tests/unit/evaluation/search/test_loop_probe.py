"""Claim: the loop probe measures the loss of whole passes, though it shares most of them, and drops only windows that cost more.

Losses are compared with `MullModel` along explicit paths and with Hugging Face layers called one by one, the race with windows
whose true cost is known.
"""

from typing import Any

import pytest
import torch
from conftest import FAMILIES, HYBRIDS, tiny
from torch.nn import functional as F

from mull.evaluation.search.loop_probe import (
    candidate_windows,
    layers_per_batch,
    loop_losses,
    loop_probe,
    mean_and_error,
)
from mull.model.path import from_layers
from mull.retrofit.wrap import wrap_transformer_with_etd
from mull.runtime.progress import Progress

PAD = 3


def silent(total: int | None = None) -> Progress:
    return Progress(total, "layer", shown=False)


def batch_of(ids: torch.Tensor, **more: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"input_ids": ids, "labels": ids.clone(), **more}


def laid_out(kind: str, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """A batch of two rows of nine tokens, whose labels leave out padding, and the first token of each document."""
    batch = batch_of(ids)
    if kind == "packed":
        batch["position_ids"] = torch.tensor([[*range(5), *range(4)], [*range(9)]])
        batch["labels"][0, 5] = -100
    elif kind != "whole":
        hidden = slice(None, PAD) if kind == "left" else slice(9 - PAD, None)
        batch["attention_mask"] = torch.ones(2, 9, dtype=torch.long)
        batch["attention_mask"][0, hidden] = 0
        batch["labels"][0, hidden] = -100
        if kind == "left":
            batch["labels"][0, PAD] = -100  # no token comes before it
    return batch


@pytest.mark.parametrize("kind", ["whole", "left", "right", "packed"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.latin(2, "family", "kind")
def test_shared_states_give_the_losses_of_whole_passes(family: str, kind: str, exact: Any, ids: Any) -> None:
    model = wrap_transformer_with_etd(exact(family), None)
    batch = laid_out(kind, ids(2, 9))
    windows = candidate_windows(8, [4, 8] if family in HYBRIDS else [1, 3, 8], 4 if family in HYBRIDS else 1)
    plain, looped, counts = loop_losses(model, batch, windows, silent())
    options = {name: tensor for name, tensor in batch.items() if name != "labels"}
    following = F.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    orders = {window: [*range(window[1]), *range(window[0], 8)] for window in windows}
    for found, order in [(plain, range(8)), *((looped[window], order) for window, order in orders.items())]:
        with torch.no_grad():
            h = model.model(**options, path=from_layers(order), use_cache=False).last_hidden_state
            expected = F.cross_entropy(model.lm_head(h).mT, following, reduction="none").sum(1)
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    assert counts.tolist() == (following != -100).sum(1).tolist()


@pytest.mark.parametrize("family", ["qwen3", "qwen3_next-dense"])
def test_the_probe_is_the_loss_of_layers_called_by_hand(family: str, ids: Any) -> None:
    model = tiny(family)
    batches = [batch_of(ids(2, 9, seed=0)), batch_of(ids(1, 5, seed=1))]
    batches[0]["labels"][0, :6] = -100
    total, targets = {"plain": 0.0, "looped": 0.0}, 0
    for batch in batches:
        seen: dict[str, Any] = {}
        hook = model.model.layers[0].register_forward_pre_hook(
            lambda _, args, kwargs, seen=seen: seen.update(h=args[0], kwargs=kwargs), with_kwargs=True
        )
        calls = []
        others = [
            layer.register_forward_pre_hook(lambda _, args, kwargs, calls=calls: calls.append(kwargs), with_kwargs=True)
            for layer in model.model.layers
        ]
        with torch.no_grad():
            model(batch["input_ids"], use_cache=False)
            for handle in [hook, *others]:
                handle.remove()
            for name, order in {"plain": range(8), "looped": [*range(4), 0, 1, 2, 3, 4, 5, 6, 7]}.items():
                h = seen["h"]
                for layer in order:
                    h = model.model.layers[layer](h, **calls[layer])
                logits = model.lm_head(model.model.norm(h))[:, :-1]
                labels = batch["labels"][:, 1:]
                total[name] += F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").item()
        targets += int((batch["labels"][:, 1:] != -100).sum())
    plain, costs = loop_probe(wrap_transformer_with_etd(model, None), batches.__getitem__, [(0, 4)], 2)
    assert plain == pytest.approx(total["plain"] / targets, abs=1e-5)
    assert costs[0].extra_loss == pytest.approx((total["looped"] - total["plain"]) / targets, abs=1e-5)
    assert abs(costs[0].extra_loss) > 1e-3
    assert (costs[0].n_rows, costs[0].dropped) == (3, False)


def test_only_what_differs_from_the_plain_pass_is_run(ids: Any) -> None:
    model = wrap_transformer_with_etd(tiny("llama"), None)
    ran: list[int] = []
    for number, layer in enumerate(model.model.layers):
        layer.register_forward_hook(lambda *_, number=number: ran.append(number))
    windows = [(2, 4), (5, 8)]
    progress = silent()
    loop_probe(model, lambda index: batch_of(ids(2, 9, seed=index)), windows, 3, progress)
    again = [2, 3, 4, 5, 6, 7]
    assert ran == 3 * [0, 1, 2, 3, *again, 4, 5, 6, 7, 5, 6, 7]
    assert progress.done == len(ran) == 3 * layers_per_batch(8, windows)


def test_the_race_ends_when_one_window_is_left(ids: Any) -> None:
    model = tiny("llama", initializer_range=0.3)
    with torch.no_grad():
        for layer in model.model.layers[3:5]:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    model.lm_head.weight.data.copy_(torch.randn(97, 32))
    asked: list[int] = []

    def batches(index: int) -> dict[str, torch.Tensor]:
        asked.append(index)
        rows = ids(16, 24, seed=index)
        with torch.no_grad():  # what the model itself finds likely, so that any change is for the worse
            rows[:, 1:] = model(rows).logits.argmax(-1)[:, :-1]
        return {"input_ids": ids(16, 24, seed=index), "labels": rows}

    wrapped, windows = wrap_transformer_with_etd(model, None), candidate_windows(8, [2])
    _, costs = loop_probe(wrapped, batches, windows, 5)
    left = [cost for cost in costs if not cost.dropped]
    assert [(cost.start, cost.extra_loss, cost.standard_error) for cost in left] == [(3, 0.0, 0.0)]
    assert asked == [*range(left[0].n_rows // 16)]
    assert len(asked) < 5
    assert all(cost.extra_loss > 0 for cost in costs if cost.dropped)


def test_a_race_rarely_drops_the_cheapest_and_drops_what_costs_more(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    true_cost = {(0, 4): 0.2, (2, 4): 0.1, (4, 8): 0.2, (8, 12): 4.0, (10, 12): 0.2}
    cheapest = {(0, 4), (2, 4), (4, 8)}  # per layer

    def losses(_model: Any, _batch: Any, windows: Any, _progress: Any) -> Any:
        counts = torch.randint(50, 100, (4,), generator=generator).double()
        plain = counts * (2 + torch.randn(4, dtype=torch.float64, generator=generator))
        noise = {window: 0.05 * torch.randn(4, dtype=torch.float64, generator=generator) for window in windows}
        return plain, {window: plain + counts * (true_cost[window] + noise[window]) for window in windows}, counts

    monkeypatch.setattr("mull.evaluation.search.loop_probe.loop_losses", losses)
    model = wrap_transformer_with_etd(tiny("llama"), None)
    runs = [loop_probe(model, lambda _: {}, [*true_cost], 4)[1] for _ in range(200)]
    dropped = {window: sum(costs[number].dropped for costs in runs) for number, window in enumerate(true_cost)}
    assert dropped[8, 12] == 200
    assert all(costs[3].n_rows == 4 for costs in runs), "after the first batch"
    assert dropped[10, 12] > 150, "twice the cost per layer"
    assert max(dropped[window] for window in cheapest) < 30
    # Errors are over rows, whose noise is 0.05 here.
    errors = torch.tensor([costs[0].standard_error for costs in runs if not costs[0].dropped])
    assert errors.mean() == pytest.approx(0.05 / 16**0.5, rel=0.1)


def test_the_error_is_that_of_a_mean_over_rows_of_unequal_length() -> None:
    sums = torch.randn(3, 5, dtype=torch.float64)
    mean, error = mean_and_error(sums, torch.full((5,), 7.0, dtype=torch.float64))
    torch.testing.assert_close(mean, (sums / 7).mean(1))
    torch.testing.assert_close(error, (sums / 7).std(1) / 5**0.5)
    counts = torch.tensor([1.0, 30.0, 2.0, 8.0, 4.0], dtype=torch.float64)
    mean, error = mean_and_error(counts * 0.3, counts)
    assert mean.item() == pytest.approx(0.3)
    assert error.item() == pytest.approx(0, abs=1e-12)
    generator = torch.Generator().manual_seed(0)
    counts = torch.randint(1, 60, (4000, 40), generator=generator).double()
    rows = counts * torch.randn(4000, 40, generator=generator, dtype=torch.float64)
    found = [mean_and_error(*pair) for pair in zip(rows, counts, strict=True)]
    spread = float(torch.stack([mean for mean, _ in found]).std())
    assert float(torch.stack([error for _, error in found]).mean()) == pytest.approx(spread, rel=0.05)


def test_rows_without_a_target_do_not_count(ids: Any) -> None:
    model = wrap_transformer_with_etd(tiny("llama"), None)
    batch = batch_of(ids(3, 9))
    batch["labels"][1] = -100
    _, costs = loop_probe(model, lambda _: batch, [(2, 4)], 1)
    assert costs[0].n_rows == 2
    batch["labels"][:] = -100
    with pytest.raises(ValueError, match="hold no target"):
        loop_probe(model, lambda _: batch, [(0, 2)], 2)


def test_candidate_windows_cover_every_start_and_refuse_what_does_not_fit() -> None:
    assert candidate_windows(4, [3, 2]) == [(0, 2), (1, 3), (2, 4), (0, 3), (1, 4)]
    assert candidate_windows(8, [4], period=4) == [(0, 4), (4, 8)]
    with pytest.raises(ValueError, match="1 to 4 layers"):
        candidate_windows(4, [5])
    with pytest.raises(ValueError, match="multiple of 4"):
        candidate_windows(8, [3], period=4)
