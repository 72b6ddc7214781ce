"""mull retrofits pretrained decoder language models: recursive depth, routing, multi-token heads, hybrid attention."""

from mull.cache import SlotCache
from mull.configs import ETDConfig, MTPConfig
from mull.generate import GenerateOutput, GenerationStats, generate
from mull.model import MullConfig, MullForCausalLM, MullOutput
from mull.native import export_native_heads
from mull.ops.sampling import Sampling
from mull.path import Path, Visit, from_actions, from_layers, recursion
from mull.presets import TransformerConfig
from mull.retrofit import certify_identity, from_pretrained, wrap_transformer_with_etd

__all__ = [
    "ETDConfig",
    "GenerateOutput",
    "GenerationStats",
    "MTPConfig",
    "MullConfig",
    "MullForCausalLM",
    "MullOutput",
    "Path",
    "Sampling",
    "SlotCache",
    "TransformerConfig",
    "Visit",
    "certify_identity",
    "export_native_heads",
    "from_actions",
    "from_layers",
    "from_pretrained",
    "generate",
    "recursion",
    "wrap_transformer_with_etd",
]
