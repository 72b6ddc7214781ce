"""The map from Qwen3 to a hybrid of Gated DeltaNet and gated attention, in the format that transformers has for Qwen3.5.

A layer that keeps its attention computes what the source's does, bit for bit in fp32: gates start at zero, where the sigmoid is
exactly 1/2, and the output map is doubled. A layer that becomes Gated DeltaNet (arXiv:2412.06464) takes over the source's maps as
far as they fit, and is an approximation.

Shapes: D model width, H query heads, G key and value heads of the source, K width of a head, E experts, I width of an expert.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedConfig, Qwen3_5MoeTextConfig, Qwen3_5TextConfig

from mull.model.configs import layer_kinds
from mull.model.path import MAX_LAYERS
from mull.runtime.arguments import Frozen

GateInit = Literal["zero", "small", "ones"]
LayerKind = Literal["full_attention", "linear_attention"]

GATE_LOGITS: dict[GateInit, float] = {"zero": 0.0, "small": 0.5, "ones": 2.0}
"""What the gates of attention start at: open by 0.5, 0.622 and 0.881. All but the first take a bias."""

TAP = 0.05
"""Last tap of the short convolutions; the others are zero. At such small inputs the SiLU after them is nearly linear. Nothing of
the scale is left: queries and keys are normalised afterwards, and so is the output."""

UNIT_SILU = 1.2784645427610738
"""``silu(z) = 1``: at this logit an output gate of a DeltaNet layer lets everything through."""

COPIED_FIELDS = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_act"),
    *("max_position_embeddings", "initializer_range", "rms_norm_eps", "use_cache", "tie_word_embeddings"),
    *("attention_bias", "attention_dropout", "pad_token_id", "bos_token_id", "eos_token_id"),
)
MOE_FIELDS = ("moe_intermediate_size", "num_experts_per_tok", "num_experts", "output_router_logits")
SOURCES = ("qwen3", "qwen3_moe")
"""``model_type`` of what can be converted."""

READERS = {
    "input_layernorm.weight": re.compile(r"self_attn\.[qkv]_proj\.weight|linear_attn\.in_proj_(qkv|z|b|a)\.weight"),
    "post_attention_layernorm.weight": re.compile(
        r"mlp\.((shared_expert|experts\.\d+)\.)?(gate|up)_proj\.weight|mlp\.experts\.gate_up_proj|"
        r"mlp\.(shared_expert_)?gate\.weight"
    ),
}
"""Norms of a layer, and the maps that read their output."""


class HybridAttentionConfig(Frozen):
    """Which layers become Gated DeltaNet. The others keep their attention, with a gate on its output."""

    deltanet_layer_pattern: tuple[int, ...] = (0, 1, 2)
    """Places in each period that become DeltaNet; ``()`` for none."""

    pattern_period: int = Field(default=4, ge=1, le=MAX_LAYERS)
    """Layers of a period."""

    layers: tuple[int, ...] | None = None
    """Numbers of the layers, from 0, that become DeltaNet, as a choice by measurement gives them. It replaces the pattern."""

    half_life: float = Field(default=128.0, ge=0.5, le=1e9)
    """Tokens after which a DeltaNet head has forgotten half of a memory, until calibration measures it. A value that is wrong
    by a factor of four is still far better than no forgetting."""

    @model_validator(mode="after")
    def _check_places(self) -> "HybridAttentionConfig":
        for name, places in (("deltanet_layer_pattern", self.deltanet_layer_pattern), ("layers", self.layers or ())):
            end = self.pattern_period if name == "deltanet_layer_pattern" else MAX_LAYERS
            if len(set(places)) < len(places) or any(not 0 <= place < end for place in places):
                raise ValueError(f"{name}={list(places)} must be different numbers from 0 to {end - 1}")
        return self

    def kinds(self, n_layers: int) -> list[LayerKind]:
        """What each of the model's layers becomes.

        Raises:
            ValueError: a layer that the model does not have, or no layer keeps its attention.
        """
        chosen = [i for i in range(n_layers) if i % self.pattern_period in self.deltanet_layer_pattern]
        chosen = chosen if self.layers is None else sorted(self.layers)
        if chosen and chosen[-1] >= n_layers:
            raise ValueError(f"layers has {chosen[-1]}, and the source has layers 0 to {n_layers - 1}.")
        if len(chosen) == n_layers:
            raise ValueError(
                f"All {n_layers} layers would become DeltaNet: transformers' cache takes its length from a layer with attention. "
                "Keep at least one."
            )
        return ["linear_attention" if layer in chosen else "full_attention" for layer in range(n_layers)]


class CrossArchTransferConfig(Frozen):
    """How a Qwen3 model becomes a hybrid."""

    hybrid_attention: HybridAttentionConfig = HybridAttentionConfig()
    """Which layers become DeltaNet."""

    gate_init_strategy: GateInit = "zero"
    """Start of the gates of attention. All compute what the source does, and differ in how fast gates learn.

    ``zero``: gates at 1/2 whatever the input, with slope 0.25. Exact, and what serving engines read.
    ``small``, ``ones``: gates at 0.622 and 0.881 with slopes 0.235 and 0.105; exact up to rounding of the output map. They need
    biases, so ``attention_bias`` becomes true, which transformers reads and engines may not. ``ones`` is not fully open: a gate
    that is has no gradient."""

    # Left out of dumps: a conversion does not read them, and goes on whatever they are.
    distillation_temperature: float = Field(default=2.0, ge=0.01, le=100, exclude=True)
    """For `mull.training.objectives.distill.DistillationTrainer`, as its `DistillConfig.temperature`."""

    distillation_alpha: float = Field(default=0.5, ge=0, le=1, exclude=True)
    """Likewise, `DistillConfig.alpha`."""


class DeltaStart(NamedTuple):
    """What was measured in the source for one layer that becomes DeltaNet. What is None starts without data."""

    half_life: Tensor | None = None
    """``[H]``: tokens after which a head has forgotten half of a memory."""

    gate: Tensor | None = None
    """``[D]``: weights ``w`` of the output gate, the same for all its channels. ``w · x`` should be near `UNIT_SILU` on the
    inputs ``x`` of the source's attention. None draws weights at random, with which the layer starts nearly silent."""

    out_scale: Tensor | None = None
    """``[H]``: factor of a head's columns of the output map."""

    out_proj: Tensor | None = None
    """``[D, H K]``: an output map instead of the source's."""


NOTHING_MEASURED = DeltaStart()


def check_starts(starts: Mapping[int, DeltaStart], config: PreTrainedConfig) -> None:
    """Refuse starts that are not of the shapes that `DeltaStart` says, or not finite.

    Args:
        starts: By layer.
        config: Configuration of the source.

    Raises:
        ValueError: names the layer and the field.
    """
    heads, model = config.num_attention_heads, config.hidden_size
    shapes = {
        "half_life": (heads,),
        "gate": (model,),
        "out_scale": (heads,),
        "out_proj": (model, heads * head_dim_of(config)),
    }
    for number, start in starts.items():
        for name, value in start._asdict().items():
            if value is None:
                continue
            if value.shape != shapes[name]:
                raise ValueError(
                    f"{name} of the start of layer {number} has shape {tuple(value.shape)} instead of {shapes[name]}: calibrate "
                    "the model that is converted."
                )
            if not is_finite(value) or (name == "half_life" and not (value > 0).all()):
                wanted = "finite and above 0" if name == "half_life" else "finite"
                raise ValueError(
                    f"{name} of the start of layer {number} has values that are not {wanted}: calibrate again."
                )


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor has neither infinity nor NaN, found without a copy of it."""
    return bool(torch.stack(tensor.aminmax()).isfinite().all())


class Target(NamedTuple):
    """A tensor of the hybrid, and where it comes from."""

    value: Tensor
    origin: Literal["copied", "derived", "fresh"]
    sources: tuple[str, ...] = ()
    """Names of the source's tensors that it is made from."""

    error: float = 0.0
    """Of a norm: largest relative error of its weights from storing ``w - 1``; 0 if all are exact."""


def head_dim_of(config: PreTrainedConfig) -> int:
    """Width of an attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def hybrid_config(source: PreTrainedConfig, config: CrossArchTransferConfig) -> PreTrainedConfig:
    """Configuration of the hybrid, with the keys that serving engines read.

    Raises:
        ValueError: the source is no Qwen3, or has something that the hybrid cannot express; says what.
    """
    kinds = config.hybrid_attention.kinds(source.num_hidden_layers)
    _require_expressible(source, kinds)
    width, heads = head_dim_of(source), source.num_attention_heads
    fields: dict[str, Any] = {name: getattr(source, name) for name in COPIED_FIELDS}
    fields |= {
        "head_dim": width,
        "layer_types": list(kinds),
        # Left out, transformers would rotate a quarter of each head.
        "rope_parameters": {**source.rope_parameters, "partial_rotary_factor": 1.0},
        # DeltaNet shares queries and keys among value heads, the opposite of grouped attention.
        "linear_num_key_heads": heads,
        "linear_num_value_heads": heads,
        "linear_key_head_dim": width,
        "linear_value_head_dim": width,
        "attn_output_gate": True,
    }
    if config.gate_init_strategy != "zero":
        fields["attention_bias"] = True
    if (interval := attention_interval(kinds)) is not None:
        fields["full_attention_interval"] = interval
    if source.model_type == "qwen3":
        fields["intermediate_size"] = source.intermediate_size
        return Qwen3_5TextConfig(architectures=["Qwen3_5ForCausalLM"], **fields)
    fields |= {name: getattr(source, name) for name in MOE_FIELDS}
    # A module that the format always has. It starts silent.
    fields["shared_expert_intermediate_size"] = source.moe_intermediate_size
    fields["router_aux_loss_coef"] = source.router_aux_loss_coef
    return Qwen3_5MoeTextConfig(architectures=["Qwen3_5MoeForCausalLM"], **fields)


def _require_expressible(source: PreTrainedConfig, kinds: Sequence[LayerKind]) -> None:
    if source.model_type not in SOURCES:
        raise ValueError(f"Architecture {source.model_type!r} cannot be converted, only {' and '.join(SOURCES)}.")
    if getattr(source, "quantization_config", None) is not None:
        raise ValueError("The source is quantized: give the checkpoint that it was made from, in bf16 or fp32.")
    delta = "linear_attention" in kinds
    moe = source.model_type == "qwen3_moe"
    windows = layer_kinds(source)
    if moe and source.sliding_window is not None:
        windows = ["sliding_attention"] * len(kinds)
    slid = [
        i for i, (kind, of) in enumerate(zip(kinds, windows, strict=True)) if (kind, of)[0] == "full_attention" != of
    ]
    sparse = moe and (source.mlp_only_layers or source.decoder_sparse_step != 1)
    refused = {
        f"layers {slid} attend to a sliding window of {source.sliding_window} tokens, which attention of Qwen3.5 does not have: "
        "turn them into DeltaNet, or set use_sliding_window to false": bool(slid),
        "attention_bias is true, and DeltaNet has no biases: convert no layer": delta and source.attention_bias,
        f"hidden_act={source.hidden_act!r}, and DeltaNet's convolutions need silu: convert no layer": (
            delta and source.hidden_act != "silu"
        ),
        "norm_topk_prob is false, and Qwen3.5 always normalises the weights of the chosen experts": (
            moe and not source.norm_topk_prob
        ),
        "some layers have no experts (mlp_only_layers, decoder_sparse_step), and in Qwen3.5-MoE all have them": sparse,
    }
    if reasons := [reason for reason, applies in refused.items() if applies]:
        raise ValueError(f"The source cannot be expressed as Qwen3.5: {'; '.join(reasons)}.")


def attention_interval(kinds: Sequence[LayerKind]) -> int | None:
    """The layers of a period, if its last one, and no other, has attention: ``full_attention_interval`` of engines; else None."""
    first = kinds.index("full_attention") + 1
    regular = ["linear_attention" if layer % first else "full_attention" for layer in range(1, len(kinds) + 1)]
    return first if regular == list(kinds) else None


def convert_layer(
    source: Mapping[str, Tensor],
    config: PreTrainedConfig,
    kind: LayerKind,
    *,
    gate: GateInit = "zero",
    start: DeltaStart = NOTHING_MEASURED,
    half_life: float = 128.0,
    seed: int = 0,
) -> dict[str, Target]:
    """All tensors of one layer of the hybrid, by their names in the layer.

    Args:
        source: All tensors of the source's layer, by their names in the layer.
        config: Configuration of the source.
        kind: What the layer becomes.
        gate: Start of the gates of attention.
        start: What was measured for a DeltaNet layer.
        half_life: Of all heads of a DeltaNet layer, where nothing was measured.
        seed: Of weights that nothing determines. They do not depend on torch's global generator.

    Returns:
        Tensors in the precision and on the device of the source. Those that are copied share its memory.
    """
    generator = torch.Generator().manual_seed(seed)
    if kind == "full_attention":
        targets = attention_tensors(source, config, gate)
    else:
        targets = delta_tensors(source, config, start, half_life, generator)
    if config.model_type == "qwen3_moe":
        targets |= _silent_expert(source, config, generator)
    taken = {name for target in targets.values() for name in target.sources} | READERS.keys()
    targets |= {name: Target(value, "copied", (name,)) for name, value in source.items() if name not in taken}
    for norm, readers in READERS.items():
        read = {name: target for name, target in targets.items() if readers.fullmatch(name)}
        targets |= store_norm(norm, source[norm], read)
    return targets


def attention_tensors(source: Mapping[str, Tensor], config: PreTrainedConfig, gate: GateInit) -> dict[str, Target]:
    """Gated attention that computes what the source's attention does; see `CrossArchTransferConfig.gate_init_strategy`."""
    heads, logit = config.num_attention_heads, GATE_LOGITS[gate]
    opened = torch.tensor(logit, dtype=torch.float64).sigmoid().item()
    query, out = source["self_attn.q_proj.weight"], source["self_attn.o_proj.weight"]
    found = {
        "self_attn.q_proj.weight": Target(_with_gates(query, heads, 0.0), "derived", ("self_attn.q_proj.weight",)),
        "self_attn.o_proj.weight": Target((_wide(out) / opened).to(out.dtype), "derived", ("self_attn.o_proj.weight",)),
    }
    for name in ("self_attn.q_norm.weight", "self_attn.k_norm.weight"):
        found |= store_norm(name, source[name], {})
    if "self_attn.q_proj.bias" in source:
        bias = _with_gates(source["self_attn.q_proj.bias"], heads, logit)
        found["self_attn.q_proj.bias"] = Target(bias, "derived", ("self_attn.q_proj.bias",))
    elif gate != "zero":
        found["self_attn.q_proj.bias"] = Target(_with_gates(query.new_zeros(len(query)), heads, logit), "fresh")
        for name in "kvo":
            width = len(source[f"self_attn.{name}_proj.weight"])
            found[f"self_attn.{name}_proj.bias"] = Target(query.new_zeros(width), "fresh")
    return found


def _with_gates(query: Tensor, heads: int, value: float) -> Tensor:
    """``[H K, ...]`` to ``[H 2K, ...]``: each head's rows, followed by as many of its gate."""
    by_head = query.unflatten(0, (heads, -1))
    return torch.cat([by_head, torch.full_like(by_head, value)], 1).flatten(0, 1)


def delta_tensors(
    source: Mapping[str, Tensor],
    config: PreTrainedConfig,
    start: DeltaStart,
    half_life: float,
    generator: torch.Generator,
) -> dict[str, Target]:
    """Gated DeltaNet that starts from the source's attention.

    Each query head gets key and value heads of its own. The weights of ``q_norm`` and ``k_norm`` are multiplied into the maps,
    because the delta rule normalises queries and keys without weights. Rotary positions and the softmax's sharpness are lost.
    """
    heads, width = config.num_attention_heads, head_dim_of(config)
    shared = heads // config.num_key_value_heads
    query, key, value, out = (source[f"self_attn.{name}_proj.weight"] for name in "qkvo")
    # Whole heads are repeated, [G, K, D] to [H, K, D], never single rows.
    key, value = (weight.unflatten(0, (-1, width)).repeat_interleave(shared, 0) for weight in (key, value))
    maps = [
        (_wide(weight) * _wide(source[f"self_attn.{name}_norm.weight"])[:, None]).to(query.dtype)
        for name, weight in (("q", query.unflatten(0, (heads, width))), ("k", key))
    ]
    names = ("q_proj.weight", "q_norm.weight", "k_proj.weight", "k_norm.weight", "v_proj.weight")
    taps = query.new_zeros(3 * heads * width, 1, 4)
    taps[..., -1] = TAP
    if start.gate is None:
        gate = torch.randn(heads * width, config.hidden_size, generator=generator) * config.initializer_range
    else:
        gate = start.gate.expand(heads * width, -1).contiguous()
    zeros = query.new_zeros(heads, config.hidden_size)
    log_factor, bias = _decay(torch.full((heads,), half_life) if start.half_life is None else start.half_life, query)
    targets = {
        "in_proj_qkv.weight": Target(
            torch.cat([*maps, value]).flatten(0, 1), "derived", tuple(f"self_attn.{name}" for name in names)
        ),
        "conv1d.weight": Target(taps, "fresh"),
        "in_proj_z.weight": Target(gate.to(query), "fresh"),
        "in_proj_b.weight": Target(zeros, "fresh"),  # every token is written with strength 1/2
        "in_proj_a.weight": Target(zeros.clone(), "fresh"),
        "A_log": Target(log_factor, "fresh"),
        "dt_bias": Target(bias, "fresh"),
        "norm.weight": Target(query.new_ones(width), "fresh"),
        "out_proj.weight": Target(out, "copied", ("self_attn.o_proj.weight",)),
    }
    if start.out_scale is not None or start.out_proj is not None:
        scaled = _wide((out if start.out_proj is None else start.out_proj).to(query.device)).unflatten(
            1, (heads, width)
        )
        if start.out_scale is not None:
            scaled = scaled * start.out_scale.to(scaled)[:, None]
        targets["out_proj.weight"] = Target(scaled.flatten(1).to(query), "derived", ("self_attn.o_proj.weight",))
    return {f"linear_attn.{name}": target for name, target in targets.items()}


def _decay(half_life: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """``A_log`` and ``dt_bias``, with ``exp(A_log) softplus(dt_bias) = ln 2 / half_life``."""
    rate = math.log(2) / half_life.double().cpu()
    bias = (rate + torch.log(-torch.expm1(-rate))).to(like.dtype)  # the inverse of softplus
    # What rounding takes from the bias (2 % of the rate in bf16), the factor gives back.
    log_factor = torch.log(rate / F.softplus(bias.double()))
    return log_factor.to(like), bias.to(like)


def _silent_expert(
    source: Mapping[str, Tensor], config: PreTrainedConfig, generator: torch.Generator
) -> dict[str, Target]:
    """The shared expert that every layer of Qwen3.5-MoE has: its output is zero, and its last map can learn."""
    like = source["mlp.gate.weight"]
    width, inner = config.hidden_size, config.moe_intermediate_size
    drawn = torch.randn(2, inner, width, generator=generator) * config.initializer_range
    tensors = {"gate_proj": drawn[0], "up_proj": drawn[1], "down_proj": torch.zeros(width, inner)}
    found = {f"mlp.shared_expert.{name}.weight": Target(value.to(like), "fresh") for name, value in tensors.items()}
    return found | {"mlp.shared_expert_gate.weight": Target(like.new_zeros(1, width), "fresh")}


def store_norm(name: str, weight: Tensor, readers: Mapping[str, Target]) -> dict[str, Target]:
    """Store a norm's weight ``w`` as ``w - 1``, and rewrite the maps that read its output so that nothing is lost.

    Where ``w - 1`` is rounded, as in bf16 below 1/2, a power of two (and a sign) moves from the map's column into the channel,
    which brings ``w`` between 1 and 2. Both numbers stay exact, and so does every product of them. A column that would underflow
    keeps its channel as it is.

    Args:
        name: Name of the norm's weight.
        weight: ``[D]``, in the precision in which it is stored.
        readers: All maps ``[..., D]`` that read the norm's output; none if they cannot be rewritten.

    Returns:
        The norm and its readers.
    """
    wide = _wide(weight)
    lossy = _wide((wide - 1).to(weight.dtype)) + 1 != wide
    scale = torch.where(lossy, wide.sign() * torch.exp2(1.0 - torch.frexp(wide).exponent), 1.0)
    if not readers:
        scale = torch.ones_like(wide)
    for target in readers.values() if lossy.any() else ():
        factor = scale.to(target.value.dtype)
        kept = (target.value / factor * factor == target.value).flatten(0, -2).all(0)
        scale = torch.where(kept, scale, 1.0)
    stored = (wide * scale - 1).to(weight.dtype)
    error = (((_wide(stored) + 1) / scale - wide).abs() / wide.abs().clamp_min(torch.finfo(wide.dtype).tiny)).max()
    rewritten = {} if (scale == 1).all() else readers
    return {
        name: Target(stored, "derived", (name,), error.item()),
        **readers,
        **{
            reader: target._replace(
                value=target.value / scale.to(target.value.dtype),
                origin="fresh" if target.origin == "fresh" else "derived",
            )
            for reader, target in rewritten.items()
        },
    }


def _wide(tensor: Tensor) -> Tensor:
    """In fp32 at least."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
