"""Claim: mull and transformers decode the same weights in turns, and each call's time and tokens are its own."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny
from torch import Tensor

from mull import GatedAttentionConfig, MTPConfig, wrap_transformer_with_etd
from mull.evaluation.speed import Outcome, measure_in_turns, mull_variant, stock_variant
from mull.evaluation.stock import can_use_mtp, heads_loaded_once, load_stock, stock_model, write_stock

HEADS = MTPConfig(num_predict_tokens=2, mtp_head_type="sequential")


def prompts(*lengths: int) -> list[tuple[Tensor, Tensor]]:
    ids = [torch.arange(3, 3 + length)[None] for length in lengths]
    return [(row, torch.ones_like(row)) for row in ids]


@pytest.mark.parametrize("family_name", ["qwen3", "olmo3", pytest.param("qwen3_5", marks=pytest.mark.slow)])
def test_transformers_own_class_writes_the_same_text_and_drafts_with_the_same_heads(
    family_name: str, tmp_path: Path
) -> None:
    model = wrap_transformer_with_etd(tiny(family_name), None, HEADS).eval()
    stock = stock_model(model)
    assert stock.lm_head.weight is model.lm_head.weight
    write_stock(model, tmp_path)
    loaded = load_stock(tmp_path, torch.float32, "cpu")
    endless = {"eos_token_id": None}
    variants = {
        "mull": mull_variant(model, 6, {}),
        "2 drafts": mull_variant(model, 6, {"draft": "mtp", "draft_length": 2}),
        "transformers": stock_variant(stock, 6, endless),
        "loaded": stock_variant(loaded, 6, {**endless, **({"use_mtp": True} if can_use_mtp(model) else {})}),
    }
    kept: dict[int, Any] = {}
    with heads_loaded_once(kept):
        timings = measure_in_turns(variants, prompts(9, 5), 2, "test")
    assert can_use_mtp(model) == (family_name != "qwen3_5")
    assert bool(kept) == can_use_mtp(model), "transformers drafted"
    texts = {name: [outcome.rows for outcome in timing.outcomes[-1]] for name, timing in timings.items()}
    assert texts["2 drafts"] == texts["transformers"] == texts["loaded"] == texts["mull"]
    assert timings["2 drafts"].acceptance
    assert timings["2 drafts"].tokens_per_pass is not None
    assert timings["transformers"].tokens_per_pass is None


def test_times_and_tokens_belong_to_calls_and_each_prompt_begins_with_another_variant(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock, calls = [0.0], []
    monkeypatch.setattr("mull.evaluation.speed.time.perf_counter", lambda: clock[0])

    def variant(name: str, seconds: float, n_tokens: int) -> Any:
        def run(ids: Tensor, mask: Tensor) -> Outcome:
            calls.append(name)
            clock[0] += seconds * ids.shape[1]
            return Outcome([[7] * n_tokens for _ in ids])

        return run

    variants = {"a": variant("a", 1.0, 4), "b": variant("b", 0.5, 2), "c": variant("c", 2.0, 1)}
    timings = measure_in_turns(variants, prompts(2, 3), 2, "test")
    assert calls == ["a", "b", "c", "b", "c", "a"] * 3
    assert timings["a"].seconds == [[2.0, 3.0]] * 2
    assert timings["a"].tokens == [4, 4]
    assert timings["a"].per_second == [8 / 5] * 2
    assert timings["b"].per_second == [4 / 2.5] * 2
    assert len(timings["c"].outcomes) == 3, "the round that warmed up"


def test_gates_on_attention_have_no_class_in_transformers() -> None:
    gated = wrap_transformer_with_etd(tiny("qwen3"), None, gated_attention=GatedAttentionConfig())
    with pytest.raises(ValueError, match="transformers has no class for this model: it has gates on its attention"):
        stock_model(gated)
