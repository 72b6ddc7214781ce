"""Claim: the presets of the source documents build what they name, and every term that they promise reaches the loss."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import VOCAB, tiny
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen3NextConfig

import mull
from mull import (
    ETDConfig,
    GatedAttentionConfig,
    MTPConfig,
    MullForCausalLM,
    TransformerConfig,
    wrap_transformer_with_etd,
)
from mull.retrofit.qwen3_next import (
    NEVER_RELEASED,
    create_qwen3_next_efficient,
    create_qwen3_next_model,
    create_qwen3_next_performance,
    next_etd,
    qwen3_next_80B_A3B,
)
from mull.training.objectives.iterations import IterationSampling
from mull.training.objectives.next_token import NextToken
from mull.training.step import DistributedConfig, make_stage

NATIVE = MTPConfig(num_predict_tokens=1, mtp_head_type="native")


def shrunk(preset: TransformerConfig, **changes: Any) -> TransformerConfig:
    """The same preset of width 32."""
    small = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = preset.base.to_dict() | small | {"eos_token_id": 2, "pad_token_id": 0} | changes
    return dataclasses.replace(preset, base=type(preset.base)(**config))


def tokens(rows: int = 2, length: int = 9) -> Tensor:
    return torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(0))


def test_the_gated_preset_gates_three_layers_of_four() -> None:
    plain = TransformerConfig.olmo3_7B().build("meta")
    for granularity, gates in (("head", 32), ("element", 4096)):
        model = TransformerConfig.olmo3_7B_hybrid_gated(granularity=granularity).build("meta")  # type: ignore[arg-type]
        assert model.num_parameters() - plain.num_parameters() == 24 * gates * 4096
        ungated = {number for number, kind in enumerate(model.kinds) if str(number) not in model.model.attention_gates}
        assert ungated == set(range(3, 32, 4))
        assert {model.kinds[number] for number in ungated} == {"full_attention"}, "those without a window"
    other = TransformerConfig.olmo3_7B_hybrid_gated(hybrid_period=2).gated_attention
    assert other == GatedAttentionConfig(layers=tuple(range(0, 32, 2)))
    for period in (1, 33):
        with pytest.raises(ValueError, match="hybrid_period"):
            TransformerConfig.olmo3_7B_hybrid_gated(hybrid_period=period)
    small = shrunk(TransformerConfig.olmo3_7B_hybrid_gated(VOCAB), num_hidden_layers=4, layer_types=None)
    model = dataclasses.replace(small, gated_attention=GatedAttentionConfig(layers=(0, 1, 2))).build().train()
    out = model(tokens(), labels=tokens())
    out.loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert model.eval().generate(tokens(), max_new_tokens=3, do_sample=False).shape == (2, 12)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_the_preset_with_experts_has_them_in_every_second_layer() -> None:
    model = TransformerConfig.olmo3_7B_hybrid_moe().build("meta")
    assert 23.2e9 < model.num_parameters() < 23.3e9
    sparse = [hasattr(layer.mlp, "experts") for layer in model.model.layers]
    assert sparse == [False, True] * 16
    block: Any = model.model.layers[1].mlp
    assert block.experts.gate_up_proj.shape == (64, 2 * 1376, 4096)
    assert block.shared_expert.up_proj.weight.shape == (1376, 4096)
    assert block.gate.top_k == 8
    without = TransformerConfig.olmo3_7B_hybrid_moe(shared_expert=False).build("meta")
    assert without.num_parameters() == model.num_parameters() - 16 * 3 * 1376 * 4096
    for options in ({"top_k": 65}, {"num_experts": 0}, {"hybrid_period": 0}, {"z_loss_weight": -1.0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            TransformerConfig.olmo3_7B_hybrid_moe(**options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="capacity_factor=1.25 would drop tokens"):
        TransformerConfig.olmo3_7B_hybrid_moe(capacity_factor=1.25)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("shared", [True, False])
def test_both_losses_of_routers_are_in_the_loss(shared: bool, tmp_path: Path) -> None:
    preset = TransformerConfig.olmo3_7B_hybrid_moe(
        VOCAB, num_experts=4, top_k=2, shared_expert=shared, lb_loss_weight=0.3, z_loss_weight=0.2
    )
    sizes = {"num_hidden_layers": 4, "layer_types": ["full_attention"] * 4, "head_dim": 8, "moe_intermediate_size": 8}
    model = shrunk(preset, **sizes, shared_expert_intermediate_size=8 * shared).build().train()
    mask = torch.ones_like(tokens())
    mask[1, :4] = 0
    labels = tokens().where(mask.cumsum(1) > 1, -100)
    out = model(tokens(), attention_mask=mask, labels=labels)
    logits: list[Tensor] = []
    for layer in (1, 3):
        gate: Any = model.model.layers[layer].mlp.gate
        gate.register_forward_hook(lambda _m, args, _o, gate=gate: logits.append(args[0] @ gate.weight.T))
    plain = model(tokens(), attention_mask=mask, labels=labels, output_router_logits=False).loss
    squares = [torch.logsumexp(each[mask.flatten() == 1], -1).square().mean() for each in logits]
    torch.testing.assert_close(out.router_z_loss, sum(squares) / 2)
    torch.testing.assert_close(out.loss, plain + 0.3 * out.aux_loss + 0.2 * out.router_z_loss)
    stage = make_stage(model, NextToken(IterationSampling(maximum=1)), DistributedConfig())
    found = stage(stage.plan_step([{"input_ids": tokens(), "labels": labels, "attention_mask": mask}]), 0)
    torch.testing.assert_close(found.sum / found.weight, out.loss)
    assert {"balancing_loss", "router_z_loss"} <= found.metrics.keys()
    out.loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.numel())
    model.eval().save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.router_z_loss_coef == 0.2
    assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)
    assert model.generate(tokens(), max_new_tokens=3, do_sample=False).shape == (2, 12)


def test_qwen3_next_has_the_sizes_of_the_release_and_the_settings_of_the_documents() -> None:
    model = qwen3_next_80B_A3B().build("meta")
    etd, mtp = model.etd_config, model.mtp_config
    assert etd is not None
    assert mtp is not None
    assert (etd.n_encoder_layers, etd.n_think_layers, etd.n_decoder_layers) == (12, 24, 12)
    assert (etd.max_think_iterations, etd.adaptive_depth, etd.confidence_threshold) == (3, True, 0.85)
    assert etd.router is not None
    assert etd.experts is not None
    assert (etd.router.hidden_size, etd.n_experts, etd.experts.rank, etd.experts.alpha) == (256, 4, 32, 64.0)
    assert (mtp.num_predict_tokens, mtp.mtp_head_type, mtp.head_weights[1:]) == (4, "native", (0.16, 0.08, 0.04, 0.02))
    plain = qwen3_next_80B_A3B(use_etd=False, use_mtp=False).build("meta")
    assert plain.num_parameters() == 79_674_391_296
    with pytest.raises(ValueError, match="was never released: the models are Qwen/Qwen3-Next-80B-A3B-Instruct"):
        create_qwen3_next_model(NEVER_RELEASED)
    assert model.etd is not None
    assert model.etd.experts is not None
    assert next_etd(Qwen3NextConfig(num_hidden_layers=8)).n_think_layers == 4


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny Qwen3-Next whose native heads are in the checkpoint, as in the release."""
    folder = tmp_path_factory.mktemp("next")
    base = tiny("qwen3_next-moe", num_hidden_layers=4)
    model = wrap_transformer_with_etd(base, None, NATIVE)
    base.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    mull.export_native_heads(model, folder)
    if not any(name.startswith("mtp.") for name in weights):
        heads = {f"mtp.{name}": value.contiguous() for name, value in model.mtp_heads.state_dict().items()}
        save_file(weights | heads, folder / "model.safetensors", {"format": "pt"})
    return str(folder)


FP32 = {"dtype": "float32"}


def test_what_is_created_runs_learns_and_writes(checkpoint: str) -> None:
    model = create_qwen3_next_model(checkpoint, gradient_checkpointing=False, **FP32)
    model.etd.experts.warmup_steps = model.etd.layer_routers.warmup_steps = 0
    assert model.dtype == torch.float32
    assert create_qwen3_next_model(checkpoint, use_etd=False).dtype == torch.bfloat16
    model.train()
    out = model(tokens(), labels=tokens())
    out.loss.backward()
    metrics = model.get_metrics()
    assert metrics["mtp_loss"] == pytest.approx(float(out.mtp_loss.detach()))
    assert metrics["etd"].keys() >= {"think_iterations", "early_exit", "router_actions", "expert_selections"}
    model.eval()
    model(tokens())
    assert model.get_metrics().keys() == {"etd"}, "of the latest call, which has no labels"
    tokens_, stats = model.generate(tokens(), max_new_tokens=4, use_speculative=True, eos_token_id=())
    assert stats["new_tokens"] == stats.new_tokens == 8
    assert stats.rounds
    plain, without = model.generate(tokens(), max_new_tokens=4, use_speculative=False, eos_token_id=())
    named = {"input_ids": tokens(), "attention_mask": torch.ones_like(tokens())}  # as a tokenizer gives them
    assert torch.equal(model.generate(**named, max_new_tokens=4, use_speculative=True, eos_token_id=())[0], tokens_)
    with pytest.raises(TypeError, match="num_beams is no option of mull.generate"):
        model.generate(tokens(), use_speculative=True, num_beams=2)
    assert torch.equal(tokens_, plain)
    assert without["drafted"] == []
    assert torch.equal(model.mtp_decoder.generate(tokens(), max_new_tokens=4, eos_token_id=()), plain)
    assert torch.equal(model.generate(tokens(), max_new_tokens=4, do_sample=False, eos_token_id=None), plain)


def test_the_efficient_model_trains_what_was_added_and_nothing_else(checkpoint: str) -> None:
    model = create_qwen3_next_efficient(checkpoint, **FP32).train()
    assert (model.etd_config.max_think_iterations, model.mtp_config.num_predict_tokens) == (2, 3)
    base = AutoModelForCausalLM.from_pretrained(checkpoint)
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert names == {name for name, _ in model.named_parameters()} - set(dict(base.named_parameters()))
    assert {name.split(".")[0] for name in names} == {"model", "mtp"}
    assert all(name.startswith(("mtp.", "model.etd.")) for name in names)
    before = {name: value.clone() for name, value in model.state_dict().items() if name in base.state_dict()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.5)
    for step in range(3):
        optimizer.zero_grad()
        model(tokens(4, 12), labels=tokens(4, 12)).loss.backward()
        missing = [name for name, parameter in model.named_parameters() if name in names and parameter.grad is None]
        assert not missing, (step, missing)
        optimizer.step()
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert sum(parameter.numel() for parameter in trained) == sum(model.get_parameter(name).numel() for name in names)


def test_a_tied_unembedding_stays_frozen(checkpoint: str) -> None:
    model = wrap_transformer_with_etd(tiny("qwen3-tied"), ETDConfig.for_model(tiny("qwen3").config), MTPConfig())
    model.freeze_backbone()
    assert not model.lm_head.weight.requires_grad
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert names
    assert all(name.startswith("mtp_heads.") for name in names)


def test_the_performance_model_trains_everything(checkpoint: str) -> None:
    model = create_qwen3_next_performance(checkpoint, **FP32)
    assert (model.etd_config.max_think_iterations, model.etd_config.n_experts) == (5, 8)
    assert model.mtp_config.num_predict_tokens == 4
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.is_gradient_checkpointing
    assert not create_qwen3_next_performance(checkpoint, gradient_checkpointing=False).is_gradient_checkpointing


def test_what_cannot_be_created_is_refused(checkpoint: str, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="max_think_iteratons"):
        create_qwen3_next_model(checkpoint, max_think_iteratons=9)
    with pytest.raises(ValueError, match="etd_config is given, and use_etd=False"):
        create_qwen3_next_model(checkpoint, use_etd=False, etd_config=next_etd(Qwen3NextConfig()))
    tiny("qwen3").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="architecture 'qwen3' and not Qwen3-Next"):
        create_qwen3_next_efficient(str(tmp_path))
    loaded: MullForCausalLM = mull.from_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match="has no extra heads|mtp="):
        loaded.generate(tokens(), max_new_tokens=2, use_speculative=True)
