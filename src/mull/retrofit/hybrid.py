"""The map from Qwen3 to a hybrid of Gated DeltaNet and gated attention, in the format that transformers has for Qwen3.5.

A layer that keeps its attention gives the outputs of the source, bit for bit in fp32: gates start at zero, so that the sigmoid is
exactly 1/2, and the output map is doubled. A layer that becomes Gated DeltaNet (arXiv:2412.06464) takes over the source's maps as far
as they fit and starts as an approximation.

Shapes: D model width, H query heads, G key and value heads of the source, K width of a head.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedConfig

GateInit = Literal["zero", "small", "ones"]
LayerKind = Literal["full_attention", "linear_attention"]

GATE_LOGITS: dict[GateInit, float] = {"zero": 0.0, "small": 0.5, "ones": 2.0}
"""What the gates of attention layers start at: open by 1/2, 0.622 and 0.881. All but the first take a bias."""

TAP = 0.05
"""Last tap of the short convolutions; the others are zero. The SiLU behind them is nearly linear at such small inputs. Queries and
keys are normalised afterwards, and so is the output, so that nothing of the scale is left."""

UNIT_SILU = 1.2784645427610738
"""``silu(z) = 1``: a constant output gate of a DeltaNet layer is open at this logit."""

HALF_LIFE = 128.0
"""Tokens after which a head of a DeltaNet layer has forgotten half of a memory, where nothing was measured."""

READERS = {
    "input_layernorm.weight": (
        *(f"self_attn.{name}_proj.weight" for name in "qkv"),
        *(f"linear_attn.in_proj_{name}.weight" for name in ("qkv", "z", "b", "a")),
    ),
    "post_attention_layernorm.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
}
"""Norms of a layer, and the maps that read their output."""


class DeltaStart(NamedTuple):
    """What was measured in the source for one layer that becomes DeltaNet. What is None starts without data."""

    half_life: Tensor | None = None
    """``[H]``: tokens after which a head has forgotten half of a memory."""

    gate: Tensor | None = None
    """``[D]``: weights ``w`` of the output gate, the same for all its channels; ``w · x`` should be near `UNIT_SILU` on the normed
    inputs ``x`` of the source's layer. None draws weights at random, with which the layer starts nearly silent."""

    out_scale: Tensor | None = None
    """``[H]``: factor of a head's columns of the output map."""

    out_map: Tensor | None = None
    """``[D, H K]``: the output map itself, instead of the source's."""


class Target(NamedTuple):
    """A tensor of the hybrid, and where it comes from."""

    value: Tensor
    origin: Literal["copied", "derived", "fresh"]
    sources: tuple[str, ...] = ()
    """Names of the source's tensors that it is made from."""

    error: float = 0.0
    """For a norm: largest relative error of its weights, from storing ``w - 1``; 0 if all are exact."""


def head_dim_of(config: PreTrainedConfig) -> int:
    """Width of an attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def convert_layer(
    source: Mapping[str, Tensor],
    config: PreTrainedConfig,
    kind: LayerKind,
    *,
    gate: GateInit = "zero",
    start: DeltaStart = DeltaStart(),
    dtype: torch.dtype | None = None,
    seed: int = 0,
) -> dict[str, Target]:
    """All tensors of one layer of the hybrid, by their names in the layer.

    Args:
        source: All tensors of the source's layer, by their names in the layer.
        config: Configuration of the source.
        kind: What the layer becomes.
        gate: Start of the gates of attention.
        start: What was measured for a DeltaNet layer.
        dtype: Of the result; default: that of the source. The source is rounded to it first.
        seed: Of weights that nothing determines; they do not depend on the global generator.

    Returns:
        Tensors on the device of the source. Those that are copied share its memory.
    """
    dtype = dtype or source["self_attn.q_proj.weight"].dtype
    source = {name: value.to(dtype) for name, value in source.items()}
    mixer = (
        attention_tensors(source, config, gate)
        if kind == "full_attention"
        else delta_tensors(source, config, start, torch.Generator().manual_seed(seed))
    )
    taken = {name for target in mixer.values() for name in target.sources} | READERS.keys()
    targets = mixer | {name: Target(value, "copied", (name,)) for name, value in source.items() if name not in taken}
    for norm, readers in READERS.items():
        targets |= fold_norm(norm, source[norm], {name: targets[name] for name in readers if name in targets})
    return targets


def attention_tensors(source: Mapping[str, Tensor], config: PreTrainedConfig, gate: GateInit) -> dict[str, Target]:
    """Gated attention that computes what the source's attention does.

    With ``zero`` this is exact in every precision. The other gates take biases, which makes ``attention_bias`` true, and rounding
    of the output map: it is divided by what the gates let through.
    """
    heads = config.num_attention_heads
    logit = GATE_LOGITS[gate]
    opened = torch.tensor(logit, dtype=torch.float64).sigmoid().item()
    found: dict[str, Target] = {}
    for name in ("q_proj.weight", "q_proj.bias"):
        if (key := f"self_attn.{name}") in source:
            query = source[key].unflatten(0, (heads, -1))  # [H, K, ...]
            gates = torch.full_like(query, logit if name.endswith("bias") else 0.0)
            found[key] = Target(torch.cat([query, gates], 1).flatten(0, 1), "derived", (key,))
    for name in ("q_norm", "k_norm"):
        found |= fold_norm(f"self_attn.{name}.weight", source[f"self_attn.{name}.weight"], {})
    key = "self_attn.o_proj.weight"
    found[key] = Target((_wide(source[key]) / opened).to(source[key].dtype), "derived", (key,))
    if gate != "zero" and not config.attention_bias:
        width = found["self_attn.q_proj.weight"].value.shape[0]
        gates = source[key].new_zeros(heads, 2, width // (2 * heads))
        gates[:, 1] = logit
        found["self_attn.q_proj.bias"] = Target(gates.flatten(), "fresh")
        for name in ("k_proj", "v_proj", "o_proj"):
            found[f"self_attn.{name}.bias"] = Target(
                source[key].new_zeros(source[f"self_attn.{name}.weight"].shape[0]), "fresh"
            )
    return found


def delta_tensors(
    source: Mapping[str, Tensor], config: PreTrainedConfig, start: DeltaStart, generator: torch.Generator
) -> dict[str, Target]:
    """Gated DeltaNet that starts from the source's attention.

    Each query head gets a key and a value head of its own: DeltaNet shares queries and keys among value heads, and grouped
    attention keys and values among queries. The weights of ``q_norm`` and ``k_norm`` are multiplied into the maps, because the
    delta rule normalises queries and keys without weights. Rotary positions and the sharpness of the softmax are lost.
    """
    heads, width = config.num_attention_heads, head_dim_of(config)
    q, k, v, o = (source[f"self_attn.{name}_proj.weight"] for name in "qkvo")
    dtype, device = q.dtype, q.device
    shared = heads // config.num_key_value_heads
    q, k = (
        _wide(weight).unflatten(0, (-1, width)) * _wide(source[f"self_attn.{name}_norm.weight"])[:, None]
        for name, weight in (("q", q), ("k", k))
    )
    # Whole heads are repeated, [G, K, D] to [H, K, D], never single rows.
    k, v = (weight.repeat_interleave(shared, 0) for weight in (k, v.unflatten(0, (-1, width))))
    maps = torch.cat([q.to(dtype), k.to(dtype), v]).flatten(0, 1)
    names = ("q_proj.weight", "q_norm.weight", "k_proj.weight", "k_norm.weight", "v_proj.weight")
    taps = torch.zeros(3 * heads * width, 1, 4, dtype=dtype, device=device)
    taps[..., -1] = TAP
    if start.gate is None:
        drawn = torch.randn(heads * width, config.hidden_size, generator=generator) * config.initializer_range
        gate = drawn.to(device, dtype)
    else:
        gate = start.gate.to(device, dtype).expand(heads * width, -1).contiguous()
    scaled = o
    if start.out_scale is not None:
        by_head = _wide(o).unflatten(1, (heads, width)) * _wide(start.out_scale.to(device))[:, None]
        scaled = by_head.flatten(1).to(dtype)
    if start.out_map is not None:
        scaled = start.out_map.to(device, dtype)
    rate = (
        math.log(2) / (torch.full((heads,), HALF_LIFE) if start.half_life is None else start.half_life.cpu()).double()
    )
    bias = (rate + torch.log(-torch.expm1(-rate))).to(dtype)  # the inverse of softplus
    # What rounding takes from the bias, the factor of the rate gives back.
    log_factor = torch.log(rate / torch.nn.functional.softplus(bias.double())).to(dtype)
    out = "self_attn.o_proj.weight"
    zeros = torch.zeros(heads, config.hidden_size, dtype=dtype, device=device)
    tensors = {
        "in_proj_qkv.weight": Target(maps, "derived", tuple(f"self_attn.{name}" for name in names)),
        "conv1d.weight": Target(taps, "fresh"),
        "in_proj_z.weight": Target(gate, "fresh"),
        "in_proj_b.weight": Target(zeros, "fresh"),  # writes with strength 1/2
        "in_proj_a.weight": Target(zeros.clone(), "fresh"),
        "A_log": Target(log_factor.to(device), "fresh"),
        "dt_bias": Target(bias.to(device), "fresh"),
        "norm.weight": Target(torch.ones(width, dtype=dtype, device=device), "fresh"),
        "out_proj.weight": Target(scaled, "copied" if scaled is o else "derived", (out,)),
    }
    return {f"linear_attn.{name}": target for name, target in tensors.items()}


def fold_norm(name: str, weight: Tensor, readers: Mapping[str, Target]) -> dict[str, Target]:
    """Store a norm's weight ``w`` as ``w - 1``, and rewrite the maps that read its output so that nothing is lost.

    In bf16, ``w - 1`` does not determine a ``w`` below 1/2. There the channel is multiplied by a power of two (and by -1) which
    brings ``w`` between 1 and 2, and the maps' column is divided by it. Both are exact, and so is every product of the two, unless
    the column would underflow: then the channel is left as it is.

    Args:
        name: Name of the norm's weight.
        weight: ``[D]`` in the precision in which it is stored.
        readers: The maps ``[..., D]`` that read its output, all of them; none if they cannot be rewritten.

    Returns:
        The norm and the maps that changed.
    """
    wide = _wide(weight)

    def restored(stored: Tensor) -> Tensor:
        return _wide((stored - 1).to(weight.dtype)) + 1

    lossy = restored(wide) != wide
    _, exponent = torch.frexp(wide)
    scale = torch.where(lossy, wide.sign() * torch.exp2(1.0 - exponent), torch.ones_like(wide))
    divided = {}
    if lossy.any():
        for reader, target in readers.items():
            columns = target.value / scale.to(target.value.dtype)
            kept = (columns * scale.to(columns.dtype) == target.value).flatten(0, -2).all(0)
            scale = torch.where(kept, scale, 1.0)
            divided[reader] = columns
        divided = {
            reader: target._replace(value=torch.where(scale == 1, target.value, divided[reader]), origin="derived")
            for reader, target in readers.items()
        }
    error = ((restored(wide * scale) / scale - wide).abs() / wide.abs().clamp_min(torch.finfo(wide.dtype).tiny)).max()
    stored = (wide * scale - 1).to(weight.dtype)
    return {name: Target(stored, "derived", (name,), error.item()), **(divided if readers else {})}


def _wide(tensor: Tensor) -> Tensor:
    """In fp32 at least."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def attention_period(kinds: Iterable[LayerKind]) -> int | None:
    """The period of attention layers, if every such layer ends one and no other does; else None."""
    places = [layer for layer, kind in enumerate(kinds, 1) if kind == "full_attention"]
    period = places[0] if places else None
    layers = len(list(kinds))
    return period if period and places == list(range(period, layers + 1, period)) else None
