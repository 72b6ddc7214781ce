"""Claim: a converted model thinks, routes, drafts and decodes as every other family does, in one call or in many.

Converted models are Qwen3.5 in format, but not in sizes: as many key heads as value heads, full rotary embeddings.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import EXACT
from torch import Tensor, nn
from transformers import PreTrainedModel

from mull import (
    CrossArchTransferConfig,
    ETDConfig,
    HaltingConfig,
    HybridAttentionConfig,
    LayerRouterConfig,
    LoRAExpertConfig,
    MTPConfig,
    MullForCausalLM,
    create_full_hybrid_model,
    create_hybrid_from_qwen3,
)
from mull.model.configs import split_for

Exact = Callable[..., PreTrainedModel]
Ids = Callable[..., Tensor]

ROWS, TOKENS = 3, 12


def deciding(decides: str | None) -> ETDConfig:
    changes: dict[str, Any] = {}
    if decides in ("last_kv", "own_state"):
        changes = {"adaptive_depth": True, "halting": HaltingConfig(threshold=0.97, stop=decides)}
    if decides == "routers":
        changes = {"layer_router": LayerRouterConfig(hidden_size=8, granularity="token"), "router_warmup_steps": 0}
        changes |= {"lora_expert": LoRAExpertConfig(rank=2), "expert_warmup_steps": 0}
    return ETDConfig(n_encoder_layers=0, n_think_layers=4, n_decoder_layers=4, max_think_iterations=2, **changes)


def randomised(model: MullForCausalLM) -> MullForCausalLM:
    """Heads, routers and experts that do something, and gates of DeltaNet layers that let something through."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if name.startswith(("mtp", "model.etd.")) and "router" not in name:
            nn.init.normal_(parameter, std=0.2, generator=generator)
        elif "layer_routers" in name:
            nn.init.normal_(parameter, generator=generator)
        elif "in_proj_z" in name:
            parameter.data *= 20
    return model


@pytest.mark.parametrize("decides", [None, "last_kv", "own_state", "routers"])
@pytest.mark.parametrize("heads", ["native", "transformer", "sequential"])
@pytest.mark.latin(12, "decides", "heads")
@torch.no_grad()
def test_calls_agree_however_tokens_are_divided(decides: str | None, heads: Any, exact: Exact, ids: Ids) -> None:
    mtp = MTPConfig(mtp_head_type=heads, num_predict_tokens=3)
    model = create_full_hybrid_model(exact("qwen3"), etd_config=deciding(decides), mtp_config=mtp)
    model, tokens = randomised(model), ids(ROWS, TOKENS)
    whole = model(tokens, use_cache=False).logits
    for lengths in ([5] + [1] * 7, [4, 1, 7]):
        cache = model.new_cache()
        parts = [model(part, past_key_values=cache, use_cache=True).logits for part in tokens.split(lengths, 1)]
        torch.testing.assert_close(torch.cat(parts, 1), whole, atol=EXACT, rtol=0)
    padded = torch.cat([ids(ROWS, 3, seed=7), tokens], 1)
    mask = (torch.arange(TOKENS + 3) >= 3).long().expand(ROWS, -1)
    found = model(padded, attention_mask=mask, use_cache=False).logits[:, 3:]
    torch.testing.assert_close(found, whole, atol=10 * EXACT, rtol=0)  # rotary embeddings are computed in fp32
    positions = torch.cat([torch.arange(3), torch.arange(TOKENS)]).expand(ROWS, -1)
    packed = model(padded, position_ids=positions, use_cache=False).logits[:, 3:]
    torch.testing.assert_close(packed, whole, atol=EXACT, rtol=0)
    for wrong in (1, 3):  # rejected drafts leave nothing behind
        cache = model.new_cache()
        cache.activate_past_recording()
        model(tokens[:, :6], past_key_values=cache)
        model(ids(ROWS, wrong, seed=9), past_key_values=cache)
        cache.crop(-wrong)
        torch.testing.assert_close(model(tokens[:, 6:], past_key_values=cache).logits, whole[:, 6:], atol=EXACT, rtol=0)
    text = model.generate(tokens, do_sample=False, max_new_tokens=8, eos_token_id=None)
    assert torch.equal(model.mtp_decoder.generate(tokens, max_new_tokens=8, eos_token_id=()), text)
    drafted, stats = model.generate(tokens, max_new_tokens=8, use_speculative=True, draft_length=2, eos_token_id=())
    assert torch.equal(drafted, text)
    assert stats["drafted"][0] > 0
    assert torch.equal(model.generate(tokens, max_new_tokens=8, use_speculative=False, eos_token_id=())[0], text)


def test_a_full_hybrid_is_the_conversion_with_a_think_block_and_heads(exact: Exact, ids: Ids) -> None:
    source, tokens = exact("qwen3-tied"), ids(ROWS, TOKENS)
    plain, model = create_hybrid_from_qwen3(source), create_full_hybrid_model(source)
    etd, mtp = model.etd_config, model.mtp_config
    assert etd is not None
    assert mtp is not None
    assert (etd.n_encoder_layers, etd.n_think_layers, etd.n_decoder_layers) == (2, 4, 2)
    assert (mtp.mtp_head_type, mtp.num_predict_tokens) == ("native", 4)
    assert torch.equal(model(tokens, think_iterations=1).logits, plain(tokens).logits)
    out = model.train()(tokens, labels=tokens, think_iterations=1)
    assert out["loss"] is out.loss
    expected = plain(tokens, labels=tokens).loss
    torch.testing.assert_close(out.loss, expected + out.mtp_loss)
    torch.testing.assert_close(
        out.mtp_loss, sum(w * out.mtp_step_losses[f"mtp_{k}"] for k, w in enumerate(mtp.head_weights[1:], 1))
    )
    model.gradient_checkpointing_enable()
    model(tokens, labels=tokens).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert create_full_hybrid_model(source, use_etd=False, use_mtp=False).num_parameters() == plain.num_parameters()
    attention = CrossArchTransferConfig(hybrid_attention=HybridAttentionConfig(deltanet_layer_pattern=()))
    same = create_full_hybrid_model(source, use_etd=False, config=attention, device="cpu", dtype=torch.float32)
    assert (same.etd_config, same.mtp_config) == (None, mtp)
    torch.testing.assert_close(same(tokens).logits, source.float()(tokens).logits)
    with pytest.raises(ValueError, match="mtp_config is given, and use_mtp=False"):
        create_full_hybrid_model(source, use_mtp=False, mtp_config=MTPConfig())


SPLITS = {8: (2, 4, 2), 12: (4, 4, 4), 16: (4, 8, 4), 28: (8, 16, 4), 30: (8, 16, 6), 36: (8, 20, 8), 40: (8, 20, 12)}


def test_think_blocks_are_whole_periods_of_attention_between_other_layers() -> None:
    for depth in range(1, 65):
        kinds = ["linear_attention" if (layer + 1) % 4 else "full_attention" for layer in range(depth)]
        for split in ("quarters", "published"):
            parts = split_for(depth, kinds, split)
            assert sum(parts) == depth
            assert min(parts) >= int(depth >= 6)
            assert parts[1] % 4 == 0 or depth < 4
            assert parts[0] % 4 == 0 or depth < 12
        assert split_for(depth, kinds, "quarters") == SPLITS.get(depth, split_for(depth, kinds, "quarters"))


def test_too_few_layers_for_a_think_block_are_refused_in_one_sentence(exact: Exact) -> None:
    source = exact("qwen3", num_hidden_layers=4)
    with pytest.raises(ValueError, match=r"The 4 layers are too few .*: give etd_config, or use_etd=False\.$"):
        create_full_hybrid_model(source, use_mtp=False)
    assert create_full_hybrid_model(source, use_etd=False, use_mtp=False).etd is None
