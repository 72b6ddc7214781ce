"""What differs between the backbones of transformers: masks, rotary embeddings, how a decoder layer is called.

Masks and rotary embeddings are computed once per call and shared by all visits. transformers' layer code runs unmodified; the
private parts of it that mull relies on are touched here and in the caches only, and pinned by a contract test per family.

Recurrent layers need two things that attention masks give to the others for free:

* Packed documents (`position_ids` that restart): each document becomes a row of its own for the layer, so neither the
  convolution nor the state crosses a boundary.
* Padding behind a token in a cached call (right padding): the row is compacted, padding goes to its end and is a no-op there, so
  that the state that the next call continues from is the one of the tokens alone.
"""

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig

from mull.model.fixed_cache import StaticSlotView
from mull.model.growing_cache import SlotView

Rotary = Callable[[nn.Module, set[str], Tensor, Tensor], dict[str, Any]]
"""``(base model, layer kinds, hidden states, position_ids) -> position embeddings by layer kind``."""


def _one_rotary(base: Any, kinds: set[str], h: Tensor, position_ids: Tensor) -> dict[str, Any]:
    return dict.fromkeys(kinds, base.rotary_emb(h, position_ids))


def _rotary_by_kind(base: Any, kinds: set[str], h: Tensor, position_ids: Tensor) -> dict[str, Any]:
    return {kind: base.rotary_emb(h, position_ids, kind) for kind in kinds}


def _multimodal_rotary(base: Any, kinds: set[str], h: Tensor, position_ids: Tensor) -> dict[str, Any]:
    # Time, height and width all advance with the text.
    return dict.fromkeys(kinds, base.rotary_emb(h, position_ids.expand(3, h.shape[0], -1)))


def _optional_rotary(base: Any, kinds: set[str], h: Tensor, position_ids: Tensor) -> dict[str, Any]:
    # Released OlmoHybrid checkpoints have no rotary embedding.
    return dict.fromkeys(kinds, None if base.rotary_emb is None else base.rotary_emb(h, position_ids))


@dataclass(frozen=True)
class Family:
    """How one architecture differs from the others."""

    rotary: Rotary
    """Computes the position embeddings that its layers expect."""

    delta_rule_module: str | None = None
    """Module under ``transformers.models`` whose functions compute the delta rule, for architectures with recurrent layers."""


FAMILIES: dict[str, Family] = {
    "llama": Family(_one_rotary),
    "olmo3": Family(_rotary_by_kind),
    "olmo_hybrid": Family(_optional_rotary, "olmo_hybrid.modeling_olmo_hybrid"),
    "qwen3": Family(_one_rotary),
    "qwen3_5_text": Family(_multimodal_rotary, "qwen3_5.modeling_qwen3_5"),
    "qwen3_5_moe_text": Family(_multimodal_rotary, "qwen3_5_moe.modeling_qwen3_5_moe"),
    "qwen3_next": Family(_one_rotary, "qwen3_next.modeling_qwen3_next"),
}
"""Supported architectures by their ``model_type``."""


def family_of(config: PreTrainedConfig) -> Family:
    """Look up an architecture, and prepare the functions of its recurrent layers.

    Raises:
        ValueError: the architecture is not supported.
    """
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"Architecture {config.model_type!r} is not supported. Supported are {', '.join(sorted(FAMILIES))}."
        )
    family = FAMILIES[config.model_type]
    if family.delta_rule_module is not None:
        _adapt_recurrent_functions(importlib.import_module(f"transformers.models.{family.delta_rule_module}"))
    return family


def layer_kinds(config: PreTrainedConfig) -> list[str]:
    """Kind of each decoder layer: ``full_attention``, ``sliding_attention`` or ``linear_attention``."""
    return list(getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers)


DELTA_RULES = ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule")
CONVOLUTIONS = ("causal_conv1d_fn", "causal_conv1d_update")


def _adapt_recurrent_functions(module: Any) -> None:
    """Let the functions that a family's recurrent layers call fit their place of work. Their numbers stay what they were.

    All of them use transformers' own torch code for tensors on the CPU: transformers chooses a kernel when it is imported, and
    with one installed its recurrent layers fail on the CPU. The keyword `cache_view`, which a layer hands on to all of them,
    takes over the call of a delta rule.
    """
    for name in (*DELTA_RULES, *CONVOLUTIONS):
        function = getattr(module, name)
        if not hasattr(function, "adapted_by_mull"):
            setattr(module, name, _adapted(function, reports=name in DELTA_RULES))


def _adapted(function: Callable[..., Any], reports: bool) -> Callable[..., Any]:
    reference = inspect.unwrap(function)

    @wraps(function)
    def adapted(first: Tensor, *args: Any, cache_view: SlotView | StaticSlotView | None = None, **kwargs: Any) -> Any:
        chosen = reference if first.device.type == "cpu" else function
        if cache_view is None or not reports:
            return chosen(first, *args, **kwargs)
        return cache_view.delta_rule(chosen, first, *args, **kwargs)

    adapted.adapted_by_mull = True  # type: ignore[attr-defined]
    return adapted


def new_block(base: Any, routed: bool = False) -> nn.Module:
    """A further decoder layer with full attention, of the backbone's own class and not initialised.

    Args:
        base: The backbone.
        routed: In a backbone with routed experts, build one that has them, as released multi-token modules do, even where the
            first layer with full attention has none.

    Raises:
        ValueError: the backbone has no layer with full attention to take as a pattern.
    """
    kinds = layer_kinds(base.config)
    if "full_attention" not in kinds:
        raise ValueError(
            "No layer of this model has full attention, so there is no pattern for heads of type transformer or sequential: use "
            "mlp or shared_lm_head."
        )
    patterns = [layer for layer, kind in enumerate(kinds) if kind == "full_attention"]
    if routed:
        patterns.sort(key=lambda layer: not hasattr(base.layers[layer].mlp, "experts"))
    layer = patterns[0]
    block: nn.Module = type(base.layers[layer])(base.config, layer)
    return block


def new_norm(base: Any) -> nn.Module:
    """A further norm like the backbone's final one, not initialised."""
    norm: nn.Module = type(base.norm)(base.config.hidden_size, base.config.rms_norm_eps)
    return norm
