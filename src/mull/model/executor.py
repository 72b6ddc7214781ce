"""The one loop over decoder layers."""

from torch import Tensor, nn

from mull.model.fixed_cache import StaticSlotView
from mull.model.growing_cache import SlotView
from mull.model.inputs import Sides


def run_layer(layer: nn.Module, kind: str, h: Tensor, sides: Sides, view: SlotView | StaticSlotView | None) -> Tensor:
    """Run one decoder layer of transformers, unmodified, for one visit.

    Args:
        layer: The decoder layer.
        kind: Its kind.
        h: Hidden states ``[B, T, D]``.
        sides: What the call's layers share.
        view: The visit's slot of the cache, or None.

    Returns:
        Hidden states ``[B, T, D]``.
    """
    options = {
        "attention_mask": sides.masks[kind],
        "position_ids": sides.position_ids,
        "past_key_values": view,
        "use_cache": view is not None,
        "position_embeddings": sides.rotary[kind],
    }
    if kind != "linear_attention":
        # Positional: reentrant checkpointing only follows positional inputs.
        return layer(h, **options)
    if sides.documents is not None:
        return sides.documents.run(lambda rows: layer(rows, **options), h)
    if view is not None:
        options["cache_view"] = view
    if sides.active is None:
        return layer(h, **options)
    order = (~sides.active).long().argsort(dim=1, stable=True)
    compacted = h.gather(1, order[..., None].expand_as(h))
    out = layer(compacted, **{**options, "attention_mask": sides.masks[kind].gather(1, order)})
    return out.gather(1, order.argsort(dim=1)[..., None].expand_as(out))
