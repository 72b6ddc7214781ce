"""Splits add up, scale to other depths as published, and say what is wrong in one sentence."""

from typing import Any

import pytest
from conftest import tiny
from pydantic import ValidationError
from transformers import LlamaConfig, Olmo3Config, Qwen3_5TextConfig, Qwen3NextConfig

from mull import ETDConfig, MTPConfig, TransformerConfig, wrap_transformer_with_etd
from mull.layers.experts import LoRABranches


@pytest.mark.parametrize(
    ("depth", "expected"),
    [(16, (7, 4, 5)), (32, (14, 8, 10)), (36, (16, 9, 11)), (28, (12, 7, 9)), (4, (2, 1, 1)), (1, (0, 1, 0))],
)
def test_the_published_split_scales_with_depth(depth: int, expected: tuple[int, int, int]) -> None:
    etd = ETDConfig.for_model(LlamaConfig(num_hidden_layers=depth))
    assert (etd.n_encoder_layers, etd.n_think_layers, etd.n_decoder_layers) == expected


def test_quarters_are_25_50_25() -> None:
    etd = ETDConfig.for_model(LlamaConfig(num_hidden_layers=32), "quarters", max_think_iterations=3)
    assert (etd.n_encoder_layers, etd.n_think_layers, etd.n_decoder_layers, etd.max_think_iterations) == (8, 16, 8, 3)


@pytest.mark.parametrize("config", [Qwen3NextConfig(num_hidden_layers=48), Qwen3_5TextConfig(num_hidden_layers=24)])
def test_a_hybrid_keeps_its_attention_period_whole(config: Qwen3NextConfig) -> None:
    etd = ETDConfig.for_model(config)
    block = config.layer_types[etd.n_encoder_layers : etd.n_encoder_layers + etd.n_think_layers]
    assert block == ["linear_attention"] * 3 + ["full_attention"] + block[4:]
    assert len(block) % 4 == 0
    assert etd.n_layers == config.num_hidden_layers


def test_sliding_windows_are_no_period_to_keep() -> None:
    etd = ETDConfig.for_model(Olmo3Config())
    assert (etd.n_encoder_layers, etd.n_think_layers, etd.n_decoder_layers) == (14, 8, 10)


def test_a_split_that_does_not_add_up_names_the_depth_and_proposes_one() -> None:
    with pytest.raises(ValueError, match=r"The split 7\+4\+5 covers 16 layers, but the model has 8. .* is 4\+2\+2"):
        wrap_transformer_with_etd(tiny("qwen3"), ETDConfig(n_encoder_layers=7, n_think_layers=4, n_decoder_layers=5))


@pytest.mark.parametrize(
    "fields",
    [
        {"n_encoder_layers": -1, "n_think_layers": 4, "n_decoder_layers": 5},
        {"n_encoder_layers": 7, "n_think_layers": 0, "n_decoder_layers": 9},
        {"n_encoder_layers": 7, "n_think_layers": 4, "n_decoder_layers": 5, "max_think_iterations": 0},
        {"n_encoder_layers": 7, "n_think_layers": 4, "n_decoder_layers": 5, "max_think_iteratons": 9},
        {"n_encoder_layers": 7, "n_think_layers": 4},
    ],
    ids=["negative", "no-block", "no-iteration", "misspelt", "missing"],
)
def test_impossible_and_misspelt_fields_are_refused(fields: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="ETDConfig|MTPConfig"):
        ETDConfig(**fields)


def test_an_unknown_split_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="split='halves' is not known. Choose one of published, quarters"):
        ETDConfig.for_model(LlamaConfig(), "halves")  # type: ignore[arg-type]


def test_presets_build_the_model_they_name() -> None:
    """The names of the source documents, which shipped a model without a loop under the second one."""
    plain = TransformerConfig.olmo3_7B(vocab_size=100278).build("meta")
    assert len(plain.model.layers) == 32
    assert plain.etd_config is None
    off = {"adaptive_depth": False, "use_layer_router": False, "use_lora_experts": False}
    looped = TransformerConfig.olmo3_7B_etd(vocab_size=100278, max_think_iterations=3, **off).build("meta")
    assert len(looped.path()) == 14 + 3 * 8 + 10
    assert sum(parameter.numel() for parameter in looped.parameters()) == sum(p.numel() for p in plain.parameters())
    other = TransformerConfig.olmo3_7B_etd(n_encoder_layers=8, n_think_layers=16, n_decoder_layers=8, **off)
    assert len(other.build("meta").path(2)) == 8 + 2 * 16 + 8


@pytest.mark.parametrize(
    ("options", "iterations", "threshold", "experts", "rank"),
    [
        ({}, 5, 0.9, 4, 16),
        # The settings that the source documents call efficiency and performance.
        ({"max_think_iterations": 3, "confidence_threshold": 0.8, "num_lora_experts": 2, "lora_rank": 8}, 3, 0.8, 2, 8),
        (
            {"max_think_iterations": 8, "confidence_threshold": 0.95, "num_lora_experts": 8, "lora_rank": 32},
            8,
            0.95,
            8,
            32,
        ),
    ],
)
def test_the_preset_with_everything_has_everything(
    options: dict[str, Any], iterations: int, threshold: float, experts: int, rank: int
) -> None:
    preset = TransformerConfig.olmo3_7B_etd(vocab_size=100278, adaptive_depth=True, lora_alpha=48.0, **options)
    model = preset.build("meta")
    etd, parts = model.etd_config, model.etd
    assert etd is not None
    assert parts is not None
    assert parts.experts is not None
    assert parts.layer_routers is not None
    assert model.iterations(None) == iterations
    rule = etd.halting_of(None)
    assert rule is not None
    assert (rule.rule, rule.threshold) == ("confidence", threshold)
    assert len(parts.layer_routers.by_layer) == 8
    shapes = [tuple(branches.lora_B.shape) for branches in parts.modules() if isinstance(branches, LoRABranches)]
    assert shapes == 4 * 8 * [(experts, 4096, rank)]
    assert all(branches.scale == 48.0 / rank for branches in parts.modules() if isinstance(branches, LoRABranches))
    gate, maps = experts * 4096, 4 * 8 * experts * rank * 2 * 4096
    assert sum(parameter.numel() for parameter in parts.experts.parameters()) == gate + maps


def test_presets_refuse_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"covers 16 layers, but the model has 32. .* 14\+8\+10"):
        TransformerConfig.olmo3_7B_etd(n_encoder_layers=7, n_think_layers=4, n_decoder_layers=5)
    with pytest.raises(ValueError, match="Give all of n_encoder_layers"):
        TransformerConfig.olmo3_7B_etd(n_encoder_layers=7)


def test_the_weights_of_heads_halve_and_sum_to_the_weight_of_all() -> None:
    assert MTPConfig(mtp_loss_weight=1).head_weights == pytest.approx((1, 0.53333, 0.26667, 0.13333, 0.06667), abs=1e-5)
    assert sum(MTPConfig().head_weights[1:]) == pytest.approx(0.3)
    assert MTPConfig(num_predict_tokens=1).head_weights == pytest.approx((1, 0.3))


def test_weights_without_decay_are_equal() -> None:
    assert MTPConfig(loss_weight_decay=1, mtp_loss_weight=0.4).head_weights == pytest.approx((1, 0.1, 0.1, 0.1, 0.1))


@pytest.mark.parametrize(
    "fields",
    [
        {"num_predict_tokens": 0},
        {"mtp_head_type": "medusa"},
        {"loss_weight_decay": 0},
        {"loss_weight_decay": 1.5},
        {"mtp_loss_weight": -0.1},
        {"num_heads": 4},
        {"speculation_lookahead": -1},
        {"mtp_head_type": "native", "native_hidden_state": "last"},
    ],
    ids=[
        "no-head",
        "unknown-type",
        "no-weight",
        "growing",
        "negative",
        "misspelt",
        "drafts-less-than-none",
        "unknown-state",
    ],
)
def test_impossible_heads_are_refused(fields: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="ETDConfig|MTPConfig"):
        MTPConfig(**fields)


@pytest.mark.parametrize("kind", ["transformer", "mlp", "shared_lm_head"])
def test_parallel_heads_cannot_share_weights(kind: str) -> None:
    """They would all predict the same token."""
    with pytest.raises(ValidationError, match="share_weights_across_steps needs mtp_head_type='sequential', not"):
        MTPConfig(mtp_head_type=kind, share_weights_across_steps=True)
    assert MTPConfig(mtp_head_type="sequential", share_weights_across_steps=True).share_weights_across_steps


@pytest.mark.parametrize("kind", ["transformer", "mlp", "shared_lm_head", "sequential"])
def test_only_native_heads_read_the_stream(kind: str) -> None:
    with pytest.raises(
        ValidationError, match=f"native_hidden_state='stream' needs mtp_head_type='native', not '{kind}'"
    ):
        MTPConfig(mtp_head_type=kind, native_hidden_state="stream")
    assert MTPConfig(mtp_head_type=kind, native_hidden_state="normed").native_hidden_state == "normed"
    assert MTPConfig(mtp_head_type="native", native_hidden_state="stream").recursive


def test_one_module_for_all_steps_is_recursive() -> None:
    assert MTPConfig(mtp_head_type="native").recursive
    assert MTPConfig(mtp_head_type="native", share_weights_across_steps=True).recursive
    assert MTPConfig(mtp_head_type="sequential", share_weights_across_steps=True).recursive
    assert not MTPConfig(mtp_head_type="sequential").recursive
    assert not MTPConfig(mtp_head_type="transformer").recursive


def test_heads_with_a_layer_need_a_pattern_with_full_attention() -> None:
    base = tiny("olmo3", layer_types=["sliding_attention"] * 8)
    with pytest.raises(ValueError, match="No layer of this model has full attention, .*: use mlp or shared_lm_head"):
        wrap_transformer_with_etd(base, None, MTPConfig(mtp_head_type="transformer"))
    assert wrap_transformer_with_etd(base, None, MTPConfig(mtp_head_type="mlp")).mtp_heads is not None
