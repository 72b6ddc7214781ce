"""The architecture that a recipe writes down: every field known, every value possible, and a model that runs."""

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from mull.model.causal_lm import MullForCausalLM
from mull.model.configuration import MullConfig
from mull.model.families import FAMILIES
from mull.model.path import MAX_LAYERS
from mull.runtime.arguments import nearest

ALIASES = {"rope_theta", "rope_scaling"}
"""Older names of parts of ``rope_parameters``, which transformers reads."""

TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
POSITIVE = {
    "head_dim",
    "hidden_size",
    "intermediate_size",
    "max_position_embeddings",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "rms_norm_eps",
    "rope_theta",
    "vocab_size",
}
LARGEST = {"num_hidden_layers": MAX_LAYERS, "num_experts": 10_000}
MAX_SIZE = 100_000_000
"""Larger numbers are slips of the pen, in any field."""

KINDS = ("full_attention", "sliding_attention", "linear_attention")

_FAILURES = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    NameError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What transformers and torch raise for values that do not fit each other."""


def make_config(fields: Mapping[str, Any]) -> PreTrainedConfig:
    """The configuration of transformers with these fields; ``model_type`` names its class.

    Raises:
        ValueError: an unsupported architecture, a field that the class does not have (names the nearest one), or a value of
            another type or outside its limits.
    """
    kind = fields.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise ValueError(f"architecture.model_type={kind!r} is not supported; supported are {known}")
    make = CONFIG_MAPPING[kind]
    known_fields = {field.name for field in dataclasses.fields(make)} - {
        field.name for field in dataclasses.fields(PreTrainedConfig)
    }
    for name in fields.keys() - known_fields - ALIASES - {"model_type"}:
        raise ValueError(f"unknown key architecture.{name}. {nearest(str(name), sorted(known_fields))}")
    for place, value in _numbers("architecture", fields):
        _check_number(place, value)
    for name in TOKENS:
        token, size = fields.get(name), fields.get("vocab_size")
        if isinstance(token, int) and isinstance(size, int) and token >= size:
            raise ValueError(f"architecture.{name}={token} is outside the vocabulary of {size} tokens")
    values = {name: value for name, value in fields.items() if name != "model_type"}
    with _named("architecture"):
        config: PreTrainedConfig = make(**values)
    return config


def _numbers(place: str, value: Any) -> Iterator[tuple[str, float]]:
    """Every number, at any depth, and where it is."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _numbers(f"{place}.{name}", inner)
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from _numbers(f"{place}.{index}", inner)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield place, value


def _check_number(place: str, value: float) -> None:
    name = place.rsplit(".", 1)[-1]
    least = 1 if isinstance(value, int) and name in POSITIVE else -1 if name in TOKENS else 0
    most = LARGEST.get(name, MAX_SIZE)
    if not math.isfinite(value) or not least <= value <= most or (name in POSITIVE and value <= 0):
        raise ValueError(f"{place}={value} must be a number from {least} to {most:,}")
    if name.endswith("dropout") and value >= 1:
        raise ValueError(f"{place}={value} must be below 1")


@contextlib.contextmanager
def _named(place: str) -> Iterator[None]:
    """Turn what transformers raises for a value into one sentence."""
    try:
        yield
    except StrictDataclassError as error:
        cause = error.__cause__ or error
        raise ValueError(f"{place}: {' '.join(str(cause).split())}") from None
    except _FAILURES as error:
        raise ValueError(
            f"{place} makes no model that runs: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        ) from None


def try_config(config: PreTrainedConfig) -> None:
    """Run three tokens through a model of this configuration that has shapes, but no weights.

    Raises:
        ValueError: sizes that do not fit each other.
    """
    with _named("architecture"), torch.device("meta"), torch.no_grad():
        # In bf16, because the kernels of routed experts refuse fp32 without real weights. Masks are given, because making them
        # reads values.
        model = nn.Module.to(MullForCausalLM(MullConfig(text_config=config)).eval(), torch.bfloat16)
        model(torch.zeros(1, 3, dtype=torch.long), use_cache=False, attention_mask=dict.fromkeys(KINDS))
