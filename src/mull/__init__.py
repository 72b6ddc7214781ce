"""mull retrofits pretrained decoder language models: recursive depth, routing, multi-token heads, hybrid attention."""

from mull.cache import SlotCache
from mull.configs import ETDConfig, MTPConfig
from mull.model import MullConfig, MullForCausalLM, MullOutput
from mull.path import Path, Visit, from_actions, from_layers, recursion
from mull.presets import TransformerConfig
from mull.retrofit import certify_identity, from_pretrained, wrap_transformer_with_etd

__all__ = [
    "ETDConfig",
    "MTPConfig",
    "MullConfig",
    "MullForCausalLM",
    "MullOutput",
    "Path",
    "SlotCache",
    "TransformerConfig",
    "Visit",
    "certify_identity",
    "from_actions",
    "from_layers",
    "from_pretrained",
    "recursion",
    "wrap_transformer_with_etd",
]
