"""What differs between the architectures of transformers: rotary embeddings, and the functions of recurrent layers.

transformers' layer code runs unmodified. Private parts of it that mull relies on are touched in this folder only, and a contract
test per family pins them.
"""

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from mull.model.configs import layer_kinds
from mull.model.memory import LayerMemory

Rotary = Callable[[Any, set[str], Tensor, Tensor], dict[str, Any]]
"""``(rotary_emb, kinds of layers, hidden states, position_ids) -> position embeddings by kind``."""


def _one_rotary(rotary_emb: Any, kinds: set[str], h: Tensor, position_ids: Tensor) -> dict[str, Any]:
    # Released OlmoHybrid checkpoints have no rotary embedding.
    return dict.fromkeys(kinds, None if rotary_emb is None else rotary_emb(h, position_ids))


def _rotary_by_kind(rotary_emb: Any, kinds: set[str], h: Tensor, position_ids: Tensor) -> dict[str, Any]:
    return {kind: rotary_emb(h, position_ids, kind) for kind in kinds}


def _multimodal_rotary(rotary_emb: Any, kinds: set[str], h: Tensor, position_ids: Tensor) -> dict[str, Any]:
    # Time, height and width all advance with the text.
    return dict.fromkeys(kinds, rotary_emb(h, position_ids.expand(3, h.shape[0], -1)))


MIXERS = ("self_attn", "linear_attn")
"""Modules of a decoder layer in which tokens meet; a layer has one of them."""


@dataclass(frozen=True)
class Family:
    """How one architecture differs from the others."""

    rotary: Rotary
    """Computes the position embeddings that its layers expect."""

    delta_rule_module: str | None = None
    """Module under ``transformers.models`` whose functions compute the delta rule, for architectures with recurrent layers."""

    gated_attention: bool = False
    """Whether its attention gates what it gives by itself."""


FAMILIES: dict[str, Family] = {
    "llama": Family(_one_rotary),
    "olmo3": Family(_rotary_by_kind),
    "olmo_hybrid": Family(_one_rotary, "olmo_hybrid.modeling_olmo_hybrid"),
    "qwen3": Family(_one_rotary),
    "qwen3_5_text": Family(_multimodal_rotary, "qwen3_5.modeling_qwen3_5", gated_attention=True),
    "qwen3_5_moe_text": Family(_multimodal_rotary, "qwen3_5_moe.modeling_qwen3_5_moe", gated_attention=True),
    "qwen3_next": Family(_one_rotary, "qwen3_next.modeling_qwen3_next", gated_attention=True),
}
"""Supported architectures by their ``model_type``."""


def require_supported(config: PreTrainedConfig) -> Family:
    """The family of a backbone's configuration.

    Raises:
        ValueError: the architecture is not supported, or its padding token has no embedding: torch cannot build it.
    """
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"Architecture {config.model_type!r} is not supported. Supported are {', '.join(sorted(FAMILIES))}."
        )
    if config.pad_token_id is not None and not -config.vocab_size <= config.pad_token_id < config.vocab_size:
        raise ValueError(
            f"The configuration's pad_token_id={config.pad_token_id} is outside the model's vocabulary of {config.vocab_size} "
            "tokens: set it to a token inside, such as the one that ends a text."
        )
    return FAMILIES[config.model_type]


DELTA_RULES = ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule")
CONVOLUTIONS = ("causal_conv1d_fn", "causal_conv1d_update")
BORDERS = ("cu_seqlens", "seq_idx")
"""Keywords by which these functions keep packed documents apart, where they do."""

KERNELS = {
    ("fla.ops.gated_delta_rule", "chunk_gated_delta_rule"): "cu_seqlens",
    ("causal_conv1d", "causal_conv1d_fn"): "seq_idx",
}
"""What transformers takes as kernels where it is installed, and which of `BORDERS` each has to take."""


def runs_kernels(device: torch.device) -> bool:
    """Whether installed kernels run on a device: they are made for GPUs, and fail on the CPU."""
    return device.type != "cpu"


def keeps_documents_apart(device: torch.device) -> bool:
    """Whether recurrent layers can take all packed documents of a batch as one sequence on this device."""
    return runs_kernels(device) and _kernels_take_borders()


@cache
def _kernels_take_borders() -> bool:
    try:
        kernels = {getattr(importlib.import_module(module), name): key for (module, name), key in KERNELS.items()}
    except (ImportError, AttributeError, RuntimeError):  # not installed, another version, no driver
        return False
    return all(key in inspect.signature(kernel).parameters for kernel, key in kernels.items())


def install_recurrent_hooks(family: Family) -> None:
    """Make the functions that the family's recurrent layers call accept ``cache_view``, for the whole process.

    A layer hands unknown keywords on to these functions. That is the only way to reach a delta rule inside of a layer of
    transformers, whose code mull does not copy: given a `LayerMemory` as ``cache_view``, the memory runs the delta rule. Without
    it, the functions compute what they did before, with one exception: on the CPU they run transformers' own torch code, if they
    are not asked to keep packed documents apart, which that code cannot do.
    """
    if family.delta_rule_module is None:
        return
    module = importlib.import_module(f"transformers.models.{family.delta_rule_module}")
    for name in (*DELTA_RULES, *CONVOLUTIONS):
        function = getattr(module, name)
        if not hasattr(function, "adapted_by_mull"):
            setattr(module, name, _adapted(function, is_delta_rule=name in DELTA_RULES))


def _adapted(function: Callable[..., Any], is_delta_rule: bool) -> Callable[..., Any]:
    reference = inspect.unwrap(function)

    @wraps(function)
    def adapted(first: Tensor, *args: Any, cache_view: LayerMemory | None = None, **kwargs: Any) -> Any:
        # transformers chooses a kernel when it is imported. Its wrapper refuses borders where there is none; the torch code alone
        # would ignore them.
        bordered = any(kwargs.get(name) is not None for name in BORDERS)
        chosen = function if bordered or runs_kernels(first.device) else reference
        if cache_view is None or not is_delta_rule:
            return chosen(first, *args, **kwargs)
        return cache_view.delta_rule(chosen, first, *args, **kwargs)

    adapted.adapted_by_mull = True  # type: ignore[attr-defined]
    return adapted


def new_block(config: PreTrainedConfig, layers: nn.ModuleList, routed: bool = False) -> nn.Module:
    """Another decoder layer with full attention, of the backbone's own class and not initialised.

    Args:
        config: Configuration of the backbone.
        layers: Its decoder layers.
        routed: In a backbone with routed experts, build one that has them, as released multi-token modules do, even where the
            first layer with full attention has none.

    Raises:
        ValueError: the backbone has no layer with full attention to take as a pattern.
    """
    patterns = [layer for layer, kind in enumerate(layer_kinds(config)) if kind == "full_attention"]
    if not patterns:
        raise ValueError(
            "No layer of this model has full attention, so there is no pattern for heads of type transformer or sequential: use "
            "mlp or shared_lm_head."
        )
    if routed:
        patterns.sort(key=lambda layer: not hasattr(layers[layer].mlp, "experts"))
    layer = patterns[0]
    return type(layers[layer])(config, layer)


def new_norm(config: PreTrainedConfig, norm: nn.Module) -> nn.Module:
    """Another norm like the backbone's final one, `norm`; not initialised."""
    return type(norm)(config.hidden_size, config.rms_norm_eps)
