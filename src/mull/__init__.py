"""mull retrofits pretrained decoder language models: recursive depth, multi-token heads, hybrid attention, weighted training."""

from mull.decoding.generate import GenerateOutput, GenerationStats, generate
from mull.decoding.mtp_decoder import MTPDecoder
from mull.model.base_model import MullModel
from mull.model.causal_lm import MullForCausalLM, MullOutput
from mull.model.configs import (
    ETDConfig,
    GatedAttentionConfig,
    HaltingConfig,
    LayerRouterConfig,
    LoRAExpertConfig,
    MTPConfig,
    TokenSkipConfig,
)
from mull.model.configuration import MullConfig
from mull.model.growing_cache import SlotCache
from mull.model.path import Path, Visit, from_actions, from_layers, recursion
from mull.model.policy import GivenTokens, Policy
from mull.ops.sampling import Sampling
from mull.retrofit.convert import convert_checkpoint, create_hybrid_from_qwen3
from mull.retrofit.expert_adapters import export_expert, load_expert
from mull.retrofit.full_hybrid import create_full_hybrid_model
from mull.retrofit.hybrid import CrossArchTransferConfig, HybridAttentionConfig
from mull.retrofit.native_heads import export_native_heads
from mull.retrofit.presets import TransformerConfig
from mull.retrofit.qwen3_next import (
    create_qwen3_next_efficient,
    create_qwen3_next_model,
    create_qwen3_next_performance,
)
from mull.retrofit.wrap import certify_identity, from_pretrained, wrap_transformer_with_etd

__all__ = [
    "CrossArchTransferConfig",
    "ETDConfig",
    "GatedAttentionConfig",
    "GenerateOutput",
    "GenerationStats",
    "GivenTokens",
    "HaltingConfig",
    "HybridAttentionConfig",
    "LayerRouterConfig",
    "LoRAExpertConfig",
    "MTPConfig",
    "MTPDecoder",
    "MullConfig",
    "MullForCausalLM",
    "MullModel",
    "MullOutput",
    "Path",
    "Policy",
    "Sampling",
    "SlotCache",
    "TokenSkipConfig",
    "TransformerConfig",
    "Visit",
    "certify_identity",
    "convert_checkpoint",
    "create_full_hybrid_model",
    "create_hybrid_from_qwen3",
    "create_qwen3_next_efficient",
    "create_qwen3_next_model",
    "create_qwen3_next_performance",
    "export_expert",
    "export_native_heads",
    "from_actions",
    "from_layers",
    "from_pretrained",
    "generate",
    "load_expert",
    "recursion",
    "wrap_transformer_with_etd",
]
