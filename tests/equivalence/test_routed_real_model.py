"""Claim: everything that decides about layers and experts starts as the real model, has gradients on it, and survives saving."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import mull
from mull import ETDConfig, HaltingConfig, LayerRouterConfig, LoRAExpertConfig, TokenSkipConfig

TEXTS = ["The capital of France is Paris, and that of Peru is Lima.", "def add(x, y):\n    return x + y"]
EXPERTS = {"lora_expert": LoRAExpertConfig(rank=4, balance_rate=0.01), "expert_warmup_steps": 0}
PARTS: dict[str, dict[str, Any]] = {
    "routers of sequences": {"layer_router": LayerRouterConfig(scope="all"), "router_warmup_steps": 0},
    "routers of tokens and experts": {
        "layer_router": LayerRouterConfig(granularity="token"),
        "router_warmup_steps": 0,
        **EXPERTS,
    },
    "experts and stops": {"adaptive_depth": True, "halting": HaltingConfig(rule="state", threshold=0.98), **EXPERTS},
    "mixture of depths": {"token_skip": TokenSkipConfig(method="mod", capacity=0.5), "token_skip_warmup_steps": 2},
    "gate-skip": {"token_skip": TokenSkipConfig(method="gate-skip", capacity=0.7), "token_skip_warmup_steps": 2},
    "mixture of recursions": {
        "adaptive_depth": True,
        "halting": HaltingConfig(rule="router", stop="share_first"),
    },
}


@pytest.mark.real
@pytest.mark.parametrize("part", PARTS)
def test_parts_start_as_the_real_model_and_learn_on_it(part: str, real_model: str, tmp_path: Path) -> None:
    etd = ETDConfig(n_encoder_layers=12, n_think_layers=6, n_decoder_layers=12, max_think_iterations=2, **PARTS[part])
    tokenizer = AutoTokenizer.from_pretrained(real_model)
    model = mull.from_pretrained(real_model, etd)  # certifies identity
    base = AutoModelForCausalLM.from_pretrained(real_model)
    prompt = tokenizer(TEXTS[0], return_tensors="pt").input_ids
    options = {"max_new_tokens": 8, "think_iterations": 1}
    expected = base.generate(prompt, max_new_tokens=8, do_sample=False)
    assert torch.equal(model.generate(prompt, do_sample=False, **options), expected)
    assert torch.equal(mull.generate(model, prompt, **options).sequences, expected)

    assert model.etd is not None
    model.requires_grad_(False)
    model.etd.requires_grad_(True)
    model.train()
    optimizer = torch.optim.AdamW(model.etd.parameters(), lr=3e-3)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        batch = tokenizer(TEXTS, return_tensors="pt", padding=True)
        labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
        loss = model(**batch, labels=labels, use_cache=False).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert all(parameter.grad is not None for parameter in model.etd.parameters())
    if "experts" in part:  # the others pay for what they leave out
        assert losses[-1] < losses[0]

    model.eval()
    model.save_pretrained(tmp_path)
    found = model.generate(prompt, do_sample=False, max_new_tokens=8)
    for loaded in (mull.from_pretrained(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)):
        assert torch.equal(loaded(prompt, use_cache=False).logits, model(prompt, use_cache=False).logits)
        assert torch.equal(loaded.generate(prompt, do_sample=False, max_new_tokens=8), found)
        assert torch.equal(mull.generate(loaded, prompt, max_new_tokens=8).sequences, found)
